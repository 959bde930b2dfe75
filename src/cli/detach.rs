//! `--detach` and `--destroy`: remove what is ours, and say what stays and why.

use anyhow::Result;
use serde::Serialize;

use super::args::Scope;
use crate::hooks::clsact::{Hooks, Qdisc, remove_unused};
use crate::hooks::link::find_link;
use crate::hooks::netlink::Link;
use crate::privileges;
use crate::state::State;

/// What was done on one interface.
#[derive(Serialize)]
#[serde(tag = "type", rename = "removed")]
struct Removed<'a> {
    interface: &'a str,
    /// How many filters of ours were removed.
    filters: usize,
    /// Only with `--destroy`: what became of the clsact qdisc.
    #[serde(skip_serializing_if = "Option::is_none")]
    qdisc: Option<&'static str>,
}

pub(super) fn run(scope: &Scope, destroy: bool) -> Result<()> {
    let what = if scope.ifaces.is_empty() { "all interfaces".to_string() } else { scope.ifaces.join(", ") };
    privileges::check(&format!("detaching from {what}"))?;
    // Without state there may still be filters whose state was lost; they are found by their name.
    let state = State::create()?;
    remove(scope, &scope.ifaces, destroy, &state)?;
    if let Ok(lock) = state.lock() {
        state.remove_if_empty(lock)?;
    }
    Ok(())
}

/// Removes it from those interfaces, or from all if none is named.
pub(super) fn remove(scope: &Scope, ifaces: &[String], destroy: bool, state: &State) -> Result<()> {
    let lock = state.lock()?;
    let mut hooks = Hooks::open(state)?;
    let links = hooks.links()?;
    let netns = scope.netns.as_deref().unwrap_or_default();
    let targets: Vec<Link> = match ifaces.is_empty() {
        true => links.clone(),
        false => ifaces.iter().map(|name| find_link(&links, name, netns).cloned()).collect::<Result<_>>()?,
    };

    for link in &targets {
        let filters = hooks.detach(&lock, link, &scope.instance)?;
        let qdisc = if destroy { Some(hooks.destroy_clsact(&lock, link)?) } else { None };
        tell(scope, link, filters, qdisc, ifaces.is_empty());
    }
    if destroy && !remove_unused(state, &lock, &scope.instance)? && !scope.json {
        eprintln!(
            "instance '{}' is still used on another interface or in another network namespace: its policy and \
             counters stay",
            scope.instance
        );
    }
    Ok(())
}

fn tell(scope: &Scope, link: &Link, filters: usize, qdisc: Option<Qdisc>, brief: bool) {
    let touched = filters > 0 || qdisc == Some(Qdisc::Removed);
    if brief && !touched {
        return; // of all interfaces, those that had nothing are not news
    }
    if scope.json {
        let qdisc = qdisc.map(|qdisc| match qdisc {
            Qdisc::Absent => "absent",
            Qdisc::Removed => "removed",
            Qdisc::Foreign => "kept: made by somebody else",
            Qdisc::InUse(_) => "kept: in use",
        });
        let record = Removed { interface: &link.name, filters, qdisc };
        println!("{}", serde_json::to_string(&record).unwrap_or_default());
        return;
    }
    let filter = match filters {
        0 => "netoken was not attached".to_string(),
        1 => "filter removed".to_string(),
        n => format!("{n} filters removed"),
    };
    let qdisc = match qdisc {
        None | Some(Qdisc::Absent) => String::new(),
        Some(Qdisc::Removed) => ", clsact qdisc removed: we made it and nobody else uses it".to_string(),
        Some(Qdisc::Foreign) => ", clsact qdisc kept: somebody else made it".to_string(),
        Some(Qdisc::InUse(n)) => format!(", clsact qdisc kept: {n} other filters use it"),
    };
    eprintln!("{}: {filter}{qdisc}", link.name);
}
