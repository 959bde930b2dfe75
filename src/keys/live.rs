//! Keys in the kernel: the maps `keys`, `rings` and `key_counts` of an instance. What is on disk decides; this file
//! makes the kernel follow in an order in which no token is made that is not accepted.

use std::collections::{BTreeSet, HashSet};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use plain::Plain;
use zeroize::Zeroizing;

use super::{KEYS_MAX, Key, RingName, State, signer};
use crate::types::{Key as RawKey, KeyCount, KeySize, KeyState, Ring};

const RINGS_MAX: u32 = KeySize::RINGS_MAX.0;
const _: () = assert!(size_of::<RawKey>() == 24 && size_of::<Ring>() == 32 && size_of::<KeyCount>() == 48);

// SAFETY: integers and arrays of them, without hidden padding, which keys.h asserts.
unsafe impl Plain for Ring {}
// SAFETY: the same.
unsafe impl Plain for KeyCount {}

/// The maps.
#[derive(Debug)]
pub struct LiveKeys {
    /// Array by key id.
    pub keys: MapHandle,
    /// Array by number of ring.
    pub rings: MapHandle,
    /// Per CPU, by key id.
    pub counts: MapHandle,
}

/// What has been done with a key.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Use {
    /// Tokens made with it, as this host's clock saw it.
    pub made: u64,
    /// Tokens accepted that were made with it.
    pub accepted: u64,
    /// When the last one was made.
    pub made_at: Option<SystemTime>,
    /// When the last one was accepted.
    pub accepted_at: Option<SystemTime>,
}

impl Use {
    /// The later of both.
    pub fn last(&self) -> Option<SystemTime> {
        self.made_at.max(self.accepted_at)
    }
}

/// Key rings that would be left without.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Losses {
    /// A key that signs.
    pub signing: BTreeSet<RingName>,
    /// Any key.
    pub all: BTreeSet<RingName>,
}

impl LiveKeys {
    /// Those that `map` finds under these names.
    pub(crate) fn by_name(map: impl Fn(&str) -> Result<MapHandle>) -> Result<LiveKeys> {
        Ok(LiveKeys { keys: map("keys")?, rings: map("rings")?, counts: map("key_counts")? })
    }

    /// The number of a ring, which it is given now if it has none yet.
    ///
    /// # Errors
    /// There are too many rings, or the kernel refused.
    pub fn ring_number(&self, name: RingName) -> Result<u8> {
        let mut free = None;
        for number in 0..RINGS_MAX {
            let ring = self.ring(number)?;
            if ring.name == name.padded() {
                return Ok(number as u8);
            }
            if ring.name[0] == 0 && free.is_none() {
                free = Some(number);
            }
        }
        let Some(number) = free else {
            bail!(
                "finding a place for the key ring '{name}': an instance has at most {RINGS_MAX} rings that have keys or are \
                 used; use another --instance"
            );
        };
        self.set_ring(number, Ring { signer: 0, name: name.padded(), ..Default::default() })?;
        Ok(number as u8)
    }

