//! `--query`: what is attached where, since when, and what it has done.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::ops::Not;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use serde::{Serialize, Serializer};

use super::args::Scope;
use super::told::{RISK, Remarks, Told};
use crate::clock::{self, Source};
use crate::counters::Counters;
use crate::events::model::since_epoch;
use crate::events::show::totals_line;
use crate::hooks::egress::{self, Stamp, stamps};
use crate::hooks::loaded::loaded_by;
use crate::hooks::netlink::Netlink;
use crate::kernel::Kernel;
use crate::netns::{Netns, look_into};
use crate::policy::running::{self, Outline};
use crate::privileges;
use crate::program::Maps;
use crate::state::{Instance, State};

/// One filter of ours, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "hook")]
struct Hook {
    /// Name of the network namespace; empty for the one that the command ran in.
    netns: String,
    netns_inode: u32,
    interface: String,
    #[serde(serialize_with = "hook_name")]
    hook: egress::Hook,
    program: u32,
    /// None at tcx.
    handle: Option<u32>,
    priority: Option<u16>,
    /// None if the pins of its instance are gone.
    instance: Option<String>,
    /// When its program was loaded, RFC 3339 in UTC with seconds.
    since: String,
    /// Foreign filters that see a packet first and may end its way.
    filters_before: usize,
    /// Programs at tcx, in front of all filters.
    tcx_before: usize,
    /// Only if it is so: another version of netoken has loaded it, and no command changes what it goes by.
    #[serde(skip_serializing_if = "Not::not")]
    outdated: bool,
    /// What its program was told; nothing if another version of netoken has loaded it.
    #[serde(flatten)]
    told: Option<Told>,
}

fn hook_name<S: Serializer>(hook: &egress::Hook, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(hook.name())
}

/// The counters of one instance, as `--json` prints them.
#[derive(Serialize)]
#[serde(tag = "type", rename = "counters")]
struct InstanceCounters<'a> {
    instance: &'a str,
    #[serde(flatten)]
    counters: &'a Counters,
}

/// The wall clock of an instance's keyed tokens, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "clock")]
struct InstanceClock<'a> {
    instance: &'a str,
    source: Source,
    /// Unix time as the classifier sees it.
    unix_s: u64,
    slot_s: u64,
    slot: u64,
}

/// An instance and what it holds.
struct Held {
    name: String,
    /// A filter of it was found.
    is_attached: bool,
    maps: Maps,
    counters: Counters,
    /// Where it cannot be read, the rest is as good.
    policy: Result<Option<Outline>>,
}

pub(super) fn run(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    // Also without any: what was attached goes on when its state is lost.
    let state = State::find()?;
    let instances = state.as_ref().map_or(Vec::new(), State::instances);
    let hooks = find(scope, &instances)?;
    let held = match held(scope, instances, &hooks) {
        Ok(held) => held,
        Err(error) => {
            print(scope, &hooks, &[]).context("writing to standard output")?;
            return Err(error);
        }
    };
    if hooks.is_empty() {
        nothing(scope, &held)?;
    }
    print(scope, &hooks, &held).context("writing to standard output")
}

/// Every instance that has a hook and, unless an interface was named, those that have none.
fn held(scope: &Scope, instances: Vec<Instance>, hooks: &[Hook]) -> Result<Vec<Held>> {
    let attached: BTreeSet<&str> = hooks.iter().filter_map(|hook| hook.instance.as_deref()).collect();
    let mut held = Vec::new();
    for instance in instances {
        let is_attached = attached.contains(&*instance.name);
        if !is_attached && (!scope.ifaces.is_empty() || !scope.wants(Some(&instance.name))) {
            continue;
        }
        match hold(&instance, is_attached) {
            Ok(one) => held.push(one),
            Err(error) if is_attached => return Err(error),
            // It may have been removed meanwhile; an attach that was killed leaves one without all of its maps.
            Err(error) if instance.pins.exists() => note!(
                "netoken: {error:#}; nothing is attached with it here, and the next --attach or --destroy mends it"
            ),
            Err(_) => {}
        }
    }
    Ok(held)
}

fn hold(instance: &Instance, is_attached: bool) -> Result<Held> {
    let maps = instance.maps()?;
    let counters = Counters::read(&maps)?;
    let policy = running::outline(instance, &maps);
    Ok(Held { name: instance.name.clone(), is_attached, maps, counters, policy })
}

fn nothing(scope: &Scope, held: &[Held]) -> Result<()> {
    if !scope.ifaces.is_empty() {
        bail!(
            "looking for filters of ours on {0}{2}: there are none; attach one with: netoken {1} --attach",
            scope.ifaces.join(", "),
            scope.flags(&scope.ifaces[0]),
            if scope.is_one_instance {
                format!(" with instance '{}'", scope.instance)
            } else {
                String::new()
            }
        );
    }
    if scope.is_one_instance && held.is_empty() {
        bail!(
            "looking for instance '{}': there is none; netoken --query lists all, and netoken {} --attach makes it",
            scope.instance,
            scope.flags("NAME")
        );
    }
    if !scope.json {
        note!("netoken is not attached to any interface");
    }
    Ok(())
}

