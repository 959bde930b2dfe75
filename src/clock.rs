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
//! with the next tick of the kernel, because in each it reads the clock only once.

use std::fs;
use std::sync::OnceLock;
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

/// How far ahead of the kernel's own boot time a time namespace shows it to us.
fn boot_shift_ns() -> i64 {
    static SHIFT: OnceLock<i64> = OnceLock::new();
    *SHIFT.get_or_init(|| {
        let text = fs::read_to_string("/proc/self/timens_offsets").unwrap_or_default();
        boot_shift_in(&text).unwrap_or_default()
    })
}

/// From lines like `boottime 3600 0`: seconds and nanoseconds.
fn boot_shift_in(text: &str) -> Option<i64> {
    let line = text.lines().find_map(|line| line.strip_prefix("boottime"))?;
    let mut numbers = line.split_whitespace().map(|number| number.parse::<i64>().ok());
    Some(numbers.next()?? * NS_PER_S + numbers.next()??)
}

impl Offsets {
    fn between(unix_ns: i64, tai_ns: i64, boot_ns: i64) -> Offsets {
        // TAI and Unix time differ by whole seconds; what is beside that is the time between two readings.
        let tai_s = (unix_ns - tai_ns + NS_PER_S / 2).div_euclid(NS_PER_S);
        Offsets { tai_ns: tai_s * NS_PER_S, boot_ns: unix_ns - boot_ns }
    }

    fn measure() -> Result<Offsets> {
        let mut best: Option<(i64, Offsets)> = None;
        // The quickest of some rounds is the least disturbed one.
        for _ in 0..5 {
            let before = read_ns(ClockId::CLOCK_REALTIME)?;
            let boot = read_ns(ClockId::CLOCK_BOOTTIME)? - boot_shift_ns();
            let tai = read_ns(ClockId::CLOCK_TAI)?;
            let after = read_ns(ClockId::CLOCK_REALTIME)?;
            let offsets = Offsets::between(before + (after - before) / 2, tai, boot);
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

/// How time is cut into slots by what is published; nothing if nothing ever was.
pub fn slots(clock: &Clock) -> Option<Slots> {
    let length_s = clock.slot_ns / NS_PER_S.unsigned_abs();
    Slots::new(length_s as u32, clock.slots_behind, clock.slots_ahead).ok()
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

/// Does what [`publish`] does. Returns the slots before and now, for who has to tell of a change.
///
/// # Errors
/// The kernel refused.
pub fn change_slots(map: &MapHandle, slots: Option<Slots>) -> Result<(Option<Slots>, Option<Slots>)> {
    let before = self::slots(&published(map)?);
    publish(map, slots)?;
    Ok((before, self::slots(&published(map)?)))
}

/// Publishes it to every instance that there is, as far as this process may. Every command does that, so that it
/// must not fail for it.
pub fn publish_to_all() {
    let Ok(Some(state)) = State::find() else { return };
    for instance in state.instances().unwrap_or_default() {
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
        Source::Boottime => read_ns(ClockId::CLOCK_BOOTTIME)? - boot_shift_ns() + clock.boot_offset_ns,
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

    /// Two hosts, of which one was told the TAI offset and the other was not, agree on what time it is.
    #[test]
    fn unix_time_does_not_depend_on_the_tai_offset() {
        let unix = 1_795_249_800 * NS_PER_S + 123_456_789;
        for tai_s in [0, 10, 37, 38, -1] {
            for noise in [0, 900, -900, 400_000_000, -400_000_000] {
                let tai = unix + tai_s * NS_PER_S;
                let offsets = Offsets::between(unix, tai + noise, unix - 5 * NS_PER_S);
                assert_eq!(tai + offsets.tai_ns, unix, "offset {tai_s} s, noise {noise} ns");
                assert_eq!(offsets.boot_ns, 5 * NS_PER_S);
            }
        }
    }

    #[test]
    fn the_shift_of_a_time_namespace_is_read() {
        assert_eq!(
            boot_shift_in("monotonic           0         0\nboottime         3600       500\n"),
            Some(3600 * NS_PER_S + 500)
        );
        assert_eq!(boot_shift_in("monotonic  -7  0\nboottime  -1  999999999\n"), Some(-1));
        assert_eq!((boot_shift_in(""), boot_shift_in("boottime x 0")), (None, None));
    }

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
