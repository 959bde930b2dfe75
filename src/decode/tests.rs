//! Captures that are whole, of every kind, and captures that are damaged in every way.

use std::io::Read;
use std::time::Duration;

use super::capture::read;
use super::options::{Found, Shape};
use super::syn::find_syn;
use crate::token::Token;

const TOKEN: [u8; 12] = [253, 12, 0x4e, 0x54, 1, 2, 3, 4, 5, 6, 7, 8];

/// An IP packet that holds a SYN with that token.
fn packet(v6: bool) -> Vec<u8> {
    let mut tcp =
        vec![0x9c, 0x40, 1, 0xbb, 0xde, 0xad, 0xbe, 0xef, 0, 0, 0, 0, 8 << 4, 2, 0xfa, 0xf0, 0, 0, 0, 0];
    tcp.extend(TOKEN);
    let mut ip = if v6 {
        [&[0x60, 0, 0, 0, 0, tcp.len() as u8, 6, 64][..], &[0x20; 16], &[0x21; 16]].concat()
    } else {
        vec![0x45, 0, 0, 20 + tcp.len() as u8, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]
    };
    ip.extend(tcp);
    ip
}

/// A frame of each link type around that packet.
fn frames(v6: bool) -> Vec<(u32, Vec<u8>)> {
    let ip = packet(v6);
    let ether_type: [u8; 2] = if v6 { [0x86, 0xdd] } else { [8, 0] };
    let ethernet = [&[2; 12][..], &ether_type, &ip].concat();
    let tagged = [&[2; 12][..], &[0x88, 0xa8, 0, 5, 0x81, 0, 0, 7], &ether_type, &ip].concat();
    let cooked = [&[0, 4, 0, 1, 0, 6, 2, 2, 2, 2, 2, 2, 0, 0][..], &ether_type, &ip].concat();
    let cooked2 = [&ether_type[..], &[0; 18], &ip].concat();
    let raw = if v6 { 229 } else { 228 };
    vec![
        (1, ethernet),
        (1, tagged),
        (113, cooked),
        (276, cooked2),
        (101, ip.clone()),
        (raw, ip.clone()),
        (0, [&[2, 0, 0, 0][..], &ip].concat()),
        (108, [&[0, 0, 0, 2][..], &ip].concat()),
    ]
}

#[derive(Clone, Copy)]
struct Order {
    big: bool,
}

impl Order {
    fn u32(self, value: u32) -> [u8; 4] {
        if self.big { value.to_be_bytes() } else { value.to_le_bytes() }
    }

    fn u16(self, value: u16) -> [u8; 2] {
        if self.big { value.to_be_bytes() } else { value.to_le_bytes() }
    }
}

const SECONDS: u32 = 1_795_249_800;

/// A pcap file; `nanos` chooses its precision.
fn pcap(big: bool, nanos: bool, link_type: u32, frames: &[&[u8]]) -> Vec<u8> {
    let order = Order { big };
    let magic = if nanos { 0xa1b2_3c4d } else { 0xa1b2_c3d4 };
    let mut file = order.u32(magic).to_vec();
    file.extend([order.u16(2), order.u16(4)].concat());
    file.extend([0, 0, 262_144, link_type].map(|value| order.u32(value)).concat());
    for frame in frames {
        let fraction = if nanos { 123_456_789 } else { 123_456 };
        let len = frame.len() as u32;
        file.extend([SECONDS, fraction, len, len].map(|value| order.u32(value)).concat());
        file.extend(*frame);
    }
    file
}

