//! What is drawn at random, and frames that are changed at random. The same seed draws the same.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};

use crate::packet::Packet;

/// The kernel runs no shorter frame.
pub const FRAME_MIN: usize = 14;

/// BPF_PROG_TEST_RUN refuses for TC an IP header that is not whole behind the first 14 bytes, whatever these are.
pub fn tc_takes(frame: &[u8]) -> bool {
    let len_min = match frame.get(12..14) {
        Some([0x08, 0x00]) => FRAME_MIN + 20,
        Some([0x86, 0xdd]) => FRAME_MIN + 40,
        _ => FRAME_MIN,
    };
    frame.len() >= len_min
}

/// From NETOKEN_SEED, or the time; it is printed.
pub fn seed() -> Result<u64> {
    let seed = match std::env::var("NETOKEN_SEED") {
        Ok(text) => text.parse().context("NETOKEN_SEED is no number")?,
        Err(_) => SystemTime::now().duration_since(UNIX_EPOCH)?.as_nanos() as u64,
    };
    println!("NETOKEN_SEED={seed}");
    // Zero is the one state that xorshift never leaves.
    Ok(seed.max(1))
}

/// Xorshift64*: small, and the same everywhere.
pub struct Random(pub u64);

impl Random {
    pub fn seeded() -> Result<Random> {
        seed().map(Random)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, end: usize) -> usize {
        ((self.next() >> 32) as usize) % end.max(1)
    }

    pub fn one_of<'a, T>(&mut self, all: &'a [T]) -> &'a T {
        &all[self.below(all.len())]
    }

    /// A packet of which a few bytes are others, in a frame that the kernel takes.
    pub fn mutant(&mut self, packet: &Packet) -> Vec<u8> {
        loop {
            let mut frame = packet.build();
            self.mutate(packet, &mut frame);
            keep_family(packet, &mut frame);
            if tc_takes(&frame) {
                return frame;
            }
        }
    }

    /// Changes a few bytes, most of them where they hurt.
    fn mutate(&mut self, packet: &Packet, frame: &mut Vec<u8>) {
        const TELLING: [u8; 18] = [0, 1, 2, 3, 4, 5, 6, 12, 17, 19, 29, 40, 41, 44, 0x4e, 0x54, 253, 255];
        for _ in 0..=self.below(4) {
            let (ip, tcp) = (packet.ip_at(), packet.tcp_at());
            let last = frame.len().saturating_sub(1);
            let at = match self.below(8) {
                0 => self.below(frame.len()),
                1 => ip + self.below(tcp - ip),
                2 => tcp + 12 + self.below(2),
                3 => ip + 2 + self.below(5),
                _ => tcp + 20 + self.below(frame.len().saturating_sub(tcp + 20)),
            }
            .min(last);
            match self.below(12) {
                0 => frame.truncate(self.below(frame.len()).max(FRAME_MIN)),
                1 => frame.extend((0..self.below(20)).map(|i| (i * 37) as u8)),
                2 => frame.insert(at, self.next() as u8),
                3 if frame.len() > FRAME_MIN => drop(frame.remove(at)),
                4 => frame[at] ^= 1 << self.below(8),
                5 => frame[at] = self.next() as u8,
                6 => frame.swap(at, last.min(at + 1)),
                7 if last > at + 8 => frame.copy_within(at..at + 4, at + 4),
                _ => frame[at] = *self.one_of(&TELLING),
            }
        }
    }
}

/// Without a link header the kernel, not the bytes, says which family it is; a change here would make a frame
/// that no device can deliver.
fn keep_family(packet: &Packet, frame: &mut [u8]) {
    if !packet.ethernet {
        let v6 = packet.dst.is_ipv6();
        frame[0] = (if v6 { 0x60 } else { 0x40 }) | (frame[0] & 0xf);
        frame[12..14].copy_from_slice(if v6 { &[0x86, 0xdd] } else { &[8, 0] });
    }
}
