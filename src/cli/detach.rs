//! `--detach` and `--destroy`: remove what is ours, and say what stays and why.

use std::collections::HashSet;
use std::io::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use super::args::Scope;
use crate::hooks::egress::Egress;
use crate::hooks::netlink::{Link, Netlink};
use crate::hooks::qdisc::Qdisc;
use crate::hooks::unused::{remove_unused, used_where};
use crate::privileges;
use crate::state::State;

/// What was done on one interface.
#[derive(Serialize)]
#[serde(tag = "type", rename = "removed")]
struct Removed {
    interface: String,
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
    let links = Netlink::connect()?.links()?;
    let targets = if all { links } else { scope.find(&links)? };
    remove_from(scope, &targets, destroy, all)
}

/// Removes it from those of the interfaces that are still there, and tells.
pub(super) fn remove(scope: &Scope, ifaces: &[String], destroy: bool) -> Result<()> {
    let mut links = Netlink::connect()?.links()?;
    links.retain(|link| ifaces.contains(&link.name));
    remove_from(scope, &links, destroy, false)
}

/// Does everything first, and then tells: that nobody can be told must not leave anything behind.
fn remove_from(scope: &Scope, links: &[Link], destroy: bool, only_news: bool) -> Result<()> {
    // Also where there is no state: a filter whose state was lost is known by its program.
    let (state, lock) = State::create()?;
    let mut hooks = Egress::open(&state)?;
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let had_state = state.instance(&scope.instance).exists();
    for link in links {
        let mut remove = || {
            let filters = hooks.detach(&lock, link, &scope.instance)?;
            let qdisc = if destroy { Some(hooks.destroy_clsact(&lock, link)?) } else { None };
            Ok(Removed { interface: link.name.clone(), filters, qdisc })
        };
        match remove() {
            Ok(removed) => done.push(removed),
            // That one stays is no reason for the others to stay.
            Err(error) => failed.push(error),
        }
    }
    if only_news {
        done.retain(|removed| removed.filters > 0 || removed.qdisc == Some(Qdisc::Removed));
    }
    let users = if destroy { remove_unused(&state, &lock, &scope.instance)? } else { HashSet::new() };
    drop(hooks);
    state.remove_if_empty(lock)?;

    tell(scope, &done).context("writing to standard output")?;
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
    first_of(failed)
}

/// The first of what failed on several interfaces; the others are told.
pub(super) fn first_of(failed: Vec<anyhow::Error>) -> Result<()> {
    let mut failed = failed.into_iter();
    let first = failed.next();
    failed.for_each(|error| note!("netoken: {error:#}"));
    first.map_or(Ok(()), Err)
}

fn tell(scope: &Scope, done: &[Removed]) -> Result<()> {
    let mut out = io::stdout().lock();
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
        note!("{}: {filter}{}", removed.interface, Qdisc::as_clause(removed.qdisc));
    }
    Ok(out.flush()?)
}
