//! Packets of which random bytes are others, wherever in them: at every hook the guard decides what the oracle says.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use netoken::guard::program::Kind;

use crate::packet::{Packet, SYN, syn};
use crate::random::Random;
use crate::run::{Bench, name};
use crate::support::share_of;
use crate::table::{FLAGS, NETWORKS, OPTIONS, PLACES, RULES, compare, oracle};

const MUTANTS: usize = 30_000;

/// A packet of the table, with an ISN of its own: a token that is still right was never seen before.
fn base(random: &mut Random) -> Result<Packet> {
    let (dst4, dst6, port) = random.one_of(PLACES);
    let dst = if random.below(2) == 0 { dst4 } else { dst6 };
    let flags = if random.below(8) == 0 { random.one_of(FLAGS).1 } else { SYN };
    let mut packet = syn().to(dst, *port).flags(flags);
    packet.isn = (random.next() >> 32) as u32;
    if random.below(2) == 0 {
        packet = random.one_of(NETWORKS).1(packet);
    }
    let packet = random.one_of(OPTIONS).1(&packet)?;
    Ok(packet.payload(*random.one_of(&[0, 0, 1, 2, 37])))
}

pub fn mutants_get_what_the_oracle_says() -> Result<()> {
    let mut random = Random::seeded()?;
    let (mut tc, mut xdp) = (Bench::new(Kind::Tc, RULES)?, Bench::new(Kind::Xdp, RULES)?);
    let mut bare = Bench::new(Kind::TcLayer3, RULES)?;
    let (with_link, without_link) = (oracle(14)?, oracle(0)?);
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    let mutants = share_of(MUTANTS)?;
    for number in 1..=mutants {
        let packet = base(&mut random)?;
        let frame = random.mutant(&packet);
        let what = format!("mutant {number}");
        compare(&mut tc, &what, &frame, &with_link)?;
        compare(&mut xdp, &what, &frame, &with_link)?;
        *verdicts.entry(name(with_link.judge(&frame).verdict)).or_default() += 1;
        if packet.tags.is_empty() {
            let frame = random.mutant(&packet.without_link_header());
            compare(&mut bare, &what, &frame, &without_link)?;
        }
    }
    println!("{mutants} mutants: {verdicts:?}");
    ensure!(verdicts.len() >= 15, "too few verdicts: {verdicts:?}");
    Ok(())
}
