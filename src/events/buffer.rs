//! A perf buffer of an instance, with one reader. What is in it, stamp and guard know.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use libbpf_rs::{ErrorKind, MapCore, MapFlags, MapHandle, PerfBuffer, PerfBufferBuilder, num_possible_cpus};

use super::model::Clock;
use crate::object::messages;
use crate::types::Live;

/// Memory for all CPUs together; a CPU's share is a power of two of pages, and at least MIN_PAGES.
const BUDGET_BYTES: usize = 4 << 20;
const PAGE_BYTES: usize = 4096;
const MIN_PAGES: usize = 8;
const MAX_PAGES: usize = 128;

/// What comes out of a buffer.
pub trait Event: Sized + 'static {
    /// Reads it as it came; nothing if it is too short to be one.
    fn decode(bytes: &[u8], clock: Clock) -> Option<Self>;

    /// Whether it is among the events that the counters know of.
    fn is_counted(&self) -> bool {
        true
    }
}

struct Inbox<E> {
    events: Vec<E>,
    clock: Clock,
    /// Of those that are counted.
    received: u64,
}

/// An open buffer.
pub struct Buffer<'a, E> {
    live: &'a MapHandle,
    buffer: PerfBuffer<'static>,
    inbox: Rc<RefCell<Inbox<E>>>,
    /// Events that were handed to the buffer before we read it.
    before: u64,
}

impl<'a, E: Event> Buffer<'a, E> {
    /// Opens the buffer. From here on the kernel sends events, until this is dropped. `handed` asks the counters how many
    /// were handed to the buffer so far.
    pub(crate) fn of(
        events: &MapHandle,
        live: &'a MapHandle,
        handed: impl FnOnce() -> Result<u64>,
    ) -> Result<Buffer<'a, E>> {
        let inbox = Rc::new(RefCell::new(Inbox { events: Vec::new(), clock: Clock::now(), received: 0 }));
        let arrived = Rc::clone(&inbox);
        let cpus = num_possible_cpus().context("counting the CPUs")?;
        let builder = PerfBufferBuilder::new(events).pages(pages_for(cpus)).sample_cb(move |_cpu, bytes| {
            let mut inbox = arrived.borrow_mut();
            let event = E::decode(bytes, inbox.clock);
            inbox.received += u64::from(event.as_ref().is_none_or(E::is_counted));
            inbox.events.extend(event);
        });
        let (built, _) = messages(|| builder.build());
        let buffer = built.context(
            "opening the event buffer; it needs CAP_PERFMON (try sudo), and CAP_IPC_LOCK where other buffers have \
             used up what a user may lock (raise kernel.perf_event_mlock_kb)",
        )?;
        let before = handed()?;
        set_reader(live, true)?;
        Ok(Buffer { live, buffer, inbox, before })
    }

    /// Waits for events, at most that long, and returns what there is, in the order of each CPU. What was lost is in the
    /// counters.
    ///
    /// # Errors
    /// The kernel refused to wait.
    pub fn read(&mut self, timeout: Duration) -> Result<Vec<E>> {
        self.inbox.borrow_mut().clock = Clock::now();
        match self.buffer.poll(timeout) {
            Err(error) if error.kind() != ErrorKind::Interrupted => Err(error).context("waiting for events"),
            _ => Ok(std::mem::take(&mut self.inbox.borrow_mut().events)),
        }
    }

    /// Of the events that were handed to the buffer until now, those for which it had no room. What is in it is taken
    /// out first; the next look returns it.
    ///
    /// # Errors
    /// The kernel refused to read the buffer.
    pub fn lost(&mut self, handed: u64) -> Result<u64> {
        self.buffer.consume().context("emptying the event buffer")?;
        Ok((handed - self.before).saturating_sub(self.inbox.borrow().received))
    }
}

impl<E> Drop for Buffer<'_, E> {
    fn drop(&mut self) {
        // A reader that was killed leaves it on, which costs time and nothing else; the next one turns it off.
        set_reader(self.live, false).ok();
    }
}

/// Tells the attached programs whether somebody reads the events; without a reader they send none.
pub(crate) fn set_reader(live: &MapHandle, has_reader: bool) -> Result<()> {
    let now = Live { has_reader: has_reader.into() };
    // SAFETY: plain data without padding.
    let bytes = unsafe { plain::as_bytes(&now) };
    live.update(&0u32.to_ne_bytes(), bytes, MapFlags::ANY).context("turning events on or off")
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
