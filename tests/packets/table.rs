//! Every combination of what a SYN may look like, judged by the oracle: family, link header, IP options or
//! extension headers, data offset, padding, payload, and one odd option.

use std::collections::{BTreeMap, HashSet};
use std::hash::{DefaultHasher, Hash, Hasher};

use anyhow::{Result, ensure};
use netoken::program::LinkHeader;
use netoken::types::Verdict;

use crate::packet::{
    AO, DEST_OPTS, HOP_BY_HOP, MD5, MSS, NOP, Packet, ROUTING, SACK_PERMITTED, STAMP, TIMESTAMPS,
    WINDOW_SCALE, syn, unknown,
};
use crate::run::{Bench, name};

const PAYLOADS: [usize; 4] = [0, 1, 100, 1400];
const VERDICTS_SEEN: [Verdict; 6] = [
    Verdict::VERDICT_STAMPED,
    Verdict::VERDICT_NO_ROOM,
    Verdict::VERDICT_AUTH_OPTION,
    Verdict::VERDICT_ALREADY_STAMPED,
    Verdict::VERDICT_FRAGMENT,
    Verdict::VERDICT_MALFORMED,
];

/// How the bytes that no option needs are spent.
#[derive(Clone, Copy, Debug)]
pub enum Padding {
    None,
    NopsBetween,
    NopsBehind,
    EolAndZeros,
    EolAndGarbage,
    /// The real options end where the token just fits, or at the end of a shorter list.
    RealToTheLimit,
}

pub const PADDINGS: [Padding; 6] = [
    Padding::None,
    Padding::NopsBetween,
    Padding::NopsBehind,
    Padding::EolAndZeros,
    Padding::EolAndGarbage,
    Padding::RealToTheLimit,
];

/// What stands first in the option list.
#[derive(Clone, Copy, Debug)]
pub enum Odd {
    Nothing,
    Token,
    OtherExid,
    Md5,
    Ao,
    LengthZero,
    LengthBeyond,
}

pub const ODDS: [Odd; 7] =
    [Odd::Nothing, Odd::Token, Odd::OtherExid, Odd::Md5, Odd::Ao, Odd::LengthZero, Odd::LengthBeyond];

fn odd_option(odd: Odd) -> Vec<u8> {
    match odd {
        Odd::Nothing => Vec::new(),
        Odd::Token => STAMP.to_vec(),
        Odd::OtherExid => vec![253, 6, 0x4e, 0x55, 1, 2],
        Odd::Md5 => MD5.to_vec(),
        Odd::Ao => AO.to_vec(),
        Odd::LengthZero => vec![200, 0],
        Odd::LengthBeyond => vec![200, 41],
    }
}

/// Real options of `len` bytes together; one byte cannot be filled and stays free.
fn real_options(mut len: usize) -> Vec<Vec<u8>> {
    let mut options = Vec::new();
    for known in [MSS, TIMESTAMPS, SACK_PERMITTED, WINDOW_SCALE] {
        if known.len() <= len && len - known.len() != 1 {
            options.push(known.to_vec());
            len -= known.len();
        }
    }
    if len >= 2 {
        options.push(unknown(len));
    }
    options
}

/// An option list of exactly `len` bytes, or nothing if there is none of that sort.
pub fn option_list(len: usize, padding: Padding, odd: Odd) -> Option<Vec<u8>> {
    let mut list = odd_option(odd);
    let room = len.checked_sub(list.len())?;
    let (real, filler): (Vec<Vec<u8>>, &[u8]) = match padding {
        Padding::None => (real_options(room), NOP),
        Padding::NopsBetween => (real_options(room * 2 / 3), NOP),
        Padding::NopsBehind => (real_options(room / 2), NOP),
        Padding::EolAndZeros => (real_options(room / 2), &[0]),
        // What stands behind EOL looks like a token, a signature and a lie, and is none of them.
        Padding::EolAndGarbage => (real_options(room / 2), &[0, 253, 12, 0x4e, 0x54, 19, 18, 200, 0]),
        Padding::RealToTheLimit => (real_options(room.min(28usize.saturating_sub(list.len()))), NOP),
    };
    let between = matches!(padding, Padding::NopsBetween);
    for option in real {
        if between && list.len() + option.len() < len {
            list.extend(NOP);
        }
        list.extend(option.iter().take(len - list.len()));
    }
    let free = len - list.len();
    list.extend(filler.iter().cycle().take(free));
    Some(list)
}

