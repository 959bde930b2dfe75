//! The counters of the guard: one for each verdict, summed over the CPUs, with the names of the C source.

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use plain::Plain;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::program::GuardMaps;
use super::types::{Counter, Verdict};

/// Number and name of every verdict, in the order of their numbers.
pub const VERDICTS: &[(u32, &str)] = include!(concat!(env!("OUT_DIR"), "/guard_verdicts.rs"));

/// The name of a verdict's number: what events, metrics and the documentation call it.
pub fn verdict_name(verdict: u32) -> &'static str {
    VERDICTS.iter().find(|(number, _)| *number == verdict).map_or("unknown", |(_, name)| name)
}

// SAFETY: integers without padding; every bit pattern is a value.
unsafe impl Plain for Counter {}

/// A reading of all counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GuardCounters {
    packets: [u64; Verdict::GUARD_COUNT.0 as usize],
    dropped: u64,
    events: u64,
}

impl GuardCounters {
    /// Reads the counters of an instance.
    ///
    /// # Errors
    /// The kernel refused to read the map.
    pub fn read(maps: &GuardMaps) -> Result<GuardCounters> {
        let mut counters = GuardCounters::default();
        for (number, name) in VERDICTS {
            let values = maps
                .counters
                .lookup_percpu(&number.to_ne_bytes(), MapFlags::ANY)
                .with_context(|| format!("reading the guard's counter '{name}'"))?
                .with_context(|| format!("the guard's counter '{name}' does not exist"))?;
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

    /// Packets with this verdict.
    pub fn of(&self, verdict: Verdict) -> u64 {
        self.packets[verdict.0 as usize]
    }

    /// All packets that got a verdict.
    pub fn total(&self) -> u64 {
        self.packets.iter().sum()
    }

    /// Packets that were dropped.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Events that were handed to the buffer, whether it had room or not.
    pub fn events(&self) -> u64 {
        self.events
    }

    /// Name and number of packets, for each verdict.
    pub fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> {
        VERDICTS.iter().map(|(number, name)| (*name, self.packets[*number as usize]))
    }

    /// In one line: those that are not zero.
    pub fn line(&self) -> String {
        let mut line = format!("{} seen", self.total());
        for (name, packets) in self.iter().filter(|(_, packets)| *packets > 0) {
            line.push_str(&format!(", {packets} {name}"));
        }
        line.push_str(&format!("; {} dropped", self.dropped));
        line
    }
}

impl Serialize for GuardCounters {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("seen", &self.total())?;
        map.serialize_entry("dropped", &self.dropped)?;
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
    fn the_documentation_explains_every_verdict_under_its_number() {
        let page = include_str!("../../docs/guard.md");
        for (number, name) in VERDICTS {
            assert!(page.contains(&format!("| `{name}` | {number} |")), "no row for {name} ({number})");
        }
    }

    #[test]
    fn numbers_count_up_from_one_and_have_names() {
        assert!((1..).zip(VERDICTS).all(|(expected, (number, _))| expected == *number));
        assert_eq!(verdict_name(Verdict::GUARD_BAD_MAC.0), "bad_mac");
        assert_eq!(verdict_name(Verdict::GUARD_COUNT.0), "unknown");
    }
}