/// A pcapng file with an interface for each frame, the precision of which is 10^-9 s, and a simple packet at its end.
fn pcapng(big: bool, frames: &[(u32, Vec<u8>)]) -> Vec<u8> {
    let order = Order { big };
    let block = |kind: u32, body: &[u8]| {
        let padded = [body, &vec![0; body.len().wrapping_neg() % 4]].concat();
        let len = order.u32(padded.len() as u32 + 12);
        [&order.u32(kind)[..], &len, &padded, &len].concat()
    };
    let section = [&order.u32(0x1a2b_3c4d)[..], &order.u16(1), &order.u16(0), &[0xff; 8]].concat();
    let mut file = block(0x0a0d_0d0a, &section);
    for (link_type, _) in frames {
        // Option 9 is the precision.
        let options = [&order.u16(9)[..], &order.u16(1), &[9, 0, 0, 0], &[0; 4]].concat();
        let body = [&order.u16(*link_type as u16)[..], &[0, 0], &order.u32(0), &options].concat();
        file.extend(block(1, &body));
    }
    let units = u64::from(SECONDS) * 1_000_000_000 + 123_456_789;
    for (number, (_, frame)) in frames.iter().enumerate() {
        let len = frame.len() as u32;
        let head = [number as u32, (units >> 32) as u32, units as u32, len, len];
        file.extend(block(6, &[&head.map(|value| order.u32(value)).concat()[..], frame].concat()));
    }
    let first = &frames[0].1;
    file.extend(block(3, &[&order.u32(first.len() as u32)[..], first].concat()));
    file
}

/// How many SYNs with the token there are, and the times that the capture gives them.
fn tokens(file: impl Read + Send) -> (usize, Vec<Option<Duration>>, Result<(), String>) {
    let (mut count, mut times) = (0, Vec::new());
    let result = read(file, |frame| {
        if let Some(syn) = find_syn(frame.link_type, frame.bytes, Shape::default()) {
            let expected = Token(TOKEN[4..].try_into()?);
            if syn.options == [Found::Token { token: expected }] && syn.flow.isn() == 0xdead_beef {
                count += 1;
                times.push(frame.time);
            }
        }
        Ok(())
    });
    (count, times, result.map_err(|error| format!("{error:#}")))
}

/// Gives one byte at a time, as a slow pipe may.
struct Trickle<'a>(&'a [u8]);

impl Read for Trickle<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let len = buffer.len().min(1);
        self.0.read(&mut buffer[..len])
    }
}

/// A short snap length (`tcpdump -s 68`) must not look as if there were no SYN.
#[test]
fn a_syn_that_is_cut_off_behind_its_flags_is_found() {
    let token = Found::Token { token: Token(TOKEN[4..].try_into().unwrap()) };
    for v6 in [false, true] {
        for (link_type, frame) in frames(v6) {
            for cut in 0..frame.len() {
                let found = find_syn(link_type as i32, &frame[..cut], Shape::default());
                // Of the header of 32 bytes the flags are the fourteenth.
                let header = (cut + 32).saturating_sub(frame.len());
                let options = found.as_ref().map(|syn| syn.options.as_slice());
                let expected = [Found::CutOff { at: 0 }];
                assert_eq!(options, (header >= 14).then_some(&expected[..]), "{link_type}, {cut} bytes");
                assert!(
                    found.is_none_or(|syn| syn.flow.isn() == 0xdead_beef && syn.flow.dst().port() == 443)
                );
            }
            let whole = find_syn(link_type as i32, &frame, Shape::default()).unwrap();
            assert_eq!(whole.options, std::slice::from_ref(&token));
        }
    }
}

#[test]
fn a_syn_is_found_in_every_kind_of_capture() {
    for big in [false, true] {
        for v6 in [false, true] {
            let frames = frames(v6);
            for (link_type, frame) in &frames {
                for nanos in [false, true] {
                    let file = pcap(big, nanos, *link_type, &[frame, frame]);
                    let fraction = if nanos { 123_456_789 } else { 123_456_000 };
                    let time = Some(Duration::new(SECONDS.into(), fraction));
                    assert_eq!(tokens(&file[..]), (2, vec![time; 2], Ok(())), "link type {link_type}");
                    assert_eq!(tokens(Trickle(&file)).0, 2);
                }
            }
            let file = pcapng(big, &frames);
            let (count, times, result) = tokens(&file[..]);
            assert_eq!((count, result), (frames.len() + 1, Ok(())), "big endian: {big}, IPv6: {v6}");
            let time = Some(Duration::new(SECONDS.into(), 123_456_789));
            assert!(times[..frames.len()].iter().all(|is| *is == time) && times[frames.len()].is_none());
            assert_eq!(tokens(Trickle(&file)).0, count);
        }
    }
}

