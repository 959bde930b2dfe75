//! `netoken guard --query`: where the guard is attached, and what it has counted.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};

use super::{RISK, Record, TO_THE_FRONT, hook_name, print_counters, print_json};
use crate::cli::args::Scope;
use crate::cli::blocked::print_blocked;
use crate::cli::table::table;
use crate::cli::told::{Remarks, Told};
use crate::events::model::since_epoch;
use crate::guard::counters::GuardCounters;
use crate::guard::program::GuardMaps;
use crate::hooks::clsact::attached;
use crate::hooks::loaded::{Loaded, loaded_by};
use crate::hooks::netlink::{Filter, Netlink, Side};
use crate::hooks::xdp::attached_xdp;
use crate::netns::{Netns, look_into};
use crate::privileges;
use crate::state::{Instance, State};

/// One program of ours on an interface.
struct Hook {
    netns: String,
    netns_inode: u32,
    interface: String,
    hook: &'static str,
    program: u32,
    loaded: Loaded,
    told: Option<Told>,
    /// Where it stands at TC; at XDP there is but one place.
    filter: Option<Filter>,
    filters_before: usize,
    tcx_before: usize,
}

fn find(scope: &Scope, instances: &[Instance]) -> Result<Vec<Hook>> {
    let places = match scope.ifaces.is_empty() && scope.netns.is_none() {
        true => Netns::all()?,
        false => vec![Netns::current()?],
    };
    let programs = loaded_by(instances)?;
    let named = scope.netns.as_deref().unwrap_or_default();
    look_into(&places, |netns| {
        let name = if netns.name.is_empty() { named } else { &netns.name };
        let netns_inode = netns.inode();
        let mut netlink = Netlink::connect()?;
        let links = scope.find_or_all(netlink.links()?)?;
        let mut found = Vec::new();
        for link in links {
            let mut push = |hook, program, loaded: Loaded, filter, filters_before, tcx_before| {
                let (netns, interface) = (name.to_string(), link.name.clone());
                let told = Told::of(&loaded);
                let hook = Hook {
                    netns,
                    netns_inode,
                    interface,
                    hook,
                    program,
                    loaded,
                    told,
                    filter,
                    filters_before,
                    tcx_before,
                };
                if scope.wants(hook.loaded.instance.as_deref()) {
                    found.push(hook);
                }
            };
            if let Some(ours) = attached_xdp(link.index, &programs)? {
                push(hook_name(ours.mode), ours.program, ours.loaded, None, 0, 0);
            }
            for ours in attached(&mut netlink, link.index, Side::Ingress, &programs)? {
                push(
                    "clsact ingress",
                    ours.program,
                    ours.loaded,
                    Some(ours.filter),
                    ours.before,
                    ours.tcx_before,
                );
            }
        }
        Ok(found)
    })
}

pub(super) fn query(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    // Also without any: what was attached goes on when its state is lost.
    let state = State::find()?;
    let all = state.as_ref().map_or(Vec::new(), State::instances);
    let hooks = find(scope, &all)?;
    let instances = instances(scope, all, &hooks);
    if hooks.is_empty() {
        if !scope.ifaces.is_empty() {
            bail!(
                "looking for the guard on {0}: it is not there; attach it with: netoken guard {1} --attach --rules FILE",
                scope.ifaces.join(", "),
                scope.flags(&scope.ifaces[0])
            );
        }
        if scope.is_one_instance && instances.is_empty() {
            bail!(
                "looking for the guard of instance '{}': there is none; netoken guard --query lists all, and netoken \
                 guard {} --attach --rules FILE makes it",
                scope.instance,
                scope.flags("NAME")
            );
        }
        if !scope.json {
            note!("the guard is not attached to any interface");
        }
    } else if scope.json {
        hooks.iter().try_for_each(print_hook)?;
    } else {
        print_hooks(&hooks).context("writing to standard output")?;
    }
    for (at, instance) in instances.iter().enumerate() {
        let is_attached =
            hooks.iter().any(|hook| hook.loaded.instance.as_deref() == Some(instance.name.as_str()));
        let maps = match GuardMaps::open(&instance.pins) {
            // An attach that was killed leaves an instance without all of its maps.
            Err(error) if !is_attached => {
                note!(
                    "netoken: {error:#}; nothing is attached with it here, and the next --attach or --destroy mends it"
                );
                continue;
            }
            maps => maps?,
        };
        if !scope.json && (at > 0 || !hooks.is_empty()) {
            writeln!(io::stdout()).context("writing to standard output")?;
        }
        let found = if is_attached { "" } else { ", not attached here" };
        print_counters(scope, &instance.name, found, &GuardCounters::read(&maps)?)?;
        print_blocked(scope.json, &instance.name, &maps)?;
    }
    Ok(())
}

/// The instances that have a guard: those of the hooks and, unless an interface was named, those that keep rules for the
/// next attach.
fn instances(scope: &Scope, mut found: Vec<Instance>, hooks: &[Hook]) -> Vec<Instance> {
    found.retain(|instance| {
        let is_attached = hooks.iter().any(|hook| hook.loaded.instance.as_deref() == Some(&instance.name));
        let has_rules = || instance.has_guard() && instance.guard_dir.exists();
        is_attached || (scope.ifaces.is_empty() && scope.wants(Some(&instance.name)) && has_rules())
    });
    found
}

fn since(hook: &Hook) -> String {
    let boot =
        SystemTime::now() - clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    humantime::format_rfc3339_seconds(since_epoch(boot + hook.loaded.loaded_at)).to_string()
}

fn print_hook(hook: &Hook) -> Result<()> {
    print_json(&Record::GuardHook {
        netns: &hook.netns,
        netns_inode: hook.netns_inode,
        interface: &hook.interface,
        hook: hook.hook,
        program: hook.program,
        instance: hook.loaded.instance.as_deref(),
        since: since(hook),
        filters_before: hook.filters_before,
        tcx_before: hook.tcx_before,
        handle: hook.filter.as_ref().map(|filter| filter.handle),
        priority: hook.filter.as_ref().map(|filter| filter.priority),
        told: hook.told.as_ref(),
        outdated: hook.loaded.is_outdated,
    })
}

fn print_hooks(hooks: &[Hook]) -> io::Result<()> {
    let heads = ["NETNS", "INTERFACE", "HOOK", "PROGRAM", "HANDLE", "PRIORITY", "INSTANCE", "SINCE (UTC)"];
    let none = || "-".to_string();
    let rows: Vec<_> = hooks
        .iter()
        .map(|hook| {
            [
                if hook.netns.is_empty() { none() } else { hook.netns.clone() },
                hook.interface.clone(),
                hook.hook.to_string(),
                hook.program.to_string(),
                hook.filter.as_ref().map_or_else(none, |filter| format!("{:#x}", filter.handle)),
                hook.filter.as_ref().map_or_else(none, |filter| filter.priority.to_string()),
                hook.loaded.instance.clone().unwrap_or("(pins lost)".to_string()),
                since(hook),
            ]
        })
        .collect();
    let mut out = io::stdout().lock();
    table(&mut out, heads, &rows)?;
    hooks.iter().try_for_each(|hook| {
        let remarks = Remarks {
            command: "netoken guard",
            netns: &hook.netns,
            interface: &hook.interface,
            instance: hook.loaded.instance.as_deref(),
            told: hook.told.as_ref(),
            outdated: hook.loaded.is_outdated,
            filters_before: hook.filters_before,
            tcx_before: hook.tcx_before,
            risk: RISK,
            to_the_front: TO_THE_FRONT,
        };
        remarks.write(&mut out)
    })
}
