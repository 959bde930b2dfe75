//! Keyed tokens as the classifier stamps them: held against the library, which makes them without the kernel.

use std::mem::offset_of;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use netoken::clock;
use netoken::kernel::Kernel;
use netoken::keys::{Key, RingName, Secret, rotate};
use netoken::program::{Maps, Settings};
use netoken::token::Token;
use netoken::token::keyed::{Bind, Flow, Slots, Stamp, Verifier, make};
use netoken::types::{KeyState, Verdict};

use crate::packet::{LINUX, Packet, syn};
use crate::random::Random;
use crate::run::{Bench, How};
use crate::support::{Hex, ensure_eq, share_of};

/// As many as the issue asks for at least.
const FLOWS: usize = 60_000;
/// Flows between two changes of the policy, and policies between two changes of the keys.
const FLOWS_A_POLICY: usize = 60;
const POLICIES_A_KEY_SET: usize = 40;

const NS: u64 = 1_000_000_000;

pub fn ring(number: usize) -> RingName {
    format!("ring-{number}").parse().expect("a name")
}

pub fn random_secret(random: &mut Random) -> Secret {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&random.next().to_le_bytes());
    bytes[8..].copy_from_slice(&random.next().to_le_bytes());
    Secret::from_bytes(&bytes)
}

/// One signing key for each of the sixteen ids, each in a ring of its own.
fn sixteen_keys(random: &mut Random) -> Result<Vec<Key>> {
    let mut keys = Vec::new();
    for id in 0..16 {
        keys.push(Key::new(ring(id), id as u8, random_secret(random), SystemTime::UNIX_EPOCH)?);
    }
    for id in 0..16 {
        rotate::sign(&mut keys, ring(id))?;
    }
    Ok(keys)
}

/// Makes it slot `slot` for the kernel, `into` behind its beginning.
pub fn set_clock(maps: &Maps, slot: u64, length_s: u32, into: Duration) -> Result<()> {
    let source = clock::Source::choose(Kernel::probe());
    let mut clock = netoken::types::Clock { slot_ns: u64::from(length_s) * NS, ..Default::default() };
    let wanted = slot * clock.slot_ns + into.as_nanos() as u64;
    let raw = clock::as_seen(&clock, source)?.as_nanos() as u64;
    let offset = wanted.wrapping_sub(raw).cast_signed();
    (clock.tai_offset_ns, clock.boot_offset_ns) = (offset, offset);
    (clock.slots_behind, clock.slots_ahead) = (1, 1);
    clock::write(&maps.clock, &clock)
}

pub fn random_packet(random: &mut Random) -> Packet {
    let v6 = random.below(2) == 0;
    let mut packet = syn().family(v6);
    if v6 {
        let mut addr = || {
            let bits = u128::from(random.next()) << 64 | u128::from(random.next());
            // An IPv4-mapped address is never on the wire.
            IpAddr::from(Ipv6Addr::from_bits(bits | 1 << 127))
        };
        (packet.src, packet.dst) = (addr(), addr());
    } else {
        let mut addr = || IpAddr::from(Ipv4Addr::from_bits((random.next() >> 32) as u32));
        (packet.src, packet.dst) = (addr(), addr());
    }
    (packet.sport, packet.dport) = (random.next() as u16, random.next() as u16);
    packet.isn = (random.next() >> 32) as u32;
    packet
}

pub fn flow_of(packet: &Packet) -> Result<Flow> {
    Flow::new((packet.src, packet.sport).into(), (packet.dst, packet.dport).into(), packet.isn)
}

/// The packet with the token as its last option.
fn with_token(packet: &Packet, token: Token) -> Packet {
    let option = [&packet.options[..], &[253, 12, 0x4e, 0x54], &token.0].concat();
    packet.clone().options(&option)
}

fn policy(tag: u16, ring: RingName, bind: Bind) -> String {
    format!("default = {{ action = 'stamp', token = {{ tag = {tag}, key = '{ring}', bind = '{bind}' }} }}")
}

