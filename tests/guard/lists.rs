//! Lists of source prefixes, and replacing rules.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use netoken::clock::{self, Source};
use netoken::guard::program::Kind;
use netoken::guard::types::{Size, Verdict};
use netoken::kernel::Kernel;

use crate::packet::{Packet, syn};
use crate::random::Random;
use crate::run::{Bench, name};
use crate::support::share_of;

const RULE: &str =
    "[[rule]]\nname = 'a'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'drop'\ntokens = '0000000000000001'\n";

fn from(src: &str) -> Packet {
    let mut packet = syn();
    packet.src = src.parse().expect("an address");
    if packet.src.is_ipv6() {
        packet.dst = crate::packet::DST6.into();
    }
    packet
}

/// What each source gets.
fn expect(bench: &mut Bench, expected: &[(&str, &str)]) -> Result<()> {
    for (src, verdict) in expected {
        let outcome = bench.run(&from(src).build())?;
        let dropped = !["exempt", "unprotected"].contains(verdict);
        ensure!(
            name(outcome.verdict) == *verdict && outcome.dropped == dropped,
            "{src}: {verdict} expected, got {} {} from {:?}",
            name(outcome.verdict),
            outcome.dropped,
            bench.kind
        );
    }
    Ok(())
}

pub fn exempt_and_blocked_sources_by_their_longest_prefix() -> Result<()> {
    let rules = format!(
        "exempt = ['10.1.0.0/16', '2001:db8:1::/48']\nblocked = ['10.0.0.0/8', '192.0.2.7', '2001:db8::/32', \
         '::/1']\n{RULE}"
    );
    for kind in [Kind::Tc, Kind::Xdp] {
        expect(
            &mut Bench::new(kind, &rules)?,
            &[
                ("10.1.2.3", "exempt"),
                ("10.2.2.3", "blocked"),
                ("11.0.0.1", "missing"),
                ("192.0.2.7", "blocked"),
                ("192.0.2.6", "missing"),
                ("2001:db8:1::5", "exempt"),
                ("2001:db8:2::5", "blocked"),
                ("2001:db9::5", "blocked"),
                ("fd00::1", "missing"),
            ],
        )?;
    }
    Ok(())
}

/// The clock of the cases stands in February 1970.
pub fn an_entry_that_has_expired_shows_what_is_around_it() -> Result<()> {
    let rules = format!(
        "exempt = [{{ src = '10.0.0.0/24', until = '1970-01-01T00:00:01Z' }}]\nblocked = ['10.0.0.0/8', {{ src = \
         '10.0.0.0/16', until = '1970-01-01T00:00:01Z' }}, {{ src = '10.0.0.1', until = '1970-01-01T00:00:00Z' }}, \
         {{ src = '172.16.0.1', until = '1970-01-01T00:00:01Z' }}, {{ src = '172.16.0.2', until = \
         '1999-01-01T00:00:00Z' }}]\n{RULE}"
    );
    for kind in [Kind::Tc, Kind::Xdp] {
        expect(
            &mut Bench::new(kind, &rules)?,
            &[
                ("10.0.0.1", "blocked"),
                ("10.0.9.9", "blocked"),
                ("172.16.0.1", "missing"),
                ("172.16.0.2", "blocked"),
            ],
        )?;
    }
    Ok(())
}

/// Which is TAI where the kernel has it: a step of the wall clock counts there at once, with no process of ours at hand.
pub fn an_entry_expires_by_the_clock_of_tokens() -> Result<()> {
    const TEN_YEARS_NS: i64 = 10 * 365 * 86_400 * 1_000_000_000;
    let has_tai = matches!(Source::choose(Kernel::probe()), Source::Tai);
    let rules = format!(
        "exempt = [{{ src = '10.0.0.1', until = '1972-01-01T00:00:00Z' }}, {{ src = '10.0.0.2', until = \
         '1970-01-01T00:00:01Z' }}]\n{RULE}"
    );
    for kind in [Kind::Tc, Kind::Xdp] {
        for wrong_by in [TEN_YEARS_NS, -TEN_YEARS_NS] {
            let mut bench = Bench::new(kind, &rules)?;
            let mut now = clock::published(&bench.program.maps.clock)?;
            let other = if has_tai { &mut now.boot_offset_ns } else { &mut now.tai_offset_ns };
            *other += wrong_by;
            clock::write(&bench.program.maps.clock, &now)?;
            expect(&mut bench, &[("10.0.0.1", "exempt"), ("10.0.0.2", "missing")])?;
        }
    }
    Ok(())
}

