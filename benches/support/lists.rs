//! Long lists of sources, the same in every run.

use std::collections::HashSet;
use std::net::{Ipv4Addr, Ipv6Addr};

/// An address for every number, spread over the address space as sources of a flood are.
pub fn host(at: usize) -> Ipv4Addr {
    let bits = (at as u32).wrapping_mul(2_654_435_761);
    Ipv4Addr::from_bits(if bits == 0xc000_0201 { 1 } else { bits })
}

/// So many IPv4 prefixes of 20 to 32 bits, as many of each length, one a line. Many are around others.
pub fn mixed(count: usize) -> String {
    let mut known = HashSet::new();
    let prefixes = (0..).map(|at| {
        let bits = 20 + (at % 13) as u32;
        (host(at).to_bits() >> (32 - bits) << (32 - bits), bits)
    });
    let new = prefixes.filter(|prefix| known.insert(*prefix)).take(count);
    new.map(|(addr, bits)| format!("{}/{bits}\n", Ipv4Addr::from_bits(addr))).collect()
}

/// An address for every number, of one IPv6 /64.
pub fn in_cluster(at: usize) -> Ipv6Addr {
    Ipv6Addr::from_bits(
        0x2001_0db8_0000_0001 << 64 | u128::from((at as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15)),
    )
}

/// So many addresses of that /64, one a line.
pub fn clustered(count: usize) -> String {
    (0..count).map(|at| format!("{}\n", in_cluster(at))).collect()
}