pub fn kernel_and_library_make_the_same_token() -> Result<()> {
    let mut random = Random::seeded()?;
    let mut bench = Bench::load(Settings::default())?;
    let mut keys = Vec::new();
    let mut seen = std::collections::BTreeMap::new();
    let flows = share_of(FLOWS)? / FLOWS_A_POLICY * FLOWS_A_POLICY;
    for round in 0..flows / FLOWS_A_POLICY {
        if round % POLICIES_A_KEY_SET == 0 {
            keys = sixteen_keys(&mut random)?;
            bench.program.maps.keys.load(&keys)?;
        }
        let (id, tag) = (random.below(16), random.next() as u16);
        let bind = *random.one_of(&Bind::ALL);
        // Far from the edges, so that the time that the round takes does not matter.
        let slot = random.next() >> 36;
        set_clock(&bench.program.maps, slot, 16, Duration::from_secs(2))?;
        bench.set_policy(&policy(tag, ring(id), bind))?;
        let secret = keys[id].secret().context("no secret")?;
        let stamp = Stamp { tag, key_id: id as u8, bind, slot: slot as u32 };
        for _ in 0..FLOWS_A_POLICY {
            let packet = random_packet(&mut random);
            let frame = packet.build();
            let outcome = bench.run(&frame, How::default())?;
            let expected = with_token(&packet, make(secret, stamp, &flow_of(&packet)?)).build();
            ensure!(
                outcome.verdict == Some(Verdict::VERDICT_STAMPED) && outcome.frame == expected,
                "{stamp:?}\n  in       {}\n  out      {}\n  expected {}",
                Hex(&frame),
                Hex(&outcome.frame),
                Hex(&expected)
            );
            *seen.entry((bind.name(), packet.src.is_ipv4())).or_insert(0) += 1;
        }
    }
    println!("tokens that are alike, by bind mode and family (true is IPv4): {seen:?}");
    ensure!(seen.len() == 6 && seen.values().sum::<usize>() == flows, "{seen:?}");
    Ok(())
}

/// A classifier with one key, and what it stamps.
pub struct Stamper {
    pub bench: Bench,
    pub keys: Vec<Key>,
}

impl Stamper {
    pub fn new(bind: Bind) -> Result<Stamper> {
        let bench = Bench::load(Settings::default())?;
        let mut keys = vec![Key::new(ring(1), 5, Secret::random()?, SystemTime::UNIX_EPOCH)?];
        rotate::sign(&mut keys, ring(1))?;
        bench.program.maps.keys.load(&keys)?;
        bench.set_policy(&policy(17, ring(1), bind))?;
        Ok(Stamper { bench, keys })
    }

    pub fn token_for(&mut self, packet: &Packet) -> Result<Token> {
        let outcome = self.bench.run(&packet.build(), How::default())?;
        ensure_eq!(outcome.verdict, Some(Verdict::VERDICT_STAMPED), "verdict");
        let at = packet.tcp_at() + 20 + packet.options.len() + 4;
        let bytes = outcome.frame.get(at..at + 8).context("no token")?;
        Ok(Token(bytes.try_into()?))
    }

    /// The slot that the library finds in a token, by what it accepts at `unix`.
    fn slot_of(&self, packet: &Packet, token: Token, unix: Duration, slots: Slots) -> Result<u32> {
        let verifier = Verifier { keys: &self.keys, slots, binds: &Bind::ALL };
        match verifier.check(token, &flow_of(packet)?, unix) {
            Ok(valid) => Ok(valid.slot),
            Err(refusal) => bail!("{token} at {unix:?}: {refusal}"),
        }
    }
}

