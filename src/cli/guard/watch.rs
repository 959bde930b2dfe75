//! `netoken guard --watch`: what comes in, as it comes.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::rules::{Ends, load, put, tell_slots};
use super::{Record, of_instance, tell_warnings};
use crate::cli::args::Scope;
use crate::cli::blocked::{alert_line, alert_record};
use crate::cli::reload::Reload;
use crate::cli::signals::Signals;
use crate::events::columns::Columns;
use crate::events::interfaces::Interfaces;
use crate::events::look::{LOOK, goes_on};
use crate::files::Files;
use crate::guard::counters::{GuardCounters, VERDICTS};
use crate::guard::events::{Alert, Reader, Seen};
use crate::guard::program::GuardMaps;
use crate::guard::rules::Rules;
use crate::privileges;
use crate::state::{EventsOf, State};

/// Longest time between two looks at the counters.
const PERIOD: Duration = Duration::from_secs(1);
const PRINTING: &str = "writing to standard output";

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
    // First of all: if it goes meanwhile, that is noticed.
    let identity = instance.identity(EventsOf::Guard);
    let maps = GuardMaps::open(&instance.pins)?;
    let _reading = state.lock_reader(&instance, EventsOf::Guard)?;
    let signals = Signals::catch(given.is_some())?;
    let ends = Ends { stop: &signals.stop, identity };
    let mut reader = Reader::open(&maps)?;
    // Last of all, so that what cannot be watched keeps the rules that it has.
    let mut reload = match given {
        None => None,
        Some((path, rules)) => {
            load(scope, rules, source, Some(&ends))?;
            let ends = &ends;
            let again = move |files: &Files| {
                let rules = Rules::read(path, files)?;
                tell_warnings(&rules);
                tell_slots(scope, put(scope, &rules, source, Some(ends))?);
                Ok(rules.summary_now())
            };
            Some(Reload::new("rules", files, true, &signals, again))
        }
    };
    let out = Columns::new(HEADS, WIDTHS, Arc::clone(&signals.stop))?;
    let mut output = Output { scope, out, interfaces: Interfaces::here() };
    if !scope.json {
        note!("watching; Ctrl-C ends it, and the guard stays attached");
    }
    output.heads()?;
    let mut counted = GuardCounters::read(&maps)?;
    let mut last = Instant::now();
    let mut attached = IsAttached(true);
    loop {
        let is_last = !goes_on(&maps.clock, &signals.stop)?;
        output.events(&mut reader, if is_last { Duration::ZERO } else { LOOK })?;
        if is_last || last.elapsed() >= PERIOD {
            last = Instant::now();
            attached.look(&state, &scope.instance)?;
            let now = GuardCounters::read(&maps)?;
            if now != counted {
                let lost = reader.lost(&now)?;
                // That has emptied the buffer; what is counted is shown before the count.
                output.events(&mut reader, Duration::ZERO)?;
                output.counters(&now, lost)?;
                counted = now;
            }
        }
        output.flush()?;
        if is_last {
            return Ok(());
        }
        if instance.identity(EventsOf::Guard) != identity {
            bail!("{doing}: it was destroyed");
        }
        reload.iter_mut().for_each(Reload::look);
    }
}

/// Whether a guard of the instance is still there, which can be detached and attached again meanwhile.
struct IsAttached(bool);

impl IsAttached {
    /// Tells a person if that has changed.
    fn look(&mut self, state: &State, instance: &str) -> Result<()> {
        let is_attached = !of_instance(state, instance)?.is_empty();
        if self.0 != is_attached {
            self.0 = is_attached;
            match is_attached {
                true => note!("the guard of instance '{instance}' is attached again"),
                false => note!(
                    "the guard of instance '{instance}' is not attached anywhere any more: nothing is checked until it is \
                     attached again"
                ),
            }
        }
        Ok(())
    }
}

const COLUMNS: usize = 6;
const HEADS: [&str; COLUMNS] = ["INTERFACE", "VERDICT", "SOURCE", "DESTINATION", "ISN", "RULE"];
/// The column of the verdict.
const VERDICT: usize = 1;
/// What most IPv4 lines need.
const WIDTHS: [usize; COLUMNS] = [9, 8, 19, 18, 8, 11];

/// Where it is printed.
struct Output<'a> {
    scope: &'a Scope,
    out: Columns<COLUMNS>,
    interfaces: Interfaces,
}

impl Output<'_> {
    fn heads(&mut self) -> Result<()> {
        if self.scope.json {
            return Ok(());
        }
        // Of one that was dropped, with a `!` behind it.
        self.out
            .make_room(VERDICT, VERDICTS.iter().map(|(_, name)| name.len() + 1).max().unwrap_or_default());
        self.out.heads().context(PRINTING)
    }

    fn events(&mut self, reader: &mut Reader<'_>, timeout: Duration) -> Result<()> {
        let all = reader.read(timeout)?;
        if !all.is_empty() {
            self.interfaces.refresh();
        }
        all.iter().try_for_each(|seen| self.seen(seen))?;
        reader.alerts().iter().try_for_each(|alert| self.alert(alert))
    }

    fn seen(&mut self, seen: &Seen) -> Result<()> {
        let interface = self.interfaces.name(seen.netns_inode, seen.ifindex);
        if self.scope.json {
            return self.out.json(&Record::Guarded { interface: &interface, seen }).context(PRINTING);
        }
        let end = |addr: Option<SocketAddr>| addr.map_or("?".to_string(), |addr| addr.to_string());
        let rule = match seen.mode {
            Some(mode) => format!("{} ({mode})", seen.rule),
            None => "-".to_string(),
        };
        let cells = [
            interface,
            format!("{}{}", seen.verdict, if seen.dropped { "!" } else { "" }),
            end(seen.src),
            end(seen.dst),
            format!("{:08x}", seen.isn),
            rule,
        ];
        let token = seen.token.map_or("-".to_string(), |token| token.to_string());
        let time = humantime::format_rfc3339_millis(seen.time).to_string();
        self.out.line(&time, &cells, &token).context(PRINTING)
    }

    fn alert(&mut self, alert: &Alert) -> Result<()> {
        if self.scope.json {
            let interface = self.interfaces.name(alert.netns_inode, alert.ifindex);
            return self.out.json(&alert_record(&self.scope.instance, &interface, alert)).context(PRINTING);
        }
        self.out.text(&alert_line(alert)).context(PRINTING)
    }

    fn counters(&mut self, counters: &GuardCounters, lost: u64) -> Result<()> {
        if self.scope.json {
            let record = Record::GuardCounters { instance: &self.scope.instance, counters, lost: Some(lost) };
            return self.out.json(&record).context(PRINTING);
        }
        let lost = if lost > 0 { format!("; {lost} events lost") } else { String::new() };
        self.out.text(&format!("-- {}{lost}", counters.line())).context(PRINTING)
    }

    fn flush(&mut self) -> Result<()> {
        self.out.flush().context(PRINTING)
    }
}