fn find(scope: &Scope, instances: &[Instance]) -> Result<Vec<Hook>> {
    // With an interface or a namespace that was named, only there; else everywhere that has a name.
    let places = match scope.ifaces.is_empty() && scope.netns.is_none() {
        true => Netns::all()?,
        false => vec![Netns::current()?],
    };
    let programs = loaded_by(instances)?;
    let boot =
        SystemTime::now() - clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let named = scope.netns.as_deref().unwrap_or_default();

    look_into(&places, |netns| {
        let name = if netns.name.is_empty() { named } else { &netns.name };
        let mut netlink = Netlink::connect()?;
        let links = scope.find_or_all(netlink.links()?)?;
        let mut found = Vec::new();
        for link in links {
            let mut ours = stamps(&mut netlink, link.index, &programs)?;
            ours.retain(|ours| scope.wants(ours.loaded.instance.as_deref()));
            found.extend(ours.into_iter().map(|ours| hook(name, netns.inode(), &link.name, ours, boot)));
        }
        Ok(found)
    })
}

fn hook(netns: &str, netns_inode: u32, interface: &str, ours: Stamp, boot: SystemTime) -> Hook {
    Hook {
        netns: netns.to_string(),
        netns_inode,
        told: Told::of(&ours.loaded),
        interface: interface.to_string(),
        hook: ours.hook,
        program: ours.program,
        handle: ours.filter.as_ref().map(|filter| filter.handle),
        priority: ours.filter.as_ref().map(|filter| filter.priority),
        outdated: ours.loaded.is_outdated,
        instance: ours.loaded.instance,
        since: humantime::format_rfc3339_seconds(since_epoch(boot + ours.loaded.loaded_at)).to_string(),
        filters_before: ours.before,
        tcx_before: ours.tcx_before,
    }
}

fn print(scope: &Scope, hooks: &[Hook], held: &[Held]) -> Result<()> {
    let mut out = io::stdout().lock();
    if scope.json {
        hooks.iter().try_for_each(|hook| print_json(&mut out, hook))?;
    } else if !hooks.is_empty() {
        table(&mut out, hooks)?;
    }
    for (at, held) in held.iter().enumerate() {
        let Held { name: instance, is_attached, maps, counters, policy } = held;
        if scope.json {
            print_json(&mut out, &InstanceCounters { instance, counters })?;
        } else {
            if at > 0 || !hooks.is_empty() {
                writeln!(out)?;
            }
            let found = if *is_attached { "" } else { ", no filter here" };
            writeln!(out, "instance '{instance}'{found}: {}", totals_line(counters, 0))?;
        }
        match policy {
            Ok(Some(policy)) if scope.json => print_json(&mut out, policy)?,
            Ok(Some(policy)) => writeln!(out, "  policy: {policy}")?,
            Ok(None) if scope.json => {}
            Ok(None) => writeln!(out, "  policy: none")?,
            Err(error) => note!("netoken: {error:#}"),
        }
        // Of no interest where no token is keyed.
        if maps.keys.any()? {
            print_clock(&mut out, scope, instance, maps)?;
        }
    }
    Ok(())
}

fn print_json(out: &mut impl Write, record: &impl Serialize) -> Result<()> {
    Ok(writeln!(out, "{}", serde_json::to_string(record)?)?)
}

fn print_clock(out: &mut impl Write, scope: &Scope, instance: &str, maps: &Maps) -> Result<()> {
    let published = clock::published(&maps.clock)?;
    let source = Source::choose(Kernel::probe());
    let unix = clock::as_seen(&published, source)?;
    let slot_s = published.slot_ns / 1_000_000_000;
    let slot = unix.as_secs().checked_div(slot_s).unwrap_or_default();
    if scope.json {
        let record = InstanceClock { instance, source, unix_s: unix.as_secs(), slot_s, slot };
        return print_json(out, &record);
    }
    let time = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + unix);
    writeln!(
        out,
        "  keyed tokens go by {}, which makes it {time}: slot {slot} of {slot_s} s",
        source.name()
    )?;
    Ok(())
}

fn table(out: &mut impl Write, hooks: &[Hook]) -> Result<()> {
    let heads = ["NETNS", "INTERFACE", "HOOK", "PROGRAM", "HANDLE", "PRIORITY", "INSTANCE", "SINCE (UTC)"];
    let none = || "-".to_string();
    let rows: Vec<_> = hooks
        .iter()
        .map(|hook| {
            [
                if hook.netns.is_empty() { none() } else { hook.netns.clone() },
                hook.interface.clone(),
                hook.hook.name().to_string(),
                hook.program.to_string(),
                hook.handle.map_or_else(none, |handle| format!("{handle:#x}")),
                hook.priority.map_or_else(none, |priority| priority.to_string()),
                hook.instance.clone().unwrap_or("(pins lost)".to_string()),
                hook.since.clone(),
            ]
        })
        .collect();
    super::table::table(out, heads, &rows)?;
    hooks.iter().try_for_each(|hook| {
        let remarks = Remarks {
            command: "netoken",
            netns: &hook.netns,
            interface: &hook.interface,
            instance: hook.instance.as_deref(),
            told: hook.told.as_ref(),
            outdated: hook.outdated,
            filters_before: hook.filters_before,
            tcx_before: hook.tcx_before,
            risk: RISK,
            to_the_front: hook.hook.to_the_front(),
        };
        remarks.write(out)
    })?;
    Ok(())
}