fn links(packet: &Packet) -> [(&'static str, Packet); 4] {
    [
        ("ethernet", packet.clone()),
        ("vlan", packet.clone().vlan(7)),
        ("qinq", packet.clone().tag(0x88a8, 100).vlan(7)),
        ("bare", packet.clone().without_link_header()),
    ]
}

fn ip_options(len: usize) -> Vec<u8> {
    // Router alert, then NOPs, then the end of the list.
    let mut bytes = vec![1; len];
    bytes[..4].copy_from_slice(&[148, 4, 0, 0]);
    bytes[len - 1] = if len > 4 { 0 } else { bytes[len - 1] };
    bytes
}

/// IPv4 and IPv6 with all that may stand between the IP header and TCP.
pub fn networks() -> Vec<(&'static str, Packet)> {
    let eight = [DEST_OPTS, ROUTING, DEST_OPTS, DEST_OPTS, ROUTING, DEST_OPTS, DEST_OPTS]
        .iter()
        .fold(syn().v6().extension(HOP_BY_HOP, 0), |packet, kind| packet.extension(*kind, 0));
    let three = syn().v6().extension(HOP_BY_HOP, 1).extension(ROUTING, 0).extension(DEST_OPTS, 2);
    vec![
        ("v4", syn()),
        ("v4 with 4 bytes of options", syn().ip_options(&ip_options(4))),
        ("v4 with 40 bytes of options", syn().ip_options(&ip_options(40))),
        ("v4 that is the first fragment", syn().fragment(0, true)),
        ("v6", syn().v6()),
        ("v6 with hop-by-hop options", syn().v6().extension(HOP_BY_HOP, 0)),
        ("v6 with a routing header", syn().v6().extension(ROUTING, 1)),
        ("v6 with destination options", syn().v6().extension(DEST_OPTS, 3)),
        ("v6 with hop-by-hop, routing, destination options", three),
        ("v6 with eight headers", eight),
        ("v6 that is an atomic fragment", syn().v6().fragment(0, false)),
    ]
}

/// All packets of the table with what they are.
fn rows() -> Vec<(String, Packet)> {
    let mut rows = Vec::new();
    for (network, packet) in networks() {
        for (link, packet) in links(&packet) {
            for (len, padding, odd) in lists() {
                let Some(list) = option_list(len, padding, odd) else { continue };
                for payload in PAYLOADS {
                    let what = format!(
                        "{network}, {link}, {len} bytes of options, {padding:?}, {odd:?}, {payload} bytes"
                    );
                    rows.push((what, packet.clone().options(&list).payload(payload)));
                }
            }
        }
    }
    rows
}

fn lists() -> impl Iterator<Item = (usize, Padding, Odd)> {
    (0..=40).step_by(4).flat_map(|len| {
        PADDINGS.into_iter().flat_map(move |padding| ODDS.into_iter().map(move |odd| (len, padding, odd)))
    })
}

pub fn every_combination_comes_out_right() -> Result<()> {
    let mut ethernet = Bench::new(LinkHeader::Ethernet)?;
    let mut bare = Bench::new(LinkHeader::None)?;
    let mut seen = HashSet::new();
    let mut verdicts: BTreeMap<&str, usize> = BTreeMap::new();
    for (what, packet) in rows() {
        let frame = packet.build();
        let mut hasher = DefaultHasher::new();
        (packet.ethernet, &frame).hash(&mut hasher);
        if !seen.insert(hasher.finish()) {
            continue;
        }
        let bench = if packet.ethernet { &mut ethernet } else { &mut bare };
        let verdict = bench.judge(&what, &frame)?;
        *verdicts.entry(name(verdict)).or_default() += 1;
    }
    println!("the table: {} distinct frames: {verdicts:?}", seen.len());
    ensure!(seen.len() >= 5000, "only {} distinct frames", seen.len());
    for verdict in VERDICTS_SEEN {
        ensure!(verdicts.contains_key(name(Some(verdict))), "{} was never seen", name(Some(verdict)));
    }
    ensure!(!verdicts.contains_key("not a SYN"), "the table holds only SYNs");
    Ok(())
}
