//! Says from a frame alone what the guard must decide. Written from RFC 791, 8200, 9293 and 6994 and from the page
//! docs/guard.md; it shares no code and no idea with `src/bpf`. Keyed tokens it lets the library check.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use netoken::guard::rules::{Mode, Rule, Rules};
use netoken::guard::types::Verdict;
use netoken::keys::Key;
use netoken::token::Token;
use netoken::token::keyed::{Flow, Parts, Refusal, Slots, Verifier};

use crate::run::{SLOT, SLOT_S};

/// What must be decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    pub verdict: Option<Verdict>,
    pub dropped: bool,
}

/// What an oracle has to know besides the frame.
pub struct Oracle {
    pub rules: Rules,
    pub keys: Vec<Key>,
    /// 14 for Ethernet, 0 for none.
    pub link_len: usize,
}

/// As much of a packet as can be told.
#[derive(Default)]
struct Look {
    src: Option<IpAddr>,
    dst: Option<IpAddr>,
    port: Option<u16>,
    /// Why its options do not matter.
    refused: Option<Verdict>,
    /// If its lengths are right.
    syn: Option<Syn>,
}

impl Look {
    /// The address in its IP header may be a stop on the way.
    fn going_anywhere(self) -> Look {
        Look { src: None, dst: None, port: None, ..self }
    }
}

struct Syn {
    flow: Flow,
    options: Vec<u8>,
    /// Where they begin, in the IP packet.
    options_at: usize,
}

