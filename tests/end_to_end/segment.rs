//! Reads a SYN as its receiver does, with code that exists only here: addresses, option list, payload and sums.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context, Result, bail, ensure};

/// What `netoken --attach` stamps when it is not told otherwise.
pub const TOKEN: [u8; 8] = *b"NETOKEN1";

/// Kinds of TCP options.
pub const KIND_MD5: u8 = 19;
pub const KIND_MPTCP: u8 = 30;
pub const KIND_FASTOPEN: u8 = 34;

/// A TCP segment and what its headers say.
#[derive(Clone, Debug)]
pub struct Segment {
    /// VLAN tags, the outer one first: type and control information.
    pub tags: Vec<(u16, u16)>,
    pub src: SocketAddr,
    pub dst: SocketAddr,
    pub isn: u32,
    /// With the reserved bits in front.
    pub flags: u16,
    pub options: Vec<(u8, Vec<u8>)>,
    /// Length of the list in bytes, padding included.
    pub options_len: usize,
    pub payload: Vec<u8>,
    /// Length of the whole IP packet, as IP says.
    pub ip_len: usize,
    pub ip_sum_is_right: bool,
    pub tcp_sum_is_right: bool,
}

const SYN: u16 = 0x02;
const ACK: u16 = 0x10;
pub const ECE_CWR: u16 = 0xc0;

fn u16_at(bytes: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_be_bytes(bytes.get(at..at + 2).context("cut short")?.try_into()?))
}

/// The ones' complement sum of RFC 1071, folded, not inverted.
pub fn sum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(u16::from_be_bytes([pair[0], pair.get(1).copied().unwrap_or(0)]));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

impl Segment {
    /// Reads a frame with an Ethernet header.
    pub fn from_frame(frame: &[u8]) -> Result<Segment> {
        let mut tags = Vec::new();
        let mut at = 12;
        while matches!(u16_at(frame, at)?, 0x8100 | 0x88a8) {
            tags.push((u16_at(frame, at)?, u16_at(frame, at + 2)?));
            at += 4;
        }
        Ok(Segment { tags, ..Segment::from_ip(&frame[at + 2..])? })
    }

    /// Reads a packet that begins with IP. Of a saved SYN, which ends with its options, the sums say nothing.
    pub fn from_ip(packet: &[u8]) -> Result<Segment> {
        let (header_len, ip_len, protocol, addresses) = match packet.first().context("empty")? >> 4 {
            4 => (usize::from(packet[0] & 15) * 4, usize::from(u16_at(packet, 2)?), packet.get(9), 12..20),
            6 => (40, 40 + usize::from(u16_at(packet, 4)?), packet.get(6), 8..40),
            version => bail!("IP version {version}"),
        };
        ensure!(protocol == Some(&6), "not TCP");
        let addresses = packet.get(addresses).context("cut short")?;
        let (src, dst) = read_addresses(addresses)?;
        let ip_sum_is_right = addresses.len() == 32 || sum(&[&packet[..header_len]]) == 0xffff;
        // A frame may be longer than its packet, a saved SYN is shorter.
        let tcp = &packet[header_len..ip_len.min(packet.len())];
        let data_at = usize::from(tcp.get(12).context("cut short")? >> 4) * 4;
        ensure!(data_at >= 20 && data_at <= tcp.len(), "a data offset of {data_at}");
        let tcp_len = (tcp.len() as u32).to_be_bytes();
        Ok(Segment {
            tags: Vec::new(),
            src: SocketAddr::new(src, u16_at(tcp, 0)?),
            dst: SocketAddr::new(dst, u16_at(tcp, 2)?),
            isn: u32::from_be_bytes(tcp[4..8].try_into()?),
            flags: u16_at(tcp, 12)? & 0xfff,
            options: walk(&tcp[20..data_at])?,
            options_len: data_at - 20,
            payload: tcp[data_at..].to_vec(),
            ip_len,
            ip_sum_is_right,
            tcp_sum_is_right: sum(&[addresses, &tcp_len, &[0, 6], tcp]) == 0xffff,
        })
    }

    pub fn is_syn(&self) -> bool {
        self.flags & (SYN | ACK) == SYN
    }

    pub fn has(&self, kind: u8) -> bool {
        self.options.iter().any(|(found, _)| *found == kind)
    }

    /// The token, if there is one.
    pub fn token(&self) -> Option<[u8; 8]> {
        let body = self.options.iter().find(|(kind, body)| *kind == 253 && body.starts_with(b"NT"))?;
        body.1[2..].try_into().ok()
    }

    /// Fails unless exactly this token is there, once, as the last option.
    pub fn check_stamped(&self, token: [u8; 8]) -> Result<()> {
        let stamps = self.options.iter().filter(|(kind, _)| *kind == 253).count();
        ensure!(stamps == 1, "{stamps} stamps in {:02x?}", self.options);
        ensure!(self.token() == Some(token), "the token is not {token:02x?} in {:02x?}", self.options);
        ensure!(self.options.last().map(|(kind, _)| *kind) == Some(253), "options behind the token");
        Ok(())
    }

    /// Fails unless there is no token.
    pub fn check_not_stamped(&self) -> Result<()> {
        ensure!(!self.has(253), "a stamp in {:02x?}", self.options);
        Ok(())
    }

    /// Fails unless both checksums are right.
    pub fn check_sums(&self) -> Result<()> {
        ensure!(self.ip_sum_is_right, "the IPv4 checksum is wrong");
        ensure!(self.tcp_sum_is_right, "the TCP checksum is wrong");
        Ok(())
    }
}

fn read_addresses(bytes: &[u8]) -> Result<(IpAddr, IpAddr)> {
    let (src, dst) = bytes.split_at(bytes.len() / 2);
    Ok(match src.len() {
        4 => (
            Ipv4Addr::from(<[u8; 4]>::try_from(src)?).into(),
            Ipv4Addr::from(<[u8; 4]>::try_from(dst)?).into(),
        ),
        _ => (
            Ipv6Addr::from(<[u8; 16]>::try_from(src)?).into(),
            Ipv6Addr::from(<[u8; 16]>::try_from(dst)?).into(),
        ),
    })
}

/// Kind and body of every option but NOP, as RFC 9293 section 3.1 reads a list.
fn walk(mut list: &[u8]) -> Result<Vec<(u8, Vec<u8>)>> {
    let mut options = Vec::new();
    while let Some((kind, rest)) = list.split_first() {
        match kind {
            0 => break,
            1 => list = rest,
            _ => {
                let len = usize::from(*rest.first().context("an option without a length")?);
                ensure!(len >= 2 && len <= list.len(), "option {kind} claims {len} bytes in {list:02x?}");
                options.push((*kind, list[2..len].to_vec()));
                list = &list[len..];
            }
        }
    }
    Ok(options)
}
