//! `netoken guard --query`: where the guard is attached, and what it has counted.

use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};

use super::{Record, hook_name, print_counters, print_json};
use crate::cli::args::Scope;
use crate::cli::blocked::print_blocked;
use crate::cli::outdated::advice;
use crate::cli::table::table;
use crate::guard::counters::GuardCounters;
use crate::guard::program::GuardMaps;
use crate::hooks::clsact::attached;
use crate::hooks::loaded::{Loaded, loaded_programs};
use crate::hooks::netlink::{Netlink, Side};
use crate::hooks::xdp::attached_xdp;
use crate::netns::Netns;
use crate::privileges;
use crate::state::State;

/// One program of ours on an interface.
struct Hook {
    netns: String,
    netns_inode: u32,
    interface: String,
    hook: &'static str,
    program: u32,
    loaded: Loaded,
    filters_before: usize,
}

fn find(scope: &Scope, state: &State) -> Result<Vec<Hook>> {
    let places = match scope.ifaces.is_empty() && scope.netns.is_none() {
        true => Netns::all()?,
        false => vec![Netns::current()?],
    };
    let programs = loaded_programs(state)?;
    let named = scope.netns.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    for netns in places {
        let name = if netns.name.is_empty() { named.to_string() } else { netns.name.clone() };
        let netns_inode = netns.inode();
        netns.run(|| {
            let mut netlink = Netlink::connect()?;
            let mut links = netlink.links()?;
            if !scope.ifaces.is_empty() {
                links = scope.find(&links)?;
            }
            for link in links {
                let mut push = |hook, program, loaded, filters_before| {
                    let (netns, interface) = (name.clone(), link.name.clone());
                    found.push(Hook { netns, netns_inode, interface, hook, program, loaded, filters_before });
                };
                if let Some(ours) = attached_xdp(link.index, &programs)? {
                    push(hook_name(ours.mode), ours.program, ours.loaded, 0);
                }
                for ours in attached(&mut netlink, link.index, Side::Ingress, &programs)? {
                    push("clsact ingress", ours.program, ours.loaded, ours.before);
                }
            }
            Ok(())
        })?;
    }
    Ok(found)
}

pub(super) fn query(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    let state = State::find()?;
    let hooks = match &state {
        Some(state) => find(scope, state)?,
        None => scope.find(&Netlink::connect()?.links()?).map(|_| Vec::new())?,
    };
    let (Some(state), false) = (&state, hooks.is_empty()) else {
        if !scope.ifaces.is_empty() {
            bail!(
                "looking for the guard on {0}: it is not there; attach it with: netoken guard {1} --attach --rules FILE",
                scope.ifaces.join(", "),
                scope.flags(&scope.ifaces[0])
            );
        }
        if !scope.json {
            note!("the guard is not attached to any interface");
        }
        return Ok(());
    };
    let boot =
        SystemTime::now() - clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let since = |hook: &Hook| humantime::format_rfc3339_seconds(boot + hook.loaded.loaded_at).to_string();
    if scope.json {
        for hook in &hooks {
            print_json(&Record::GuardHook {
                netns: &hook.netns,
                netns_inode: hook.netns_inode,
                interface: &hook.interface,
                hook: hook.hook,
                program: hook.program,
                instance: hook.loaded.instance.as_deref(),
                since: since(hook),
                filters_before: hook.filters_before,
                outdated: hook.loaded.is_outdated,
            })?;
        }
    } else {
        let heads = ["NETNS", "INTERFACE", "HOOK", "PROGRAM", "INSTANCE", "SINCE (UTC)"];
        let rows: Vec<_> = hooks
            .iter()
            .map(|hook| {
                [
                    if hook.netns.is_empty() { "-".to_string() } else { hook.netns.clone() },
                    hook.interface.clone(),
                    hook.hook.to_string(),
                    hook.program.to_string(),
                    hook.loaded.instance.clone().unwrap_or("(pins lost)".to_string()),
                    since(hook),
                ]
            })
            .collect();
        let mut out = io::stdout().lock();
        table(&mut out, heads, &rows).context("writing to standard output")?;
        for hook in hooks.iter().filter(|hook| hook.loaded.is_outdated) {
            let instance = hook.loaded.instance.as_deref();
            writeln!(out, "{}", advice("netoken guard", &hook.interface, &hook.netns, instance))?;
        }
        for hook in hooks.iter().filter(|hook| hook.filters_before > 0) {
            writeln!(
                out,
                "{}: {} other filters run before the guard and may let packets pass it by",
                hook.interface, hook.filters_before
            )?;
        }
        writeln!(out)?;
    }
    let mut instances: Vec<&str> = hooks.iter().filter_map(|hook| hook.loaded.instance.as_deref()).collect();
    instances.sort_unstable();
    instances.dedup();
    for instance in instances {
        let maps = GuardMaps::open(&state.instance(instance).pins)?;
        print_counters(scope, instance, &GuardCounters::read(&maps)?, None)?;
        print_blocked(scope.json, instance, &maps)?;
    }
    Ok(())
}