/// ::ffff:10.1.2.3 on the wire is no IPv4 address, and nobody's list entry.
pub fn a_mapped_source_reaches_no_list() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, &format!("exempt = ['10.0.0.0/8']\n{RULE}"))?;
        expect(&mut bench, &[("10.1.2.3", "exempt"), ("::ffff:10.1.2.3", "malformed")])?;
    }
    Ok(())
}

pub fn new_rules_replace_all_of_the_old_ones() -> Result<()> {
    let mut bench = Bench::new(Kind::Xdp, &format!("exempt = ['10.0.0.0/8']\n{RULE}"))?;
    for round in 0..5 {
        expect(&mut bench, &[("10.1.2.3", "exempt"), ("11.0.0.1", "missing")])?;
        bench.set_rules(&format!("blocked = ['10.0.0.0/8', '11.0.0.0/8']\n{RULE}"))?;
        expect(&mut bench, &[("10.1.2.3", "blocked"), ("11.0.0.1", "blocked")])?;
        bench.set_rules(&RULE.replace("['0.0.0.0/0', '::/0']", "'192.0.2.99'"))?;
        expect(&mut bench, &[("10.1.2.3", "unprotected"), ("11.0.0.1", "unprotected")])?;
        ensure!(bench.program.maps.table()?.is_some(), "no rules in round {round}");
        bench.set_rules(&format!("exempt = ['10.0.0.0/8']\n{RULE}"))?;
    }
    Ok(())
}

pub fn rules_without_a_list_forget_it() -> Result<()> {
    let mut bench =
        Bench::new(Kind::Tc, &format!("exempt = ['10.0.0.0/8']\nblocked = ['11.0.0.1']\n{RULE}"))?;
    for _ in 0..3 {
        bench.set_rules(RULE)?;
        expect(&mut bench, &[("10.1.2.3", "missing"), ("11.0.0.1", "missing")])?;
    }
    Ok(())
}

/// An entry, as its text and as numbers.
struct Entry {
    is_v6: bool,
    addr: u128,
    bits: u32,
    has_expired: bool,
    text: String,
}

impl Entry {
    /// Few bits differ, so that many are around others.
    fn random(random: &mut Random) -> Entry {
        let is_v6 = random.below(2) == 0;
        let width = if is_v6 { 128 } else { 32 };
        let bits = random.below(width as usize + 1) as u32;
        let addr = [0, width / 2 - 1, width - 2].map(|at| (random.below(4) as u128) << at);
        let addr = addr.into_iter().fold(0, |all, part| all | part) & !host_bits(width, bits);
        let src = format!("{}/{bits}", ip(is_v6, addr));
        let until = *random.one_of(&["", "1970-01-02T00:00:00Z", "1970-03-01T00:00:00Z"]);
        let text = match until {
            "" => format!("'{src}'"),
            until => format!("{{ src = '{src}', until = '{until}' }}"),
        };
        Entry { is_v6, addr, bits, has_expired: until.starts_with("1970-01"), text }
    }

    fn holds(&self, is_v6: bool, addr: u128) -> bool {
        let width = if self.is_v6 { 128 } else { 32 };
        is_v6 == self.is_v6 && addr & !host_bits(width, self.bits) == self.addr
    }

    /// Its first and last address, and the next ones outside.
    fn edges(&self) -> [u128; 4] {
        let width = if self.is_v6 { 128 } else { 32 };
        let last = self.addr | host_bits(width, self.bits);
        [self.addr, last, self.addr.wrapping_sub(1), last.wrapping_add(1)].map(|a| a & host_bits(width, 0))
    }
}

/// The bits of an address behind the first `bits` of `width`.
fn host_bits(width: u32, bits: u32) -> u128 {
    u128::MAX.checked_shr(128 - width + bits).unwrap_or(0)
}

fn ip(is_v6: bool, addr: u128) -> IpAddr {
    if is_v6 { Ipv6Addr::from_bits(addr).into() } else { Ipv4Addr::from_bits(addr as u32).into() }
}

/// The longest prefix that has not expired, by a look at every entry.
fn longest(list: &[Entry], is_v6: bool, addr: u128) -> Option<&Entry> {
    list.iter().filter(|entry| entry.holds(is_v6, addr) && !entry.has_expired).max_by_key(|entry| entry.bits)
}

