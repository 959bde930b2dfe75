//! A million SYNs that nobody with a key has made: random tokens, tokens of other flows, and right ones of which bits
//! were turned over.

use std::time::SystemTime;

use anyhow::{Result, ensure};
use netoken::guard::program::Kind;
use netoken::guard::types::Verdict;
use netoken::keys::{Key, Secret};
use netoken::token::keyed::{Bind, Flow, Stamp, make};

use crate::packet::{LINUX, Packet, syn};
use crate::random::Random;
use crate::run::{Bench, SLOT, keyed, name};
use crate::support::{Hex, share_of};
use crate::table::with;

const FORGED: usize = 1_000_000;
/// One right one for so many forged ones.
const GENUINE_EVERY: usize = 50;
/// After so many, both hooks have had equally many of each kind.
const ROUND: usize = 200;
const RULES: &str = "[[rule]]\nname = 'all'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'drop'\nkeys = 'edge'\nbinds = \
                     ['flow', 'server', 'isn']\n";

/// A SYN with a token that is right.
fn right(random: &mut Random) -> Result<Packet> {
    let mut packet = syn().family(random.below(2) == 0).options(LINUX);
    (packet.sport, packet.dport, packet.isn) =
        (random.next() as u16, random.next() as u16, (random.next() >> 32) as u32);
    let bind = *random.one_of(&Bind::ALL);
    let token = keyed(&packet, 1, random.next() as u16, bind, SLOT)?;
    Ok(with(&packet, LINUX, &[token.0]))
}

pub fn a_million_forged_syns_and_none_is_accepted() -> Result<()> {
    let benches = [Bench::new(Kind::Tc, RULES)?, Bench::new(Kind::Xdp, RULES)?];
    let mut random = Random::seeded()?;
    let mut genuine = right(&mut random)?;
    // Whole rounds, so that what is expected of each hook can be counted.
    let forged = share_of(FORGED / ROUND)? * ROUND;
    for at in 0..forged {
        if at % GENUINE_EVERY == 0 {
            genuine = right(&mut random)?;
            for bench in &benches {
                ensure!(!bench.run_uncounted(&genuine.build())?.0, "a right token is refused");
            }
        }
        // Half of them by the longer way that a VLAN makes them go.
        let mut packet = if at / 8 % 2 == 0 { genuine.clone() } else { genuine.clone().vlan(7) };
        let token_at = packet.options.len() - 8;
        match at % 4 {
            // Any token, mostly with a key that there is.
            0 => {
                let token = random.next().to_le_bytes();
                packet.options[token_at..].copy_from_slice(&token);
                packet.options[token_at + 2] = 1 << 4 | (SLOT as u8 & 15);
            }
            // The right one with up to three bits turned over. The same bit twice would be none.
            1 => {
                let mut bits = [random.below(64), random.below(64), random.below(64)];
                bits.sort_unstable();
                bits.iter().take(1 + random.below(3)).enumerate().for_each(|(at, bit)| {
                    if at == 0 || bits[at - 1] != *bit {
                        packet.options[token_at + bit / 8] ^= 1 << (bit % 8);
                    }
                });
            }
            // The right one on another flow: with another ISN no bind mode holds.
            2 => packet.isn ^= 1 << random.below(32),
            // The option itself, or what stands in front of it, is no longer what it was.
            _ => {
                let bit = random.below(32);
                packet.options[token_at - 4 + bit / 8] ^= 1 << (bit % 8);
            }
        }
        let frame = packet.build();
        // Half of them each, because both together take twice as long.
        let bench = &benches[at / 4 % 2];
        let (dropped, _, _) = bench.run_uncounted(&frame)?;
        ensure!(dropped, "{:?} accepts\n  {}", bench.kind, Hex(&frame));
    }
    for bench in &benches {
        let counters = bench.counters()?;
        println!("{:?}: {}", bench.kind, counters.line());
        ensure!(
            counters.of(Verdict::GUARD_VALID) == (forged / GENUINE_EVERY) as u64,
            "accepted others than the right ones"
        );
        ensure!(counters.dropped() == forged as u64 / 2, "{} were dropped", counters.dropped());
    }
    Ok(())
}

/// As a key is while it is retired: the secret goes first, and with zeros anybody can make a token.
pub fn a_key_without_its_secret_accepts_nothing() -> Result<()> {
    let nothing = Secret::from_bytes(&[0; 16]);
    let packet = syn();
    let flow = Flow::new((packet.src, packet.sport).into(), (packet.dst, packet.dport).into(), packet.isn)?;
    for (kind, bind) in [Kind::Tc, Kind::Xdp].into_iter().flat_map(|kind| Bind::ALL.map(|bind| (kind, bind)))
    {
        let mut bench = Bench::new(kind, RULES)?;
        let key = Key::new("edge".parse()?, 1, Secret::from_bytes(&[0; 16]), SystemTime::UNIX_EPOCH)?;
        bench.program.maps.keys.load(&[key])?;
        let token = make(&nothing, Stamp { tag: 17, key_id: 1, bind, slot: SLOT }, &flow);
        let outcome = bench.run(&with(&packet, LINUX, &[token.0]).build())?;
        ensure!(
            outcome.dropped && outcome.verdict == Some(Verdict::GUARD_RETIRED_KEY),
            "{kind:?}, {bind:?}: {}",
            name(outcome.verdict)
        );
    }
    Ok(())
}
