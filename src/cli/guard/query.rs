//! `netoken guard --query`: where the guard is attached, and what it has counted.

use std::io::{self, Write};

use anyhow::{Context, Result, bail};

use super::{PASSED_BY, RISK, Record, SEES_IT, TO_THE_FRONT, hook_name, print_json};
use crate::cli::args::Scope;
use crate::cli::blocked::print_blocked;
use crate::cli::detach::first_of;
use crate::cli::found::{Contents, Found, Held, Kind, Place, find};
use crate::cli::instance_clock::InstanceClock;
use crate::guard::blocked::{self, Blocked};
use crate::guard::counters::GuardCounters;
use crate::guard::program::GuardMaps;
use crate::guard::running::{self, Outline};
use crate::hooks::clsact::attached;
use crate::hooks::loaded::Programs;
use crate::hooks::netlink::{Link, Netlink, Side};
use crate::hooks::xdp::attached_xdp;
use crate::privileges;
use crate::state::Instance;

/// What a guard is to who looks for programs.
pub(in crate::cli) const GUARDS: Kind = Kind { record: "guard_hook", command: "netoken guard", risk: RISK };

/// What is read of an instance.
struct Read {
    counters: GuardCounters,
    blocked: Vec<Blocked>,
    /// Where they cannot be read, the rest is as good.
    rules: Result<Option<Outline>>,
    clock: Option<InstanceClock>,
}

pub(super) fn query(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    // Those that keep rules for the next attach.
    let has_rules = |instance: &Instance| instance.has_guard() && instance.guard_dir.exists();
    let (found, Contents { held, failed, .. }) = find(scope, &GUARDS, look, has_rules, read)?;
    if found.hooks.is_empty() {
        nothing(scope, &found, has_rules)?;
    }
    let printed = print(scope, &found, &held).context("writing to standard output");
    first_of(failed).and(printed)
}

/// The guards of an interface.
pub(in crate::cli) fn look(netlink: &mut Netlink, link: &Link, programs: &Programs) -> Result<Vec<Place>> {
    let at_xdp = attached_xdp(link.index, programs)?.map(|ours| Place {
        hook: hook_name(ours.mode),
        program: ours.program,
        loaded: ours.loaded,
        filter: None,
        filters_before: 0,
        tcx_before: 0,
        to_the_front: TO_THE_FRONT,
        remark: (link.kind == "veth").then(|| format!("{PASSED_BY}; {SEES_IT}")),
    });
    let at_tc = attached(netlink, link.index, Side::Ingress, programs)?.into_iter().map(|ours| Place {
        hook: "clsact ingress",
        program: ours.program,
        loaded: ours.loaded,
        filter: Some(ours.filter),
        filters_before: ours.before,
        tcx_before: ours.tcx_before,
        to_the_front: TO_THE_FRONT,
        remark: None,
    });
    Ok(at_xdp.into_iter().chain(at_tc).collect())
}

fn read(instance: &Instance) -> Result<Read> {
    let maps = GuardMaps::open(&instance.pins)
        .with_context(|| format!("opening the guard of instance '{}'", instance.name))?;
    Ok(Read {
        counters: GuardCounters::read(&maps)?,
        blocked: blocked::read(&maps)?,
        rules: running::outline(instance, &maps),
        clock: InstanceClock::read(instance, &maps.keys, &maps.clock)?,
    })
}

fn nothing(scope: &Scope, found: &Found, has_rules: impl Fn(&Instance) -> bool) -> Result<()> {
    if !scope.ifaces.is_empty() {
        bail!(
            "looking for the guard on {0}: it is not there; attach it with: netoken guard {1} --attach --rules FILE",
            scope.ifaces.join(", "),
            scope.flags(&scope.ifaces[0])
        );
    }
    if scope.is_one_instance && !found.has_instance(&scope.instance, has_rules) {
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
    Ok(())
}

fn print(scope: &Scope, found: &Found, all: &[Held<Read>]) -> Result<()> {
    let mut out = io::stdout().lock();
    if scope.json {
        found.hooks.iter().try_for_each(print_json)?;
    } else if !found.hooks.is_empty() {
        found.table(&mut out, &GUARDS)?;
    }
    for (at, Held { instance, is_attached, held }) in all.iter().enumerate() {
        let Read { counters, blocked, rules, clock } = held;
        if scope.json {
            print_json(&Record::GuardCounters { instance, counters, lost: None })?;
        } else {
            if at > 0 || !found.hooks.is_empty() {
                writeln!(out)?;
            }
            let here = if *is_attached { "" } else { ", not attached here" };
            writeln!(out, "instance '{instance}'{here}: {}", counters.line())?;
        }
        match rules {
            Ok(Some(rules)) if scope.json => print_json(&Record::outline(instance, rules))?,
            Ok(Some(rules)) => writeln!(out, "  rules: {rules}")?,
            Ok(None) if scope.json => {}
            Ok(None) => writeln!(out, "  rules: none")?,
            Err(error) => note!("netoken: {error:#}"),
        }
        clock.as_ref().map_or(Ok(()), |clock| clock.print(&mut out, scope.json))?;
        print_blocked(scope.json, instance, blocked)?;
    }
    Ok(())
}
