//! The option lists of [`crate::stacks`], as they are and behind them what else a SYN may carry, and each of these with
//! every byte of it changed. The stamp recognises the lists of real stacks as a whole and walks any other one:
//! whichever way it takes, the oracle has to agree.

use std::collections::BTreeMap;

use anyhow::{Result, ensure};
use netoken::program::{LinkHeader, Settings};
use netoken::types::{Fault, Verdict};

use crate::packet::{AO, MD5, Packet, STAMP, syn};
use crate::run::{Bench, name};
use crate::stacks::{STACKS, variants};
use crate::support::share_of;

const ENDINGS: &[(&str, &[u8])] = &[
    ("as it is", &[]),
    ("then NOPs", &[1, 1, 1, 1]),
    ("then the end", &[0, 0, 0, 0]),
    ("then garbage behind the end", &[0, 253, 12, 19]),
    ("then an option that nobody knows", &[200, 4, 7, 7]),
    ("then a token", &STAMP),
    ("then MD5", &[MD5[0], MD5[1], 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 1, 1]),
    ("then AO", AO),
];

/// Each list with each ending for which there is room, over both families.
fn packets() -> Vec<(String, Packet)> {
    let mut packets = Vec::new();
    for v6 in [false, true] {
        for (stack, list) in STACKS {
            for (ending, more) in ENDINGS {
                let options = [*list, *more].concat();
                if options.len() <= 40 {
                    packets.push((format!("{stack}, {ending}, v6 {v6}"), syn().family(v6).options(&options)));
                }
            }
        }
    }
    packets
}

pub fn every_byte_of_what_stacks_send_counts() -> Result<()> {
    let mut ethernet = Bench::new(LinkHeader::Ethernet)?;
    let mut bare = Bench::new(LinkHeader::None)?;
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    let every = 100 / share_of(100)?;
    for (what, packet) in packets() {
        // The first is the packet itself.
        for (what, packet) in variants(&what, &packet).into_iter().step_by(every) {
            let verdict = ethernet.judge(&what, &packet.build())?;
            *verdicts.entry(name(verdict)).or_default() += 1;
            ethernet.judge(&format!("{what}, vlan"), &packet.clone().vlan(7).payload(3).build())?;
            bare.judge(&what, &packet.without_link_header().build())?;
        }
    }
    println!("layouts: {verdicts:?}");
    for verdict in [
        Verdict::VERDICT_STAMPED,
        Verdict::VERDICT_ALREADY_STAMPED,
        Verdict::VERDICT_AUTH_OPTION,
        Verdict::VERDICT_NO_ROOM,
        Verdict::VERDICT_MALFORMED,
    ] {
        ensure!(verdicts.contains_key(name(Some(verdict))), "{} was never seen", name(Some(verdict)));
    }
    Ok(())
}

/// Writing the headers fails when the token is already in the list that is to be written.
pub fn a_restored_list_is_the_one_that_came() -> Result<()> {
    for fault in [Fault::FAULT_STORE_TCP, Fault::FAULT_STORE_IP, Fault::FAULT_CSUM_BYTES] {
        let mut bench = Bench::stamping(Settings { faults: fault.0, ..Settings::default() })?;
        for (stack, list) in STACKS {
            for packet in [syn(), syn().v6(), syn().payload(9)] {
                let frame = packet.options(list).build();
                bench.expect_untouched(stack, &frame, Verdict::VERDICT_HELPER_FAILED, false)?;
            }
        }
    }
    Ok(())
}
