//! How values, rules and tokens are spelt for the kernel.

use plain::Plain;

use super::super::values::{Cgroup, Interface, Mark, Prefix, Range};
use super::super::{Decision, WhenFull};
use super::Naming;
use crate::types::{Action, Facts, Field, Rule as RawRule, WhenFull as RawWhenFull};

/// [`Facts`] as the kernel compares them.
pub(super) type Words = [u64; size_of::<Facts>() / 8];

pub(super) fn words(facts: &Facts) -> Words {
    // SAFETY: Facts is plain data of exactly this size; the bytes are copied.
    let bytes = unsafe { plain::as_bytes(facts) };
    let mut words = Words::default();
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(8)) {
        *word = u64::from_ne_bytes(bytes.try_into().unwrap_or_default());
    }
    words
}

pub(super) fn facts(words: &Words) -> Facts {
    let mut bytes = [0; size_of::<Facts>()];
    for (bytes, word) in bytes.chunks_exact_mut(8).zip(words) {
        bytes.copy_from_slice(&word.to_ne_bytes());
    }
    let mut facts = Facts::default();
    // The buffer has exactly the size.
    facts.copy_from_bytes(&bytes).ok();
    facts
}

/// Narrows mask and key by a value; false if nothing can match both.
pub(super) fn narrow(atom: Atom<'_>, mask: &mut Facts, key: &mut Facts) -> bool {
    match atom {
        Atom::Prefix(field, prefix) => {
            let family = if prefix.is_v6() { 6 } else { 4 };
            if mask.family != 0 && key.family != family {
                return false;
            }
            (mask.family, key.family) = (0xff, family);
            let (addr, bits) = prefix.mapped();
            let bits = u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0).to_be_bytes();
            match field {
                Field::FIELD_SRC => (mask.saddr, key.saddr) = (bits, addr.octets()),
                _ => (mask.daddr, key.daddr) = (bits, addr.octets()),
            }
        }
        Atom::Number(Field::FIELD_DPORT, port) => {
            (mask.dport_be, key.dport_be) = (0xffff, (port as u16).to_be())
        }
        Atom::Number(Field::FIELD_SPORT, port) => {
            (mask.sport_be, key.sport_be) = (0xffff, (port as u16).to_be())
        }
        Atom::Number(_, uid) => {
            (mask.uid, key.uid) = (u32::MAX, uid);
            (mask.has_sender, key.has_sender) = (0xff, 1);
        }
        Atom::Mark(mark) => (mask.mark, key.mark) = (mark.mask, mark.value),
        Atom::Interface(interface) => {
            (mask.ifindex, key.ifindex) = (u32::MAX, interface.index);
            (mask.netns_ino, key.netns_ino) = (u32::MAX, interface.netns);
        }
        Atom::Cgroup(cgroup, _) => {
            (mask.cgroup_id, key.cgroup_id) = (u64::MAX, cgroup.id);
            (mask.has_sender, key.has_sender) = (0xff, 1);
        }
    }
    true
}

pub(super) fn describe_mask(mask: &Facts, level: Option<u8>) -> String {
    let mut parts = Vec::new();
    let is_v4 = |bits: u32| bits >= 96;
    for (name, bytes) in [("src", mask.saddr), ("dst", mask.daddr)] {
        let bits = u128::from_be_bytes(bytes).count_ones();
        match bits {
            0 => {}
            // The family is compared as well, so an IPv6 prefix this long is told apart, but not by its mask.
            bits if is_v4(bits) => parts.push(format!("{name}/{} (or IPv6 /{bits})", bits - 96)),
            bits => parts.push(format!("{name}/{bits}")),
        }
    }
    if mask.family != 0 && parts.is_empty() {
        parts.push("family".to_string());
    }
    for (name, is_used) in [
        ("port", mask.dport_be != 0),
        ("src_port", mask.sport_be != 0),
        ("interface", mask.ifindex != 0),
        ("uid", mask.uid != 0),
    ] {
        if is_used {
            parts.push(name.to_string());
        }
    }
    if mask.mark != 0 {
        parts.push(format!("mark/{:#x}", mask.mark));
    }
    if mask.cgroup_id != 0 {
        parts.push(format!("cgroup at depth {}", level.unwrap_or(0)));
    }
    if parts.is_empty() { "any".to_string() } else { parts.join(" + ") }
}

/// Cuts a range of `width`-bit numbers into blocks that a prefix describes: first number and bits that count.
pub(super) fn blocks(range: Range, width: u32) -> Vec<(u32, u32)> {
    let mut blocks = Vec::new();
    let (mut at, end) = (u64::from(range.first), u64::from(range.last) + 1);
    while at < end {
        let aligned = if at == 0 { 32 } else { at.trailing_zeros() };
        let fits = (end - at).ilog2();
        let size = aligned.min(fits).min(width);
        blocks.push((at as u32, width - size));
        at += 1 << size;
    }
    blocks
}

pub(super) fn raw_rule(
    number: u32,
    hits: u32,
    decision: &Decision,
    names: Naming<'_>,
) -> anyhow::Result<RawRule> {
    let mut rule = RawRule { id: number, hits, ..Default::default() };
    let action = match decision {
        Decision::Stamp { token, when_full } => {
            rule.token =
                token.to_raw(number, names.instance, |ring| names.rings.get(&ring).copied().unwrap_or(0))?;
            let when_full = match when_full {
                WhenFull::Pass => RawWhenFull::WHEN_FULL_PASS,
                WhenFull::Drop => RawWhenFull::WHEN_FULL_DROP,
            };
            rule.when_full = when_full.0 as u8;
            Action::ACTION_STAMP
        }
        Decision::Skip => Action::ACTION_SKIP,
        Decision::Drop => Action::ACTION_DROP,
    };
    rule.action = action.0 as u8;
    Ok(rule)
}

/// A value of one field, as it narrows a shape.
#[derive(Clone, Copy)]
pub(super) enum Atom<'a> {
    Prefix(Field, Prefix),
    Number(Field, u32),
    Mark(Mark),
    Interface(&'a Interface),
    Cgroup(&'a Cgroup, u8),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_cut_into_blocks_that_cover_just_them() {
        for (first, last) in [(0, 0), (0, 65535), (65535, 65535), (1, 65534), (80, 443), (8000, 8999)] {
            let blocks = blocks(Range { first, last }, 16);
            let covered: Vec<u32> =
                blocks.iter().flat_map(|(first, bits)| *first..*first + (1 << (16 - bits))).collect();
            assert_eq!(covered, (first..=last).collect::<Vec<_>>());
        }
        assert_eq!(blocks(Range { first: 0, last: u32::MAX }, 32), [(0, 0)]);
    }
}
