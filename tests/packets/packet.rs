//! Describes packets and writes them: `syn().v6().vlan(7).options(&[...]).payload(100)`. Nothing here knows
//! the classifier; lengths and checksums are computed with code that exists only in this file, and every
//! one of them can be made to lie.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

pub const FIN: u8 = 0x01;
pub const SYN: u8 = 0x02;
pub const RST: u8 = 0x04;
pub const PSH: u8 = 0x08;
pub const ACK: u8 = 0x10;
pub const URG: u8 = 0x20;
pub const ECE: u8 = 0x40;
pub const CWR: u8 = 0x80;

/// RFC 8200 section 4, RFC 4302, RFC 4303.
pub const HOP_BY_HOP: u8 = 0;
pub const ROUTING: u8 = 43;
pub const FRAGMENT: u8 = 44;
pub const ESP: u8 = 50;
pub const AH: u8 = 51;
pub const DEST_OPTS: u8 = 60;

/// Without a link header, BPF_PROG_TEST_RUN still takes the EtherType from bytes 12 and 13. They are a part of
/// the source address, so these addresses make them say the truth: 8.0 is 0x0800 and 86dd is IPv6.
pub const SRC4: Ipv4Addr = Ipv4Addr::new(8, 0, 0, 1);
pub const DST4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
pub const SRC6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0x86dd, 0, 0, 0, 0, 1);
pub const DST6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x10);

/// A packet that is not written yet.
#[derive(Clone, Debug)]
pub struct Packet {
    pub ethernet: bool,
    pub tags: Vec<(u16, u16)>,
    pub src: IpAddr,
    pub dst: IpAddr,
    pub ip_id: u16,
    pub ip_options: Vec<u8>,
    /// IPv4: the 16 bits of flags and fragment offset.
    pub ip_fragment: u16,
    /// IPv6: type and bytes behind the "next header" byte.
    pub extensions: Vec<(u8, Vec<u8>)>,
    pub protocol: u8,
    pub sport: u16,
    pub dport: u16,
    pub isn: u32,
    pub flags: u8,
    pub options: Vec<u8>,
    pub payload: Vec<u8>,
    pub trailer: Vec<u8>,
    /// Instead of the true value.
    pub data_offset: Option<u8>,
    /// Added to the true IP length.
    pub ip_len_lie: i32,
}

/// A SYN over IPv4 on Ethernet, without options.
pub fn syn() -> Packet {
    Packet {
        ethernet: true,
        tags: Vec::new(),
        src: SRC4.into(),
        dst: DST4.into(),
        ip_id: 0x1234,
        ip_options: Vec::new(),
        ip_fragment: 0x4000,
        extensions: Vec::new(),
        protocol: 6,
        sport: 40_000,
        dport: 443,
        isn: 0x0102_0304,
        flags: SYN,
        options: Vec::new(),
        payload: Vec::new(),
        trailer: Vec::new(),
        data_offset: None,
        ip_len_lie: 0,
    }
}

impl Packet {
    pub fn v6(mut self) -> Self {
        (self.src, self.dst) = (SRC6.into(), DST6.into());
        self
    }

    pub fn family(self, v6: bool) -> Self {
        if v6 { self.v6() } else { self }
    }

    pub fn without_link_header(mut self) -> Self {
        self.ethernet = false;
        self
    }

    pub fn vlan(self, id: u16) -> Self {
        self.tag(0x8100, id)
    }

    pub fn tag(mut self, ether_type: u16, tci: u16) -> Self {
        self.tags.push((ether_type, tci));
        self
    }

    pub fn to(mut self, dst: &str, dport: u16) -> Self {
        self.dst = dst.parse().expect("an address");
        self.src = if self.dst.is_ipv4() { SRC4.into() } else { SRC6.into() };
        self.dport = dport;
        self
    }

