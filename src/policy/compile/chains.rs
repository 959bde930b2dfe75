//! What stands behind each key of the hash table: rules that are tried one after the other.

use rustc_hash::FxHashMap;

use super::CHAIN_MAX;
use super::encode::Words;

/// The variants behind a key, in the order of their rules.
struct Chain {
    first: u32,
    last: u32,
    /// Records that they will need.
    len: u16,
    /// The last one has no checks, so nothing behind it is ever reached.
    is_closed: bool,
}

const NONE: u32 = u32::MAX;

/// All chains of a policy.
#[derive(Default)]
pub(super) struct Chains {
    map: FxHashMap<Words, Chain>,
    /// Variant and next link, or NONE.
    links: Vec<(u32, u32)>,
}

impl Chains {
    pub fn reserve(&mut self, rules: usize) {
        self.map.reserve(rules);
        self.links.reserve(rules);
    }

    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Adds a variant behind a key, unless nothing would ever reach it there. It takes so many records.
    ///
    /// # Errors
    /// The chain is too long.
    pub fn append(&mut self, key: &Words, variant: u32, records: usize, is_closed: bool) -> Result<(), ()> {
        let link = self.links.len() as u32;
        let last = match self.map.get_mut(key) {
            None => {
                let len = u16::try_from(records).map_err(drop)?;
                if records > CHAIN_MAX {
                    return Err(());
                }
                self.map.insert(*key, Chain { first: link, last: link, len, is_closed });
                NONE
            }
            Some(chain) if chain.is_closed => return Ok(()),
            Some(chain) => {
                if usize::from(chain.len) + records > CHAIN_MAX {
                    return Err(());
                }
                chain.len += records as u16;
                chain.is_closed = is_closed;
                std::mem::replace(&mut chain.last, link)
            }
        };
        self.links.push((variant, NONE));
        if last != NONE {
            self.links[last as usize].1 = link;
        }
        Ok(())
    }

    /// Calls `each` with every key and the variants behind it.
    pub fn for_each(&self, mut each: impl FnMut(&Words, &[u32])) {
        let mut variants = Vec::new();
        for (key, chain) in &self.map {
            variants.clear();
            let mut at = chain.first;
            while at != NONE {
                let (variant, next) = self.links[at as usize];
                variants.push(variant);
                at = next;
            }
            each(key, &variants);
        }
    }
}
