//! `netoken guard --detach` and `--destroy`: take away what we attached, and nothing else.

use std::collections::HashSet;

use anyhow::Result;

use super::{Record, print_json};
use crate::cli::args::Scope;
use crate::cli::detach::first_of;
use crate::hooks::clsact::Hooks;
use crate::hooks::netlink::{Link, Netlink, Side};
use crate::hooks::qdisc::Qdisc;
use crate::hooks::unused::{Lost, remove_unused, used_where};
use crate::hooks::xdp::take_xdp;
use crate::privileges;
use crate::state::State;

/// Without an interface, on all of this network namespace; then only those are told of which there is news.
pub(super) fn remove(scope: &Scope, destroy: bool) -> Result<()> {
    let all = scope.ifaces.is_empty();
    let what = if all { "all interfaces".to_string() } else { scope.ifaces.join(", ") };
    privileges::check(&format!("detaching the guard from {what}"))?;
    let links = scope.find_or_all(Netlink::connect()?.links()?)?;
    let (state, lock) = State::create()?;
    let mut hooks = Hooks::open(&state, Side::Ingress)?;
    let (mut done, mut failed) = (Vec::new(), Vec::new());
    let had_state = state.instance(&scope.instance).exists();
    let lost = Lost::now(&state);
    for link in &links {
        let mut remove = || {
            let programs = hooks.detach(&lock, link, &scope.instance)?
                + usize::from(take_xdp(&state, &lock, link, &scope.instance)?.is_some());
            let qdisc = if destroy { Some(hooks.destroy_clsact(&lock, link)?) } else { None };
            Ok((link, programs, qdisc))
        };
        match remove() {
            Ok(removed) => done.push(removed),
            // That one stays is no reason for the others to stay.
            Err(error) => failed.push(error),
        }
    }
    if all {
        done.retain(|(_, programs, qdisc)| *programs > 0 || *qdisc == Some(Qdisc::Removed));
    }
    drop(hooks);
    let unused = match destroy {
        true => lost.and_then(|lost| remove_unused(&state, &lock, &scope.instance, &lost)),
        false => Ok(HashSet::new()),
    };
    let users = unused.unwrap_or_else(|error| {
        failed.push(error);
        HashSet::new()
    });
    failed.extend(state.remove_if_empty(lock).err());

    // What was done is told before what failed.
    let told = tell(scope, &done);
    if done.is_empty() && failed.is_empty() && all && !scope.json {
        let also = if had_state && users.is_empty() { "; its rules and counters are removed" } else { "" };
        note!("the guard of instance '{}' is not attached to any interface here{also}", scope.instance);
    }
    if !users.is_empty() {
        note!(
            "instance '{}' is still used {}: its rules, keys and counters stay",
            scope.instance,
            used_where(&users, true)
        );
    }
    first_of(failed).and(told)
}

/// Interfaces with how many programs were removed, and what became of the qdisc.
fn tell(scope: &Scope, done: &[(&Link, usize, Option<Qdisc>)]) -> Result<()> {
    for (link, programs, qdisc) in done {
        if scope.json {
            print_json(&Record::GuardRemoved { interface: &link.name, programs: *programs, qdisc: *qdisc })?;
            continue;
        }
        let what = if *programs > 0 { "guard removed" } else { "the guard was not attached" };
        note!("{}: {what}{}", link.name, Qdisc::as_clause(*qdisc));
    }
    Ok(())
}
