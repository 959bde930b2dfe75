//! Sources that are blocked because they were refused too often: what blocks them, what does not, and that nobody can
//! lock out who has a right token or needs none.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use netoken::guard::blocked::{Blocked, read, unblock};
use netoken::guard::program::Kind;
use netoken::token::keyed::Bind;

use crate::packet::{DST6, LINUX, Packet, syn};
use crate::replay::in_one_bucket;
use crate::run::{Bench, SLOT, in_time, keyed, name, set_clock, within};
use crate::table::{STATIC, with};

/// More refused packets than these block a source.
const REFUSED: usize = 3;
const KINDS: [Kind; 2] = [Kind::Tc, Kind::Xdp];

fn rules(more: &str, mode: &str) -> String {
    format!(
        "auto_block = {{ refused = {REFUSED}, within = '1h', block_for = '1h'{more} }}\n[[rule]]\nname = 'a'\ndst = \
         ['0.0.0.0/0', '::/0']\nmode = '{mode}'\nkeys = 'edge'\ntokens = 'a1b2c3d4e5f60718'\nbinds = ['flow', \
         'server', 'isn']\n"
    )
}

fn from(src: &str) -> Packet {
    let mut packet = syn().options(LINUX);
    packet.src = src.parse().expect("an address");
    if packet.src.is_ipv6() {
        packet.dst = DST6.into();
    }
    packet
}

fn expect(bench: &mut Bench, packet: &Packet, verdict: &str) -> Result<()> {
    let outcome = bench.run(&packet.build())?;
    ensure!(
        name(outcome.verdict) == verdict,
        "{} from {:?}: {verdict} expected, got {}",
        packet.src,
        bench.kind,
        name(outcome.verdict)
    );
    Ok(())
}

/// As many as are too many; the last of them still gets its own verdict.
fn flood(bench: &mut Bench, src: &str) -> Result<()> {
    (0..=REFUSED).try_for_each(|_| expect(bench, &from(src), "missing"))
}

fn blocked(bench: &Bench) -> Result<Vec<String>> {
    let mut found: Vec<String> =
        read(&bench.program.maps)?.iter().map(|blocked| blocked.src.to_string()).collect();
    found.sort();
    Ok(found)
}

