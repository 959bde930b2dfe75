//! `netoken guard --watch`: what comes in, as it comes.

use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::rules::{load, put};
use super::{Record, of_instance, print_counters, print_json};
use crate::cli::args::Scope;
use crate::cli::blocked::print_alert;
use crate::cli::reload::Reload;
use crate::cli::signals::Signals;
use crate::files::Files;
use crate::guard::counters::GuardCounters;
use crate::guard::events::{Reader, Seen};
use crate::guard::program::GuardMaps;
use crate::guard::rules::Rules;
use crate::privileges;
use crate::state::{Instance, State};

/// Longest time between two looks at the counters.
const PERIOD: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(200);

/// A file of rules, and what it says.
type Given<'a> = (&'a Path, &'a Rules);

/// `files` are those that the rules were read from.
pub(super) fn watch(scope: &Scope, given: Option<Given<'_>>, files: Files, source: &str) -> Result<()> {
    let doing = format!("watching the guard of instance '{}'", scope.instance);
    privileges::check(&doing)?;
    let Some(state) = State::find()? else { bail!("{doing}: it is not attached anywhere") };
    let instance = state.instance(&scope.instance);
    if of_instance(&state, &scope.instance)?.is_empty() {
        bail!("{doing}: it is not attached anywhere");
    }
    let maps = GuardMaps::open(&instance.pins)?;
    // Another one than that of the stamp, whose events have a reader of their own.
    let reading = Instance { name: format!("{}.guard", instance.name), ..state.instance(&scope.instance) };
    let _reading = state.lock_reader(&reading)?;
    let signals = Signals::catch(given.is_some())?;
    let mut reader = Reader::open(&maps)?;
    // Last of all, so that what cannot be watched keeps the rules that it has.
    let mut reload = match given {
        None => None,
        Some((path, rules)) => {
            load(scope, rules, source)?;
            let again = move |files: &Files| {
                let rules = Rules::read(path, files)?;
                put(scope, &rules, source)?;
                Ok(rules.summary())
            };
            Some(Reload::new("rules", files, true, &signals.reload, again))
        }
    };
    if !scope.json {
        note!("watching; Ctrl-C ends it, and the guard stays attached");
    }
    let mut counted = GuardCounters::read(&maps)?;
    let mut last = Instant::now();
    loop {
        let ends = signals.stop.load(Ordering::Relaxed);
        reload.iter_mut().for_each(Reload::look);
        for seen in reader.read(if ends { Duration::ZERO } else { POLL })? {
            print_seen(scope, &seen)?;
        }
        for alert in reader.alerts() {
            print_alert(scope.json, &instance.name, &alert)?;
        }
        if ends || last.elapsed() >= PERIOD {
            last = Instant::now();
            let now = GuardCounters::read(&maps)?;
            if now != counted {
                print_counters(scope, &instance.name, &now, Some(reader.lost(&now)?))?;
                counted = now;
            }
        }
        if ends {
            return Ok(());
        }
    }
}

fn print_seen(scope: &Scope, seen: &Seen) -> Result<()> {
    if scope.json {
        return print_json(&Record::Guarded { seen });
    }
    let time = humantime::format_rfc3339_micros(seen.time).to_string();
    let end = |addr: Option<SocketAddr>| addr.map_or("?".to_string(), |addr| addr.to_string());
    let verdict = format!("{}{}", seen.verdict, if seen.dropped { "!" } else { "" });
    let rule = if seen.rule == 0 {
        "-".to_string()
    } else {
        format!("{} ({})", seen.rule, seen.mode.unwrap_or("-"))
    };
    let token = seen.token.map_or("-".to_string(), |token| token.to_string());
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{}  {verdict:<16}  {:<21}  {:<21}  {:08x}  {rule:<11}  {token}",
        &time[11..26],
        end(seen.src),
        end(seen.dst),
        seen.isn
    )
    .context("writing to standard output")
}