/// Just before and just behind the edges of slots, among them those at which the four bits begin anew.
pub fn slots_change_at_their_edges_and_wrap() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Flow)?;
    let packet = syn().options(LINUX);
    let margin = Duration::from_millis(200);
    for length_s in [1, 16, 3600] {
        let slots = Slots::new(length_s, 1, 1)?;
        let length = Duration::from_secs(length_s.into());
        for slot in [100u32, 111, 112, 127, 128, (1 << 20) - 1, 112_203_119, u32::MAX - 1] {
            // The kernel counts nanoseconds in 63 bits.
            if u64::from(slot) * u64::from(length_s) > 9_000_000_000 {
                continue;
            }
            for (into, expected) in [
                (Duration::from_millis(20), slot),
                (margin, slot),
                (length - margin, slot),
                // The clock is read once in a tick, which is 10 ms at most.
                (length + Duration::from_millis(20), slot + 1),
            ] {
                // The clock goes on meanwhile.
                let mut tries = 0;
                let token = loop {
                    let began = Instant::now();
                    set_clock(&stamper.bench.program.maps, slot.into(), length_s, into)?;
                    let token = stamper.token_for(&packet)?;
                    if began.elapsed() < margin / 2 {
                        break token;
                    }
                    tries += 1;
                    ensure!(tries < 50, "this machine is too slow to stamp in {:?}", margin / 2);
                };
                let unix = Duration::from_secs(u64::from(slot) * u64::from(length_s)) + into;
                let found = stamper.slot_of(&packet, token, unix, slots)?;
                ensure_eq!(found, expected, "slot of {length_s} s, {into:?} behind the beginning of {slot}");
                ensure_eq!(token.0[2], 5 << 4 | (expected & 15) as u8, "key id and slot in {token}");
            }
        }
    }
    Ok(())
}

/// The wall clock is set; what user space publishes then makes the next token right. Nothing is sticky.
pub fn a_stepped_clock_is_followed_both_ways() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Server)?;
    let packet = syn().v6();
    let maps = &stamper.bench.program.maps;
    let mut published = clock::published(&maps.clock)?;
    let slots = Slots::default();
    let (tai, boot) = (published.tai_offset_ns, published.boot_offset_ns);
    for step_s in [0, 16, -16, 37, 3600, -3600, 86_400 * 365, -86_400 * 365, 0] {
        published.tai_offset_ns = tai + step_s * NS as i64;
        published.boot_offset_ns = boot + step_s * NS as i64;
        clock::write(&stamper.bench.program.maps.clock, &published)?;
        let unix = clock::now().checked_add_signed(step_s)?;
        let token = stamper.token_for(&packet)?;
        let found = stamper.slot_of(&packet, token, unix, slots)?;
        // A slot may have begun meanwhile, or since the kernel looked at its clock, which it does once in a tick.
        let (earliest, latest) = (slots.at(unix - Duration::from_millis(10)), slots.at(unix) + 1);
        ensure!((earliest..=latest).contains(&found), "slot {found} after a step of {step_s} s");
        // A checker whose clock was not stepped accepts it only if the step is within its window.
        let unstepped = stamper.slot_of(&packet, token, clock::now(), slots);
        if step_s.abs() >= 48 {
            ensure!(unstepped.is_err(), "accepted in spite of a step of {step_s} s");
        }
        if step_s.abs() <= 16 && step_s >= 0 {
            unstepped?;
        }
    }
    // What every command and every stream does puts it right again.
    published.tai_offset_ns = tai + 3600 * NS as i64;
    published.boot_offset_ns = boot + 3600 * NS as i64;
    clock::write(&stamper.bench.program.maps.clock, &published)?;
    ensure!(clock::publish(&stamper.bench.program.maps.clock, None)?, "a wrong clock was left as it is");
    ensure!(!clock::publish(&stamper.bench.program.maps.clock, None)?, "a right clock was set again");
    let token = stamper.token_for(&packet)?;
    stamper.slot_of(&packet, token, clock::now(), slots).map(drop)
}

trait Step: Sized {
    fn checked_add_signed(self, seconds: i64) -> Result<Self>;
}

impl Step for Duration {
    fn checked_add_signed(self, seconds: i64) -> Result<Duration> {
        let by = Duration::from_secs(seconds.unsigned_abs());
        let moved = if seconds < 0 { self.checked_sub(by) } else { self.checked_add(by) };
        moved.context("before 1970")
    }
}