#[test]
fn only_a_syn_is_one() {
    let frame = &frames(false)[0].1;
    let flags_at = 14 + 20 + 13;
    for flags in 0..=255u8 {
        let mut frame = frame.clone();
        frame[flags_at] = flags;
        for cut in [frame.len(), flags_at + 1] {
            let found = find_syn(1, &frame[..cut], Shape::default()).is_some();
            assert_eq!(found, flags & 0x17 == 0x02, "{flags:#x}, {cut} bytes");
        }
    }
}

#[test]
fn a_capture_that_is_cut_short_gives_what_it_has_and_says_so() {
    let frame = &frames(false)[0].1;
    for file in [pcap(false, false, 1, &[frame, frame]), pcapng(true, &frames(false)[..2])] {
        let mut counts = Vec::new();
        for len in 0..file.len() {
            let (count, _, result) = tokens(&file[..len]);
            if let Err(error) = &result {
                assert!(error.contains("cut short") || error.contains("neither pcap"), "{len}: {error}");
            }
            counts.push((count, result.is_ok()));
        }
        // Whole only where a packet ends.
        assert!(counts.iter().filter(|(_, ok)| *ok).count() <= 5, "{counts:?}");
        assert!(counts.iter().any(|(count, ok)| *count == 1 && !ok));
    }
}

#[test]
fn a_packet_may_be_as_long_as_libpcap_captures_them() {
    let long = [&frames(true)[0].1[..], &vec![0x55; 262_000]].concat();
    let small = &frames(true)[0].1;
    for file in [
        pcap(false, false, 1, &[small, &long, small, &long]),
        pcapng(false, &[(1, small.clone()), (1, long.clone()), (1, long.clone())]),
    ] {
        assert_eq!((tokens(&file[..]).0, tokens(&file[..]).2), (4, Ok(())));
    }
}

#[test]
fn what_is_no_capture_is_refused() {
    for (file, expect) in [
        (&b""[..], "neither pcap nor pcapng"),
        (b"#!/bin/sh\necho hello, world, this is no capture\n", "neither pcap nor pcapng"),
        (&[0x0a, 0x0d, 0x0d, 0x0a, 0xff, 0xff, 0xff, 0x7f, 0x4d, 0x3c, 0x2b, 0x1a], "which is a lie"),
        (&[0x0a, 0x0d, 0x0d, 0x0a, 8, 0, 0, 0, 0x4d, 0x3c, 0x2b, 0x1a], "which is a lie"),
        (&[0x0a, 0x0d, 0x0d, 0x0a, 28, 0, 0, 0, 1, 2, 3, 4], "neither pcap nor pcapng"),
    ] {
        let error = tokens(file).2.unwrap_err();
        assert!(error.contains(expect), "{error}");
    }
    // A packet that claims to be longer than anything is.
    let mut file = pcap(false, false, 1, &[&[0; 64]]);
    file[32..36].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f]);
    assert!(tokens(&file[..]).2.is_err());
}

/// Random damage: whatever happens, the end is reached, and nothing panics.
#[test]
fn damaged_captures_are_survived() {
    let seed = std::env::var("NETOKEN_SEED").ok().and_then(|text| text.parse().ok());
    let mut state = seed.unwrap_or_else(|| crate::clock::now().as_nanos() as u64).max(1);
    println!("random: NETOKEN_SEED={state}");
    let mut random = move |end: usize| {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        (state.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % end
    };
    let mut files = Vec::new();
    for big in [false, true] {
        for v6 in [false, true] {
            let frames = frames(v6);
            files.push(pcapng(big, &frames));
            files.extend(frames.iter().map(|(link_type, frame)| pcap(big, v6, *link_type, &[frame, frame])));
        }
    }
    let (mut good, mut bad) = (0, 0);
    for _ in 0..5_000 {
        let mut file = files[random(files.len())].clone();
        for _ in 0..=random(4) {
            let at = random(file.len());
            match random(4) {
                0 => file[at] ^= 1 << random(8),
                1 => file[at] = [0, 1, 0x7f, 0x80, 0xff][random(5)],
                2 => drop(file.drain(at..(at + 1 + random(8)).min(file.len()))),
                _ => file.insert(at, random(256) as u8),
            }
            if file.is_empty() {
                break;
            }
        }
        match tokens(&file[..]).2 {
            Ok(()) => good += 1,
            Err(_) => bad += 1,
        }
    }
    println!("{good} read to their end, {bad} refused");
    assert!(good > 500 && bad > 500);
}
