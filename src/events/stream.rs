//! Runs the metrics stream: reads, prints and watches until it is told to stop, the reader of its output goes
//! away, or nothing is attached any more.

use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::look::{LOOK, goes_on};
use super::reader::Reader;
use super::show::{Output, Record};
use super::watch::Watch;
use crate::counters::Counters;
use crate::is_closed_pipe;
use crate::program::Maps;

/// How often totals are printed, if they have changed.
const TOTALS: Duration = Duration::from_secs(1);

/// Why the stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// A signal, or nobody reads the output any more.
    Asked,
    /// No interface is left to stamp on.
    NothingLeft,
    /// Somebody has destroyed the instance, and perhaps attached another one of that name.
    Destroyed,
}

/// Streams until the end; `each_look` is called between two looks at the buffer.
///
/// # Errors
/// The kernel refused to be read, or the output failed for another reason than a closed pipe.
pub fn run(
    maps: &Maps,
    reader: &mut Reader<'_>,
    output: &mut Output,
    watch: &mut Watch<'_>,
    stop: &AtomicBool,
    each_look: &mut dyn FnMut() -> Result<()>,
) -> Result<End> {
    let mut stream = Stream { maps, shown: None, next_totals: Instant::now() + TOTALS };
    match stream.run(reader, output, watch, stop, each_look) {
        Err(error) if is_closed_pipe(&error) => Ok(End::Asked),
        other => other.context("streaming to standard output"),
    }
}

struct Stream<'a> {
    maps: &'a Maps,
    shown: Option<(Counters, u64)>,
    next_totals: Instant,
}

impl Stream<'_> {
    fn run(
        &mut self,
        reader: &mut Reader<'_>,
        output: &mut Output,
        watch: &mut Watch<'_>,
        stop: &AtomicBool,
        each_look: &mut dyn FnMut() -> Result<()>,
    ) -> Result<End> {
        output.heads()?;
        output.flush()?;
        let end = loop {
            if !goes_on(&self.maps.clock, stop)? {
                break End::Asked;
            }
            self.events(reader, output, LOOK)?;
            report_changes(output, watch)?;
            if !watch.has_links() {
                break End::NothingLeft;
            }
            if watch.is_destroyed() {
                break End::Destroyed;
            }
            each_look()?;
            if Instant::now() >= self.next_totals {
                self.next_totals = Instant::now() + TOTALS;
                self.totals(reader, output)?;
            }
            output.flush()?;
        };
        // What happened until now is part of the story.
        self.events(reader, output, Duration::ZERO)?;
        self.totals(reader, output)?;
        output.flush()?;
        Ok(end)
    }

    fn events(&mut self, reader: &mut Reader<'_>, output: &mut Output, timeout: Duration) -> Result<()> {
        let syns = reader.read(timeout)?;
        if !syns.is_empty() {
            output.refresh_names();
        }
        syns.iter().try_for_each(|syn| output.syn(syn)).context("printing an event")
    }

    /// Prints the totals, unless the same were printed last.
    fn totals(&mut self, reader: &mut Reader<'_>, output: &mut Output) -> Result<()> {
        let counters = Counters::read(self.maps)?;
        let lost = reader.lost(counters.events())?;
        // Looking for losses has emptied the buffer; what is counted is shown before the count.
        self.events(reader, output, Duration::ZERO)?;
        let now = (counters, lost);
        if self.shown.as_ref() != Some(&now) {
            output.totals(&now.0, now.1).context("printing the totals")?;
            self.shown = Some(now);
        }
        Ok(())
    }
}

fn report_changes(output: &mut Output, watch: &mut Watch<'_>) -> Result<()> {
    let changes = watch.changes()?;
    if changes.is_empty() {
        return Ok(());
    }
    for (interface, change) in changes {
        if output.is_json() {
            output.record(&Record::Interface { interface: &interface, change: &change })?;
        } else {
            output.flush()?;
            note!("{interface}: {change}");
        }
    }
    Ok(())
}
