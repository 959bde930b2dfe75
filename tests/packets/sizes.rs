//! Lengths and sums at their edges: payloads around the chunks in which they move, the MTU, segments that
//! wait for offload, skbs in fragments, and checksums that come out as 0 or as all ones.

use anyhow::{Context, Result, ensure};
use netoken::program::{LinkHeader, Settings};
use netoken::types::{Fault, Verdict};

use crate::packet::{DEST_OPTS, HOP_BY_HOP, LINUX, MSS, Packet, ROUTING, STAMP, syn};
use crate::run::{Bench, How, name};
use crate::support::{ensure_eq, sh};

const STAMPED: Verdict = Verdict::VERDICT_STAMPED;
const TOO_BIG: Verdict = Verdict::VERDICT_TOO_BIG;

/// Around every multiple of 1, 2 and 4 KiB that one page holds.
const PAYLOADS: [usize; 22] = [
    1, 2, 3, 4, 11, 12, 13, 255, 256, 257, 511, 513, 1023, 1024, 1025, 2036, 2047, 2048, 2049, 2060, 3001,
    3400,
];
/// More than a page: kernels before 6.19 do not let a test build them.
const LONG_PAYLOADS: [usize; 12] = [4083, 4084, 4095, 4096, 4097, 6143, 6144, 6145, 8191, 8192, 8193, 15_000];

/// Where it stands in an Ethernet frame.
const IPV4_CHECKSUM: usize = 24;

fn payload_of(len: usize) -> [Packet; 4] {
    let (v4, v6) = (syn().payload(len), syn().v6().payload(len));
    [v4.clone(), v6.clone(), v4.options(LINUX).trailer(&[0xee; 7]), v6.vlan(2).options(LINUX)]
}

pub fn a_payload_of_any_size_moves_whole() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for len in PAYLOADS {
        for packet in payload_of(len) {
            bench.expect(&format!("{len} bytes of payload"), &packet.build(), STAMPED)?;
        }
    }
    Ok(())
}

pub fn a_payload_of_several_pages_moves_whole() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for len in LONG_PAYLOADS {
        for packet in payload_of(len) {
            bench.expect(&format!("{len} bytes of payload"), &packet.build(), STAMPED)?;
        }
    }
    Ok(())
}

/// Above some 16 KiB the kernel may refuse to grow an skb, and near 64 KiB the length field cannot say what the
/// loopback device could carry: then the SYN leaves as it came.
pub fn a_payload_beyond_reason_is_stamped_or_left_alone() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let total_max = usize::from(u16::MAX);
    for len in
        [16_000, 16_384, 32_768, total_max - 12, total_max - 11, total_max - 4, total_max - 3, total_max]
    {
        for list in [&[][..], &[2, 4, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1]] {
            let frame = syn().options(list).payload(len - 40 - list.len()).build();
            let outcome = bench.run(&frame, How::default())?;
            println!("{len} bytes, {} of them options: {}", list.len(), name(outcome.verdict));
            let refused = matches!(outcome.verdict, Some(TOO_BIG | Verdict::VERDICT_HELPER_FAILED));
            if !(refused && !outcome.dropped && outcome.frame == frame) {
                bench.expect(&format!("{len} bytes"), &frame, STAMPED)?;
            }
        }
    }
    Ok(())
}

/// In a network namespace of its own, whose loopback device gets a small MTU.
fn with_mtu(mtu: usize, test: fn(&mut Bench) -> Result<()>) -> Result<()> {
    std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("leaving the network namespace")?;
        sh(&format!("ip link set lo mtu {mtu} up"))?;
        // Where the kernel cannot be asked for the MTU, the program is told it.
        let mut bench = Bench::stamping(Settings { mtu_bytes: mtu as u32, ..Settings::default() })?;
        bench.path.mtu = mtu;
        test(&mut bench)
    })
    .join()
    .unwrap_or_else(|_| anyhow::bail!("the thread panicked"))
}