pub fn a_rule_without_a_signing_key_leaves_the_syn_as_it_came() -> Result<()> {
    let mut bench = Bench::load(Settings::default())?;
    let mut keys = vec![Key::new(ring(1), 0, Secret::random()?, SystemTime::UNIX_EPOCH)?];
    for (what, has_key) in [("no key", false), ("a key that only verifies", true)] {
        if has_key {
            bench.program.maps.keys.load(&keys)?;
        }
        for when_full in ["pass", "drop"] {
            bench.set_policy(&format!(
                "[default]\naction = 'stamp'\nwhen_full = '{when_full}'\n\
                 token = {{ tag = 1, key = '{}', bind = 'flow' }}",
                ring(1)
            ))?;
            for packet in [syn().options(LINUX), syn().v6()] {
                let frame = packet.build();
                bench.expect_untouched(what, &frame, Verdict::VERDICT_NO_KEY, when_full == "drop")?;
            }
        }
    }
    rotate::sign(&mut keys, ring(1))?;
    bench.program.maps.keys.load(&keys)?;
    let outcome = bench.run(&syn().build(), How::default())?;
    ensure_eq!(outcome.verdict, Some(Verdict::VERDICT_STAMPED), "with a signing key");
    keys[0].retire();
    bench.program.maps.keys.load(&keys)?;
    bench.expect_untouched("a retired key", &syn().build(), Verdict::VERDICT_NO_KEY, true)
}

/// Both keys are known before and after; the value that says which one signs is all that changes.
pub fn another_signer_is_one_write() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Flow)?;
    let later = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
    stamper.keys.push(Key::new(ring(1), 9, Secret::random()?, later)?);
    stamper.bench.program.maps.keys.load(&stamper.keys)?;
    let packet = syn();
    ensure_eq!(stamper.token_for(&packet)?.0[2] >> 4, 5, "the signer before");
    rotate::sign(&mut stamper.keys, ring(1))?;
    stamper.bench.program.maps.keys.load(&stamper.keys)?;
    ensure_eq!(stamper.token_for(&packet)?.0[2] >> 4, 9, "the signer after");
    // The same id with another secret, which only verifies: nobody signs, with either.
    stamper.keys[1] = Key::new(ring(1), 9, Secret::random()?, later)?;
    stamper.bench.program.maps.keys.load(&stamper.keys)?;
    stamper.bench.expect_untouched("nobody signs", &packet.build(), Verdict::VERDICT_NO_KEY, false)?;
    rotate::sign(&mut stamper.keys, ring(1))?;
    stamper.bench.program.maps.keys.load(&stamper.keys)?;
    let token = stamper.token_for(&packet)?;
    stamper.slot_of(&packet, token, clock::now(), Slots::default()).map(drop)
}

pub fn a_key_counts_what_is_made_with_it() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Isn)?;
    let before = clock::now();
    ensure_eq!(stamper.bench.program.maps.keys.use_of(5)?, Default::default(), "before the first token");
    for _ in 0..7 {
        stamper.token_for(&syn())?;
    }
    let used = stamper.bench.program.maps.keys.use_of(5)?;
    ensure_eq!((used.made, used.accepted, used.accepted_at), (7, 0, None), "counted");
    let last = used.last().context("never used")?.duration_since(SystemTime::UNIX_EPOCH)?;
    let tolerance = Duration::from_millis(50);
    ensure!(last + tolerance >= before && last <= clock::now() + tolerance, "last used at {last:?}");
    for id in (0..16).filter(|id| *id != 5) {
        ensure_eq!(stamper.bench.program.maps.keys.use_of(id)?.made, 0, "made with key {id}");
    }
    Ok(())
}

/// Reading it costs as much as the MAC, so it is read once in a tick; but in each.
pub fn the_clock_is_read_anew() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Isn)?;
    let mut made_at = || -> Result<SystemTime> {
        stamper.token_for(&syn())?;
        stamper.bench.program.maps.keys.use_of(5)?.made_at.context("never used")
    };
    let first = made_at()?;
    // A tick is 10 ms at most.
    thread::sleep(Duration::from_millis(50));
    let passed = made_at()?.duration_since(first).unwrap_or_default();
    ensure!(passed >= Duration::from_millis(30), "{passed:?} passed by the clock of the classifier");
    Ok(())
}

