//! `--query`: what is attached where, since when, and what it has done.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::args::Scope;
use crate::clock::{self, Source};
use crate::counters::Counters;
use crate::events::model::since_epoch;
use crate::events::show::totals_line;
use crate::hooks::clsact::{Attached, attached, loaded_programs};
use crate::hooks::netlink::{Netlink, Side};
use crate::kernel::Kernel;
use crate::netns::Netns;
use crate::privileges;
use crate::program::Maps;
use crate::state::State;

/// One filter of ours, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "hook")]
struct Hook {
    /// Name of the network namespace; empty for the one that the command ran in.
    netns: String,
    interface: String,
    hook: &'static str,
    program: u32,
    handle: u32,
    priority: u16,
    /// None if the pins of its instance are gone.
    instance: Option<String>,
    /// When its program was loaded, RFC 3339 in UTC with seconds.
    since: String,
    /// Foreign filters that see a packet first and may end its way.
    filters_before: usize,
}

/// The counters of one instance, as `--json` prints them.
#[derive(Serialize)]
#[serde(tag = "type", rename = "counters")]
struct InstanceCounters<'a> {
    instance: &'a str,
    #[serde(flatten)]
    counters: Counters,
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

pub(super) fn run(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    let Some(state) = State::find()? else {
        check_names(scope)?;
        return nothing(scope);
    };
    let hooks = find(scope, &state)?;
    if hooks.is_empty() {
        return nothing(scope);
    }
    let instances = instances(&state, &hooks)?;
    print(scope, &hooks, instances).context("writing to standard output")
}

/// The maps and counters of every instance that has a hook, by its name.
fn instances<'a>(state: &State, hooks: &'a [Hook]) -> Result<BTreeMap<&'a str, (Maps, Counters)>> {
    let names: BTreeSet<&str> = hooks.iter().filter_map(|hook| hook.instance.as_deref()).collect();
    let open = |name| {
        let maps = state.instance(name).maps()?;
        let counters = Counters::read(&maps)?;
        Ok((name, (maps, counters)))
    };
    names.into_iter().map(open).collect()
}

/// A wrong name is an error also where nothing can be attached.
fn check_names(scope: &Scope) -> Result<()> {
    scope.find(&Netlink::connect()?.links()?).map(drop)
}

fn nothing(scope: &Scope) -> Result<()> {
    if !scope.ifaces.is_empty() {
        bail!(
            "looking for filters of ours on {0}: there are none; attach one with: netoken {1} --attach",
            scope.ifaces.join(", "),
            scope.flags(&scope.ifaces[0])
        );
    }
    if !scope.json {
        note!("netoken is not attached to any interface");
    }
    Ok(())
}

fn find(scope: &Scope, state: &State) -> Result<Vec<Hook>> {
    // With an interface or a namespace that was named, only there; else everywhere that has a name.
    let places = match scope.ifaces.is_empty() && scope.netns.is_none() {
        true => Netns::all()?,
        false => vec![Netns::current()?],
    };
    let programs = loaded_programs(state)?;
    let boot =
        SystemTime::now() - clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let named = scope.netns.as_deref().unwrap_or_default();

    let mut hooks = Vec::new();
    for netns in places {
        let name = if netns.name.is_empty() { named.to_string() } else { netns.name.clone() };
        hooks.extend(netns.run(|| {
            let mut netlink = Netlink::connect()?;
            let mut links = netlink.links()?;
            if !scope.ifaces.is_empty() {
                links = scope.find(&links)?;
            }
            let mut found = Vec::new();
            for link in links {
                for ours in attached(&mut netlink, link.index, Side::Egress, &programs)? {
                    found.push(hook(&name, &link.name, ours, boot));
                }
            }
            Ok(found)
        })?);
    }
    Ok(hooks)
}

fn hook(netns: &str, interface: &str, ours: Attached, boot: SystemTime) -> Hook {
    Hook {
        netns: netns.to_string(),
        interface: interface.to_string(),
        hook: "clsact egress",
        program: ours.program,
        handle: ours.filter.handle,
        priority: ours.filter.priority,
        instance: ours.loaded.instance,
        since: humantime::format_rfc3339_seconds(since_epoch(boot + ours.loaded.loaded_at)).to_string(),
        filters_before: ours.before,
    }
}

fn print(scope: &Scope, hooks: &[Hook], instances: BTreeMap<&str, (Maps, Counters)>) -> Result<()> {
    let mut out = io::stdout().lock();
    if scope.json {
        for hook in hooks {
            writeln!(out, "{}", serde_json::to_string(hook)?)?;
        }
    } else {
        table(&mut out, hooks)?;
    }
    if !scope.json && !instances.is_empty() {
        writeln!(out)?;
    }
    for (instance, (maps, counters)) in instances {
        if scope.json {
            writeln!(out, "{}", serde_json::to_string(&InstanceCounters { instance, counters })?)?;
        } else {
            writeln!(out, "instance '{instance}': {}", totals_line(&counters, 0))?;
        }
        // Of no interest where no token is keyed.
        if maps.keys.any()? {
            print_clock(&mut out, scope, instance, &maps)?;
        }
    }
    Ok(())
}

fn print_clock(out: &mut impl Write, scope: &Scope, instance: &str, maps: &Maps) -> Result<()> {
    let published = clock::published(&maps.clock)?;
    let source = Source::choose(&Kernel::probe());
    let unix = clock::as_seen(&published, source)?;
    let slot_s = published.slot_ns / 1_000_000_000;
    let slot = unix.as_secs().checked_div(slot_s).unwrap_or_default();
    if scope.json {
        let record = InstanceClock { instance, source, unix_s: unix.as_secs(), slot_s, slot };
        return Ok(writeln!(out, "{}", serde_json::to_string(&record)?)?);
    }
    let time = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + unix);
    writeln!(
        out,
        "instance '{instance}': keyed tokens go by {}, which makes it {time}: slot {slot} of {slot_s} s",
        source.name()
    )?;
    Ok(())
}

fn table(out: &mut impl Write, hooks: &[Hook]) -> Result<()> {
    let heads = ["NETNS", "INTERFACE", "HOOK", "PROGRAM", "HANDLE", "PRIORITY", "INSTANCE", "SINCE (UTC)"];
    let rows: Vec<_> = hooks
        .iter()
        .map(|hook| {
            [
                if hook.netns.is_empty() { "-".to_string() } else { hook.netns.clone() },
                hook.interface.clone(),
                hook.hook.to_string(),
                hook.program.to_string(),
                format!("{:#x}", hook.handle),
                hook.priority.to_string(),
                hook.instance.clone().unwrap_or("(pins lost)".to_string()),
                hook.since.clone(),
            ]
        })
        .collect();
    super::table::table(out, heads, &rows)?;
    for hook in hooks.iter().filter(|hook| hook.filters_before > 0) {
        let place = match hook.netns.is_empty() {
            true => hook.interface.clone(),
            false => format!("{} in {}", hook.interface, hook.netns),
        };
        let others = match hook.filters_before {
            1 => "another filter runs".to_string(),
            n => format!("{n} other filters run"),
        };
        writeln!(out, "{place}: {others} before ours and may end a packet's way there")?;
    }
    Ok(())
}
