//! What the event buffer carries: each field of an event, and one event for each `sample` SYNs.

use std::cell::RefCell;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use libbpf_rs::{MapHandle, PerfBuffer, PerfBufferBuilder};
use netoken::counters::Counters;
use netoken::program::Settings;
use netoken::types::{Event, Verdict};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;
use plain::Plain;

use crate::packet::{ACK, LINUX, MD5, Packet, STAMP, SYN, TOKEN, syn, unknown};
use crate::run::{Bench, How};
use crate::support::ensure_eq;

/// A rule stands in front of the others, so that its number is not 1.
const POLICY: &str = r#"
default = { action = "stamp", token = "a1b2c3d4e5f60718", when_full = "drop" }

[[rule]]
name = "other"
dst = "203.0.113.0/24"
action = "skip"

[[rule]]
name = "dropped"
dst = "198.51.100.0/24"
port = 443
action = "drop"
"#;

/// Any number: it is handed through.
const NETNS_INO: u32 = 0xf000_0001;

/// An event as its bytes say it.
#[repr(transparent)]
#[derive(Clone, Copy, Default)]
struct Raw(Event);

// SAFETY: integers and arrays of them without hidden padding (`layout.rs`); every bit pattern is a value.
unsafe impl Plain for Raw {}

/// Events in the order in which they came, and how many were lost.
#[derive(Default)]
struct Log {
    events: RefCell<Vec<Event>>,
    lost: RefCell<u64>,
}

impl Log {
    fn open<'a>(&'a self, map: &'a MapHandle) -> Result<PerfBuffer<'a>> {
        Ok(PerfBufferBuilder::new(map)
            .pages(64)
            .sample_cb(|_cpu, bytes: &[u8]| {
                let mut raw = Raw::default();
                if raw.copy_from_bytes(bytes).is_ok() {
                    self.events.borrow_mut().push(raw.0);
                }
            })
            .lost_cb(|_cpu, number| *self.lost.borrow_mut() += number)
            .build()?)
    }

    fn take(&self, buffer: &PerfBuffer<'_>) -> Result<Vec<Event>> {
        buffer.consume()?;
        ensure_eq!(*self.lost.borrow(), 0, "lost events");
        Ok(self.events.take())
    }
}

/// Runs `test` on one CPU: events are sampled for each CPU on its own.
fn on_one_cpu(test: impl FnOnce() -> Result<()> + Send + 'static) -> Result<()> {
    let pinned = move || {
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let cpu = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu) == Ok(true)).context("no CPU")?;
        let mut one = CpuSet::new();
        one.set(cpu)?;
        sched_setaffinity(Pid::from_raw(0), &one).context("staying on one CPU")?;
        test()
    };
    std::thread::spawn(pinned).join().unwrap_or_else(|_| Err(anyhow!("the thread panicked")))
}

/// IPv4 addresses travel as IPv4-mapped ones.
fn mapped(addr: IpAddr) -> [u8; 16] {
    match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    }
}

fn now_ns() -> Result<u64> {
    Ok(Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64)
}

/// What an event says beside the addresses.
struct Expected {
    verdict: Verdict,
    dropped: u8,
    rule: u32,
    token: [u8; 8],
    old_len: u8,
    new_len: u8,
}

impl Expected {
    fn name(&self) -> &'static str {
        netoken::counters::verdict_name(self.verdict.0)
    }
}

fn check(event: &Event, packet: &Packet, expected: &Expected) -> Result<()> {
    let what = expected.name();
    ensure_eq!(u32::from(event.verdict), expected.verdict.0, "{what}: verdict");
    ensure_eq!(event.dropped, expected.dropped, "{what}: dropped");
    ensure_eq!(event.rule, expected.rule, "{what}: rule");
    ensure_eq!(event.token, expected.token, "{what}: token");
    ensure_eq!(event.old_options_len_bytes, expected.old_len, "{what}: old length");
    ensure_eq!(event.new_options_len_bytes, expected.new_len, "{what}: new length");
    ensure_eq!(event.netns_ino, NETNS_INO, "{what}: network namespace");
    ensure_eq!(event.ifindex, 1, "{what}: interface (loopback runs the tests)");

    let flow = event.flow;
    ensure_eq!(flow.saddr, mapped(packet.src), "{what}: source");
    ensure_eq!(flow.daddr, mapped(packet.dst), "{what}: destination");
    ensure_eq!(u16::from_be(flow.sport_be), packet.sport, "{what}: source port");
    ensure_eq!(u16::from_be(flow.dport_be), packet.dport, "{what}: destination port");
    ensure_eq!(flow.isn, packet.isn, "{what}: ISN");
    ensure_eq!(flow.family, if packet.dst.is_ipv4() { 4 } else { 6 }, "{what}: family");
    ensure_eq!(flow.pad, [0; 3], "{what}: padding of the flow");
    Ok(())
}

