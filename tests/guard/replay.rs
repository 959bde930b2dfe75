//! A token that was accepted once, on another flow.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use netoken::guard::program::Kind;
use netoken::token::keyed::Bind;

use crate::packet::{LINUX, Packet, syn};
use crate::run::{Bench, SLOT, SLOT_S, in_time, keyed, name, set_clock, set_clock_to, within};
use crate::table::with;

const RULE: &str = "[[rule]]\nname = 'a'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'drop'\nkeys = 'edge'\nbinds = ['flow', \
                    'server', 'isn']\n";

fn expect(bench: &mut Bench, what: &str, packet: &Packet, verdict: &str) -> Result<()> {
    let outcome = bench.run(&packet.build())?;
    ensure!(
        name(outcome.verdict) == verdict && outcome.dropped == (verdict != "valid"),
        "{what}: {verdict} expected, got {} {} from {:?}",
        name(outcome.verdict),
        outcome.dropped,
        bench.kind
    );
    Ok(())
}

pub fn a_token_is_good_for_one_flow_and_its_retransmissions() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        for v6 in [false, true] {
            let mut bench = Bench::new(kind, RULE)?;
            let packet = syn().family(v6);
            let first = with(&packet, LINUX, &[keyed(&packet, 1, 17, Bind::Server, SLOT)?.0]);
            let mut other_port = first.clone();
            other_port.sport += 1;
            let mut other_source = first.clone();
            other_source.src =
                if v6 { "2001:db8:86dd::9".parse()? } else { "8.0.0.9".parse::<std::net::IpAddr>()? };
            for round in 0..3 {
                let what = |what: &str| format!("{what}, round {round}");
                expect(&mut bench, &what("the first"), &first, "valid")?;
                expect(&mut bench, &what("another port"), &other_port, "replayed")?;
                expect(&mut bench, &what("another source"), &other_source, "replayed")?;
            }
            bench.set_rules(&format!("{RULE}may_repeat = true\n"))?;
            expect(&mut bench, "where it may repeat", &other_port, "valid")?;
        }
    }
    Ok(())
}

pub fn only_what_is_accepted_is_counted_as_use_of_its_key() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        let packet = syn();
        let mut copy = with(&packet, LINUX, &[keyed(&packet, 1, 17, Bind::Server, SLOT)?.0]);
        expect(&mut bench, "the first", &copy, "valid")?;
        for _ in 0..5 {
            copy.sport += 1;
            expect(&mut bench, "a copy", &copy, "replayed")?;
        }
        let accepted = bench.program.maps.keys.use_of(1)?.accepted;
        ensure!(accepted == 1, "{kind:?}: {accepted} are said to have been accepted");
    }
    Ok(())
}

pub fn the_bind_mode_leaves_something_free() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        let packet = syn();
        let first = with(&packet, LINUX, &[keyed(&packet, 1, 17, Bind::Isn, SLOT)?.0]);
        let mut elsewhere = first.clone();
        elsewhere.dport += 1;
        expect(&mut bench, "the first", &first, "valid")?;
        expect(&mut bench, "another server", &elsewhere, "replayed")?;
        // Bound to the flow it is no token of another one at all.
        let bound = with(&packet, LINUX, &[keyed(&packet, 1, 18, Bind::Flow, SLOT)?.0]);
        let mut moved = bound.clone();
        moved.sport += 1;
        expect(&mut bench, "the flow", &bound, "valid")?;
        expect(&mut bench, "another flow", &moved, "bad_mac")?;
        expect(&mut bench, "the flow again", &bound, "valid")?;
    }
    Ok(())
}

/// The same packet with one bit turned over, for each bit of the source and, if wanted, of the destination.
fn with_one_bit_turned(packet: &Packet, destination_too: bool) -> Vec<Packet> {
    let turned = |addr: IpAddr, bit: u32| match addr {
        IpAddr::V4(addr) => IpAddr::from(Ipv4Addr::from_bits(addr.to_bits() ^ 1 << bit)),
        IpAddr::V6(addr) => IpAddr::from(Ipv6Addr::from_bits(addr.to_bits() ^ 1 << bit)),
    };
    let addr_bits = if packet.src.is_ipv4() { 32 } else { 128 };
    let mut all = Vec::new();
    for bit in 0..addr_bits {
        all.push(Packet { src: turned(packet.src, bit), ..packet.clone() });
        if destination_too {
            all.push(Packet { dst: turned(packet.dst, bit), ..packet.clone() });
        }
    }
    for bit in 0..16 {
        all.push(Packet { sport: packet.sport ^ 1 << bit, ..packet.clone() });
        if destination_too {
            all.push(Packet { dport: packet.dport ^ 1 << bit, ..packet.clone() });
        }
    }
    all
}