pub fn random_lists_decide_as_a_look_at_every_entry() -> Result<()> {
    let mut random = Random::seeded()?;
    let mut bench = Bench::new(Kind::Xdp, "")?;
    for _ in 0..share_of(40)? {
        let mut list = || {
            let mut list: Vec<Entry> = (0..20).map(|_| Entry::random(&mut random)).collect();
            list.sort_by_key(|entry| (entry.is_v6, entry.addr, entry.bits));
            list.dedup_by_key(|entry| (entry.is_v6, entry.addr, entry.bits));
            list
        };
        let (exempt, blocked) = (list(), list());
        let text =
            |list: &[Entry]| list.iter().map(|entry| entry.text.as_str()).collect::<Vec<_>>().join(", ");
        let rules = format!("exempt = [{}]\nblocked = [{}]\n{RULE}", text(&exempt), text(&blocked));
        bench.set_rules(&rules)?;
        for entry in exempt.iter().chain(&blocked) {
            for addr in entry.edges() {
                let verdict =
                    match (longest(&exempt, entry.is_v6, addr), longest(&blocked, entry.is_v6, addr)) {
                        _ if entry.is_v6 && addr >> 32 == 0xffff => "malformed",
                        (Some(_), _) => "exempt",
                        (_, Some(_)) => "blocked",
                        _ => "missing",
                    };
                let src = ip(entry.is_v6, addr).to_string();
                expect(&mut bench, &[(&src, verdict)]).with_context(|| rules.clone())?;
            }
        }
    }
    Ok(())
}

/// Hosts and small networks in clusters of all sizes: pages whose boundaries lie in one corner of what they span, or have
/// one upper half of their IPv6 addresses in common, and searches from in front of them and behind them.
pub fn however_sources_lie_all_are_found() -> Result<()> {
    let mut random = Random::seeded()?;
    let mut bench = Bench::new(Kind::Tc, "")?;
    for round in 0..share_of(30)? {
        let mut any = || u128::from(random.next()) << 64 | u128::from(random.next());
        let bases = [any(), any(), any()];
        let bases = &bases[..1 + round % 3];
        // The last of them fill pages below the first one, of each family.
        let (hosts, widest) = (*random.one_of(&[3, 20, 100, 800]), *random.one_of(&[16, 64, 128]));
        let host = |random: &mut Random| {
            let is_v6 = random.below(2) == 0;
            let width = if is_v6 { 128 } else { 32 };
            let within = u128::from(random.next()) << 64 | u128::from(random.next());
            let within = within & host_bits(128, 127 - random.below(widest.min(width) as usize) as u32);
            (is_v6, width, (random.one_of(bases) ^ within) & host_bits(width, 0))
        };
        let entry = |random: &mut Random| {
            let (is_v6, width, addr) = host(random);
            let bits = width - random.below(3) as u32;
            let addr = addr & !host_bits(width, bits);
            Entry { is_v6, addr, bits, has_expired: false, text: format!("'{}/{bits}'", ip(is_v6, addr)) }
        };
        let mut list: Vec<Entry> = (0..hosts).map(|_| entry(&mut random)).collect();
        list.sort_by_key(|entry| (entry.is_v6, entry.addr, entry.bits));
        list.dedup_by_key(|entry| (entry.is_v6, entry.addr, entry.bits));
        let text: Vec<&str> = list.iter().map(|entry| entry.text.as_str()).collect();
        bench.set_rules(&format!("blocked = [{}]\n{RULE}", text.join(", ")))?;

        let mut addrs: Vec<(bool, u128)> = Vec::new();
        for entry in &list {
            addrs.extend(entry.edges().map(|addr| (entry.is_v6, addr)));
        }
        // Near a cluster, and on either side of it.
        for bit in 0..128 {
            let (is_v6, width, addr) = host(&mut random);
            addrs.push((is_v6, (addr ^ 1 << bit) & host_bits(width, 0)));
        }
        for (is_v6, addr) in addrs {
            let verdict = match longest(&list, is_v6, addr) {
                _ if is_v6 && addr >> 32 == 0xffff => "malformed",
                Some(_) => "blocked",
                None => "missing",
            };
            let text: &dyn std::fmt::Display = if list.len() < 30 { &text.join(", ") } else { &"many" };
            expect(&mut bench, &[(&ip(is_v6, addr).to_string(), verdict)])
                .with_context(|| format!("blocked: {text}"))?;
        }
    }
    Ok(())
}