pub fn the_mtu_is_kept_to_the_byte() -> Result<()> {
    with_mtu(1400, |bench| {
        for packet in [syn(), syn().v6(), syn().v6().extension(HOP_BY_HOP, 0), syn().ip_options(&[1; 8])] {
            for packet in [packet.clone(), packet.clone().vlan(5), packet.tag(0x88a8, 6).vlan(5)] {
                for (list, growth) in [(&[][..], 12), (LINUX, 12), (&[1, 1, 1, 1], 8), (&[1; 12], 0)] {
                    let headers = packet.tcp_at() - packet.ip_at() + 20 + list.len();
                    for (len, verdict) in [
                        (1400 - growth, STAMPED),
                        (1401 - growth, if growth > 0 { TOO_BIG } else { STAMPED }),
                    ] {
                        let packet = packet.clone().options(list).payload(len - headers);
                        bench.expect(
                            &format!("{len} bytes, growing by {growth}"),
                            &packet.build(),
                            verdict,
                        )?;
                    }
                }
            }
        }
        // Padding does not count.
        let padded = syn().options(LINUX).payload(1400 - 12 - 60).trailer(&[0; 30]);
        bench.expect("padding beyond the MTU", &padded.build(), STAMPED)
    })
}

pub fn a_segment_that_waits_for_offload_must_not_grow() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let how = How { gso_size: 500, ..How::default() };
    for packet in [syn(), syn().v6(), syn().vlan(3)] {
        for list in [&[][..], MSS, LINUX] {
            let frame = packet.clone().options(list).payload(1200).build();
            bench.expect_how("gso", &frame, TOO_BIG, how)?;
        }
        let roomy = packet.options(&[1; 12]).payload(1200).build();
        bench.expect_how("gso with room", &roomy, STAMPED, how)?;
    }
    Ok(())
}

/// A header counts its length in one byte: up to 2048 bytes each, and the page that a test can fill in all.
pub fn extension_headers_may_be_long() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for (hop_by_hop, routing, dest_opts) in [
        (0, 0, 23),
        (0, 0, 24),
        (20, 10, 31),
        (31, 31, 31),
        (63, 0, 64),
        (127, 0, 0),
        (128, 0, 0),
        (255, 0, 100),
    ] {
        let packet = syn()
            .v6()
            .extension(HOP_BY_HOP, hop_by_hop)
            .extension(ROUTING, routing)
            .extension(DEST_OPTS, dest_opts)
            .options(LINUX)
            .payload(77);
        let what = format!("TCP {} bytes behind the beginning", packet.tcp_at());
        bench.expect(&what, &packet.build(), STAMPED)?;
    }
    Ok(())
}

/// Everything from some byte on lies outside the linear part.
pub fn an_skb_in_fragments_is_stamped_as_well() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let long = syn().v6().extension(HOP_BY_HOP, 20).extension(ROUTING, 10).extension(DEST_OPTS, 31);
    for (what, packet) in [
        ("v4", syn().options(LINUX)),
        ("v6", syn().v6().options(LINUX)),
        ("qinq", syn().tag(0x88a8, 2).vlan(1).options(LINUX).payload(3000)),
        ("v4 with payload", syn().options(&[1; 40]).payload(500)),
        ("v6 with headers beyond 256 bytes", long.options(LINUX).payload(500)),
    ] {
        let frame = packet.build();
        // Both families' fixed headers: the kernel builds the skb's socket from them.
        for linear in (54..=frame.len().min(packet.tcp_at() + 64)).chain([frame.len()]) {
            let how = How { linear: linear as u32, ..How::default() };
            bench.expect_how(&format!("{what}, {linear} linear bytes"), &frame, STAMPED, how)?;
        }
    }
    Ok(())
}

/// Whether it is a SYN shows if its flags are there; with the rest missing for good, it leaves as it came.
pub fn a_syn_that_cannot_be_brought_together_is_counted() -> Result<()> {
    let settings = Settings { faults: Fault::FAULT_PULL.0, ..Settings::default() };
    let mut bench = Bench::strict(settings)?;
    for drops in [true, false] {
        if !drops {
            bench.set_policy("default = { action = 'stamp', token = 'a1b2c3d4e5f60718' }")?;
        }
        for (what, packet) in [
            ("v4", syn().options(LINUX)),
            ("v6", syn().v6().options(LINUX)),
            ("qinq", syn().tag(0x88a8, 2).vlan(1).options(LINUX).payload(3000)),
        ] {
            let frame = packet.build();
            let (flags_at, options_end) = (packet.tcp_at() + 16, packet.tcp_at() + 20 + LINUX.len());
            for linear in 54..options_end {
                let how = How { linear: linear as u32, ..How::default() };
                let outcome = bench.run(&frame, how)?;
                let verdict = (linear >= flags_at).then_some(Verdict::VERDICT_HELPER_FAILED);
                ensure!(
                    outcome.verdict == verdict && outcome.dropped == (drops && verdict.is_some()),
                    "{what}, {linear} linear bytes: {} dropped: {}",
                    name(outcome.verdict),
                    outcome.dropped
                );
                ensure!(outcome.dropped || outcome.frame == frame, "{what}, {linear} linear bytes: changed");
            }
        }
    }
    Ok(())
}

