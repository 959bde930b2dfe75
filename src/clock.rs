//! The wall clock of the classifier. BPF can read clocks, but not the wall clock; what has to be added to one of
//! them is published here, in the map `clock` of an instance, beside how time is cut into slots.
//!
//! | kernel | clock | what makes it wrong while no process of ours runs |
//! |---|---|---|
//! | 6.1 and later | CLOCK_TAI | the time daemon tells the kernel of the TAI offset, once after booting: 37 s |
//! | before | CLOCK_BOOTTIME | a step of the wall clock: as much as it is stepped |
//! | all | | a leap second that is not smeared: 1 s |
//!
//! Nothing else does: when NTP slews the wall clock, it slews both of these with it, and both go on while the
//! machine sleeps, which CLOCK_MONOTONIC does not. A step moves CLOCK_TAI with the wall clock; a program notices
//! within a quarter of a second, because it reads a cheaper clock in between.

use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use nix::time::{ClockId, clock_gettime};
use plain::Plain;
use serde::Serialize;

use crate::kernel::Kernel;
use crate::state::State;
use crate::token::keyed::Slots;
use crate::types::Clock;

// SAFETY: integers without hidden padding, which keys.h asserts.
unsafe impl Plain for Clock {}

const _: () = assert!(size_of::<Clock>() == 32);

const NS_PER_S: i64 = 1_000_000_000;
/// Reading two clocks one after the other is not exact; less than this is no step.
const NOISE_NS: u64 = 1_000_000;

/// Which clock a program reads on this kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Source {
    /// CLOCK_TAI, which follows the steps of the wall clock.
    Tai,
    /// CLOCK_BOOTTIME, which does not.
    Boottime,
}

impl Source {
    /// What the running kernel allows.
    pub fn choose(kernel: &Kernel) -> Source {
        if kernel.has_tai { Source::Tai } else { Source::Boottime }
    }

    /// As clock_gettime(2) calls it.
    pub fn name(self) -> &'static str {
        match self {
            Source::Tai => "CLOCK_TAI",
            Source::Boottime => "CLOCK_BOOTTIME",
        }
    }
}

/// What has to be added to a clock to get Unix time, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Offsets {
    tai_ns: i64,
    boot_ns: i64,
}

fn read_ns(clock: ClockId) -> Result<i64> {
    let time = clock_gettime(clock).context("reading a clock")?;
    Ok(time.tv_sec() * NS_PER_S + time.tv_nsec())
}

impl Offsets {
    fn measure() -> Result<Offsets> {
        let mut best: Option<(i64, Offsets)> = None;
        // The quickest of some rounds is the least disturbed one.
        for _ in 0..5 {
            let before = read_ns(ClockId::CLOCK_REALTIME)?;
            let boot = read_ns(ClockId::CLOCK_BOOTTIME)?;
            let tai = read_ns(ClockId::CLOCK_TAI)?;
            let after = read_ns(ClockId::CLOCK_REALTIME)?;
            let unix = before + (after - before) / 2;
            // The difference is always whole seconds.
            let tai_s = (unix - tai + if unix < tai { -NS_PER_S / 2 } else { NS_PER_S / 2 }) / NS_PER_S;
            let offsets = Offsets { tai_ns: tai_s * NS_PER_S, boot_ns: unix - boot };
            let took = (after - before).unsigned_abs() as i64;
            if best.is_none_or(|(quickest, _)| took < quickest) {
                best = Some((took, offsets));
            }
        }
        best.map(|(_, offsets)| offsets).context("reading the clocks")
    }
}

/// What is published now; zeros if nothing ever was.
///
/// # Errors
/// The kernel refused to be read.
pub fn published(map: &MapHandle) -> Result<Clock> {
    let bytes = map
        .lookup(&0u32.to_ne_bytes(), MapFlags::ANY)
        .context("reading the clock of the classifier")?
        .context("the classifier has no clock")?;
    let mut clock = Clock::default();
    clock.copy_from_bytes(&bytes).map_err(|_| anyhow!("the classifier's clock has a strange size"))?;
    Ok(clock)
}

/// Publishes what the wall clock is now and, if they are given, how long slots are; what is not given stays, or
/// becomes the default. True if anything had to be changed.
///
/// # Errors
/// The kernel refused.
pub fn publish(map: &MapHandle, slots: Option<Slots>) -> Result<bool> {
    let old = published(map)?;
    let offsets = Offsets::measure()?;
    let mut new = old;
    if offsets.tai_ns.abs_diff(old.tai_offset_ns) > NOISE_NS {
        new.tai_offset_ns = offsets.tai_ns;
    }
    if offsets.boot_ns.abs_diff(old.boot_offset_ns) > NOISE_NS {
        new.boot_offset_ns = offsets.boot_ns;
    }
    if let Some(slots) = slots.or((old.slot_ns == 0).then(Slots::default)) {
        new.slot_ns = u64::from(slots.length_s()) * NS_PER_S as u64;
        new.slots_behind = slots.behind();
        new.slots_ahead = slots.ahead();
    }
    // SAFETY: plain data without padding.
    let same = unsafe { plain::as_bytes(&new) == plain::as_bytes(&old) };
    if !same {
        write(map, &new)?;
    }
    Ok(!same)
}

/// Makes the classifier believe that. Outside of tests, [`publish`] is what one wants.
///
/// # Errors
/// The kernel refused.
pub fn write(map: &MapHandle, clock: &Clock) -> Result<()> {
    // SAFETY: plain data without padding.
    let bytes = unsafe { plain::as_bytes(clock) };
    map.update(&0u32.to_ne_bytes(), bytes, MapFlags::ANY).context("setting the clock of the classifier")
}

/// Publishes it to every instance that there is, as far as this process may. Every command does that, so that it
/// must not fail for it.
pub fn publish_to_all() {
    let Ok(Some(state)) = State::find() else { return };
    for instance in state.instances() {
        // One of another layout is not ours to write to.
        let map = MapHandle::from_pinned_path(instance.pins.join("clock"));
        if let Some(map) = map.ok().filter(|map| map.value_size() as usize == size_of::<Clock>()) {
            publish(&map, None).ok();
        }
    }
}

/// The wall clock as the classifier would compute it now.
///
/// # Errors
/// A clock cannot be read.
pub fn as_seen(clock: &Clock, source: Source) -> Result<Duration> {
    let ns = match source {
        Source::Tai => read_ns(ClockId::CLOCK_TAI)? + clock.tai_offset_ns,
        Source::Boottime => read_ns(ClockId::CLOCK_BOOTTIME)? + clock.boot_offset_ns,
    };
    Ok(Duration::from_nanos(ns.max(0) as u64))
}

/// The wall clock.
pub fn now() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_clocks_and_their_offsets_make_the_wall_clock() {
        let offsets = Offsets::measure().unwrap();
        let clock =
            Clock { tai_offset_ns: offsets.tai_ns, boot_offset_ns: offsets.boot_ns, ..Default::default() };
        for source in [Source::Tai, Source::Boottime] {
            let (seen, now) = (as_seen(&clock, source).unwrap(), now());
            let off = now.abs_diff(seen);
            // Generous for a machine under load; a wrong offset is off by a second or more.
            assert!(off < Duration::from_millis(500), "{source:?} is off by {off:?}");
        }
        assert_eq!(offsets.tai_ns % NS_PER_S, 0);
    }
}
