//! `--query`: what is attached where, since when, and what it has done.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};
use serde::Serialize;

use super::args::Scope;
use super::detach::first_of;
use super::found::{Contents, Found, Held, Kind, Place, find, places};
use super::guard::query::{GUARDS, look as look_for_guards};
use super::instance_clock::InstanceClock;
use super::told::RISK;
use crate::counters::Counters;
use crate::events::show::totals_line;
use crate::hooks::egress::{Stamp, stamps};
use crate::hooks::loaded::Programs;
use crate::hooks::netlink::{Link, Netlink};
use crate::note::quoted;
use crate::policy::running::{self, Outline};
use crate::privileges;
use crate::state::Instance;

const STAMPS: Kind = Kind { record: "hook", command: "netoken", risk: RISK };

/// The counters of one instance, as `--json` prints them.
#[derive(Serialize)]
#[serde(tag = "type", rename = "counters")]
struct InstanceCounters<'a> {
    instance: &'a str,
    #[serde(flatten)]
    counters: &'a Counters,
}

/// What is read of an instance.
struct Read {
    counters: Counters,
    /// Where it cannot be read, the rest is as good.
    policy: Result<Option<Outline>>,
    clock: Option<InstanceClock>,
}

pub(super) fn run(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    let look = |netlink: &mut Netlink, link: &Link, programs: &Programs| {
        Ok(stamps(netlink, link.index, programs)?.into_iter().map(place).collect())
    };
    let (found, Contents { held, failed, .. }) = find(scope, &STAMPS, look, |_| true, read)?;
    let guards = guards(scope, &found, &held).unwrap_or_default();
    if found.hooks.is_empty() {
        nothing(scope, &found, guards.as_deref())?;
    } else if let Some(guards) = guards.filter(|_| !scope.json) {
        note!("{guards}");
    }
    let printed = print(scope, &found, &held).context("writing to standard output");
    first_of(failed).and(printed)
}

fn place(stamp: Stamp) -> Place {
    Place {
        hook: stamp.hook.name(),
        program: stamp.program,
        loaded: stamp.loaded,
        filter: stamp.filter,
        filters_before: stamp.before,
        tcx_before: stamp.tcx_before,
        to_the_front: stamp.hook.to_the_front(),
        remark: None,
    }
}

fn read(instance: &Instance) -> Result<Read> {
    let maps = instance.maps()?;
    let clock = InstanceClock::read(instance, &maps.keys, &maps.clock)?;
    Ok(Read { counters: Counters::read(&maps)?, policy: running::outline(instance, &maps), clock })
}

/// Where there are guards of instances of which no filter was found, and what shows more of them; nothing if there are none.
fn guards(scope: &Scope, found: &Found, held: &[Held<Read>]) -> Result<Option<String>> {
    if !found.hooks.is_empty() && held.iter().all(|held| held.is_attached) {
        return Ok(None);
    }
    let places = places(scope, &GUARDS, look_for_guards, |instance| !found.has_hook_of(instance))?;
    if places.is_empty() {
        return Ok(None);
    }
    let mut command = "netoken guard".to_string();
    scope.ifaces.iter().for_each(|iface| command.push_str(&format!(" --iface {}", quoted(iface))));
    if let Some(netns) = &scope.netns {
        command.push_str(&format!(" --netns {}", quoted(netns)));
    }
    if scope.is_one_instance {
        command.push_str(&format!(" --instance {}", quoted(&scope.instance)));
    }
    Ok(Some(format!("guards are attached to {}: {command} --query", places.join(", "))))
}

fn nothing(scope: &Scope, found: &Found, guards: Option<&str>) -> Result<()> {
    if !scope.ifaces.is_empty() {
        let guards = guards.map_or(String::new(), |guards| format!("\n{guards}"));
        bail!(
            "looking for filters of ours on {0}{2}: there are none; attach one with: netoken {1} --attach{guards}",
            scope.ifaces.join(", "),
            scope.flags(&scope.ifaces[0]),
            if scope.is_one_instance {
                format!(" with instance '{}'", scope.instance)
            } else {
                String::new()
            }
        );
    }
    if scope.is_one_instance && !found.has_instance(&scope.instance, |_| true) {
        bail!(
            "looking for instance '{}': there is none; netoken --query lists all, and netoken {} --attach makes it",
            scope.instance,
            scope.flags("NAME")
        );
    }
    match guards {
        _ if scope.json => {}
        Some(guards) => note!("netoken stamps on no interface; {guards}"),
        None => note!("netoken is not attached to any interface"),
    }
    Ok(())
}

fn print(scope: &Scope, found: &Found, all: &[Held<Read>]) -> Result<()> {
    let mut out = io::stdout().lock();
    if scope.json {
        found.hooks.iter().try_for_each(|hook| print_json(&mut out, hook))?;
    } else if !found.hooks.is_empty() {
        found.table(&mut out, &STAMPS)?;
    }
    for (at, Held { instance, is_attached, held: Read { counters, policy, clock } }) in all.iter().enumerate()
    {
        if scope.json {
            print_json(&mut out, &InstanceCounters { instance, counters })?;
        } else {
            if at > 0 || !found.hooks.is_empty() {
                writeln!(out)?;
            }
            let here = if *is_attached { "" } else { ", no filter here" };
            writeln!(out, "instance '{instance}'{here}: {}", totals_line(counters, 0))?;
        }
        match policy {
            Ok(Some(policy)) if scope.json => print_json(&mut out, policy)?,
            Ok(Some(policy)) => writeln!(out, "  policy: {policy}")?,
            Ok(None) if scope.json => {}
            Ok(None) => writeln!(out, "  policy: none")?,
            Err(error) => note!("netoken: {error:#}"),
        }
        clock.as_ref().map_or(Ok(()), |clock| clock.print(&mut out, scope.json))?;
    }
    Ok(())
}

fn print_json(out: &mut impl Write, record: &impl Serialize) -> Result<()> {
    Ok(writeln!(out, "{}", serde_json::to_string(record)?)?)
}
