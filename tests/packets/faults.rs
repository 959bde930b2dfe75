//! A helper fails half way: the packet must leave as it came, or, if even that fails, not at all.

use anyhow::{Result, ensure};
use netoken::program::{LinkHeader, Settings};
use netoken::types::{Fault, Verdict};

use crate::packet::{LINUX, MSS, Packet, syn};
use crate::run::{Bench, How, name};

/// FAULT_MOVE is the second chunk of the payload, FAULT_STORE_IP and FAULT_CSUM_LENGTH need growth.
const FAULTS: [(&str, Fault); 6] = [
    ("grow", Fault::FAULT_GROW),
    ("move", Fault::FAULT_MOVE),
    ("store TCP", Fault::FAULT_STORE_TCP),
    ("store IP", Fault::FAULT_STORE_IP),
    ("sum of the length", Fault::FAULT_CSUM_LENGTH),
    ("sum of the bytes", Fault::FAULT_CSUM_BYTES),
];

fn packets() -> Vec<Packet> {
    vec![
        syn().options(LINUX).payload(3000),
        syn().v6().options(LINUX).payload(2999),
        syn().v6().vlan(3).options(MSS).payload(2500),
        syn().ip_options(&[1; 8]).payload(3001).trailer(&[0xdd; 5]),
        syn().without_link_header().options(LINUX).payload(3000),
    ]
}

fn bench_for(link_header: LinkHeader, faults: u32, drops: bool) -> Result<Bench> {
    let settings = Settings { link_header, faults, ..Settings::default() };
    let mut bench = Bench::strict(settings)?;
    if !drops {
        bench.set_policy("default = { action = 'stamp', token = 'a1b2c3d4e5f60718' }")?;
        bench.drops_when_full = false;
    }
    Ok(bench)
}

/// Every fault, together with `more`, on every packet.
fn for_each(more: u32, drops: bool, test: fn(&mut Bench, &str, Fault, &[u8]) -> Result<()>) -> Result<()> {
    for (what, fault) in FAULTS {
        for link_header in [LinkHeader::Ethernet, LinkHeader::None] {
            let mut bench = bench_for(link_header, fault.0 | more, drops)?;
            let fits = |packet: &&Packet| packet.ethernet == (link_header == LinkHeader::Ethernet);
            for packet in packets().iter().filter(fits) {
                test(&mut bench, what, fault, &packet.build())?;
            }
        }
    }
    Ok(())
}

pub fn a_helper_that_fails_leaves_the_packet_as_it_came() -> Result<()> {
    for_each(0, false, |bench, what, _, frame| {
        bench.expect_untouched(what, frame, Verdict::VERDICT_HELPER_FAILED, false)?;
        // A second packet on the same CPU finds nothing left behind by the first.
        bench.expect_untouched(what, frame, Verdict::VERDICT_HELPER_FAILED, false)
    })
}

pub fn a_helper_that_fails_drops_where_the_policy_says_so() -> Result<()> {
    for_each(0, true, |bench, what, _, frame| {
        let outcome = bench.run(frame, How::default())?;
        ensure!(
            outcome.verdict == Some(Verdict::VERDICT_HELPER_FAILED) && outcome.dropped,
            "{what}: {} dropped: {}",
            name(outcome.verdict),
            outcome.dropped
        );
        Ok(())
    })
}

/// A packet that is neither stamped nor as it came must not leave.
pub fn a_restore_that_fails_drops_the_packet() -> Result<()> {
    for_each(Fault::FAULT_RESTORE.0, false, |bench, what, fault, frame| {
        // Nothing had changed yet when growing failed.
        if fault == Fault::FAULT_GROW {
            return bench.expect_untouched(what, frame, Verdict::VERDICT_HELPER_FAILED, false);
        }
        let outcome = bench.run(frame, How::default())?;
        ensure!(
            outcome.verdict == Some(Verdict::VERDICT_HELPER_FAILED) && outcome.dropped,
            "{what}, then the restore: {} dropped: {}",
            name(outcome.verdict),
            outcome.dropped
        );
        Ok(())
    })
}

/// The faults sit at steps that not every packet takes.
pub fn a_fault_off_the_way_changes_nothing() -> Result<()> {
    let roomy = syn().options(&[1; 12]).payload(3000);
    for (what, fault, packet) in [
        ("no second chunk", Fault::FAULT_MOVE, syn().options(LINUX).payload(2048)),
        ("nothing to grow", Fault::FAULT_GROW, roomy.clone()),
        ("nothing to move", Fault::FAULT_MOVE, roomy.clone()),
        ("nothing to restore", Fault::FAULT_RESTORE, roomy),
    ] {
        let mut bench = bench_for(LinkHeader::Ethernet, fault.0, false)?;
        bench.expect(what, &packet.build(), Verdict::VERDICT_STAMPED)?;
    }
    Ok(())
}
