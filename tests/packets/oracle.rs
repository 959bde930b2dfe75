//! Says from a frame alone what must become of it, and checks what became of it. Written from RFC 791, 8200,
//! 9293, 6994 and 1624, with etherparse as a second opinion; it shares no code and no idea with `src/bpf`.
//!
//! It knows one policy: stamp everything. What a policy decides is tested in `policies.rs`.

use anyhow::{Result, bail, ensure};
use etherparse::{NetSlice, SlicedPacket, TransportSlice};
use netoken::types::Verdict;

use crate::packet::{ACK, FIN, RST, STAMP, SYN, checksum};
use crate::run::{Outcome, name};

const OPTIONS_MAX: usize = 40;
const EXTENSIONS_MAX: usize = 8;

/// What is known besides the bytes.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    /// 14 for Ethernet, 0 for none.
    pub link_len: usize,
    pub mtu: usize,
    pub gso: bool,
}

/// What must happen.
#[derive(Debug)]
pub enum Judgement {
    NotASyn,
    Leaves(Verdict),
    Stamped(Stamp),
}

/// What a stamped frame looks like.
#[derive(Debug)]
pub struct Stamp {
    syn: Syn,
    options_len: usize,
    new_options_len: usize,
    /// Real options, the token, and the EOL bytes that must be there.
    list: Vec<u8>,
}

/// Where things are in a frame that holds a SYN.
#[derive(Clone, Copy, Debug)]
pub struct Syn {
    pub is_v6: bool,
    pub ip_at: usize,
    pub tcp_at: usize,
    /// Behind the last byte that the IP length covers.
    pub ip_end: usize,
    pub is_fragment: bool,
}

impl Judgement {
    pub fn verdict(&self) -> Option<Verdict> {
        match self {
            Judgement::NotASyn => None,
            Judgement::Leaves(verdict) => Some(*verdict),
            Judgement::Stamped(_) => Some(Verdict::VERDICT_STAMPED),
        }
    }

    pub fn describe(&self) -> String {
        match self {
            Judgement::Stamped(stamp) => format!(
                "stamped, option length {} -> {}, list {}",
                stamp.options_len,
                stamp.new_options_len,
                crate::support::Hex(&stamp.list)
            ),
            other => name(other.verdict()).to_string(),
        }
    }
}

/// The verdict for a frame, and how it looks afterwards.
pub fn judge(frame: &[u8], path: &Path) -> Judgement {
    let Some(syn) = find_syn(frame, path.link_len) else { return Judgement::NotASyn };
    if syn.is_fragment {
        return Judgement::Leaves(Verdict::VERDICT_FRAGMENT);
    }
    let header_len = usize::from(frame[syn.tcp_at + 12] >> 4) * 4;
    let header_end = syn.tcp_at + header_len;
    if header_len < 20 || header_end > syn.ip_end || syn.ip_end > frame.len() {
        return Judgement::Leaves(Verdict::VERDICT_MALFORMED);
    }
    let list = &frame[syn.tcp_at + 20..header_end];
    let Some(options) = walk(list) else { return Judgement::Leaves(Verdict::VERDICT_MALFORMED) };
    if options.real.iter().any(|option| is_stamp(option)) {
        return Judgement::Leaves(Verdict::VERDICT_ALREADY_STAMPED);
    }
    if options.real.iter().any(|option| matches!(option[0], 19 | 29)) {
        return Judgement::Leaves(Verdict::VERDICT_AUTH_OPTION);
    }
    let Some(kept) = choose_kept(list, &options) else { return Judgement::Leaves(Verdict::VERDICT_NO_ROOM) };
    let end = kept.len() + STAMP.len();
    let new_options_len = list.len().max(end.next_multiple_of(4));
    let growth = new_options_len - list.len();
    if growth > 0 && (path.gso || syn.ip_end - syn.ip_at + growth > path.mtu || overflows(&syn, growth)) {
        return Judgement::Leaves(Verdict::VERDICT_TOO_BIG);
    }

    let mut new_list = kept;
    new_list.extend(STAMP);
    new_list.resize(end.next_multiple_of(4), 0);
    if new_list.len() < new_options_len {
        // Behind this byte nobody reads.
        new_list.push(0);
    }
    Judgement::Stamped(Stamp { syn, options_len: list.len(), new_options_len, list: new_list })
}

/// A length field has 16 bits, whatever the device could carry.
fn overflows(syn: &Syn, growth: usize) -> bool {
    let counted_from = if syn.is_v6 { syn.ip_at + 40 } else { syn.ip_at };
    syn.ip_end - counted_from + growth > usize::from(u16::MAX)
}

/// What stands in front of the token: the list up to its last real option, or only the real options.
fn choose_kept(list: &[u8], options: &Options<'_>) -> Option<Vec<u8>> {
    if options.end + STAMP.len() <= OPTIONS_MAX {
        return Some(list[..options.end].to_vec());
    }
    let packed = options.real.concat();
    (packed.len() + STAMP.len() <= OPTIONS_MAX).then_some(packed)
}

