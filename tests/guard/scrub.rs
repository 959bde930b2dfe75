//! Tokens that do not reach the host: that they are gone, that the checksum is right in every form in which it comes, and
//! what the application can ask for instead.

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapCore, MapFlags};
use netoken::guard::program::{Kind, Settings};
use netoken::guard::types::{Peer, PeerKey};
use netoken::types::Fault;

use crate::packet::{FIN, LINUX, Packet, SYN, checksum, syn};
use crate::run::{Bench, name};
use crate::table::{STATIC, source_route, with};

const RULE: &str = "[[rule]]\nname = 'a'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'drop'\nscrub = true\ntokens = \
                    'a1b2c3d4e5f60718'\n";
const EDGE: &str = "[[rule]]\nname = 'a'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'scrub'\n";

/// What the packet would be with NOPs from the start.
fn without(packet: &Packet) -> Vec<u8> {
    let mut clean = packet.clone();
    let at = clean.options.len() - 12;
    clean.options[at..].fill(1);
    clean.build()
}

/// In the frame, with the sum of the pseudo-header alone for a checksum, as the kernel leaves it to a device.
fn partial(packet: &Packet, mut frame: Vec<u8>) -> Vec<u8> {
    let at = packet.tcp_at();
    let addrs = if packet.dst.is_ipv4() { 26..34 } else { 22..54 };
    let len = ((frame.len() - at) as u32).to_be_bytes();
    let sum = !checksum(&[&frame[addrs], &len, &[0, 6]]);
    frame[at + 16..at + 18].copy_from_slice(&sum.to_be_bytes());
    frame
}

pub fn the_checksum_is_that_of_a_packet_without_a_token() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        for v6 in [false, true] {
            for before in [LINUX, &[1, 3, 3, 7], &[], &[2, 4, 5, 0xb4]] {
                for payload in [0, 1, 2, 3, 99, 100, 1400] {
                    let packet = with(&syn().family(v6), before, &[STATIC]).payload(payload);
                    let outcome = bench.run(&packet.build())?;
                    ensure!(
                        !outcome.dropped && outcome.frame == without(&packet),
                        "{kind:?}, IPv6 {v6}, {payload} bytes: {outcome:?}"
                    );
                }
            }
        }
    }
    Ok(())
}

/// Only XDP has to tell it from the packet; at TC the skb says it, which tests/end_to_end shows. 99 bytes of this payload
/// would make one of the packets in 65536 that sum up either way.
pub fn a_checksum_that_is_left_to_the_device_stays() -> Result<()> {
    let mut bench = Bench::new(Kind::Xdp, RULE)?;
    for v6 in [false, true] {
        for payload in [0, 1, 2, 3, 98, 100, 101, 1400, 3000] {
            let packet = with(&syn().family(v6), LINUX, &[STATIC]).payload(payload);
            let outcome = bench.run(&partial(&packet, packet.build()))?;
            ensure!(
                !outcome.dropped && outcome.frame == partial(&packet, without(&packet)),
                "IPv6 {v6}, {payload} bytes: {outcome:?}"
            );
        }
    }
    Ok(())
}

/// One packet in 65536 has a checksum that is right and looks as if it were left to the device.
pub fn a_whole_checksum_that_looks_partial_is_mended() -> Result<()> {
    let mut bench = Bench::new(Kind::Xdp, RULE)?;
    for v6 in [false, true] {
        for payload in [0, 3, 100, 1400] {
            let mut packet = with(&syn().family(v6), LINUX, &[STATIC]).payload(payload);
            let found = (0..=0xffff).find(|low| {
                packet.isn = 0x0102_0000 | low;
                packet.build() == partial(&packet, packet.build())
            });
            ensure!(found.is_some(), "no ISN makes it so");
            let outcome = bench.run(&packet.build())?;
            ensure!(
                !outcome.dropped && outcome.frame == without(&packet),
                "IPv6 {v6}, {payload} bytes: {outcome:?}"
            );
        }
    }
    Ok(())
}

pub fn at_the_edge_of_trust_nothing_is_refused() -> Result<()> {
    let rules = format!("exempt = ['8.0.0.1']\nblocked = ['2001:db8::/32']\n{EDGE}");
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, &rules)?;
        for v6 in [false, true] {
            let bare = syn().family(v6).options(LINUX).build();
            let outcome = bench.run(&bare)?;
            ensure!(name(outcome.verdict) == "clean" && outcome.frame == bare, "{kind:?}: {outcome:?}");
            let packet = with(&syn().family(v6), LINUX, &[[9; 8]]);
            let outcome = bench.run(&packet.build())?;
            ensure!(
                name(outcome.verdict) == "scrubbed" && outcome.frame == without(&packet),
                "{kind:?}: {outcome:?}"
            );
            let odd = [
                ("bad_flags", packet.clone().flags(SYN | FIN)),
                ("source_routed", source_route(packet.clone(), 131)),
            ];
            for (verdict, packet) in odd {
                let outcome = bench.run(&packet.build())?;
                ensure!(
                    name(outcome.verdict) == verdict && !outcome.dropped && outcome.frame == without(&packet),
                    "{kind:?}: {outcome:?}"
                );
            }
            let cut = &packet.build()[..packet.tcp_at() + 22];
            let outcome = bench.run(cut)?;
            ensure!(
                name(outcome.verdict) == "malformed" && !outcome.dropped && outcome.frame == cut,
                "{kind:?}: {outcome:?}"
            );
        }
        ensure!(peer(&bench, &syn())?.is_none(), "nobody has checked it");
    }
    Ok(())
}