    pub fn flags(mut self, flags: u8) -> Self {
        self.flags = flags;
        self
    }

    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// Bytes that differ from each other, so that a shift shows.
    pub fn payload(mut self, len: usize) -> Self {
        self.payload = (0..len).map(|i| (i * 7 + (i >> 8) * 3 + 1) as u8).collect();
        self
    }

    pub fn trailer(mut self, bytes: &[u8]) -> Self {
        self.trailer = bytes.to_vec();
        self
    }

    pub fn ip_options(mut self, options: &[u8]) -> Self {
        self.ip_options = options.to_vec();
        self
    }

    /// An extension header of `8 + 8 * more_words` bytes: PadN for options, an unused type for routing.
    pub fn extension(mut self, kind: u8, more_words: u8) -> Self {
        let len = 7 + 8 * usize::from(more_words);
        let mut bytes = vec![0; len];
        bytes[0] = more_words;
        match kind {
            // Type 253 is for experiments (RFC 4727); no segments left.
            ROUTING => bytes[1] = 253,
            // AH counts words of four bytes, minus two.
            AH => bytes[0] = ((len + 1) / 4 - 2) as u8,
            _ => (bytes[1], bytes[2]) = (1, (len - 3) as u8),
        }
        self.extensions.push((kind, bytes));
        self
    }

    /// IPv4: flags and offset. IPv6: a fragment header. The offset counts 8 bytes.
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        if self.dst.is_ipv4() {
            self.ip_fragment = offset | u16::from(more) << 13;
        } else {
            let field = (offset << 3 | u16::from(more)).to_be_bytes();
            self.extensions.push((FRAGMENT, vec![0, field[0], field[1], 1, 2, 3, 4]));
        }
        self
    }

    pub fn data_offset(mut self, words: u8) -> Self {
        self.data_offset = Some(words);
        self
    }

    pub fn ip_len_lie(mut self, more: i32) -> Self {
        self.ip_len_lie = more;
        self
    }

    /// Where the IP header begins.
    pub fn ip_at(&self) -> usize {
        if self.ethernet { 14 + 4 * self.tags.len() } else { 0 }
    }

    /// Where the TCP header begins.
    pub fn tcp_at(&self) -> usize {
        let extensions: usize = self.extensions.iter().map(|(_, bytes)| bytes.len() + 1).sum();
        let ip_len = if self.dst.is_ipv4() { 20 + self.ip_options.len() } else { 40 + extensions };
        self.ip_at() + ip_len
    }

    /// The bytes on the wire.
    pub fn build(&self) -> Vec<u8> {
        let segment = self.segment();
        let mut frame = self.link_header();
        match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => frame.extend(self.ipv4_header(src, dst, segment.len())),
            (IpAddr::V6(src), IpAddr::V6(dst)) => frame.extend(self.ipv6_header(src, dst, segment.len())),
            _ => panic!("source and destination are of one family"),
        }
        frame.extend(segment);
        frame.extend(&self.trailer);
        frame
    }

    fn link_header(&self) -> Vec<u8> {
        if !self.ethernet {
            return Vec::new();
        }
        let mut bytes = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
        for (ether_type, tci) in &self.tags {
            bytes.extend(ether_type.to_be_bytes());
            bytes.extend(tci.to_be_bytes());
        }
        let ether_type: u16 = if self.dst.is_ipv4() { 0x0800 } else { 0x86dd };
        bytes.extend(ether_type.to_be_bytes());
        bytes
    }

    fn ipv4_header(&self, src: Ipv4Addr, dst: Ipv4Addr, segment_len: usize) -> Vec<u8> {
        let len = 20 + self.ip_options.len();
        let total = ((len + segment_len) as i32 + self.ip_len_lie) as u16;
        let mut bytes = vec![0x40 | (len / 4) as u8, 0];
        bytes.extend(total.to_be_bytes());
        bytes.extend(self.ip_id.to_be_bytes());
        bytes.extend(self.ip_fragment.to_be_bytes());
        bytes.extend([64, self.protocol, 0, 0]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        bytes.extend(&self.ip_options);
        let check = checksum(&[&bytes]);
        bytes[10..12].copy_from_slice(&check.to_be_bytes());
        bytes
    }

    fn ipv6_header(&self, src: Ipv6Addr, dst: Ipv6Addr, segment_len: usize) -> Vec<u8> {
        let extensions: usize = self.extensions.iter().map(|(_, bytes)| bytes.len() + 1).sum();
        let length = ((extensions + segment_len) as i32 + self.ip_len_lie) as u16;
        let kinds: Vec<u8> = self.extensions.iter().map(|(kind, _)| *kind).chain([self.protocol]).collect();
        let mut bytes = vec![0x60, 0x0a, 0xbc, 0xde];
        bytes.extend(length.to_be_bytes());
        bytes.extend([kinds[0], 64]);
        bytes.extend(src.octets());
        bytes.extend(dst.octets());
        for ((_, extension), next) in self.extensions.iter().zip(&kinds[1..]) {
            bytes.push(*next);
            bytes.extend(extension);
        }
        bytes
    }

    fn segment(&self) -> Vec<u8> {
        let words = self.data_offset.unwrap_or(5 + self.options.len().div_ceil(4) as u8);
        let mut bytes = Vec::new();
        bytes.extend(self.sport.to_be_bytes());
        bytes.extend(self.dport.to_be_bytes());
        bytes.extend(self.isn.to_be_bytes());
        bytes.extend([0, 0, 0, 0, words << 4, self.flags, 0xfa, 0xf0, 0, 0, 0, 0]);
        bytes.extend(&self.options);
        bytes.extend(&self.payload);
        let check = checksum(&[&self.pseudo_header(bytes.len()), &bytes]);
        if self.protocol == 6 {
            bytes[16..18].copy_from_slice(&check.to_be_bytes());
        }
        bytes
    }

    fn pseudo_header(&self, len: usize) -> Vec<u8> {
        let mut bytes = match (self.src, self.dst) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => [src.octets(), dst.octets()].concat(),
            (IpAddr::V6(src), IpAddr::V6(dst)) => [src.octets(), dst.octets()].concat(),
            _ => panic!("source and destination are of one family"),
        };
        bytes.extend((len as u32).to_be_bytes());
        bytes.extend([0, 0, 0, self.protocol]);
        bytes
    }
}

