//! Frames that nobody describes: cut off at every byte, and changed at random. The oracle judges them all.

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};

use crate::packet::{AO, LINUX, MD5, MSS, Packet, STAMP, syn};
use crate::run::{Bench, name};
use crate::support::share_of;
use crate::table::{ODDS, Odd, PADDINGS, networks, option_list};
use netoken::program::LinkHeader;

const FRAME_MIN: usize = 14;
const MUTANTS: usize = 40_000;

/// BPF_PROG_TEST_RUN refuses an IP header that is not whole behind the first 14 bytes, whatever these are.
fn kernel_takes(frame: &[u8]) -> bool {
    let len_min = match frame.get(12..14) {
        Some([0x08, 0x00]) => FRAME_MIN + 20,
        Some([0x86, 0xdd]) => FRAME_MIN + 40,
        _ => FRAME_MIN,
    };
    frame.len() >= len_min
}

fn representatives() -> Vec<(&'static str, Packet)> {
    let mut all = vec![
        ("vlan", syn().vlan(1).options(LINUX)),
        ("qinq, v6", syn().v6().tag(0x88a8, 2).vlan(1).options(LINUX)),
        ("bare v4", syn().without_link_header().options(LINUX).payload(9)),
        ("bare v6", syn().v6().without_link_header().options(LINUX)),
        ("trailer", syn().options(MSS).trailer(&[7; 9])),
        ("stamped", syn().options(&STAMP)),
    ];
    all.extend(networks().into_iter().map(|(what, packet)| (what, packet.options(LINUX).payload(5))));
    all
}

pub fn a_truncated_frame_leaves_as_it_came() -> Result<()> {
    let mut ethernet = Bench::new(LinkHeader::Ethernet)?;
    let mut bare = Bench::new(LinkHeader::None)?;
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    for (what, packet) in representatives() {
        let frame = packet.build();
        let bench = if packet.ethernet { &mut ethernet } else { &mut bare };
        for len in (FRAME_MIN..=frame.len()).filter(|len| kernel_takes(&frame[..*len])) {
            let verdict = bench.judge(&format!("{what}, {len} of {} bytes", frame.len()), &frame[..len])?;
            *verdicts.entry(name(verdict)).or_default() += 1;
        }
    }
    println!("truncation: {verdicts:?}");
    ensure!(verdicts.contains_key("malformed") && verdicts.contains_key("not a SYN"), "{verdicts:?}");
    Ok(())
}

/// Xorshift64*: small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 32) as usize) % end.max(1)
    }

    pub fn one_of<T: Clone>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())].clone()
    }
}

pub fn seed() -> Result<u64> {
    let seed = match std::env::var("NETOKEN_SEED") {
        Ok(text) => text.parse()?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
    };
    println!("random: NETOKEN_SEED={seed}");
    // Zero is the one state that xorshift never leaves.
    Ok(seed.max(1))
}

fn random_base(random: &mut Random, networks: &[(&'static str, Packet)]) -> Packet {
    let mut packet = random.one_of(networks).1;
    for _ in 0..random.below(3) {
        packet = packet.tag(random.one_of(&[0x8100, 0x88a8, 0x9100]), 5);
    }
    if random.below(4) == 0 {
        packet = packet.without_link_header();
    }
    let list = match random.below(6) {
        0 => LINUX.to_vec(),
        1 => [MSS, MD5].concat(),
        2 => [AO, &[1, 1, 0, 0]].concat(),
        _ => {
            let odd = if random.below(2) == 0 { Odd::Nothing } else { random.one_of(&ODDS) };
            option_list(random.below(11) * 4, random.one_of(&PADDINGS), odd).unwrap_or_default()
        }
    };
    let payload = random.one_of(&[0, 0, 1, 2, 37]);
    let trailer = vec![0xee; random.one_of(&[0, 0, 0, 1, 6])];
    packet.options(&list).payload(payload).trailer(&trailer)
}

/// Changes a few bytes, most of them where they hurt.
fn mutate(random: &mut Random, packet: &Packet, frame: &mut Vec<u8>) {
    const TELLING: [u8; 18] = [0, 1, 2, 3, 4, 5, 6, 12, 17, 19, 29, 40, 41, 44, 0x4e, 0x54, 253, 255];
    for _ in 0..=random.below(4) {
        let (ip, tcp) = (packet.ip_at(), packet.tcp_at());
        let last = frame.len().saturating_sub(1);
        let at = match random.below(8) {
            0 => random.below(frame.len()),
            1 => ip + random.below(tcp - ip),
            2 => tcp + 12 + random.below(2),
            3 => ip + 2 + random.below(5),
            _ => tcp + 20 + random.below(frame.len().saturating_sub(tcp + 20)),
        }
        .min(last);
        match random.below(12) {
            0 => frame.truncate(random.below(frame.len()).max(FRAME_MIN)),
            1 => frame.extend((0..random.below(20)).map(|i| (i * 37) as u8)),
            2 => frame.insert(at, random.next() as u8),
            3 if frame.len() > FRAME_MIN => drop(frame.remove(at)),
            4 => frame[at] ^= 1 << random.below(8),
            5 => frame[at] = random.next() as u8,
            6 => frame.swap(at, last.min(at + 1)),
            7 if last > at + 8 => frame.copy_within(at..at + 4, at + 4),
            _ => frame[at] = random.one_of(&TELLING),
        }
    }
}

/// Without a link header the kernel, not the bytes, says which family it is; a change here would make a frame
/// that no device can deliver.
fn keep_family(packet: &Packet, frame: &mut [u8]) {
    if !packet.ethernet {
        let v6 = packet.dst.is_ipv6();
        frame[0] = (if v6 { 0x60 } else { 0x40 }) | (frame[0] & 0xf);
        frame[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
    }
}

pub fn mutants_get_what_the_oracle_says() -> Result<()> {
    let mut random = Random(seed()?);
    let mut ethernet = Bench::new(LinkHeader::Ethernet)?;
    let mut bare = Bench::new(LinkHeader::None)?;
    let networks = networks();
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    let (mut number, mutants) = (0, share_of(MUTANTS)?);
    while number < mutants {
        let packet = random_base(&mut random, &networks);
        let mut frame = packet.build();
        mutate(&mut random, &packet, &mut frame);
        keep_family(&packet, &mut frame);
        if !kernel_takes(&frame) {
            continue;
        }
        number += 1;
        let bench = if packet.ethernet { &mut ethernet } else { &mut bare };
        let verdict = bench.judge(&format!("mutant {number}"), &frame)?;
        *verdicts.entry(name(verdict)).or_default() += 1;
    }
    println!("mutation: {mutants} mutants: {verdicts:?}");
    ensure!(verdicts.len() >= 7, "too few verdicts: {verdicts:?}");
    Ok(())
}