/// Bytes that may not be there.
fn be16(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

impl Oracle {
    pub fn judge(&self, frame: &[u8]) -> Judgement {
        let Some(look) = self.look(frame) else { return Judgement { verdict: None, dropped: false } };
        let Some(rule) = self.rule(&look) else {
            return Judgement { verdict: Some(Verdict::GUARD_UNPROTECTED), dropped: false };
        };
        let verdict = match (self.verdict(&look, rule), rule.mode) {
            // Nobody is asked who it comes from, nor what it is good for.
            (_, Mode::Scrub) => look.refused.unwrap_or_else(|| {
                match look.syn.as_ref().and_then(|syn| tokens(&syn.options)).map(|tokens| tokens.len()) {
                    None => Verdict::GUARD_MALFORMED,
                    Some(0) => Verdict::GUARD_CLEAN,
                    Some(_) => Verdict::GUARD_SCRUBBED,
                }
            }),
            (verdict, _) => verdict,
        };
        let passes = matches!(verdict, Verdict::GUARD_VALID | Verdict::GUARD_EXEMPT);
        Judgement { verdict: Some(verdict), dropped: rule.mode == Mode::Drop && !passes }
    }

    /// The frame as it goes on, but for its TCP checksum, and where that is if it has to be another one.
    pub fn scrubbed(&self, frame: &[u8]) -> (Vec<u8>, Option<usize>) {
        let mut after = frame.to_vec();
        let Some(look) = self.look(frame) else { return (after, None) };
        let (Some(rule), Some(syn)) = (self.rule(&look), &look.syn) else { return (after, None) };
        let list = blanked(&syn.options);
        if !rule.scrub || self.judge(frame).dropped || list == syn.options {
            return (after, None);
        }
        let tags = (12..frame.len()).step_by(4);
        let tags = tags.take_while(|at| matches!(be16(frame, *at), Some(0x8100 | 0x88a8 | 0x9100)));
        let options_at = syn.options_at + if self.link_len == 0 { 0 } else { 14 + 4 * tags.count() };
        after[options_at..][..list.len()].copy_from_slice(&list);
        (after, Some(options_at - 4))
    }

    fn rule(&self, look: &Look) -> Option<&Rule> {
        let could = |rule: &&Rule| {
            look.dst.is_none_or(|dst| rule.dst.iter().any(|prefix| contains(&prefix.to_string(), dst)))
                && look.port.is_none_or(|port| rule.ports.iter().any(|(a, b)| (*a..=*b).contains(&port)))
        };
        let mut rules = self.rules.rules.iter().filter(could);
        if look.port.is_some() {
            return rules.next();
        }
        let all: Vec<&Rule> = rules.collect();
        all.iter().find(|rule| rule.mode == Mode::Drop).or(all.first()).copied()
    }

    fn verdict(&self, look: &Look, rule: &Rule) -> Verdict {
        if let Some(src) = look.src {
            if matches!(src, IpAddr::V6(src) if src.to_ipv4_mapped().is_some()) {
                return Verdict::GUARD_MALFORMED;
            }
            if self.rules.exempt.iter().any(|listed| contains(&listed.src.to_string(), src)) {
                return Verdict::GUARD_EXEMPT;
            }
            if self.rules.blocked.iter().any(|listed| contains(&listed.src.to_string(), src)) {
                return Verdict::GUARD_BLOCKED;
            }
        }
        match (look.refused, &look.syn) {
            (Some(verdict), _) => verdict,
            (None, Some(syn)) => self.token(syn, rule),
            (None, None) => Verdict::GUARD_MALFORMED,
        }
    }

    fn token(&self, syn: &Syn, rule: &Rule) -> Verdict {
        let Some(tokens) = tokens(&syn.options) else { return Verdict::GUARD_MALFORMED };
        let token = match tokens[..] {
            [] => return Verdict::GUARD_MISSING,
            [token] => token,
            _ => return Verdict::GUARD_DUPLICATE,
        };
        if rule.tokens.contains(&token) {
            return Verdict::GUARD_VALID;
        }
        if rule.keys.is_empty() {
            return Verdict::GUARD_WRONG_STATIC;
        }
        let parts = Parts::from(token);
        if !rule.tags.is_empty() && !rule.tags.contains(&parts.tag) {
            return Verdict::GUARD_TAG_NOT_ALLOWED;
        }
        match self.keys.iter().find(|key| key.id() == parts.key_id) {
            None => return Verdict::GUARD_UNKNOWN_KEY,
            Some(key) if !key.is_live() => return Verdict::GUARD_RETIRED_KEY,
            Some(key) if !rule.keys.contains(&key.ring()) => return Verdict::GUARD_KEY_NOT_ALLOWED,
            Some(_) => {}
        }
        let slots = Slots::new(SLOT_S, 1, 1).expect("slots");
        let now = Duration::from_secs((2 * u64::from(SLOT) + 1) * u64::from(SLOT_S) / 2);
        match (Verifier { keys: &self.keys, slots, binds: &rule.binds }).check(token, &syn.flow, now) {
            Ok(_) => Verdict::GUARD_VALID,
            Err(Refusal::WrongTime) => match (u32::from(parts.slot_low) + 16 - SLOT % 16) % 16 {
                0..=8 => Verdict::GUARD_FUTURE_SLOT,
                _ => Verdict::GUARD_STALE_SLOT,
            },
            Err(_) => Verdict::GUARD_BAD_MAC,
        }
    }

    /// Nothing for what opens no connection.
    fn look(&self, frame: &[u8]) -> Option<Look> {
        let unknown = |verdict| Some(Look { refused: Some(verdict), ..Look::default() });
        let (mut at, mut ether_type) = match self.link_len {
            0 => (0, if frame.first()? >> 4 == 4 { 0x0800 } else { 0x86dd }),
            _ => (14, be16(frame, 12)?),
        };
        let mut tags = 0;
        while matches!(ether_type, 0x8100 | 0x88a8 | 0x9100) {
            tags += 1;
            if tags > 3 {
                return unknown(Verdict::GUARD_TOO_DEEP);
            }
            match be16(frame, at + 2) {
                Some(next) => ether_type = next,
                None => return unknown(Verdict::GUARD_MALFORMED),
            }
            at += 4;
        }
        let ip = frame.get(at..)?;
        match ether_type {
            0x0800 if ip.len() < 20 => unknown(Verdict::GUARD_MALFORMED),
            0x86dd if ip.len() < 40 => unknown(Verdict::GUARD_MALFORMED),
            0x0800 => ipv4(ip),
            0x86dd if tags == 0 && is_no_syn(ip) => None,
            0x86dd => ipv6(ip),
            _ => None,
        }
    }
}

/// Whether TCP right behind an IPv6 header is no SYN, where 16 bytes of it are there. That the header may be of another version is left to the host,
/// which drops such a packet.
fn is_no_syn(ip: &[u8]) -> bool {
    ip.len() >= 56 && ip[6] == 6 && ip[53] & 0x12 != 2
}

fn ipv4(ip: &[u8]) -> Option<Look> {
    const TCP: u8 = 6;
    if ip[9] != TCP {
        return None;
    }
    let addr = |at: usize| IpAddr::from(Ipv4Addr::new(ip[at], ip[at + 1], ip[at + 2], ip[at + 3]));
    let by_addr = |verdict| Look {
        src: Some(addr(12)),
        dst: Some(addr(16)),
        refused: Some(verdict),
        ..Look::default()
    };
    let header = usize::from(ip[0] & 0xf) * 4;
    if ip[0] >> 4 != 4 || header < 20 {
        return Some(by_addr(Verdict::GUARD_MALFORMED));
    }
    // A list of options that lies may hide a source route as well.
    let routed = header > 20
        && ip
            .get(20..header)
            .and_then(options)
            .is_none_or(|list| list.iter().any(|o| matches!(o[0], 131 | 137)));
    if be16(ip, 6)? & 0x3fff != 0 {
        let found = by_addr(Verdict::GUARD_FRAGMENT);
        return Some(if routed { found.going_anywhere() } else { found });
    }
    let claimed = usize::from(be16(ip, 2)?);
    tcp(ip, header, claimed, routed, (addr(12), addr(16)))
}

fn ipv6(ip: &[u8]) -> Option<Look> {
    let addr = |at: usize| {
        let octets: [u8; 16] = ip[at..at + 16].try_into().expect("16 bytes");
        IpAddr::from(Ipv6Addr::from(octets))
    };
    let by_addr =
        |verdict| Look { src: Some(addr(8)), dst: Some(addr(24)), refused: Some(verdict), ..Look::default() };
    let leads = |next: u8| matches!(next, 0 | 6 | 43 | 44 | 60);
    let (mut at, mut next, mut routed) = (40, ip[6], false);
    if !leads(next) {
        return None;
    }
    if ip[0] >> 4 != 6 {
        return Some(by_addr(Verdict::GUARD_MALFORMED));
    }
    for _ in 0..8 {
        if next == 6 {
            break;
        }
        if !leads(next) {
            return None;
        }
        let Some(head) = ip.get(at..at + 8) else {
            let found = by_addr(Verdict::GUARD_MALFORMED);
            return Some(if routed { found.going_anywhere() } else { found });
        };
        if next == 44 {
            // Between a fragment's header and TCP there may be a routing header.
            let found = by_addr(Verdict::GUARD_FRAGMENT);
            let found = if routed || head[0] != 6 { found.going_anywhere() } else { found };
            return leads(head[0]).then_some(found);
        }
        routed |= next == 43 && head[3] != 0;
        next = head[0];
        at += 8 + 8 * usize::from(head[1]);
    }
    match next {
        6 => {
            let claimed = 40 + usize::from(be16(ip, 4)?);
            tcp(ip, at, claimed, routed, (addr(8), addr(24)))
        }
        // So there may be behind as many headers as nobody looks at.
        next if leads(next) => Some(by_addr(Verdict::GUARD_TOO_DEEP).going_anywhere()),
        _ => None,
    }
}

/// The TCP header at `at`. `claimed`: where the IP packet ends, as its header says.
fn tcp(ip: &[u8], at: usize, claimed: usize, routed: bool, (src, dst): (IpAddr, IpAddr)) -> Option<Look> {
    let by_addr = Look { src: Some(src), dst: Some(dst), ..Look::default() };
    let malformed = Some(Verdict::GUARD_MALFORMED);
    let Some(head) = ip.get(at..at + 14) else {
        let look = Look { refused: malformed, ..by_addr };
        return Some(if routed { look.going_anywhere() } else { look });
    };
    let (is_syn, ack, fin_or_rst) = (head[13] & 2 != 0, head[13] & 16 != 0, head[13] & 5 != 0);
    if !is_syn || ack {
        return None;
    }
    let port = be16(head, 2)?;
    let header = usize::from(head[12] >> 4) * 4;
    let is_cut = header > 20 && at + header > ip.len();
    let refused = match (routed, fin_or_rst) {
        _ if is_cut => malformed,
        (true, _) => Some(Verdict::GUARD_SOURCE_ROUTED),
        (_, true) => Some(Verdict::GUARD_BAD_FLAGS),
        _ => None,
    };
    let mut syn = None;
    if header >= 20 && at + header <= claimed && claimed <= ip.len() {
        let isn = u32::from_be_bytes(head[4..8].try_into().ok()?);
        let flow = Flow::new((src, be16(head, 0)?).into(), (dst, port).into(), isn).ok();
        let options = ip[at + 20..at + header].to_vec();
        syn = flow.map(|flow| Syn { flow, options, options_at: at + 20 });
    }
    let look = Look { port: Some(port), refused, syn, ..by_addr };
    Some(if routed { look.going_anywhere() } else { look })
}

/// The options in front of the end of the list; nothing if a length lies.
fn options(mut list: &[u8]) -> Option<Vec<&[u8]>> {
    let mut found = Vec::new();
    while let Some(kind) = list.first() {
        match kind {
            0 => break,
            1 => list = &list[1..],
            _ => {
                let len = usize::from(*list.get(1)?);
                if len < 2 {
                    return None;
                }
                found.push(list.get(..len)?);
                list = &list[len..];
            }
        }
    }
    Some(found)
}

/// The list with NOPs for every option of our kind and experiment in front of where one stops to read.
fn blanked(list: &[u8]) -> Vec<u8> {
    let mut list = list.to_vec();
    let mut at = 0;
    while at < list.len() && list[at] != 0 {
        let len = match list[at..] {
            [1, ..] => 1,
            [_, len, ..] if len >= 2 && at + usize::from(len) <= list.len() => usize::from(len),
            _ => break,
        };
        let is_ours = list[at] == 253 && len >= 4 && list[at + 2..at + 4] == [0x4e, 0x54];
        if is_ours {
            list[at..at + len].fill(1);
            if len != 12 {
                break;
            }
        }
        at += len;
    }
    list
}

fn tokens(list: &[u8]) -> Option<Vec<Token>> {
    let ours = |option: &&&[u8]| option.len() >= 4 && option[0] == 253 && option[2..4] == [0x4e, 0x54];
    options(list)?.iter().filter(ours).map(|option| Some(Token(option.get(4..)?.try_into().ok()?))).collect()
}

/// Whether an address is below a prefix, written as `address/bits`.
fn contains(prefix: &str, addr: IpAddr) -> bool {
    let (network, bits) = prefix.split_once('/').expect("a prefix");
    let bits: u32 = bits.parse().expect("a length");
    match (network.parse().expect("an address"), addr) {
        (IpAddr::V4(network), IpAddr::V4(addr)) => {
            (network.to_bits() ^ addr.to_bits()).leading_zeros() >= bits
        }
        (IpAddr::V6(network), IpAddr::V6(addr)) => {
            (network.to_bits() ^ addr.to_bits()).leading_zeros() >= bits
        }
        _ => false,
    }
}