fn rows() -> Vec<(Packet, Expected)> {
    let row = |packet: Packet, verdict, dropped, new_len: usize| {
        let old_len = packet.options.len() as u8;
        (packet, Expected { verdict, dropped, rule: 0, token: TOKEN, old_len, new_len: new_len as u8 })
    };
    let mut rows = Vec::new();
    for v6 in [false, true] {
        let base = Packet { isn: 0xfedc_ba98, sport: 0xabcd, dport: 0x0123, ..syn().family(v6) };
        let with = |options: &[u8]| base.clone().options(options);
        rows.extend([
            row(with(LINUX), Verdict::VERDICT_STAMPED, 0, 32),
            row(with(&[]).vlan(7).payload(50), Verdict::VERDICT_STAMPED, 0, 12),
            row(with(&[1; 40]), Verdict::VERDICT_STAMPED, 0, 40),
            row(with(&unknown(32)), Verdict::VERDICT_NO_ROOM, 1, 32),
            row(with(&[MD5, &[1, 1]].concat()), Verdict::VERDICT_AUTH_OPTION, 1, 20),
            row(with(&STAMP), Verdict::VERDICT_ALREADY_STAMPED, 0, 12),
            row(with(&[200, 1, 0, 0]), Verdict::VERDICT_MALFORMED, 1, 4),
            row(with(&[]).data_offset(4), Verdict::VERDICT_MALFORMED, 1, 0),
            row(with(LINUX).fragment(0, true), Verdict::VERDICT_FRAGMENT, 1, 20),
        ]);
    }
    for (dst, verdict, dropped, rule) in
        [("203.0.113.9", Verdict::VERDICT_SKIPPED, 0, 1), ("198.51.100.9", Verdict::VERDICT_DROPPED, 1, 2)]
    {
        let (packet, expected) = row(syn().options(LINUX).to(dst, 443), verdict, dropped, 20);
        rows.push((packet, Expected { rule, token: [0; 8], ..expected }));
    }
    rows
}

pub fn an_event_says_what_happened() -> Result<()> {
    on_one_cpu(|| {
        let mut bench = Bench::load(Settings { netns_ino: NETNS_INO, ..Settings::default() })?;
        bench.set_policy(POLICY)?;
        bench.program.maps.set_reader(true)?;
        let map = MapHandle::try_from(&bench.program.maps.events)?;
        let log = Log::default();
        let buffer = log.open(&map)?;
        for (packet, expected) in rows() {
            let before = now_ns()?;
            bench.run(&packet.build(), How::default())?;
            let after = now_ns()?;
            let events = log.take(&buffer)?;
            ensure_eq!(events.len(), 1, "events for one SYN that is {}", expected.name());
            let time_ns = events[0].time_ns;
            ensure!((before..=after).contains(&time_ns), "{}: {before} {time_ns} {after}", expected.name());
            check(&events[0], &packet, &expected)?;
        }
        Ok(())
    })
}

