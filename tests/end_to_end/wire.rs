//! Frames as they are on the wire: writing SYNs by hand, sending them in the skb state that a case wants, and
//! seeing what arrives at the other end.

use std::net::{IpAddr, SocketAddr};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use etherparse::PacketBuilder;
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, PATIENCE};
use crate::segment::{self, Segment};
use crate::sys;

/// MSS, SACK permitted, timestamps, NOP, window scale: what Linux sends.
pub const LINUX_OPTIONS: [u8; 20] = [2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7];
const SOURCE: u16 = 40_000;
const TCP_CHECKSUM: usize = 16;

/// Whose sums a sender leaves to the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// CHECKSUM_PARTIAL: the field holds the sum of the pseudo header.
    Partial,
    /// CHECKSUM_NONE: the field is right.
    Complete,
}

/// A SYN with an Ethernet header, and where its parts are.
#[derive(Clone, Debug)]
pub struct Frame {
    pub bytes: Vec<u8>,
    tcp_at: usize,
}

impl Frame {
    /// Writes a SYN from `src` to `dst`.
    pub fn syn(src: IpAddr, dst: SocketAddr, options: &[u8], payload: &[u8]) -> Result<Frame> {
        // Locally administered, and nobody's.
        let ethernet = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
        let (ip, tcp_at) = match (src, dst.ip()) {
            (IpAddr::V4(src), IpAddr::V4(dst)) => (ethernet.ipv4(src.octets(), dst.octets(), 64), 34),
            (IpAddr::V6(src), IpAddr::V6(dst)) => (ethernet.ipv6(src.octets(), dst.octets(), 64), 54),
            _ => bail!("{src} and {dst} are not of one family"),
        };
        let tcp = ip.tcp(SOURCE, dst.port(), 0x0102_0304, 64_000).syn().options_raw(options)?;
        let mut bytes = Vec::new();
        tcp.write(&mut bytes, payload)?;
        Ok(Frame { bytes, tcp_at })
    }

    pub fn ip_len(&self) -> usize {
        self.bytes.len() - 14
    }

    /// The frame with a `struct virtio_net_hdr` in front, which says how its skb is to be made: at least
    /// `linear` bytes of it, which the kernel rounds up to what it needs, are not in fragments.
    fn with_vnet_header(&self, checksum: Checksum, linear: usize) -> Vec<u8> {
        const NEEDS_CSUM: u8 = 1;
        let mut frame = self.bytes.clone();
        let partial = checksum == Checksum::Partial;
        if partial {
            let addresses = if self.tcp_at == 34 { &frame[26..34] } else { &frame[22..54] };
            let tcp_len = ((frame.len() - self.tcp_at) as u32).to_be_bytes();
            let sum = segment::sum(&[addresses, &tcp_len, &[0, 6]]);
            frame[self.tcp_at + TCP_CHECKSUM..][..2].copy_from_slice(&sum.to_be_bytes());
        }
        let (start, offset) = if partial { (self.tcp_at as u16, TCP_CHECKSUM as u16) } else { (0, 0) };
        let flags = if partial { NEEDS_CSUM } else { 0 };
        let gso_size = 0;
        let mut bytes = vec![flags, 0];
        for field in [linear as u16, gso_size, start, offset] {
            bytes.extend(field.to_ne_bytes());
        }
        bytes.extend(frame);
        bytes
    }
}

/// A packet socket on one interface.
pub struct Tap {
    socket: Socket,
}

impl Tap {
    /// Opens it for sending only.
    pub fn sender(lab: &Lab, ns: &str, interface: &str) -> Result<Tap> {
        let tap = Tap::open(lab, ns, interface, 0)?;
        sys::set_option(&tap.socket, libc::SOL_PACKET, libc::PACKET_VNET_HDR, &1i32.to_ne_bytes())?;
        Ok(tap)
    }

    /// Opens it for receiving. What arrives from now on is kept until it is asked for.
    pub fn receiver(lab: &Lab, ns: &str, interface: &str) -> Result<Tap> {
        let tap = Tap::open(lab, ns, interface, 1)?;
        sys::set_option(&tap.socket, libc::SOL_PACKET, libc::PACKET_AUXDATA, &1i32.to_ne_bytes())?;
        Ok(tap)
    }

    fn open(lab: &Lab, ns: &str, interface: &str, receive: usize) -> Result<Tap> {
        lab.within(ns, || {
            // Protocol 0: nothing arrives before the socket is bound to one interface.
            let socket = Socket::new(Domain::PACKET, Type::RAW, None)?;
            if receive > 0 {
                socket.set_recv_buffer_size(4 << 20)?;
            }
            sys::bind_packet(&socket, interface)?;
            Ok(Tap { socket })
        })
    }

    /// Sends a frame.
    pub fn send(&self, frame: &Frame, checksum: Checksum, linear: usize) -> Result<()> {
        let bytes = frame.with_vnet_header(checksum, linear);
        self.socket.send(&bytes).with_context(|| format!("sending a frame of {}", frame.bytes.len()))?;
        Ok(())
    }

    /// The SYN that opened this connection, when it first came by here. One of another, which was sent again, is passed
    /// over.
    pub fn syn_of(&self, connection: &Segment) -> Result<Segment> {
        loop {
            let (_, syn) = self.next_syn(connection.dst.port())?;
            if (syn.src, syn.isn) == (connection.src, connection.isn) {
                return Ok(syn);
            }
        }
    }

    /// The next SYN to this port, as frame and as what it says.
    pub fn next_syn(&self, dport: u16) -> Result<(Vec<u8>, Segment)> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("waited {PATIENCE:?} for a SYN to port {dport}");
            }
            self.socket.set_read_timeout(Some(left))?;
            let (mut frame, tag) = sys::receive_frame(&self.socket).context("waiting for a SYN")?;
            if let Some((kind, control)) = tag {
                // The device keeps the outer tag beside the frame; on the wire it stands here.
                frame.splice(12..12, [kind.to_be_bytes(), control.to_be_bytes()].concat());
            }
            if let Ok(segment) = Segment::from_frame(&frame)
                && segment.is_syn()
                && segment.dst.port() == dport
            {
                return Ok((frame, segment));
            }
        }
    }
}
