//! What both queries say of the wall clock of an instance, by which its stamp and its guard go.

use std::io::Write;
use std::time::{Duration, SystemTime};

use anyhow::Result;
use libbpf_rs::MapHandle;
use serde::Serialize;

use crate::clock::{Source, as_seen, published};
use crate::kernel::Kernel;
use crate::keys::live::LiveKeys;
use crate::state::Instance;

/// The wall clock of an instance's keyed tokens, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "clock")]
pub(super) struct InstanceClock {
    instance: String,
    source: Source,
    /// Unix time as the classifier sees it.
    unix_s: u64,
    slot_s: u64,
    slot: u64,
}

impl InstanceClock {
    /// Of no interest where no token is keyed.
    pub fn read(instance: &Instance, keys: &LiveKeys, clock: &MapHandle) -> Result<Option<InstanceClock>> {
        if !keys.any()? {
            return Ok(None);
        }
        let published = published(clock)?;
        let source = Source::choose(Kernel::probe());
        let unix_s = as_seen(&published, source)?.as_secs();
        let slot_s = published.slot_ns / 1_000_000_000;
        let slot = unix_s.checked_div(slot_s).unwrap_or_default();
        Ok(Some(InstanceClock { instance: instance.name.clone(), source, unix_s, slot_s, slot }))
    }

    /// Prints it.
    pub fn print(&self, out: &mut impl Write, json: bool) -> Result<()> {
        if json {
            return Ok(writeln!(out, "{}", serde_json::to_string(self)?)?);
        }
        let InstanceClock { source, unix_s, slot_s, slot, .. } = self;
        let time = humantime::format_rfc3339_seconds(SystemTime::UNIX_EPOCH + Duration::from_secs(*unix_s));
        writeln!(
            out,
            "  keyed tokens go by {}, which makes it {time}: slot {slot} of {slot_s} s",
            source.name()
        )?;
        Ok(())
    }
}
