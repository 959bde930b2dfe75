//! Every state in which a SYN can come to the hook, as packet sockets, other filters and tun devices make them.
//! TX offload is off, so that what arrives holds the checksums that the wire would see.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use crate::lab::ip;
use crate::segment::{Segment, TOKEN};
use crate::support::ensure_eq;
use crate::wire::{Checksum, Frame, LINUX_OPTIONS, Tap};
use crate::world::{FAMILIES, Family, IN, OUT, World};
use crate::{NET, case};

use Checksum::{Complete, Partial};

const PORT: u16 = 4000;
const MSS: [u8; 4] = [2, 4, 5, 180];
const GROWTH: usize = 12;

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        for checksum in [Partial, Complete] {
            cases.push(case(
                &format!("a SYN over {name} with a {checksum:?} checksum is right, whatever its payload"),
                NET,
                move || payloads(family, checksum, 1500, &[0, 1, 2, 3, 99, 1000, 1388]),
            ));
            cases.push(case(
                &format!("a SYN over {name} in fragments with a {checksum:?} checksum is right"),
                NET,
                move || payloads(family, checksum, 9000, &[4100, 5000, 5001, 8000, 8001]),
            ));
        }
        for mtu in [1280, 1500, 9000] {
            cases.push(case(
                &format!("a SYN over {name} may fill an MTU of {mtu}, and is left alone if it would not fit"),
                NET,
                move || mtu_edge(family, mtu),
            ));
        }
    }
    cases
}

/// A hook, a sender in front of it, and a receiver behind it.
pub struct Bench {
    pub world: World,
    pub family: Family,
    pub sender: Tap,
    pub receiver: Tap,
}

impl Bench {
    pub fn new(family: Family, mtu: usize) -> Result<Bench> {
        let world = World::new(false)?;
        for (ns, interface) in [(&world.client, OUT), (&world.server, IN)] {
            ip(ns, [format!("link set {interface} mtu {mtu}")])?;
        }
        let sender = Tap::sender(&world.lab, &world.client, OUT)?;
        let receiver = Tap::receiver(&world.lab, &world.server, IN)?;
        Ok(Bench { world, family, sender, receiver })
    }

    pub fn syn(&self, options: &[u8], payload: &[u8]) -> Result<Frame> {
        let dst = SocketAddr::new(self.world.server_addr(self.family), PORT);
        Frame::syn(self.world.client_addr(self.family), dst, options, payload)
    }

    /// Sends a SYN and checks that it arrives stamped, right, and with its payload.
    pub fn expect_stamped(&self, options: &[u8], payload: &[u8], skb: (Checksum, usize)) -> Result<Segment> {
        let frame = self.syn(options, payload)?;
        let before = Segment::from_frame(&frame.bytes)?;
        self.sender.send(&frame, skb.0, skb.1)?;
        let (_, after) = self.receiver.next_syn(PORT)?;
        let check = || -> Result<()> {
            after.check_stamped(TOKEN)?;
            after.check_sums()?;
            ensure!(after.payload == payload, "the payload is another");
            ensure_eq!(after.ip_len, before.ip_len + GROWTH, "length of the IP packet");
            ensure_eq!((after.src, after.dst, after.isn), (before.src, before.dst, before.isn), "the flow");
            ensure!(
                after.options.starts_with(&before.options),
                "options are missing: {:02x?}",
                after.options
            );
            Ok(())
        };
        check().with_context(|| format!("{} bytes of payload, {skb:?}", payload.len()))?;
        Ok(after)
    }
}

/// Bytes that differ from their neighbours, and from those of other lengths.
pub fn payload(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at * 31 + at / 256 + len) as u8).collect()
}

/// With `linear` bytes in front, the rest of an skb that is longer than a page lies in fragments: all headers,
/// the options and payload, or only payload.
fn payloads(family: Family, checksum: Checksum, mtu: usize, lengths: &[usize]) -> Result<()> {
    const LINEAR: [usize; 5] = [14, 40, 64, 94, 200];
    let bench = Bench::new(family, mtu)?;
    bench.world.attach("")?;
    let mut sent = 0;
    for &len in lengths {
        for linear in LINEAR {
            // In front of the TCP header's end, nothing may be cut off from an skb that has not even that.
            let linear = if mtu > 4096 { linear } else { 0 };
            bench.expect_stamped(&LINUX_OPTIONS, &payload(len), (checksum, linear))?;
            bench.expect_stamped(&MSS, &payload(len), (checksum, linear))?;
            sent += 2;
            if mtu <= 4096 {
                break;
            }
        }
    }
    bench.world.expect_counters(&[("stamped", sent)])
}

fn mtu_edge(family: Family, mtu: usize) -> Result<()> {
    let bench = Bench::new(family, mtu)?;
    bench.world.attach("")?;
    let fits = payload(mtu - GROWTH - bench.syn(&MSS, b"")?.ip_len());
    for checksum in [Partial, Complete] {
        let stamped = bench.expect_stamped(&MSS, &fits, (checksum, 0))?;
        ensure_eq!(stamped.ip_len, mtu, "length of the largest SYN");

        for more in [1, GROWTH] {
            let frame = bench.syn(&MSS, &[&fits[..], &payload(more)].concat())?;
            bench.sender.send(&frame, checksum, 0)?;
            let (arrived, _) = bench.receiver.next_syn(PORT)?;
            ensure!(
                arrived == frame.bytes,
                "with {more} more, {checksum:?}, what arrived is not what was sent"
            );
        }
    }
    bench.world.expect_counters(&[("stamped", 2), ("too_big", 4)])
}
