//! Lists of source prefixes, and replacing rules.

use anyhow::{Result, ensure};
use netoken::guard::program::Kind;

use crate::packet::{Packet, syn};
use crate::run::{Bench, name};

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
