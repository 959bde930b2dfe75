//! The sets that checks ask: prefixes and ranges as keys of a trie.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::super::values::{List, Prefix, Range};
use super::encode::blocks;
use crate::types::{SetKey, Size};

/// All sets of a policy.
#[derive(Default)]
pub(super) struct Sets {
    /// What is in them.
    pub keys: Vec<SetKey>,
    /// Their numbers, by the address of the list that they were made from and its kind.
    known: FxHashMap<(usize, u32), u32>,
    next: u32,
}

impl Sets {
    /// A new one. Sets of addresses take two numbers: one for IPv4, the next for IPv6.
    pub fn begin(&mut self) -> u32 {
        let set = self.next;
        self.next += 2;
        set
    }

    pub fn add(&mut self, set: u32, value: [u8; 16], bits: u32) {
        self.keys.push(SetKey { bits: Size::SET_ID_BITS.0 + bits, set, value });
    }

    /// The set of a shared list is made once.
    fn of_list<T>(&mut self, list: &List<T>, kind: u32) -> (u32, bool) {
        let List::Many(many) = list else { return (self.begin(), true) };
        let key = (Arc::as_ptr(many).cast::<u8>() as usize, kind);
        if let Some(set) = self.known.get(&key) {
            return (*set, false);
        }
        let set = self.begin();
        self.known.insert(key, set);
        (set, true)
    }

    pub fn prefixes(&mut self, list: &List<Prefix>) -> u32 {
        let (set, is_new) = self.of_list(list, 0);
        if is_new {
            for prefix in list.all() {
                let (addr, bits) = prefix.mapped();
                self.add(set + u32::from(prefix.is_v6()), addr.octets(), bits.into());
            }
        }
        set
    }

    pub fn ranges(&mut self, list: &List<Range>, width: u32) -> u32 {
        let (set, is_new) = self.of_list(list, width);
        if is_new {
            for range in list.all() {
                for (first, bits) in blocks(*range, width) {
                    let mut value = [0; 16];
                    value[..4].copy_from_slice(&(first << (32 - width)).to_be_bytes());
                    self.add(set, value, bits);
                }
            }
        }
        set
    }
}
