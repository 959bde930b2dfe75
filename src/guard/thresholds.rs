//! The part of the guard's file that says how much refusing is too much: for a source, which is then blocked, and for
//! the instance, which then raises an alert.

use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use serde::Deserialize;

use super::rules::{Alerts, AutoBlock};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AutoBlockFile {
    refused: u32,
    within: String,
    block_for: String,
    #[serde(default = "v4_bits")]
    v4_bits: u8,
    #[serde(default = "v6_bits")]
    v6_bits: u8,
}

fn v4_bits() -> u8 {
    32
}

/// What one customer gets of IPv6, at least.
fn v6_bits() -> u8 {
    64
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AlertsFile {
    within: String,
    low: Option<u64>,
    medium: Option<u64>,
    high: Option<u64>,
    critical: Option<u64>,
}

/// A time in the file, which is neither nothing nor for ever.
fn duration(name: &str, text: &str) -> Result<Duration> {
    let time = humantime::parse_duration(text)
        .map_err(|_| anyhow!("'{name}': '{text}' is no time; write it like 10s, 5m or 1h"))?;
    if time < Duration::from_secs(1) || time > DURATION_MAX {
        bail!("'{name}': '{text}' is not between 1s and {}", humantime::format_duration(DURATION_MAX));
    }
    Ok(time)
}

const DURATION_MAX: Duration = Duration::from_secs(30 * 24 * 3600);

impl AutoBlockFile {
    pub(super) fn check(self) -> Result<AutoBlock> {
        if self.refused == 0 {
            bail!("'refused' is 0; a source would be blocked for nothing");
        }
        for (name, bits, max) in [("v4_bits", self.v4_bits, 32), ("v6_bits", self.v6_bits, 128)] {
            if bits == 0 || bits > max {
                bail!("'{name}' is {bits}; it goes from 1 to {max}");
            }
        }
        Ok(AutoBlock {
            refused: self.refused,
            within: duration("within", &self.within)?,
            block_for: duration("block_for", &self.block_for)?,
            v4_bits: self.v4_bits,
            v6_bits: self.v6_bits,
        })
    }
}

impl AlertsFile {
    pub(super) fn check(self) -> Result<Alerts> {
        let within = duration("within", &self.within)?;
        let refused = [self.low, self.medium, self.high, self.critical];
        let said: Vec<u64> = refused.into_iter().flatten().collect();
        if said.is_empty() {
            bail!("it names no severity; there are low, medium, high and critical");
        }
        if said[0] == 0 || !said.is_sorted_by(|lower, higher| lower < higher) {
            bail!("from low to critical the numbers have to rise, and to begin with 1 at least");
        }
        Ok(Alerts { within, refused })
    }
}
