//! The option lists that real stacks and scanners send, and everything that differs from a packet in one byte of its
//! list. Stamp and guard recognise such a list as a whole and walk any other one, so one byte decides which way they go.

use crate::packet::{LINUX, MSS, Packet};

pub const STACKS: &[(&str, &[u8])] = &[
    ("nothing", &[]),
    ("mss", MSS),
    ("linux", LINUX),
    ("linux, no timestamps", &[2, 4, 5, 0xb4, 1, 1, 4, 2, 1, 3, 3, 7]),
    ("windows", &[2, 4, 5, 0xb4, 1, 3, 3, 8, 1, 1, 4, 2]),
    ("macos", &[2, 4, 5, 0xb4, 1, 3, 3, 6, 1, 1, 8, 10, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0, 4, 2, 0, 0]),
    ("freebsd", &[2, 4, 5, 0xb4, 1, 3, 3, 6, 4, 2, 8, 10, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0]),
    ("openbsd", &[2, 4, 5, 0xb4, 1, 1, 4, 2, 1, 3, 3, 6, 1, 1, 8, 10, 0x11, 0x22, 0x33, 0x44, 0, 0, 0, 0]),
];

/// Kinds and lengths that mean something, and others; to these come the neighbours of what stood there.
const TELLING: &[u8] = &[0, 1, 2, 3, 4, 5, 8, 10, 12, 19, 29, 34, 0x4e, 0x54, 253, 254, 255];

/// The packet and all that differ from it in one byte of the options or in the length of these.
pub fn variants(what: &str, packet: &Packet) -> Vec<(String, Packet)> {
    let mut all = vec![(what.to_string(), packet.clone())];
    for (at, old) in packet.options.iter().enumerate() {
        let near = [old.wrapping_add(1), old.wrapping_sub(1), old ^ 0x80];
        for new in TELLING.iter().chain(&near).filter(|new| *new != old) {
            let mut changed = packet.clone();
            changed.options[at] = *new;
            all.push((format!("{what}, byte {at} is {new} and not {old}"), changed));
        }
    }
    for words in 0..=15 {
        all.push((format!("{what}, data offset {words}"), packet.clone().data_offset(words)));
    }
    all
}