    /// Whether each of these rings has a number or can be given one.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub(crate) fn has_room(&self, wanted: &BTreeSet<RingName>) -> Result<bool> {
        let (mut missing, mut free) = (wanted.len(), 0);
        for number in 0..RINGS_MAX {
            match RingName::from_padded(self.ring(number)?.name) {
                Some(name) if wanted.contains(&name) => missing -= 1,
                Some(_) => {}
                None => free += 1,
            }
        }
        Ok(missing <= free)
    }

    /// Takes their numbers from rings that have no key, but for these. The caller holds the lock of the state, and knows that
    /// nothing in use means one of them.
    ///
    /// # Errors
    /// The kernel refused.
    pub(crate) fn give_up_all_but(&self, needed: &BTreeSet<RingName>) -> Result<()> {
        let with_keys = self.rings_with_keys()?;
        for number in 0..RINGS_MAX {
            let ring = self.ring(number)?;
            let name = RingName::from_padded(ring.name);
            let is_needed = ring.signer != 0
                || with_keys.contains(&(number as u8))
                || name.is_some_and(|name| needed.contains(&name));
            if !is_needed {
                self.set_ring(number, Ring::default())?;
            }
        }
        Ok(())
    }

    /// A `struct netoken_key`.
    fn raw(&self, id: u8) -> Result<Zeroizing<Vec<u8>>> {
        let key = self.keys.lookup(&u32::from(id).to_ne_bytes(), MapFlags::ANY);
        Ok(Zeroizing::new(key.context("looking at a key in the kernel")?.unwrap_or_default()))
    }

    /// The ids of the keys that it accepts tokens of, and the number of the ring of each.
    fn live(&self) -> Result<Vec<(u8, u8)>> {
        let mut found = Vec::new();
        for id in 0..KEYS_MAX as u8 {
            let key = self.raw(id)?;
            if key.get(std::mem::offset_of!(RawKey, state)) == Some(&(KeyState::KEY_LIVE.0 as u8)) {
                found.extend(key.get(std::mem::offset_of!(RawKey, ring)).map(|ring| (id, *ring)));
            }
        }
        Ok(found)
    }

    /// The numbers of the rings that have a key.
    fn rings_with_keys(&self) -> Result<HashSet<u8>> {
        Ok(self.live()?.into_iter().map(|(_, ring)| ring).collect())
    }

    /// The ids of those of these keys that it has just so, and of those that it accepts tokens of beside them.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub fn compare(&self, keys: &[Key]) -> Result<(BTreeSet<u8>, BTreeSet<u8>)> {
        let live = self.live()?;
        let is_named = |id| keys.iter().any(|key| key.id == id);
        let beside = live.iter().map(|(id, _)| *id).filter(|id| !is_named(*id)).collect();
        let mut same = BTreeSet::new();
        for key in keys {
            let is_same = match live.iter().find(|(id, _)| *id == key.id) {
                None => !key.is_live(),
                Some((_, number)) => {
                    let ring = self.ring(u32::from(*number))?;
                    let signs = ring.signer == u32::from(key.id) + 1;
                    ring.name == key.ring.padded()
                        && signs == (key.state == State::Signing)
                        && *self.raw(key.id)? == *encode(Some(key), KeyState::KEY_LIVE, *number)
                }
            };
            same.extend(is_same.then_some(key.id));
        }
        Ok((same, beside))
    }

    /// Makes the kernel's keys those.
    ///
    /// # Errors
    /// There are too many rings, or the kernel refused.
    pub fn load(&self, keys: &[Key]) -> Result<()> {
        // First everything can be verified, then the signers change, then what is gone goes.
        for key in keys.iter().filter(|key| key.is_live()) {
            let ring = self.ring_number(key.ring)?;
            self.set_live(key, ring)?;
        }
        for number in 0..RINGS_MAX {
            let ring = self.ring(number)?;
            let Some(name) = RingName::from_padded(ring.name) else { continue };
            let signer = signer(keys, name).map_or(0, |key| u32::from(key.id) + 1);
            if ring.signer != signer {
                self.set_ring(number, Ring { signer, ..ring })?;
            }
        }
        for id in (0..KEYS_MAX as u8).filter(|id| !keys.iter().any(|key| key.id == *id && key.is_live())) {
            let retired = keys.iter().any(|key| key.id == id);
            let state = if retired { KeyState::KEY_RETIRED } else { KeyState::KEY_ABSENT };
            self.write(id, &encode(None, state, 0))?;
        }
        Ok(())
    }

    /// The rings that would have no key any more if the kernel's keys were those, and the rings that would have none that signs;
    /// of those that have one now.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub fn losses(&self, keys: &[Key]) -> Result<Losses> {
        let mut losses = Losses::default();
        let with_keys = self.rings_with_keys()?;
        for number in 0..RINGS_MAX {
            let ring = self.ring(number)?;
            let Some(name) = RingName::from_padded(ring.name) else { continue };
            if ring.signer != 0 && signer(keys, name).is_none() {
                losses.signing.insert(name);
            }
            let has_one = keys.iter().any(|key| key.ring == name && key.is_live());
            if with_keys.contains(&(number as u8)) && !has_one {
                losses.all.insert(name);
            }
        }
        Ok(losses)
    }

    fn set_live(&self, key: &Key, ring: u8) -> Result<()> {
        let new = encode(Some(key), KeyState::KEY_LIVE, ring);
        if *self.raw(key.id)? == *new {
            return Ok(());
        }
        // Another secret, a byte at a time: nobody may sign with half of it.
        for number in 0..RINGS_MAX {
            let ring = self.ring(number)?;
            if ring.signer == u32::from(key.id) + 1 {
                self.set_ring(number, Ring { signer: 0, ..ring })?;
            }
        }
        self.reset_use(key.id)?;
        self.write(key.id, &new)
    }

    fn write(&self, id: u8, bytes: &[u8]) -> Result<()> {
        self.keys
            .update(&u32::from(id).to_ne_bytes(), bytes, MapFlags::ANY)
            .with_context(|| format!("giving key {id} to the kernel"))
    }

    fn ring(&self, number: u32) -> Result<Ring> {
        let bytes = self
            .rings
            .lookup(&number.to_ne_bytes(), MapFlags::ANY)
            .context("looking at a key ring in the kernel")?
            .context("the kernel has no such key ring")?;
        let mut ring = Ring::default();
        ring.copy_from_bytes(&bytes).map_err(|_| anyhow::anyhow!("a key ring of a strange size"))?;
        Ok(ring)
    }

    fn set_ring(&self, number: u32, ring: Ring) -> Result<()> {
        // SAFETY: plain data without padding.
        let bytes = unsafe { plain::as_bytes(&ring) };
        self.rings
            .update(&number.to_ne_bytes(), bytes, MapFlags::ANY)
            .context("choosing the signing key of a ring")
    }

    /// What has been done with a key since it was given to the kernel.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub fn use_of(&self, id: u8) -> Result<Use> {
        let rows = self
            .counts
            .lookup_percpu(&u32::from(id).to_ne_bytes(), MapFlags::ANY)
            .context("reading the counters of a key")?
            .unwrap_or_default();
        let mut sum = KeyCount::default();
        for row in rows {
            let mut count = KeyCount::default();
            count.copy_from_bytes(&row).map_err(|_| anyhow::anyhow!("a counter of a strange size"))?;
            sum.made += count.made;
            sum.accepted += count.accepted;
            sum.made_at_ns = sum.made_at_ns.max(count.made_at_ns);
            sum.accepted_at_ns = sum.accepted_at_ns.max(count.accepted_at_ns);
        }
        let time = |ns: u64| (ns != 0).then(|| SystemTime::UNIX_EPOCH + Duration::from_nanos(ns));
        Ok(Use {
            made: sum.made,
            accepted: sum.accepted,
            made_at: time(sum.made_at_ns),
            accepted_at: time(sum.accepted_at_ns),
        })
    }

    fn reset_use(&self, id: u8) -> Result<()> {
        let cpus = libbpf_rs::num_possible_cpus().context("counting the CPUs")?;
        let zeros = vec![vec![0; size_of::<KeyCount>()]; cpus];
        self.counts
            .update_percpu(&u32::from(id).to_ne_bytes(), &zeros, MapFlags::ANY)
            .context("clearing the counters of a key")
    }

    /// True if the kernel has any key.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub fn any(&self) -> Result<bool> {
        (0..RINGS_MAX).try_fold(false, |any, number| Ok(any || self.ring(number)?.name[0] != 0))
    }

    /// The rings of which no key signs.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub fn without_signer(&self) -> Result<BTreeSet<RingName>> {
        let mut found = BTreeSet::new();
        for number in 0..RINGS_MAX {
            let ring = self.ring(number)?;
            found.extend(RingName::from_padded(ring.name).filter(|_| ring.signer == 0));
        }
        Ok(found)
    }

    /// Those of the rings with these numbers that have no key at all.
    ///
    /// # Errors
    /// The kernel refused to say it.
    pub(crate) fn without_key(&self, numbers: impl Fn(u32) -> bool) -> Result<BTreeSet<RingName>> {
        let with_keys = self.rings_with_keys()?;
        let mut found = BTreeSet::new();
        for number in
            (0..RINGS_MAX).filter(|number| numbers(*number) && !with_keys.contains(&(*number as u8)))
        {
            found.extend(RingName::from_padded(self.ring(number)?.name));
        }
        Ok(found)
    }
}

/// A `struct netoken_key`, in memory that is wiped.
fn encode(key: Option<&Key>, state: KeyState, ring: u8) -> Zeroizing<Vec<u8>> {
    let mut bytes = Zeroizing::new(vec![0; size_of::<RawKey>()]);
    if let Some(secret) = key.filter(|key| key.state != State::Retired).and_then(Key::secret) {
        bytes[..super::SECRET_LEN].copy_from_slice(secret.bytes());
        // The program reads two little-endian numbers.
        if cfg!(target_endian = "big") {
            bytes[..super::SECRET_LEN].chunks_exact_mut(8).for_each(<[u8]>::reverse);
        }
    }
    bytes[std::mem::offset_of!(RawKey, state)] = state.0 as u8;
    bytes[std::mem::offset_of!(RawKey, ring)] = ring;
    bytes
}