/// RFC 1071 over the parts, each of which but the last has an even length.
pub fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u64;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum >> 16) + (sum & 0xffff);
    }
    !(sum as u16)
}

/// The option that must come out, with the token that the tests stamp.
pub const TOKEN: [u8; 8] = [0xa1, 0xb2, 0xc3, 0xd4, 0xe5, 0xf6, 0x07, 0x18];
pub const STAMP: [u8; 12] = [253, 12, 0x4e, 0x54, 0xa1, 0xb2, 0xc3, 0xd4, 0xe5, 0xf6, 0x07, 0x18];

pub const NOP: &[u8] = &[1];
pub const MSS: &[u8] = &[2, 4, 5, 0xb4];
pub const WINDOW_SCALE: &[u8] = &[3, 3, 7];
pub const SACK_PERMITTED: &[u8] = &[4, 2];
pub const TIMESTAMPS: &[u8] = &[8, 10, 0, 1, 2, 3, 0, 0, 0, 0];
pub const MD5: &[u8] = &[19, 18, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
pub const AO: &[u8] = &[29, 16, 1, 1, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9];
/// What Linux sends: 20 bytes.
pub const LINUX: &[u8] = &[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 1, 2, 3, 0, 0, 0, 0, 1, 3, 3, 7];

/// An option of `len` bytes that nobody knows.
pub fn unknown(len: usize) -> Vec<u8> {
    let mut bytes = vec![200, len as u8];
    bytes.extend((2..len).map(|i| 0x30 + i as u8));
    bytes
}
