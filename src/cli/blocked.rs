//! What `netoken guard` says of sources that were blocked automatically, and of alerts.

use std::io::{self, Write};

use anyhow::{Context, Result};
use serde::Serialize;

use super::guard::print_json;
use super::table::table;
use crate::guard::blocked::{Blocked, unblock};
use crate::guard::events::Alert;
use crate::guard::program::GuardMaps;
use crate::guard::running::{self, Running};
use crate::note::quoted;
use crate::policy::values::Prefix;
use crate::state::{Instance, State, instance_flag};

#[derive(Serialize)]
#[serde(tag = "type")]
enum Record<'a> {
    #[serde(rename = "guard_auto_blocked")]
    AutoBlocked {
        instance: &'a str,
        #[serde(flatten)]
        blocked: &'a Blocked,
    },
    #[serde(rename = "guard_unblocked")]
    Unblocked {
        instance: &'a str,
        /// How many sources were let in again.
        sources: usize,
        /// Entries of the rules' own list that still block something of the prefix.
        blocked_by_rules: usize,
    },
    #[serde(rename = "guard_alert")]
    Alert {
        instance: &'a str,
        /// Where the last packet came in.
        interface: &'a str,
        #[serde(flatten)]
        alert: &'a Alert,
    },
}

/// Prints the sources of an instance that are blocked now, if there are any.
pub(super) fn print_blocked(json: bool, instance: &str, found: &[Blocked]) -> Result<()> {
    if json {
        return found.iter().try_for_each(|blocked| print_json(&Record::AutoBlocked { instance, blocked }));
    }
    if found.is_empty() {
        return Ok(());
    }
    let rows: Vec<_> = found
        .iter()
        .map(|blocked| {
            let until = humantime::format_rfc3339_seconds(blocked.until).to_string();
            [blocked.src.to_string(), until, blocked.refused.to_string()]
        })
        .collect();
    let mut out = io::stdout().lock();
    writeln!(out)?;
    table(&mut out, ["BLOCKED AUTOMATICALLY", "UNTIL (UTC)", "REFUSED SINCE"], &rows)
        .context("writing to standard output")
}

/// Lets sources in again. What the rules block by their own list stays.
pub(super) fn unblock_prefix(
    json: bool,
    instance: &Instance,
    maps: &GuardMaps,
    prefix: Prefix,
) -> Result<()> {
    let sources = unblock(maps, prefix)?;
    // What is not remembered any more is not known.
    let (listed, source) = listed(instance, maps, prefix).unwrap_or_default();
    if json {
        let blocked_by_rules = listed.len();
        return print_json(&Record::Unblocked { instance: &instance.name, sources, blocked_by_rules });
    }
    let s = if sources == 1 { "" } else { "s" };
    note!("{sources} source{s} of {prefix} unblocked in instance '{}'", instance.name);
    if let [first, others @ ..] = &listed[..] {
        let more = if others.is_empty() { String::new() } else { format!(" (and {} more)", others.len()) };
        let flag = instance_flag(&instance.name);
        note!(
            "the rules block {first}{more} by a list of their own: change {source}, or the list that it names, and then: \
             netoken guard --load --rules {}{flag}",
            quoted(&source)
        );
    }
    Ok(())
}

/// What the rules block of a prefix by their own list, and where they are from.
fn listed(instance: &Instance, maps: &GuardMaps, prefix: Prefix) -> Result<(Vec<Prefix>, String)> {
    // Who changes rules is waited for only now: what was asked for is done.
    let _locked = State::with_instance(&instance.name)?;
    let Running { rules, source, .. } = running::read(instance, maps)?;
    Ok((rules.blocking(prefix), source))
}

/// An alert, as `--json` prints it.
pub(super) fn alert_record<'a>(
    instance: &'a str,
    interface: &'a str,
    alert: &'a Alert,
) -> impl Serialize + 'a {
    Record::Alert { instance, interface, alert }
}

/// An alert, for a person.
pub(super) fn alert_line(alert: &Alert) -> String {
    let time = humantime::format_rfc3339_millis(alert.time).to_string();
    let Alert { severity, refused, within_s, .. } = alert;
    format!("{}  alert: {severity}: {refused} refused within {within_s} s", &time[11..23])
}