/// The number of a rule means something only with its policy.
pub fn an_event_says_which_policy_decided() -> Result<()> {
    on_one_cpu(|| {
        let mut bench = Bench::load(Settings::default())?;
        bench.program.maps.set_reader(true)?;
        let map = MapHandle::try_from(&bench.program.maps.events)?;
        let log = Log::default();
        let buffer = log.open(&map)?;
        let no_default = "[[rule]]\nname = 'other'\ndst = '203.0.113.0/24'\naction = 'skip'\n";
        let of_all = "[[rule]]\nname = 'all'\naction = 'skip'\n";
        for (policy, generation, rule) in [
            (None, 0, 0),
            (Some(POLICY), 1, 0),
            (Some("default = { action = 'skip' }"), 2, 0),
            (Some(of_all), 3, 1),
            (Some(no_default), 0, 0),
            (Some(POLICY), 5, 0),
        ] {
            policy.map_or(Ok(()), |policy| bench.set_policy(policy))?;
            bench.run(&syn().build(), How::default())?;
            let events = log.take(&buffer)?;
            ensure_eq!(events.len(), 1, "events with {policy:?}");
            ensure_eq!(events[0].generation, generation, "the generation of {policy:?}");
            ensure_eq!(events[0].rule, rule, "the rule of {policy:?}");
        }
        Ok(())
    })
}

/// What would find no reader is not sent; the counters do not mind.
pub fn without_a_reader_syns_are_counted_but_make_no_event() -> Result<()> {
    on_one_cpu(|| {
        let mut bench = Bench::load(Settings::default())?;
        bench.set_policy(POLICY)?;
        let map = MapHandle::try_from(&bench.program.maps.events)?;
        let log = Log::default();
        let buffer = log.open(&map)?;
        for (has_reader, number) in [(None, 0), (Some(true), 1), (Some(false), 0), (Some(true), 1)] {
            has_reader.map_or(Ok(()), |on| bench.program.maps.set_reader(on))?;
            bench.expect("with or without a reader", &syn().build(), Verdict::VERDICT_STAMPED)?;
            ensure_eq!(log.take(&buffer)?.len(), number, "events with reader {has_reader:?}");
        }
        Ok(())
    })
}

pub fn what_is_not_a_syn_makes_no_event() -> Result<()> {
    on_one_cpu(|| {
        let mut bench = Bench::load(Settings::default())?;
        bench.set_policy(POLICY)?;
        bench.program.maps.set_reader(true)?;
        let map = MapHandle::try_from(&bench.program.maps.events)?;
        let log = Log::default();
        let buffer = log.open(&map)?;
        for packet in [syn().flags(ACK), syn().v6().flags(SYN | ACK), syn().fragment(3, false)] {
            bench.run(&packet.build(), How::default())?;
        }
        ensure_eq!(log.take(&buffer)?.len(), 0, "events");
        Ok(())
    })
}

pub fn one_of_ten_syns_makes_an_event_and_all_are_counted() -> Result<()> {
    on_one_cpu(|| {
        let mut bench = Bench::load(Settings { sample: 10, ..Settings::default() })?;
        bench.set_policy(POLICY)?;
        bench.program.maps.set_reader(true)?;
        let map = MapHandle::try_from(&bench.program.maps.events)?;
        let log = Log::default();
        let buffer = log.open(&map)?;
        // Every verdict is sampled on its own: a rare one does not drown in a frequent one.
        let (stamped, full) = (syn().options(LINUX).build(), syn().options(&unknown(40)).build());
        let mut events = Vec::new();
        for number in 0..100 {
            bench.run(&stamped, How::default())?;
            if number % 5 == 0 {
                bench.run(&full, How::default())?;
            }
            if number == 0 {
                events = log.take(&buffer)?;
                ensure_eq!(events.len(), 2, "events of the first of each");
            }
        }
        events.extend(log.take(&buffer)?);
        let of = |verdict: Verdict| events.iter().filter(|e| u32::from(e.verdict) == verdict.0).count();
        ensure_eq!(of(Verdict::VERDICT_STAMPED), 10, "events of 100 stamped SYNs");
        ensure_eq!(of(Verdict::VERDICT_NO_ROOM), 2, "events of 20 SYNs without room");
        ensure_eq!(events.len(), 12, "events");
        let counters = Counters::read(&bench.program.maps)?;
        ensure_eq!(counters.of(Verdict::VERDICT_STAMPED), 100, "stamped");
        ensure_eq!(counters.of(Verdict::VERDICT_NO_ROOM), 20, "without room");
        ensure_eq!(counters.total(), 120, "all");
        ensure_eq!(counters.dropped(), 20, "dropped");
        ensure_eq!(counters.events(), 12, "events, for who has to know how many are lost");
        Ok(())
    })
}
