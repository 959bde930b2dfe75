//! The counters of the guard: one for each verdict, summed over the CPUs, with the names of the C source.

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use plain::Plain;
use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use super::program::GuardMaps;
use super::types::{Counters, Size, Verdict};

/// Number and name of every verdict, in the order of their numbers.
pub const VERDICTS: &[(u32, &str)] = include!(concat!(env!("OUT_DIR"), "/guard_verdicts.rs"));

/// The name of a verdict's number: what events, metrics and the documentation call it.
pub fn verdict_name(verdict: u32) -> &'static str {
    VERDICTS.iter().find(|(number, _)| *number == verdict).map_or("unknown", |(_, name)| name)
}

// SAFETY: integers and arrays of them, without padding; every bit pattern is a value.
unsafe impl Plain for Counters {}

const COUNT: usize = Verdict::GUARD_COUNT.0 as usize;
const ROWS: usize = Size::GUARD_ROWS.0 as usize;

/// Packets by the number of their verdict.
pub type Row = Vec<u64>;

/// A reading of all counters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuardCounters {
    packets: [u64; COUNT],
    dropped: u64,
    events: u64,
    rows: [u64; ROWS * COUNT],
}

impl Default for GuardCounters {
    fn default() -> Self {
        GuardCounters { packets: [0; COUNT], dropped: 0, events: 0, rows: [0; ROWS * COUNT] }
    }
}

impl GuardCounters {
    /// Reads the counters of an instance.
    ///
    /// # Errors
    /// The kernel refused to read the map.
    pub fn read(maps: &GuardMaps) -> Result<GuardCounters> {
        let values = maps
            .counters
            .lookup_percpu(&0u32.to_ne_bytes(), MapFlags::ANY)
            .context("reading the guard's counters")?
            .context("the guard's counters do not exist")?;
        let mut sum = GuardCounters::default();
        for bytes in values {
            let mut of_cpu = Counters::default();
            of_cpu.copy_from_bytes(&bytes).ok().context("the guard's counters have a strange size")?;
            for (sum, counter) in sum.packets.iter_mut().zip(&of_cpu.verdicts) {
                *sum += counter.packets;
            }
            sum.dropped += of_cpu.verdicts.iter().map(|counter| counter.dropped).sum::<u64>();
            sum.events += of_cpu.verdicts.iter().map(|counter| counter.events).sum::<u64>();
            sum.rows.iter_mut().zip(&of_cpu.rows).for_each(|(sum, packets)| *sum += packets);
        }
        Ok(sum)
    }

    /// What was counted in a row, which is that of a rule or, number 0, of what no rule is about.
    pub(super) fn row(&self, row: u8) -> Row {
        self.rows[usize::from(row) * COUNT..][..COUNT].to_vec()
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
