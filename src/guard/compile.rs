//! Turns rules into what the kernel stores; the lists are in [`super::sources`]. Nothing else knows how that is.

use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::time::Duration;

use super::rules::{Alerts, AutoBlock, Mark, Mode, Rule, Rules};
use super::types::{Accept, Match, Mode as RawMode, RawAlerts, RawAutoBlock, Rule as RawRule, Size, Table};
use crate::keys::RingName;
use crate::token::Token;

/// Numbers of rings, as an instance has given them.
pub(super) type RingNumbers = HashMap<RingName, u8>;

impl Rules {
    /// The rules as the kernel stores them. `ring_number` says what number the instance has given to each of
    /// [`Rules::rings`].
    pub fn table(&self, generation: u8, ring_number: impl Fn(RingName) -> u8) -> Table {
        let mut table = Table {
            generation,
            has_exempt: (!self.exempt.is_empty()).into(),
            has_blocked: (!self.blocked.is_empty()).into(),
            auto_block: self.auto_block.map(AutoBlock::to_raw).unwrap_or_default(),
            alerts: self.alerts.map(Alerts::to_raw).unwrap_or_default(),
            ..Default::default()
        };
        let mut matches = 0;
        for (at, rule) in self.rules.iter().enumerate() {
            table.rules[at] = rule.to_raw(at, &ring_number);
            for dst in &rule.dst {
                for (port_first, port_last) in &rule.ports {
                    let (addr, bits) = dst.mapped();
                    table.matches[matches] = Match {
                        addr: words(addr.octets()),
                        mask: words(mask(bits).octets()),
                        port_first: *port_first,
                        port_last: *port_last,
                        rule: at as u8,
                        mode: rule.raw_mode().0 as u8,
                        family: dst.family(),
                        ..Default::default()
                    };
                    matches += 1;
                }
            }
        }
        table.matches_count = matches as u32;
        table
    }
}

impl AutoBlock {
    fn to_raw(self) -> RawAutoBlock {
        let prefixlen = |bits: u8| Size::SOURCE_FAMILY_BITS.0 + u32::from(bits);
        RawAutoBlock {
            within_ns: nanos(self.within),
            block_ns: nanos(self.block_for),
            refused_max: self.refused.into(),
            mask4: words(mask(96 + self.v4_bits).octets()),
            mask6: words(mask(self.v6_bits).octets()),
            prefixlen4: prefixlen(96 + self.v4_bits),
            prefixlen6: prefixlen(self.v6_bits),
        }
    }
}

impl Alerts {
    fn to_raw(self) -> RawAlerts {
        RawAlerts {
            within_ns: nanos(self.within),
            refused: self.refused.map(|refused| refused.unwrap_or(u64::MAX)),
        }
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Rule {
    fn raw_mode(&self) -> RawMode {
        match self.mode {
            Mode::Observe => RawMode::MODE_OBSERVE,
            Mode::Mark(_) => RawMode::MODE_MARK,
            Mode::Drop => RawMode::MODE_DROP,
            Mode::Scrub => RawMode::MODE_SCRUB,
        }
    }

    fn to_raw(&self, at: usize, ring_number: impl Fn(RingName) -> u8) -> RawRule {
        let mark = match self.mode {
            Mode::Mark(mark) => mark,
            _ => Mark { valid: 0, refused: 0, mask: 0 },
        };
        let mut raw = RawRule {
            id: at as u32 + 1,
            mode: self.raw_mode().0 as u8,
            tags_count: self.tags.len() as u8,
            statics_count: self.tokens.len() as u8,
            may_repeat: self.may_repeat.into(),
            accept: Accept {
                rings: self.keys.iter().fold(0, |bits, ring| bits | 1 << ring_number(*ring)),
                binds: self.binds.iter().fold(0, |bits, bind| bits | 1 << bind.number()),
                any_tag: 1,
                ..Default::default()
            },
            mark_valid: mark.valid,
            mark_refused: mark.refused,
            mark_mask: mark.mask,
            scrub: self.scrub.into(),
            ..Default::default()
        };
        for (to, tag) in raw.tags_be.iter_mut().zip(&self.tags) {
            *to = tag.to_be();
        }
        for (to, Token(bytes)) in raw.statics.iter_mut().zip(&self.tokens) {
            *to = u64::from_ne_bytes(*bytes);
        }
        raw
    }
}

/// As the program reads them out of a packet.
fn words(bytes: [u8; 16]) -> [u64; 2] {
    let (first, second) = bytes.split_at(8);
    [first, second].map(|half| u64::from_ne_bytes(half.try_into().expect("half of 16 bytes")))
}

fn mask(bits: u8) -> Ipv6Addr {
    Ipv6Addr::from(u128::MAX.checked_shl(128 - u32::from(bits)).unwrap_or(0))
}