pub fn nothing_of_what_is_free_may_differ() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        for v6 in [false, true] {
            for bind in [Bind::Server, Bind::Isn] {
                // What is bound to the ISN alone is the same for both families.
                let packet = Packet { isn: 1 + u32::from(v6), ..syn().family(v6) };
                let first = with(&packet, LINUX, &[keyed(&packet, 1, 17, bind, SLOT)?.0]);
                expect(&mut bench, "the first", &first, "valid")?;
                for other in with_one_bit_turned(&first, bind == Bind::Isn) {
                    let what = format!("{bind:?}, from {} {}", other.src, other.sport);
                    expect(&mut bench, &what, &other, "replayed")?;
                    expect(&mut bench, "a retransmission", &first, "valid")?;
                }
            }
        }
    }
    Ok(())
}

/// Nobody else can use such a token, so it is not remembered.
pub fn what_is_bound_to_the_flow_needs_no_room() -> Result<()> {
    let packets = in_one_bucket(12, Bind::Flow)?;
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        for packet in packets.iter().chain(&packets) {
            expect(&mut bench, "one of many", packet, "valid")?;
        }
        for other in with_one_bit_turned(&packets[0], true) {
            expect(&mut bench, "on another flow", &other, "bad_mac")?;
        }
    }
    Ok(())
}

/// As long as its slot is accepted, a token stays the token of the flow that it came with, whatever the wall clock says.
pub fn a_clock_that_is_set_makes_nothing_good_again() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        let packet = syn();
        let first = with(&packet, LINUX, &[keyed(&packet, 1, 17, Bind::Server, SLOT)?.0]);
        let other = Packet { sport: first.sport + 1, ..first.clone() };
        expect(&mut bench, "the first", &first, "valid")?;
        for (slot, is_accepted) in
            [(SLOT + 1, true), (SLOT - 1, true), (SLOT + 2, false), (SLOT - 2, false), (SLOT, true)]
        {
            set_clock_to(&bench.program.maps, SLOT_S, slot)?;
            let what = format!("in slot {slot}");
            if is_accepted {
                expect(&mut bench, &what, &other, "replayed")?;
                expect(&mut bench, &what, &first, "valid")?;
            } else {
                let refused = if slot > SLOT { "stale_slot" } else { "future_slot" };
                expect(&mut bench, &what, &other, refused)?;
            }
        }
    }
    Ok(())
}

/// SYNs whose tokens fall into one bucket, which goes by the first two bytes of the MAC.
pub fn in_one_bucket(count: usize, bind: Bind) -> Result<Vec<Packet>> {
    let mut found: Vec<Packet> = Vec::new();
    let mut bucket = None;
    for isn in 0..u32::MAX {
        let mut packet = syn();
        packet.isn = isn;
        let token = keyed(&packet, 1, 17, bind, SLOT)?;
        if *bucket.get_or_insert([token.0[3], token.0[4]]) == [token.0[3], token.0[4]] {
            found.push(with(&packet, LINUX, &[token.0]));
        }
        if found.len() == count {
            return Ok(found);
        }
    }
    bail!("there are not so many")
}

pub fn a_full_bucket_refuses_and_forgets_in_time() -> Result<()> {
    const WAYS: usize = 8;
    let packets = in_one_bucket(WAYS + 1, Bind::Server)?;
    let (last, others) = packets.split_last().expect("nine");
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        // An hour is remembered, as long as slots last.
        for packet in others {
            expect(&mut bench, "one that has room", packet, "valid")?;
        }
        expect(&mut bench, "one that has none", last, "seen_full")?;
        expect(&mut bench, "a retransmission", &others[0], "valid")?;

        in_time(|| forgets_in_time(kind, others, last))?;
    }
    Ok(())
}

fn forgets_in_time(kind: Kind, others: &[Packet], last: &Packet) -> Result<Option<()>> {
    const SLOT_LEN: Duration = Duration::from_secs(1);
    let mut bench = Bench::new(kind, RULE)?;
    let filled = within(SLOT_LEN, || {
        set_clock(&bench.program.maps, 1)?;
        let began = Instant::now();
        for packet in others {
            expect(&mut bench, "one that has room", packet, "valid")?;
        }
        expect(&mut bench, "one that has none", last, "seen_full")?;
        Ok(began)
    })?;
    let Some(began) = filled else { return Ok(None) };
    // The slot is held where it is, while the time in which they are remembered goes by.
    let waited = loop {
        let asked = within(SLOT_LEN, || {
            set_clock(&bench.program.maps, 1)?;
            bench.run(&last.build())
        })?;
        let Some(outcome) = asked else { return Ok(None) };
        match name(outcome.verdict) {
            "valid" => break began.elapsed(),
            "seen_full" => {}
            other => bail!("{other} after {:?}", began.elapsed()),
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "nothing is forgotten");
        std::thread::sleep(Duration::from_millis(10));
    };
    ensure!(waited >= Duration::from_secs(3), "forgotten after {waited:?}, while its slots were accepted");
    Ok(Some(()))
}