/// The packet whose checksum at `at` is `wanted`, by the one 16-bit field of it that `set` changes: what the sum
/// lacks when that field is zero, RFC 1071.
fn find(packet: &Packet, set: fn(&mut Packet, u16), at: usize, wanted: u16) -> Result<Packet> {
    let mut packet = packet.clone();
    set(&mut packet, 0);
    let (has, wants) = (!sum_at(&packet.build(), at), !wanted);
    let lacks = wants.wrapping_sub(has).wrapping_sub(u16::from(wants < has));
    set(&mut packet, lacks);
    ensure!(sum_at(&packet.build(), at) == wanted, "no value gives the checksum {wanted:#x}");
    Ok(packet)
}

fn sum_at(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

/// RFC 1624: an update must not turn 0x0000 into 0xffff or back.
pub fn tcp_checksums_at_the_edges_stay_right() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let set: fn(&mut Packet, u16) = |packet, value| packet.isn = 0x0506_0000 | u32::from(value);
    for base in [syn().payload(3), syn().v6().payload(4)] {
        let at = base.tcp_at() + 16;
        for wanted in [0x0000, 0x0001, 0x00ff, 0xff00, 0xfffe] {
            let before = find(&base, set, at, wanted)?;
            bench.expect(&format!("TCP checksum {wanted:#x} before"), &before.build(), STAMPED)?;

            let stamped = find(&base.clone().options(&STAMP), set, at, wanted)?;
            let out = bench.run(&stamped.clone().options(&[]).build(), How::default())?.frame;
            ensure_eq!(sum_at(&out, at), wanted, "TCP checksum after");
            ensure_eq!(out, stamped.build(), "the whole frame");
        }
        // All ones is the other way to write a sum of zero; receivers take it.
        let zero = find(&base, set, at, 0)?;
        let mut frame = zero.build();
        frame[at..at + 2].fill(0xff);
        bench.expect("TCP checksum 0xffff before", &frame, STAMPED)?;
    }
    Ok(())
}

pub fn ipv4_checksums_at_the_edges_stay_right() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let set: fn(&mut Packet, u16) = |packet, value| packet.ip_id = value;
    for base in [syn(), syn().ip_options(&[1; 12]).payload(9)] {
        for wanted in [0x0000, 0x0001, 0x000b, 0x000c, 0x00ff, 0xff00, 0xfff3, 0xfffe] {
            let before = find(&base, set, IPV4_CHECKSUM, wanted)?;
            bench.expect(&format!("IPv4 checksum {wanted:#x} before"), &before.build(), STAMPED)?;

            let stamped = find(&base.clone().options(&STAMP), set, IPV4_CHECKSUM, wanted)?;
            let out = bench.run(&stamped.clone().options(&[]).build(), How::default())?.frame;
            ensure_eq!(sum_at(&out, IPV4_CHECKSUM), wanted, "IPv4 checksum after");
            ensure_eq!(out, stamped.build(), "the whole frame");
        }
        let mut frame = find(&base, set, IPV4_CHECKSUM, 0)?.build();
        frame[IPV4_CHECKSUM..][..2].fill(0xff);
        bench.expect("IPv4 checksum 0xffff before", &frame, STAMPED)?;
    }
    Ok(())
}

/// A wrong sum must not be healed: whoever would have dropped the SYN must still.
pub fn a_wrong_checksum_stays_wrong() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for base in [syn().options(LINUX).payload(10), syn().v6().options(LINUX)] {
        for flip in 0..16 {
            let mut frame = base.build();
            frame[base.tcp_at() + 16 + flip / 8] ^= 1 << (flip % 8);
            let what = format!("bit {flip} of the TCP checksum");
            let got = bench.judge(&what, &frame)?;
            ensure!(got == Some(STAMPED), "{what}: {}", name(got));
        }
    }
    for flip in 0..16 {
        let mut frame = syn().build();
        frame[IPV4_CHECKSUM + flip / 8] ^= 1 << (flip % 8);
        bench.expect(&format!("bit {flip} of the IPv4 checksum"), &frame, STAMPED)?;
    }
    Ok(())
}