pub fn what_cannot_be_scrubbed_is_dropped() -> Result<()> {
    for kind in [Kind::Tc, Kind::TcLayer3, Kind::Xdp] {
        let faults = Fault::FAULT_STORE_TCP.0;
        for rules in [RULE, EDGE, &RULE.replace("'drop'", "'observe'")] {
            let mut bench = Bench::with(Settings { kind, faults, ..Settings::default() }, rules)?;
            let mut packet = with(&syn(), LINUX, &[STATIC]);
            packet.ethernet = kind != Kind::TcLayer3;
            let outcome = bench.run(&packet.build())?;
            ensure!(name(outcome.verdict) == "not_scrubbed" && outcome.dropped, "{kind:?}: {outcome:?}");
        }
    }
    Ok(())
}

pub fn a_rule_can_mark_and_scrub() -> Result<()> {
    let rules = RULE.replace("'drop'", "'mark'\nmark = { valid = 1, refused = 2, mask = 3 }");
    let mut bench = Bench::new(Kind::Tc, &rules)?;
    for v6 in [false, true] {
        for (token, mark) in [(STATIC, 0xf1), ([9; 8], 0xf2)] {
            let packet = with(&syn().family(v6), LINUX, &[token]);
            let outcome = bench.run(&packet.build())?;
            ensure!(
                outcome.mark == mark && !outcome.dropped && outcome.frame == without(&packet),
                "IPv6 {v6}: {outcome:?}"
            );
        }
    }
    Ok(())
}

/// What the application is told of a flow.
fn peer(bench: &Bench, packet: &Packet) -> Result<Option<Peer>> {
    let octets = |addr: std::net::IpAddr| match addr {
        std::net::IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        std::net::IpAddr::V6(addr) => addr.octets(),
    };
    let key = PeerKey {
        saddr: octets(packet.src),
        daddr: octets(packet.dst),
        sport_be: packet.sport.to_be(),
        dport_be: packet.dport.to_be(),
        family: if packet.dst.is_ipv4() { 4 } else { 6 },
        ..Default::default()
    };
    // SAFETY: plain data, whose padding is spelt out.
    let bytes = unsafe { plain::as_bytes(&key) };
    let Some(value) = bench.program.maps.peers.lookup(bytes, MapFlags::ANY)? else { return Ok(None) };
    ensure!(value.len() == size_of::<Peer>(), "{} bytes", value.len());
    let u32_at = |at: usize| u32::from_ne_bytes(value[at..at + 4].try_into().expect("four bytes"));
    Ok(Some(Peer {
        time_ns: u64::from_ne_bytes(value[..8].try_into()?),
        token: value[8..16].try_into()?,
        verdict: u32_at(16),
        rule: u32_at(20),
    }))
}

pub fn the_application_can_ask_who_it_was() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let rules = RULE.replace("mode = 'drop'", "port = 443\nmode = 'observe'");
        let mut bench = Bench::new(kind, &format!("{rules}{}", RULE.replace("'a'", "'b'")))?;
        for v6 in [false, true] {
            let packet = with(&syn().family(v6), LINUX, &[STATIC]);
            let mut wrong = with(&syn().family(v6), LINUX, &[[9; 8]]);
            wrong.sport += 1;
            let mut second = packet.clone();
            second.dport += 1;
            for packet in [&packet, &wrong, &second] {
                ensure!(peer(&bench, packet)?.is_none(), "{kind:?}: told before it came");
                bench.run(&packet.build())?;
            }
            let first = peer(&bench, &packet)?.context("not told of the first")?;
            ensure!((first.token, first.verdict, first.rule) == (STATIC, 2, 1), "{kind:?}: {first:?}");
            ensure!(peer(&bench, &second)?.is_some_and(|peer| peer.rule == 2), "{kind:?}: the second rule");
            ensure!(peer(&bench, &wrong)?.is_none(), "{kind:?}: told of a token that is wrong");
            bench.run(&packet.build())?;
            let again = peer(&bench, &packet)?.context("forgotten")?;
            ensure!(again.time_ns > first.time_ns, "{kind:?}: the time of a retransmission");
        }
    }
    Ok(())
}