/// As the kernel may have it for a moment, while an update of a key that signs is under way.
pub fn a_signer_that_is_not_whole_makes_no_token() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Flow)?;
    stamper.token_for(&syn())?;
    let map = MapHandle::try_from(&stamper.bench.program.maps.keys.keys)?;
    let (id, secret, state) = (5u32.to_ne_bytes(), 0..16, offset_of!(netoken::types::Key, state));
    let whole = map.lookup(&id, MapFlags::ANY)?.context("no key")?;
    let (mut zeros, mut retired, mut absent) = (whole.clone(), whole.clone(), whole.clone());
    zeros[secret].fill(0);
    retired[state] = KeyState::KEY_RETIRED.0 as u8;
    absent[state] = KeyState::KEY_ABSENT.0 as u8;
    for (what, key) in [("zeros", zeros), ("retired", retired), ("absent", absent)] {
        map.update(&id, &key, MapFlags::ANY)?;
        stamper.bench.expect_untouched(what, &syn().build(), Verdict::VERDICT_NO_KEY, false)?;
    }
    // A half of zeros is no missing secret.
    for half in [0..8, 8..16] {
        let mut key = whole.clone();
        key[half].fill(0);
        map.update(&id, &key, MapFlags::ANY)?;
        stamper.token_for(&syn())?;
    }
    Ok(())
}

/// Of what was there before: what nobody had is not lost.
pub fn only_what_a_ring_had_is_told_as_lost() -> Result<()> {
    let keys = |signs: &[usize]| -> Result<Vec<Key>> {
        let key = |at: usize| Key::new(ring(at), at as u8, Secret::random()?, SystemTime::UNIX_EPOCH);
        let mut keys = [1, 2].into_iter().map(key).collect::<Result<Vec<Key>>>()?;
        signs.iter().try_for_each(|at| rotate::sign(&mut keys, ring(*at)).map(drop))?;
        Ok(keys)
    };
    let bench = Bench::load(Settings::default())?;
    let live = &bench.program.maps.keys;
    // Ring 3 has a number, and never had a key.
    live.ring_number(ring(3))?;
    live.load(&keys(&[1])?)?;
    let lost = |keys: &[Key]| -> Result<[Vec<RingName>; 2]> {
        let losses = live.losses(keys)?;
        Ok([losses.signing, losses.all].map(|rings| rings.into_iter().collect()))
    };
    ensure_eq!(lost(&keys(&[1])?)?, [vec![], vec![]], "lost of the same");
    ensure_eq!(lost(&keys(&[2])?)?, [vec![ring(1)], vec![]], "lost where another signs");
    ensure_eq!(lost(&[])?, [vec![ring(1)], vec![ring(1), ring(2)]], "lost where there is no key");
    let mut retired = keys(&[1])?;
    retired[1].retire();
    ensure_eq!(lost(&retired)?, [vec![], vec![ring(2)]], "lost where one is retired");
    Ok(())
}

/// Where the token goes does not depend on what it is made of.
pub fn every_option_list_takes_a_keyed_token_as_a_static_one() -> Result<()> {
    let mut stamper = Stamper::new(Bind::Flow)?;
    set_clock(&stamper.bench.program.maps, 1000, 16, Duration::from_secs(2))?;
    let mut fixed = Bench::load(Settings::default())?;
    for words in 0..=10 {
        for packet in [syn(), syn().v6(), syn().vlan(7), syn().payload(100)] {
            let packet = packet.options(&vec![1; words * 4]);
            let frame = packet.build();
            let keyed = stamper.bench.run(&frame, How::default())?;
            let secret = stamper.keys[0].secret().context("no secret")?;
            let stamp = Stamp { tag: 17, key_id: 5, bind: Bind::Flow, slot: 1000 };
            let token = make(secret, stamp, &flow_of(&packet)?);
            fixed.set_policy(&format!("default = {{ action = 'stamp', token = '{token}' }}"))?;
            let expected = fixed.run(&frame, How::default())?;
            ensure_eq!(keyed.verdict, expected.verdict, "{words} words");
            ensure_eq!(Hex(&keyed.frame).to_string(), Hex(&expected.frame).to_string(), "{words} words");
        }
    }
    Ok(())
}
