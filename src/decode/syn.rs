//! From a captured frame to the SYN that it may hold.

use std::net::IpAddr;

use etherparse::{EtherType, IpNumber, LaxNetSlice, LaxSlicedPacket, TransportSlice};

use super::options::{Found, Shape, find, find_in_part};
use crate::token::keyed::Flow;

/// Link types of a capture, as <https://www.tcpdump.org/linktypes.html> numbers them.
const NULL: i32 = 0;
const ETHERNET: i32 = 1;
const RAW: [i32; 4] = [12, 14, 101, 228];
const RAW_V6: i32 = 229;
const LOOP: i32 = 108;
const LINUX_SLL: i32 = 113;
const LINUX_SLL2: i32 = 276;

/// RFC 9293: bytes without options; and of the flags SYN, and those that must not be set with it: ACK, RST and FIN.
const TCP_HEADER_LEN: usize = 20;
const SYN: u8 = 0x02;
const FLAGS_OF_SYN: u8 = SYN | 0x10 | 0x04 | 0x01;

/// A SYN that was captured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Syn {
    /// Whose it is.
    pub flow: Flow,
    /// Those of its options that are worth a word.
    pub options: Vec<Found>,
}

/// Whether SYNs can be found in captures of this link type.
pub fn is_known(link_type: i32) -> bool {
    matches!(link_type, NULL | ETHERNET | RAW_V6 | LOOP | LINUX_SLL | LINUX_SLL2) || RAW.contains(&link_type)
}

/// The SYN in a frame, if it is one and was captured as far as its flags. A SYN has SYN set, and ACK, RST and FIN clear.
pub fn find_syn(link_type: i32, frame: &[u8], shape: Shape) -> Option<Syn> {
    let by_type = |type_at: usize, len: usize| {
        let bytes = frame.get(type_at..type_at + 2)?;
        let ether_type = EtherType(u16::from_be_bytes([bytes[0], bytes[1]]));
        Some(LaxSlicedPacket::from_ether_type(ether_type, frame.get(len..)?))
    };
    let packet = match link_type {
        ETHERNET => LaxSlicedPacket::from_ethernet(frame).ok()?,
        LINUX_SLL => by_type(14, 16)?,
        LINUX_SLL2 => by_type(0, 20)?,
        // The family in front is in an order that nobody says; IP says itself what it is.
        NULL | LOOP => LaxSlicedPacket::from_ip(frame.get(4..)?).ok()?,
        known if is_known(known) => LaxSlicedPacket::from_ip(frame).ok()?,
        _ => return None,
    };
    from_packet(&packet, shape)
}

/// The SYN that begins with its IP header and ends with its options or later: what Linux saves of one.
pub fn read_syn(headers: &[u8], shape: Shape) -> Option<Syn> {
    from_packet(&LaxSlicedPacket::from_ip(headers).ok()?, shape)
}

fn from_packet(packet: &LaxSlicedPacket<'_>, shape: Shape) -> Option<Syn> {
    let (src, dst): (IpAddr, IpAddr) = match packet.net.as_ref()? {
        LaxNetSlice::Ipv4(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        LaxNetSlice::Ipv6(ip) => (ip.header().source_addr().into(), ip.header().destination_addr().into()),
        _ => return None,
    };
    let tcp = match &packet.transport {
        Some(TransportSlice::Tcp(tcp)) => Tcp {
            ports: (tcp.source_port(), tcp.destination_port()),
            isn: tcp.sequence_number(),
            is_syn: tcp.syn() && !(tcp.ack() || tcp.rst() || tcp.fin()),
            options: find(tcp.options(), shape),
        },
        _ => cut_off(packet, shape)?,
    };
    if !tcp.is_syn {
        return None;
    }
    let flow = Flow::new((src, tcp.ports.0).into(), (dst, tcp.ports.1).into(), tcp.isn);
    Some(Syn { flow: flow.ok()?, options: tcp.options })
}

/// What counts of a TCP header.
struct Tcp {
    ports: (u16, u16),
    isn: u32,
    is_syn: bool,
    options: Vec<Found>,
}

/// A TCP header that was not captured as far as it goes, but as far as its flags.
fn cut_off(packet: &LaxSlicedPacket<'_>, shape: Shape) -> Option<Tcp> {
    let payload = packet.net.as_ref()?.ip_payload_ref()?;
    let header = payload.payload;
    let ([a, b, c, d], flags) = (*header.first_chunk()?, *header.get(13)?);
    let len = usize::from(header[12] >> 4) * 4;
    if payload.ip_number != IpNumber::TCP || payload.fragmented || len < TCP_HEADER_LEN || header.len() >= len
    {
        return None;
    }
    let isn = u32::from_be_bytes(*header[4..].first_chunk()?);
    Some(Tcp {
        ports: (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])),
        isn,
        is_syn: flags & FLAGS_OF_SYN == SYN,
        options: find_in_part(header.get(TCP_HEADER_LEN..).unwrap_or_default(), shape),
    })
}
