//! Frames that nobody describes: cut off at every byte, and changed at random. The oracle judges them all.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};

use crate::packet::{AO, LINUX, MD5, MSS, Packet, STAMP, syn};
use crate::random::{FRAME_MIN, Random, tc_takes};
use crate::run::{Bench, name};
use crate::support::share_of;
use crate::table::{ODDS, Odd, PADDINGS, networks, option_list};
use netoken::program::LinkHeader;

const MUTANTS: usize = 40_000;

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
        for len in (FRAME_MIN..=frame.len()).filter(|len| tc_takes(&frame[..*len])) {
            let verdict = bench.judge(&format!("{what}, {len} of {} bytes", frame.len()), &frame[..len])?;
            *verdicts.entry(name(verdict)).or_default() += 1;
        }
    }
    println!("truncation: {verdicts:?}");
    ensure!(verdicts.contains_key("malformed") && verdicts.contains_key("not a SYN"), "{verdicts:?}");
    Ok(())
}

fn random_base(random: &mut Random, networks: &[(&'static str, Packet)]) -> Packet {
    let mut packet = random.one_of(networks).1.clone();
    for _ in 0..random.below(3) {
        packet = packet.tag(*random.one_of(&[0x8100, 0x88a8, 0x9100]), 5);
    }
    if random.below(4) == 0 {
        packet = packet.without_link_header();
    }
    let list = match random.below(6) {
        0 => LINUX.to_vec(),
        1 => [MSS, MD5].concat(),
        2 => [AO, &[1, 1, 0, 0]].concat(),
        _ => {
            let odd = if random.below(2) == 0 { Odd::Nothing } else { *random.one_of(&ODDS) };
            option_list(random.below(11) * 4, *random.one_of(&PADDINGS), odd).unwrap_or_default()
        }
    };
    let payload = *random.one_of(&[0, 0, 1, 2, 37]);
    let trailer = vec![0xee; *random.one_of(&[0, 0, 0, 1, 6])];
    packet.options(&list).payload(payload).trailer(&trailer)
}

pub fn mutants_get_what_the_oracle_says() -> Result<()> {
    let mut random = Random::seeded()?;
    let mut ethernet = Bench::new(LinkHeader::Ethernet)?;
    let mut bare = Bench::new(LinkHeader::None)?;
    let networks = networks();
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    let mutants = share_of(MUTANTS)?;
    for number in 1..=mutants {
        let packet = random_base(&mut random, &networks);
        let frame = random.mutant(&packet);
        let bench = if packet.ethernet { &mut ethernet } else { &mut bare };
        let verdict = bench.judge(&format!("mutant {number}"), &frame)?;
        *verdicts.entry(name(verdict)).or_default() += 1;
    }
    println!("mutation: {mutants} mutants: {verdicts:?}");
    ensure!(verdicts.len() >= 7, "too few verdicts: {verdicts:?}");
    Ok(())
}
