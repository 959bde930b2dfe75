//! `--detach` and `--destroy`: remove what is ours, and say what stays and why.

use std::collections::HashSet;
use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::Scope;
use crate::events::columns::Patient;
use crate::events::watch::Left;
use crate::hooks::egress::Egress;
use crate::hooks::netlink::{Link, Netlink};
use crate::hooks::qdisc::Qdisc;
use crate::hooks::tcx;
use crate::hooks::unused::{Lost, remove_unused, used_where};
use crate::netns::Netns;
use crate::privileges;
use crate::state::{Lock, State};

/// What was done on one interface.
#[derive(Serialize)]
#[serde(tag = "type", rename = "removed")]
struct Removed {
    interface: String,
    /// The network namespace that it has moved to, if it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    netns: Option<String>,
    /// How many filters of ours were removed.
    filters: usize,
    /// Only with `--destroy`: what became of the clsact qdisc.
    #[serde(flatten)]
    qdisc: Option<Qdisc>,
}

pub(super) fn run(scope: &Scope, destroy: bool) -> Result<()> {
    let all = scope.ifaces.is_empty();
    let what = if all { "all interfaces".to_string() } else { scope.ifaces.join(", ") };
    privileges::check(&format!("detaching from {what}"))?;
    let targets = scope.find_or_all(Netlink::connect()?.links()?)?;
    // Also where there is no state: a filter whose state was lost is known by its program.
    let (state, lock) = State::create()?;
    let targets = targets.into_iter().map(Target::here).collect();
    remove_from(scope, &state, lock, targets, destroy, all, &mut io::stdout().lock())
}

/// An interface, and its network namespace if that is another one.
struct Target {
    netns: Option<Netns>,
    link: Link,
}

impl Target {
    fn here(link: Link) -> Target {
        Target { netns: None, link }
    }
}

/// Removes what a stream leaves, wherever it is by now, and tells.
pub(super) fn remove(scope: &Scope, left: &Left, state: &State, lock: Lock) -> Result<()> {
    if left.is_replaced_by(&state.instance(&scope.instance)) {
        note!("instance '{}' was destroyed meanwhile; what is attached now stays", scope.instance);
        return Ok(());
    }
    // A name may be another one since the last look.
    let present = Netlink::connect()?.links()?;
    let here = |index: u32| present.iter().find(|link| link.index == index);
    let (mut targets, mut elsewhere) = (Vec::new(), left.moved.clone());
    for watched in &left.links {
        match here(watched.link.index) {
            Some(link) => targets.push(Target::here(link.clone())),
            None => elsewhere.extend(watched.at_tcx),
        }
    }
    let moved = elsewhere.into_iter().filter_map(tcx::whereabouts);
    targets.extend(moved.map(|(netns, link)| Target { netns: Some(netns), link }));
    // Signals are handled, so one that waited for a reader who has stopped would wait for ever.
    let mut out = Patient::stdout(Arc::new(AtomicBool::new(true))).context("preparing standard output")?;
    remove_from(scope, state, lock, targets, true, false, &mut out)
}

/// Does everything first, and then tells: that nobody can be told must not leave anything behind. What was done is told
/// before what failed.
fn remove_from(
    scope: &Scope,
    state: &State,
    lock: Lock,
    targets: Vec<Target>,
    destroy: bool,
    only_news: bool,
    out: &mut dyn Write,
) -> Result<()> {
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let had_state = state.instance(&scope.instance).exists();
    let lost = Lost::now(state);
    for target in targets {
        let removed = match &target.netns {
            None => take_away(scope, state, &lock, &target, destroy),
            Some(netns) => netns.run(|| take_away(scope, state, &lock, &target, destroy)),
        };
        match removed {
            Ok(removed) => done.push(removed),
            // That one stays is no reason for the others to stay.
            Err(error) => failed.push(error),
        }
    }
    if only_news {
        done.retain(|removed| removed.filters > 0 || removed.qdisc == Some(Qdisc::Removed));
    }
    let unused = match destroy {
        true => lost.and_then(|lost| remove_unused(state, &lock, &scope.instance, &lost)),
        false => Ok(HashSet::new()),
    };
    let users = unused.unwrap_or_else(|error| {
        failed.push(error);
        HashSet::new()
    });
    failed.extend(state.remove_if_empty(lock).err());

    let told = tell(scope, &done, out).context("writing to standard output");
    if done.is_empty() && failed.is_empty() && only_news && !scope.json {
        let also = if had_state && users.is_empty() { "; its policy and counters are removed" } else { "" };
        note!("instance '{}' is not attached to any interface here{also}", scope.instance);
    }
    if !users.is_empty() {
        note!(
            "instance '{}' is still used {}: its policy and counters stay",
            scope.instance,
            used_where(&users, false)
        );
    }
    first_of(failed).and(told)
}

/// The first of what failed; the rest is told.
pub(super) fn first_of(failed: Vec<anyhow::Error>) -> Result<()> {
    let mut failed = failed.into_iter();
    let first = failed.next();
    failed.for_each(|error| note!("netoken: {error:#}"));
    first.map_or(Ok(()), Err)
}

/// In the network namespace of the calling thread.
fn take_away(scope: &Scope, state: &State, lock: &Lock, target: &Target, destroy: bool) -> Result<Removed> {
    let mut hooks = Egress::open(state)?;
    let filters = hooks.detach(lock, &target.link, &scope.instance)?;
    let qdisc = if destroy { Some(hooks.destroy_clsact(lock, &target.link)?) } else { None };
    let netns = target.netns.as_ref().map(Netns::called);
    Ok(Removed { interface: target.link.name.clone(), netns, filters, qdisc })
}

fn tell(scope: &Scope, done: &[Removed], out: &mut dyn Write) -> Result<()> {
    for removed in done {
        if scope.json {
            writeln!(out, "{}", serde_json::to_string(removed)?)?;
            continue;
        }
        let filter = match removed.filters {
            0 => "netoken was not attached".to_string(),
            1 => "filter removed".to_string(),
            n => format!("{n} filters removed"),
        };
        let netns =
            removed.netns.as_ref().map_or(String::new(), |netns| format!(" in network namespace {netns}"));
        note!("{}{netns}: {filter}{}", removed.interface, Qdisc::as_clause(removed.qdisc));
    }
    Ok(out.flush()?)
}