/// Among a million of each family every look goes through three pages, and at their ends from one to the next.
pub fn a_million_entries_and_then_few_and_none() -> Result<()> {
    const STEP: u32 = 4200;
    let count = share_of(1_000_000)? as u32;
    let v4 = |at: u32| Ipv4Addr::from_bits((at + 1) * STEP);
    let v6 = |at: u32| Ipv6Addr::from_bits((0x2001_0db8 << 96) + u128::from(at + 1) * u128::from(STEP));
    let mut text = String::new();
    for at in 0..count {
        writeln!(text, "{}\n{}", v4(at), v6(at))?;
    }
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("blocked");
    std::fs::write(&file, text)?;
    let long = format!("blocked_file = '{}'\n{RULE}", file.display());
    let mut places = vec![0, 1, count / 3, count - 2, count - 1];
    // Each entry makes two ranges, so that pages end at multiples of the half of what is in one.
    let page = Size::SOURCE_PAGE_BOUNDARIES.0;
    for (entries, step) in [(page / 2, 255), (page * page / 2, 5)] {
        let ends = (1..count / entries).step_by(step);
        places.extend(ends.flat_map(|end| [end * entries - 1, end * entries, end * entries + 1]));
    }

    let mut bench = Bench::new(Kind::Xdp, &long)?;
    for place in places {
        for addr in [IpAddr::from(v4(place)), v6(place).into()] {
            let [before, after] = [-1, 1].map(|by: i128| match addr {
                IpAddr::V4(addr) => ip(false, (i128::from(addr.to_bits()) + by) as u128).to_string(),
                IpAddr::V6(addr) => ip(true, (addr.to_bits() as i128 + by) as u128).to_string(),
            });
            let all = [(&*addr.to_string(), "blocked"), (&*before, "missing"), (&*after, "missing")];
            expect(&mut bench, &all).with_context(|| format!("entry {place} of {count}"))?;
        }
    }
    let (one, other) = (v4(7).to_string(), v6(7).to_string());
    // Both generations have had the long list in the end.
    let short = format!("blocked = ['{one}']\n{RULE}");
    for rules in [&long, &short, &short] {
        bench.set_rules(rules)?;
        expect(
            &mut bench,
            &[(&one, "blocked"), (&other, if *rules == long { "blocked" } else { "missing" })],
        )?;
    }
    bench.set_rules(RULE)?;
    expect(&mut bench, &[(&one, "missing"), (&other, "missing")])
}

/// As many entries as fit into one page, into two levels of pages, and one more than each.
pub fn a_list_that_needs_one_page_more() -> Result<()> {
    let page = Size::SOURCE_PAGE_BOUNDARIES.0;
    // The lowest address has a boundary of its own, and each entry two.
    for fits in [(page - 1) / 2, (page * page - 1) / 2] {
        for count in [fits, fits + 1] {
            let addr = |at: u32| Ipv4Addr::from_bits((at + 1) * 1000);
            let list: String = (0..count).map(|at| format!("'{}', ", addr(at))).collect();
            let mut bench = Bench::new(Kind::Xdp, &format!("blocked = [{list}]\n{RULE}"))?;
            for at in [0, 1, count / 2, count - 2, count - 1] {
                let [before, after] = [-1, 1]
                    .map(|by: i64| ip(false, (i64::from(addr(at).to_bits()) + by) as u128).to_string());
                let all = [(&*addr(at).to_string(), "blocked"), (&*before, "missing"), (&*after, "missing")];
                expect(&mut bench, &all).with_context(|| format!("entry {at} of {count}"))?;
            }
        }
    }
    Ok(())
}

/// Rules and lists are replaced in one step: from a mixture of both the source would be on no list.
pub fn while_lists_are_replaced_a_source_is_on_the_old_one_or_the_new_one() -> Result<()> {
    // More than fit into one page.
    let around: String = (0..500).map(|at| format!("'172.16.{}.{}', ", at / 128, at % 128 * 2)).collect();
    let rules = ["exempt", "blocked"].map(|name| format!("{name} = [{around} '10.1.2.3']\n{RULE}"));
    let bench = Bench::new(Kind::Xdp, &rules[0])?;
    let frame = from("10.1.2.3").build();
    let (done, runs) = (AtomicBool::new(false), AtomicU64::new(0));
    thread::scope(|scope| {
        let packets = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                let run = bench.run_uncounted(&frame);
                done.fetch_or(run.is_err(), Ordering::Relaxed);
                run?;
                runs.fetch_add(1, Ordering::Relaxed);
            }
            Ok::<(), anyhow::Error>(())
        });
        // However slow the machine is, a packet comes to each list: the second of those that end after it was set.
        let set = |rules: &String| {
            bench.set_rules(rules)?;
            let enough = runs.load(Ordering::Relaxed) + 2;
            while runs.load(Ordering::Relaxed) < enough && !done.load(Ordering::Relaxed) {
                thread::yield_now();
            }
            Ok(())
        };
        let replaced = share_of(50)
            .and_then(|rounds| (0..rounds).try_for_each(|_| rules.iter().rev().try_for_each(set)));
        done.store(true, Ordering::Relaxed);
        packets.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        replaced
    })?;
    let runs = runs.into_inner();
    let counters = bench.counters()?;
    let (exempt, blocked) = (counters.of(Verdict::GUARD_EXEMPT), counters.of(Verdict::GUARD_BLOCKED));
    ensure!(exempt > 0 && blocked > 0 && exempt + blocked == runs, "{runs} packets: {}", counters.line());
    Ok(())
}