fn is_stamp(option: &[u8]) -> bool {
    option.len() >= 4 && option[0] == STAMP[0] && option[2..4] == STAMP[2..4]
}

/// An option list as RFC 9293 section 3.1 reads it.
pub struct Options<'a> {
    /// Everything but NOP and EOL.
    pub real: Vec<&'a [u8]>,
    /// Behind the last of them.
    pub end: usize,
}

/// Nothing if a length is a lie.
pub fn walk(list: &[u8]) -> Option<Options<'_>> {
    let mut options = Options { real: Vec::new(), end: 0 };
    let mut at = 0;
    while at < list.len() {
        match list[at] {
            0 => break,
            1 => at += 1,
            _ => {
                let len = usize::from(*list.get(at + 1)?);
                if len < 2 {
                    return None;
                }
                options.real.push(list.get(at..at + len)?);
                at += len;
                options.end = at;
            }
        }
    }
    Some(options)
}

fn u16_at(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

/// Finds the SYN in a frame; nothing if there is none.
pub fn find_syn(frame: &[u8], link_len: usize) -> Option<Syn> {
    let (ip_at, is_v6) = find_ip(frame, link_len)?;
    let syn = if is_v6 { find_tcp_in_ipv6(frame, ip_at)? } else { find_tcp_in_ipv4(frame, ip_at)? };
    let flags = *frame.get(syn.tcp_at + 13)?;
    frame.get(syn.tcp_at + 15)?;
    (flags & (SYN | ACK | RST | FIN) == SYN).then_some(syn)
}

fn find_ip(frame: &[u8], link_len: usize) -> Option<(usize, bool)> {
    let mut ip_at = link_len;
    let is_v6 = if link_len == 0 {
        frame.first()? >> 4 == 6
    } else {
        let mut ether_type = u16_at(frame, 12)?;
        for _ in 0..2 {
            if matches!(ether_type, 0x8100 | 0x88a8 | 0x9100) {
                ether_type = u16_at(frame, ip_at + 2)?;
                ip_at += 4;
            }
        }
        match ether_type {
            0x0800 => false,
            0x86dd => true,
            _ => return None,
        }
    };
    (frame.get(ip_at)? >> 4 == if is_v6 { 6 } else { 4 }).then_some((ip_at, is_v6))
}

fn find_tcp_in_ipv4(frame: &[u8], ip_at: usize) -> Option<Syn> {
    let header = frame.get(ip_at..ip_at + 20)?;
    let header_len = usize::from(header[0] & 0xf) * 4;
    let fragment = u16_at(header, 6)?;
    if header_len < 20 || header[9] != 6 || fragment & 0x1fff != 0 {
        return None;
    }
    Some(Syn {
        is_v6: false,
        ip_at,
        tcp_at: ip_at + header_len,
        ip_end: ip_at + usize::from(u16_at(header, 2)?),
        is_fragment: fragment & 0x2000 != 0,
    })
}

fn find_tcp_in_ipv6(frame: &[u8], ip_at: usize) -> Option<Syn> {
    let header = frame.get(ip_at..ip_at + 40)?;
    let mut next = header[6];
    let mut at = ip_at + 40;
    let mut is_fragment = false;
    for _ in 0..EXTENSIONS_MAX {
        let len = match next {
            0 | 43 | 60 => 8 + 8 * usize::from(*frame.get(at + 1)?),
            44 => {
                if u16_at(frame, at + 2)? & 0xfff8 != 0 {
                    return None;
                }
                is_fragment = true;
                8
            }
            _ => break,
        };
        next = *frame.get(at)?;
        at += len;
    }
    let ip_end = ip_at + 40 + usize::from(u16_at(header, 4)?);
    (next == 6).then_some(Syn { is_v6: true, ip_at, tcp_at: at, ip_end, is_fragment })
}

/// Compares what happened with what must happen.
pub fn check(frame: &[u8], expected: &Judgement, got: &Outcome, drops_when_full: bool) -> Result<()> {
    ensure!(got.verdict == expected.verdict(), "the verdict is {}", name(got.verdict));
    let drops = match expected {
        Judgement::Leaves(verdict) => drops_when_full && *verdict != Verdict::VERDICT_ALREADY_STAMPED,
        _ => false,
    };
    ensure!(got.dropped == drops, "dropped is {}", got.dropped);
    match expected {
        Judgement::Stamped(stamp) => stamp.check(frame, &got.frame),
        _ => {
            ensure!(got.frame == frame, "the frame is not as it came");
            Ok(())
        }
    }
}

impl Stamp {
    fn check(&self, old: &[u8], new: &[u8]) -> Result<()> {
        let syn = self.syn;
        let growth = self.new_options_len - self.options_len;
        ensure!(new.len() == old.len() + growth, "the frame grew by {}", new.len() as i64 - old.len() as i64);
        ensure!(new[..syn.ip_at] == old[..syn.ip_at], "the link header changed");
        self.check_ip(old, new, growth)?;
        self.check_tcp(old, new)?;
        ensure!(
            new[syn.tcp_at + 20 + self.new_options_len..] == old[syn.tcp_at + 20 + self.options_len..],
            "the payload or what is behind it changed"
        );
        self.check_sums(old, new, growth)
    }

    fn check_ip(&self, old: &[u8], new: &[u8], growth: usize) -> Result<()> {
        let Syn { is_v6, ip_at, tcp_at, .. } = self.syn;
        let length_at = ip_at + if is_v6 { 4 } else { 2 };
        let may_change = |at: usize| {
            (length_at..length_at + 2).contains(&at) || !is_v6 && (ip_at + 10..ip_at + 12).contains(&at)
        };
        let changed = (ip_at..tcp_at).find(|at| old[*at] != new[*at] && !may_change(*at));
        if let Some(at) = changed {
            bail!("byte {} of the IP header changed", at - ip_at);
        }
        let length = |frame| usize::from(u16_at(frame, length_at).unwrap_or(0));
        ensure!(length(new) == length(old) + growth, "the IP length is {}, was {}", length(new), length(old));
        Ok(())
    }

    fn check_tcp(&self, old: &[u8], new: &[u8]) -> Result<()> {
        let at = self.syn.tcp_at;
        ensure!(new[at..at + 12] == old[at..at + 12], "ports or sequence numbers changed");
        let words = 5 + self.new_options_len as u8 / 4;
        ensure!(new[at + 12] == words << 4 | old[at + 12] & 0xf, "byte 12 is {:#x}", new[at + 12]);
        ensure!(new[at + 13..at + 16] == old[at + 13..at + 16], "flags or window changed");
        ensure!(new[at + 18..at + 20] == old[at + 18..at + 20], "the urgent pointer changed");

        let list = &new[at + 20..at + 20 + self.new_options_len];
        ensure!(list.starts_with(&self.list), "the option list is {}", crate::support::Hex(list));
        let before = walk(&old[at + 20..at + 20 + self.options_len]).map(|o| o.real).unwrap_or_default();
        let after = walk(list).map(|o| o.real).unwrap_or_default();
        let real = [&before[..], &[&STAMP[..]]].concat();
        ensure!(after == real, "a receiver reads the options {after:02x?}");
        Ok(())
    }

    /// A right sum stays right to the bit, a wrong one stays wrong by as much: whoever drops it must still.
    fn check_sums(&self, old: &[u8], new: &[u8], growth: usize) -> Result<()> {
        let Syn { is_v6, ip_at, tcp_at, ip_end, .. } = self.syn;
        if !is_v6 {
            let before = checksum(&[&old[ip_at..tcp_at]]);
            let after = checksum(&[&new[ip_at..tcp_at]]);
            ensure!(same_sum(before, after), "IPv4 checksum: {before:#06x} was left over, now {after:#06x}");
        }
        let before = self.tcp_sum(old, ip_end);
        let after = self.tcp_sum(new, ip_end + growth);
        ensure!(same_sum(before, after), "TCP checksum: {before:#06x} was left over, now {after:#06x}");
        if let Some((true, true)) = etherparse_agrees(old, ip_at) {
            let Some((ip, tcp)) = etherparse_agrees(new, ip_at) else {
                bail!("etherparse reads what came, but not what went out")
            };
            ensure!(ip && tcp, "etherparse: IPv4 checksum right: {ip}, TCP checksum right: {tcp}");
        }
        Ok(())
    }

    /// 0 if the checksum in the segment is right.
    fn tcp_sum(&self, frame: &[u8], ip_end: usize) -> u16 {
        let Syn { is_v6, ip_at, tcp_at, .. } = self.syn;
        let addresses = if is_v6 { ip_at + 8..ip_at + 40 } else { ip_at + 12..ip_at + 20 };
        let len = ((ip_end - tcp_at) as u32).to_be_bytes();
        checksum(&[&frame[addresses], &len, &[0, 6], &frame[tcp_at..ip_end]])
    }
}

fn same_sum(a: u16, b: u16) -> bool {
    a == b || (a ^ b == 0xffff && (a == 0 || b == 0))
}

/// Whether the two checksums are exactly what etherparse computes; nothing if it cannot read the frame.
fn etherparse_agrees(frame: &[u8], ip_at: usize) -> Option<(bool, bool)> {
    let packet = SlicedPacket::from_ip(frame.get(ip_at..)?).ok()?;
    let Some(TransportSlice::Tcp(tcp)) = packet.transport else { return None };
    match packet.net? {
        NetSlice::Ipv4(ip) => {
            let header = ip.header().to_header();
            let right = tcp.calc_checksum_ipv4(header.source, header.destination).ok()? == tcp.checksum();
            Some((header.calc_header_checksum() == header.header_checksum, right))
        }
        NetSlice::Ipv6(ip) => {
            let (src, dst) = (ip.header().source(), ip.header().destination());
            Some((true, tcp.calc_checksum_ipv6(src, dst).ok()? == tcp.checksum()))
        }
        NetSlice::Arp(_) => None,
    }
}