pub fn too_many_refused_packets_block_their_source_and_no_other() -> Result<()> {
    for kind in KINDS {
        let mut bench = Bench::new(kind, &rules("", "drop"))?;
        for (bad, neighbour, other) in
            [("8.0.0.1", "8.0.0.1", "8.0.0.2"), ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1")]
        {
            for _ in 0..REFUSED {
                expect(&mut bench, &from(bad), "missing")?;
            }
            ensure!(!blocked(&bench)?.iter().any(|src| src.starts_with(bad)), "blocked too early");
            // Whatever it is refused for.
            expect(&mut bench, &with(&from(neighbour), &[], &[[9; 8], [9; 8]]), "duplicate")?;
            for src in [bad, neighbour] {
                expect(&mut bench, &from(src), "auto_blocked")?;
                expect(&mut bench, &with(&from(src), LINUX, &[STATIC]), "auto_blocked")?;
            }
            expect(&mut bench, &from(other), "missing")?;
            expect(&mut bench, &with(&from(other), LINUX, &[STATIC]), "valid")?;
        }
        ensure!(blocked(&bench)? == ["2001:db8::/64", "8.0.0.1/32"], "{:?}", blocked(&bench)?);
        let all = read(&bench.program.maps)?;
        ensure!(all.iter().all(|blocked| blocked.refused == 4), "{all:?}");
        let ends = |blocked: &Blocked| blocked.until.duration_since(std::time::SystemTime::now());
        for blocked in &all {
            let left = ends(blocked).context("it has ended")?;
            ensure!(left > Duration::from_secs(3500) && left <= Duration::from_secs(3600), "{left:?}");
        }
    }
    Ok(())
}

/// Anybody can write the address of somebody else into a SYN.
pub fn a_source_that_is_blocked_gets_in_with_a_keyed_token() -> Result<()> {
    for kind in KINDS {
        for v6 in [false, true] {
            let mut bench = Bench::new(kind, &rules("", "drop"))?;
            let packet = syn().family(v6);
            let src = packet.src.to_string();
            flood(&mut bench, &src)?;
            for (at, bind) in Bind::ALL.into_iter().enumerate() {
                let mut packet = packet.clone();
                packet.sport += at as u16;
                let right = with(&packet, LINUX, &[keyed(&packet, 1, 17, bind, SLOT)?.0]);
                expect(&mut bench, &right, "valid")?;
                let mut wrong = right.clone();
                wrong.isn ^= 1;
                expect(&mut bench, &wrong, "auto_blocked")?;
            }
            expect(&mut bench, &packet, "auto_blocked")?;
        }
    }
    Ok(())
}

/// Also if it shares the prefix of one that is blocked, and if what it sends would be refused.
pub fn who_is_exempt_is_never_blocked() -> Result<()> {
    for kind in KINDS {
        let rules = format!(
            "exempt = ['8.0.0.1', '2001:db8::1']\nblocked = ['8.0.9.0/24']\n{}",
            rules(", v4_bits = 24", "drop")
        );
        let mut bench = Bench::new(kind, &rules)?;
        for exempt in ["8.0.0.1", "2001:db8::1"] {
            for _ in 0..3 * REFUSED {
                expect(&mut bench, &from(exempt), "exempt")?;
                expect(&mut bench, &with(&from(exempt), &[], &[[9; 8], [9; 8]]), "exempt")?;
            }
        }
        for _ in 0..3 * REFUSED {
            expect(&mut bench, &from("8.0.9.9"), "blocked")?;
        }
        ensure!(blocked(&bench)?.is_empty(), "{:?} are blocked", blocked(&bench)?);
        for (neighbour, exempt) in [("8.0.0.2", "8.0.0.1"), ("2001:db8::2", "2001:db8::1")] {
            flood(&mut bench, neighbour)?;
            expect(&mut bench, &from(neighbour), "auto_blocked")?;
            expect(&mut bench, &from(exempt), "exempt")?;
        }
        ensure!(blocked(&bench)? == ["2001:db8::/64", "8.0.0.0/24"], "{:?}", blocked(&bench)?);
    }
    Ok(())
}

pub fn in_mode_observe_nothing_is_dropped() -> Result<()> {
    for kind in KINDS {
        let mut bench = Bench::new(kind, &rules("", "observe"))?;
        for at in 0..3 * REFUSED {
            let outcome = bench.run(&from("8.0.0.1").build())?;
            let verdict = if at <= REFUSED { "missing" } else { "auto_blocked" };
            ensure!(name(outcome.verdict) == verdict && !outcome.dropped, "{outcome:?}");
        }
    }
    Ok(())
}

/// Nor is anybody for an address that cannot be one.
pub fn without_being_asked_nobody_is_blocked() -> Result<()> {
    for kind in KINDS {
        let on = rules("", "drop");
        let (_, off) = on.split_once('\n').context("one line of settings")?;
        let mut bench = Bench::new(kind, off)?;
        for _ in 0..3 * REFUSED {
            expect(&mut bench, &from("8.0.0.1"), "missing")?;
        }
        bench.set_rules(&on)?;
        for _ in 0..3 * REFUSED {
            expect(&mut bench, &from("::ffff:8.0.0.1"), "malformed")?;
        }
        ensure!(blocked(&bench)?.is_empty(), "{:?} are blocked", blocked(&bench)?);
        flood(&mut bench, "8.0.0.1")?;
        expect(&mut bench, &from("8.0.0.1"), "auto_blocked")?;
        // When it is off again, so are the blocks.
        bench.set_rules(off)?;
        expect(&mut bench, &from("8.0.0.1"), "missing")?;
    }
    Ok(())
}

pub fn a_source_can_be_let_in_again() -> Result<()> {
    for kind in KINDS {
        let mut bench = Bench::new(kind, &rules("", "drop"))?;
        let all = ["8.0.0.1", "8.0.0.2", "9.0.0.1", "2001:db8::1"];
        for src in all {
            flood(&mut bench, src)?;
        }
        for (prefix, count) in [("9.0.0.1", 1), ("9.0.0.0/8", 0), ("8.0.0.0/8", 2), ("2001:db8::77", 1)] {
            let unblocked = unblock(&bench.program.maps, prefix.parse()?)?;
            ensure!(unblocked == count, "{prefix}: {unblocked}");
        }
        for src in all {
            expect(&mut bench, &from(src), "missing")?;
        }
    }
    Ok(())
}

/// Its tokens are right; that there is no room is not its fault.
pub fn who_finds_no_room_is_not_counted() -> Result<()> {
    const WAYS: usize = 8;
    let packets = in_one_bucket(WAYS + 1, Bind::Server)?;
    let (last, others) = packets.split_last().context("nine")?;
    for kind in KINDS {
        let mut bench = Bench::new(kind, &rules("", "drop"))?;
        for packet in others {
            expect(&mut bench, packet, "valid")?;
        }
        for _ in 0..3 * REFUSED {
            expect(&mut bench, last, "seen_full")?;
        }
        ensure!(blocked(&bench)?.is_empty(), "{:?} are blocked", blocked(&bench)?);
    }
    Ok(())
}

/// However often they come.
pub fn who_has_a_right_static_token_is_not_counted() -> Result<()> {
    for kind in KINDS {
        let mut bench = Bench::new(kind, &rules("", "drop"))?;
        for v6 in [false, true] {
            let right = with(&syn().family(v6), LINUX, &[STATIC]);
            for _ in 0..3 * REFUSED {
                expect(&mut bench, &right, "valid")?;
            }
            ensure!(blocked(&bench)?.is_empty(), "{:?} are blocked", blocked(&bench)?);
        }
    }
    Ok(())
}

pub fn a_source_is_as_many_bits_as_the_rules_say() -> Result<()> {
    for kind in KINDS {
        let mut bench = Bench::new(kind, &rules(", v4_bits = 24, v6_bits = 40", "drop"))?;
        for (bad, neighbour, other) in
            [("8.0.0.1", "8.0.0.254", "8.0.1.1"), ("2001:db8::1", "2001:db8:ff:1::2", "2001:db8:100::1")]
        {
            for _ in 0..REFUSED {
                expect(&mut bench, &from(bad), "missing")?;
            }
            expect(&mut bench, &from(neighbour), "missing")?;
            expect(&mut bench, &from(bad), "auto_blocked")?;
            expect(&mut bench, &from(neighbour), "auto_blocked")?;
            expect(&mut bench, &from(other), "missing")?;
        }
        ensure!(blocked(&bench)? == ["2001:db8::/40", "8.0.0.0/24"], "{:?}", blocked(&bench)?);
    }
    Ok(())
}

/// Asks until the source is not blocked any more.
fn wait(bench: &mut Bench, began: Instant) -> Result<Duration> {
    loop {
        match name(bench.run(&from("8.0.0.1").build())?.verdict) {
            "auto_blocked" => {}
            "missing" => return Ok(began.elapsed()),
            other => bail!("{other}"),
        }
        ensure!(began.elapsed() < Duration::from_secs(20), "it stays blocked");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub fn a_block_ends_and_a_window_as_well() -> Result<()> {
    KINDS.into_iter().try_for_each(|kind| in_time(|| ends(kind)))
}

fn ends(kind: Kind) -> Result<Option<()>> {
    const BLOCK: Duration = Duration::from_secs(1);
    let short = rules("", "drop").replace("block_for = '1h'", "block_for = '1s'").replace("'1h'", "'2s'");
    let mut bench = Bench::new(kind, &short)?;
    set_clock(&bench.program.maps, 3600)?;
    let flood_and_ask = |bench: &mut Bench| {
        within(BLOCK, || {
            flood(bench, "8.0.0.1")?;
            expect(bench, &from("8.0.0.1"), "auto_blocked")
        })
    };
    let began = Instant::now();
    let Some(()) = flood_and_ask(&mut bench)? else { return Ok(None) };
    let waited = wait(&mut bench, began)?;
    ensure!(waited >= BLOCK, "blocked for {waited:?}");
    ensure!(blocked(&bench)?.is_empty(), "{:?} are shown", blocked(&bench)?);
    // The one that was let in began a window; behind it a new one begins.
    for _ in 1..REFUSED {
        expect(&mut bench, &from("8.0.0.1"), "missing")?;
    }
    std::thread::sleep(Duration::from_millis(2050));
    flood_and_ask(&mut bench)
}
