//! The counters: one for each verdict, summed over the CPUs, with the names that the C source gives them.

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use plain::Plain;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::program::Maps;
use crate::types::{Counter, Verdict};

/// Number and name of every verdict, in the order of their numbers.
pub const VERDICTS: &[(u32, &str)] = include!(concat!(env!("OUT_DIR"), "/netoken_verdicts.rs"));

/// The name of a verdict's number: what events, metrics and the README call it.
pub fn verdict_name(verdict: u32) -> &'static str {
    VERDICTS.iter().find(|(number, _)| *number == verdict).map_or("unknown", |(_, name)| name)
}

// SAFETY: integers without padding; every bit pattern is a value.
unsafe impl Plain for Counter {}

/// A reading of all counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    packets: [u64; Verdict::VERDICT_COUNT.0 as usize],
    dropped: u64,
    events: u64,
}

impl Counters {
    /// Reads the counters of an instance.
    ///
    /// # Errors
    /// The kernel refused to read the map.
    pub fn read(maps: &Maps) -> Result<Counters> {
        let mut counters = Counters::default();
        for (number, name) in VERDICTS {
            let values = maps
                .counters
                .lookup_percpu(&number.to_ne_bytes(), MapFlags::ANY)
                .with_context(|| format!("reading the counter '{name}'"))?
                .with_context(|| format!("the counter '{name}' does not exist"))?;
            for bytes in values {
                let mut counter = Counter::default();
                counter.copy_from_bytes(&bytes).ok().context("a counter of a strange size")?;
                counters.packets[*number as usize] += counter.packets;
                counters.dropped += counter.dropped;
                counters.events += counter.events;
            }
        }
        Ok(counters)
    }

    /// SYNs with this verdict.
    pub fn of(&self, verdict: Verdict) -> u64 {
        self.packets[verdict.0 as usize]
    }

    /// All SYNs.
    pub fn total(&self) -> u64 {
        self.packets.iter().sum()
    }

    /// SYNs that were not sent, whatever the verdict.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Events that were handed to the buffer, whether it had room or not.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Name and number of SYNs, for each verdict.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        VERDICTS.iter().map(|(number, name)| (*name, self.packets[*number as usize]))
    }
}

impl Serialize for Counters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("syns", &self.total())?;
        map.serialize_entry("not_sent", &self.dropped)?;
        for (name, packets) in self.iter() {
            map.serialize_entry(name, &packets)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_readme_explains_every_verdict_under_its_number() {
        let readme = include_str!("../README.md");
        for (number, name) in VERDICTS {
            assert!(readme.contains(&format!("| `{name}` | {number} |")), "no row for {name} ({number})");
        }
    }

    #[test]
    fn numbers_count_up_from_one_and_have_names() {
        assert!((1..).zip(VERDICTS).all(|(expected, (number, _))| expected == *number));
        assert_eq!(verdict_name(Verdict::VERDICT_NO_ROOM.0), "no_room");
        assert_eq!(verdict_name(Verdict::VERDICT_COUNT.0), "unknown");
    }
}
