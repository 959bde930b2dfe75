//! The reader of the stamp's events. What an event means is in [`super::model`]; nothing here decides.

use anyhow::{Context, Result};

use super::buffer::{Buffer, Event};
use super::model::{Clock, Syn};
use crate::counters::Counters;
use crate::program::Maps;

impl Event for Syn {
    fn decode(bytes: &[u8], clock: Clock) -> Option<Syn> {
        Syn::decode(bytes, clock)
    }
}

/// The one reader of an instance's events.
pub type Reader<'a> = Buffer<'a, Syn>;

impl<'a> Reader<'a> {
    /// Opens the buffer. From here on the kernel sends events, until this is dropped.
    ///
    /// # Errors
    /// The kernel refused a perf event.
    pub fn open(maps: &'a Maps) -> Result<Reader<'a>> {
        Buffer::of(&maps.events, &maps.live, || Ok(Counters::read(maps)?.events()))
            .context("preparing the stream; --quiet attaches without one")
    }
}
