//! What an event says of a packet, and that it says nothing of the one before: both are written in the same place.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use netoken::guard::events::{Reader, Seen};
use netoken::guard::program::{Kind, Settings};
use netoken::token::Token;

use crate::packet::{LINUX, Packet, syn};
use crate::races::{cpus, stay_on};
use crate::run::Bench;
use crate::table::{RULES, STATIC, with};

/// Any number: it is handed through.
const NETNS_INO: u32 = 0xf000_0001;
/// That of the loopback device, where the kernel runs packets.
const IFINDEX: u32 = 1;

/// A packet, and what is to be said of it beside its addresses: verdict, rule, and whether its addresses, its ports and its
/// token are shown.
type Case = (Packet, &'static str, u32, bool, bool, bool);

fn cases(v6: bool) -> Vec<Case> {
    let to = |port| syn().to(if v6 { "2001:db8:1::10" } else { "192.0.2.10" }, port);
    let stamped = |port| with(&to(port), LINUX, &[STATIC]);
    let mut exempt = stamped(80);
    exempt.src = if v6 { "2001:db8:86dd::2" } else { "8.0.0.2" }.parse().expect("an address");
    vec![
        (stamped(80), "valid", 2, true, true, true),
        (to(80), "missing", 2, true, true, false),
        (stamped(80).vlan(1).vlan(2).vlan(3).vlan(4), "too_deep", 1, false, false, false),
        (stamped(22), "valid", 3, true, true, true),
        (stamped(22).fragment(0, true), "fragment", 1, true, false, false),
        (stamped(5001), "valid", 4, true, true, true),
        (to(9).options(LINUX), "unprotected", 0, true, true, false),
        (stamped(5003), "scrubbed", 6, true, true, true),
        (exempt, "exempt", 2, true, true, false),
        (stamped(443).data_offset(15), "malformed", 1, true, true, false),
    ]
}

fn expected((packet, verdict, rule, shows_addrs, shows_ports, shows_token): &Case, seen: &Seen) -> Seen {
    let port = |port: u16| if *shows_ports { port } else { 0 };
    let end = |addr, number| shows_addrs.then_some((addr, port(number)).into());
    let modes = ["drop", "mark", "drop", "drop", "observe", "scrub", "observe"];
    let mode = rule.checked_sub(1).map(|at| modes[at as usize]);
    Seen {
        time: seen.time,
        netns_inode: NETNS_INO,
        ifindex: IFINDEX,
        src: end(packet.src, packet.sport),
        dst: end(packet.dst, packet.dport),
        isn: if *shows_ports { packet.isn } else { 0 },
        verdict,
        dropped: mode == Some("drop") && *verdict != "valid",
        scrubbed: packet.dport > 5000,
        mode,
        rule: *rule,
        token: shows_token.then_some(Token(STATIC)),
    }
}

/// Each case behind one that leaves as much as there is, and on the CPU where that has left it.
pub fn an_event_says_what_was_decided_and_nothing_of_the_packet_before() -> Result<()> {
    let on_one_cpu = || {
        stay_on(*cpus()?.first().context("no CPU")?)?;
        [Kind::Tc, Kind::Xdp].into_iter().try_for_each(each_says_its_own)
    };
    thread::scope(|scope| scope.spawn(on_one_cpu).join()).map_err(|_| anyhow!("it panicked"))?
}

fn each_says_its_own(kind: Kind) -> Result<()> {
    let bench = Bench::with(Settings { kind, netns_ino: NETNS_INO, ..Settings::default() }, RULES)?;
    let mut reader = Reader::open(&bench.program.maps)?;
    let full = with(&syn().to("192.0.2.10", 5001), LINUX, &[STATIC]).build();
    for case in [cases(false), cases(true)].concat() {
        bench.run_uncounted(&full)?;
        bench.run_uncounted(&case.0.build())?;
        let said = reader.read(Duration::ZERO)?;
        let [_, seen] = &said[..] else { anyhow::bail!("{} events of two packets", said.len()) };
        let expected = expected(&case, seen);
        ensure!(*seen == expected, "{kind:?}:\n  expected {expected:?}\n  got      {seen:?}");
    }
    Ok(())
}

/// The first of each verdict and then one of ten; a rare one does not drown in a frequent one.
pub fn one_of_ten_packets_makes_an_event_and_all_are_counted() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let bench = Bench::with(Settings { kind, sample: 10, ..Settings::default() }, RULES)?;
        let mut reader = Reader::open(&bench.program.maps)?;
        let (valid, missing) =
            (with(&syn().to("192.0.2.10", 22), LINUX, &[STATIC]).build(), syn().to("192.0.2.10", 22).build());
        let mut seen = |packets: usize, expected: usize| -> Result<()> {
            for number in 0..packets {
                bench.run_uncounted(&valid)?;
                if number % 5 == 0 {
                    bench.run_uncounted(&missing)?;
                }
            }
            let seen = reader.read(Duration::ZERO)?.len();
            ensure!(seen == expected, "{kind:?}: {seen} events of {packets} packets, not {expected}");
            Ok(())
        };
        seen(1, 2)?;
        seen(99, 11)?;
        let counters = bench.counters()?;
        let counted = (counters.total(), counters.dropped(), counters.events());
        ensure!(counted == (121, 21, 13), "{kind:?}: {counted:?} are counted");
    }
    Ok(())
}

pub fn without_a_reader_packets_are_counted_but_make_no_event() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let bench = Bench::new(kind, RULES)?;
        for _ in 0..3 {
            bench.run_uncounted(&syn().build())?;
        }
        let counters = bench.counters()?;
        let counted = (counters.total(), counters.events());
        ensure!(counted == (3, 0), "{kind:?}: {counted:?} are counted");
    }
    Ok(())
}
