//! Reads the perf buffer of an instance. What an event means is in [`super::model`]; nothing here decides.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::{ErrorKind, PerfBuffer, PerfBufferBuilder, num_possible_cpus};

use super::model::{Clock, Syn};
use crate::counters::Counters;
use crate::program::{Maps, messages};

/// Memory for all CPUs together; a CPU's share is a power of two of pages, and at least MIN_PAGES.
const BUDGET_BYTES: usize = 4 << 20;
const PAGE_BYTES: usize = 4096;
const MIN_PAGES: usize = 8;
const MAX_PAGES: usize = 128;

#[derive(Debug)]
struct Inbox {
    syns: Vec<Syn>,
    clock: Clock,
    received: u64,
}

/// The one reader of an instance's events.
pub struct Reader<'a> {
    maps: &'a Maps,
    buffer: PerfBuffer<'static>,
    inbox: Rc<RefCell<Inbox>>,
    /// Events that were handed to the buffer before we read it.
    before: u64,
}

impl<'a> Reader<'a> {
    /// Opens the buffer. From here on the kernel sends events, until this is dropped.
    ///
    /// # Errors
    /// The kernel refused a perf event.
    pub fn open(maps: &'a Maps) -> Result<Reader<'a>> {
        let inbox = Rc::new(RefCell::new(Inbox { syns: Vec::new(), clock: Clock::now(), received: 0 }));
        let arrived = Rc::clone(&inbox);
        let cpus = num_possible_cpus().context("counting the CPUs")?;
        let builder =
            PerfBufferBuilder::new(&maps.events).pages(pages_for(cpus)).sample_cb(move |_cpu, bytes| {
                let mut inbox = arrived.borrow_mut();
                let syn = Syn::decode(bytes, inbox.clock);
                inbox.syns.extend(syn);
                inbox.received += 1;
            });
        let (built, _) = messages(|| builder.build());
        let buffer = built.context(
            "opening the event buffer; it needs CAP_PERFMON (try sudo), and CAP_IPC_LOCK where other buffers have \
             used up what a user may lock (raise kernel.perf_event_mlock_kb); --quiet attaches without a buffer",
        )?;
        let before = Counters::read(maps)?.events();
        maps.set_reader(true)?;
        Ok(Reader { maps, buffer, inbox, before })
    }

    /// Waits for events, at most that long, and returns what there is, in the order of each CPU. What was lost is
    /// in the counters.
    ///
    /// # Errors
    /// The kernel refused to wait.
    pub fn read(&mut self, timeout: Duration) -> Result<Vec<Syn>> {
        self.inbox.borrow_mut().clock = Clock::now();
        match self.buffer.poll(timeout) {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error).context("waiting for events"),
            _ => Ok(std::mem::take(&mut self.inbox.borrow_mut().syns)),
        }
    }
}

impl Reader<'_> {
    /// Of the events that `counters` know of, those for which the buffer had no room. What is in the buffer is
    /// taken out first; the next look returns it.
    ///
    /// # Errors
    /// The kernel refused to read the buffer.
    pub fn lost(&mut self, counters: &Counters) -> Result<u64> {
        self.buffer.consume().context("emptying the event buffer")?;
        Ok((counters.events() - self.before).saturating_sub(self.inbox.borrow().received))
    }
}

impl Drop for Reader<'_> {
    fn drop(&mut self) {
        // A reader that was killed leaves it on, which costs time and nothing else; the next one turns it off.
        self.maps.set_reader(false).ok();
    }
}

fn pages_for(cpus: usize) -> usize {
    let share = (BUDGET_BYTES / PAGE_BYTES / cpus.max(1)).clamp(MIN_PAGES, MAX_PAGES);
    1 << share.ilog2()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_buffer_of_a_big_machine_stays_small() {
        assert_eq!(pages_for(2), 128);
        assert_eq!(pages_for(24), 32);
        assert_eq!(pages_for(1024), 8);
    }
}
