//! Puts a compiled policy into use, in one step, and reads back which one that is.
//!
//! Why a packet never sees parts of two policies: it reads the map `policies` once, and finds everything else by the
//! slot that the generation in there names. A new policy is written into the slot that is *not* named, and then
//! `policies` is updated, which is one store of a pointer. The kernel lets that system call return only after every
//! program that was running then has ended (`maybe_wait_bpf_programs()`), so when it has returned no packet looks into
//! the old slot any more, and it can be emptied, and filled again by the next one. Commands take turns by the lock of
//! [`crate::state`], so nobody else fills the same slot. One that is killed before the update leaves a slot that
//! nobody names; one that is killed behind it, a slot that takes memory until the next load.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};
use plain::Plain;

use super::compile::{Compiled, Naming, compile};
use super::read::Progress;
use super::{Policy, compile::Refused};
use crate::inner;
use crate::keys::RingName;
use crate::program::Maps;
use crate::types::{Entry, Facts, Generation, Hits, Record, SetKey, Size};

// SAFETY: integers and arrays of them, without hidden padding, which types.h asserts.
unsafe impl Plain for Hits {}

/// Elements for one system call; more than some thousands make it no faster.
const BATCH: usize = 16 << 10;
/// Errors that say that the kernel does not know batches for this kind of map.
const NO_BATCH: [libbpf_rs::ErrorKind; 2] =
    [libbpf_rs::ErrorKind::InvalidInput, libbpf_rs::ErrorKind::Unsupported];

/// Number of the hit counter of the default.
pub const DEFAULT_HITS: u32 = 0;
/// How many hit counters there can be.
pub const HITS_MAX: u32 = Size::HITS_FIRST.0 + Size::HITS_CHUNK.0 * Size::HITS_CHUNKS_MAX.0;

/// The map of one part of a policy.
struct Part<'a> {
    name: &'static str,
    outer: &'a MapHandle,
    kind: MapType,
    flags: u32,
}

impl Maps {
    /// Puts a policy into use. A packet sees the old one or this one. Hit counters are those of the rules' numbers.
    ///
    /// # Errors
    /// The policy is beyond the limits, or the kernel refused a map; the running policy is then unchanged.
    pub fn set_policy(&self, policy: &Policy) -> Result<()> {
        let hits: Vec<u32> = (1..=policy.rules.len() as u32).collect();
        let rings = self.ring_numbers(policy)?;
        let names = Naming { instance: "default", rings: &rings };
        let compiled = compile(policy, names, &hits).map_err(|refused: Refused| anyhow!(refused))?;
        self.install(&compiled, None).map(drop)
    }

    /// The numbers of the key rings that a policy uses; a ring that has none yet is given one.
    ///
    /// # Errors
    /// There are too many rings.
    pub fn ring_numbers(&self, policy: &Policy) -> Result<HashMap<RingName, u8>> {
        policy.rings().into_iter().map(|ring| Ok((ring, self.keys.ring_number(ring)?))).collect()
    }

    /// Puts a compiled policy into use and returns the number of its generation.
    ///
    /// # Errors
    /// The kernel refused a map; the running policy is then unchanged.
    pub fn install(&self, compiled: &Compiled, progress: Option<Progress<'_>>) -> Result<u64> {
        let number = self.generation()?.map_or(0, |before| before.number) + 1;
        self.install_as(number, compiled, progress).map(|()| number)
    }

    /// The same as the generation of that number.
    pub(super) fn install_as(
        &self,
        number: u64,
        compiled: &Compiled,
        progress: Option<Progress<'_>>,
    ) -> Result<()> {
        let before = self.generation()?;
        let mut next = *compiled.generation;
        next.number = number;
        next.slot = before.as_ref().map_or(0, |before| 1 - before.slot.min(1));

        // A command that was killed may have left something there.
        self.empty(next.slot)?;
        self.fill(&compiled.generation, compiled, next.slot, progress)?;
        let generation = inner::create(MapType::Array, "policy", 4, size_of::<Generation>(), 1, 0)?;
        // SAFETY: plain data without hidden padding, which types.h asserts.
        let bytes = unsafe { plain::as_bytes(&next) };
        generation.update(&0u32.to_ne_bytes(), bytes, MapFlags::ANY).context("filling the generation")?;
        inner::put(&self.policies, 0, &generation).context("putting the policy into use")?;
        if let Some(before) = before {
            // Only now: the update has waited for those who still used the other slot. What stays in it takes memory until
            // the next load, and is no failure of this one, whose policy is in use.
            self.empty(before.slot).ok();
        }
        Ok(())
    }

    /// Takes the policy out of use: then there is none, as before the first one.
    ///
    /// # Errors
    /// The kernel refused.
    pub(crate) fn remove_policy(&self) -> Result<()> {
        inner::take(&self.policies, 0).context("taking the policy out of use")?;
        [0, 1].into_iter().try_for_each(|slot| self.empty(slot))
    }

    fn parts(&self) -> [Part<'_>; 3] {
        [
            Part { name: "policy_entries", outer: &self.policy_entries, kind: MapType::Hash, flags: 0 },
            Part {
                name: "policy_records",
                outer: &self.policy_records,
                kind: MapType::Array,
                flags: libbpf_sys::BPF_F_INNER_MAP,
            },
            Part {
                name: "policy_sets",
                outer: &self.policy_sets,
                kind: MapType::LpmTrie,
                flags: libbpf_sys::BPF_F_NO_PREALLOC,
            },
        ]
    }

    fn fill(
        &self,
        generation: &Generation,
        compiled: &Compiled,
        slot: u32,
        progress: Option<Progress<'_>>,
    ) -> Result<()> {
        if generation.shape_count == 0 {
            return Ok(());
        }
        let of_records = compiled.records.iter().map(|record| record.rule.hits);
        let of_entries = compiled.entries.iter().map(|(_, entry)| entry.rule.hits);
        let highest = of_records.chain(of_entries).max().unwrap_or(0);
        self.make_room_for_hits(highest)?;
        let [entries, records, sets] = self.parts();

        let map = entries.create(size_of::<Facts>(), size_of::<Entry>(), compiled.entries.len())?;
        let pairs = compiled.entries.iter().map(|(key, entry)| (key, entry));
        update_all(&map, pairs, "loading entries", progress)?;
        inner::put(entries.outer, slot, &map)?;

        // Number 0 is none.
        if compiled.records.len() == 1 {
            return Ok(());
        }
        let map = records.create(4, size_of::<Record>(), compiled.records.len())?;
        let numbers: Vec<u32> = (0..compiled.records.len() as u32).collect();
        update_all(&map, numbers.iter().zip(&compiled.records), "loading rules", progress)?;
        inner::put(records.outer, slot, &map)?;

        if compiled.sets.is_empty() {
            return Ok(());
        }
        let map = sets.create(size_of::<SetKey>(), 4, compiled.sets.len())?;
        let pairs = compiled.sets.iter().map(|key| (key, &1u32));
        update_all(&map, pairs, "loading sets", progress)?;
        inner::put(sets.outer, slot, &map)
    }

    fn empty(&self, slot: u32) -> Result<()> {
        self.parts().iter().try_for_each(|part| inner::take(part.outer, slot))
    }

    /// The generation in use, or nothing if no policy was ever put into use.
    ///
    /// # Errors
    /// The kernel refused to read it.
    pub fn generation(&self) -> Result<Option<Box<Generation>>> {
        let Some(map) = self.policy()? else { return Ok(None) };
        let bytes = map.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).context("reading the policy in use")?;
        let bytes = bytes.context("the policy in use is empty")?;
        let mut generation = Box::<Generation>::default();
        generation.copy_from_bytes(&bytes).ok().context("the policy in use has a strange size")?;
        Ok(Some(generation))
    }

    /// Kernel memory of the policy in use and its hit counters, as the kernel counts it.
    ///
    /// # Errors
    /// The kernel refused to tell.
    pub fn policy_bytes(&self) -> Result<usize> {
        let slot = self.generation()?.map_or(0, |generation| generation.slot);
        let mut maps: Vec<MapHandle> = self.policy()?.into_iter().collect();
        for part in self.parts() {
            maps.extend(inner::get(part.outer, slot)?);
        }
        for chunk in 0..Size::HITS_CHUNKS_MAX.0 {
            maps.extend(self.hits_chunk(chunk)?);
        }
        let mut bytes = 0;
        for map in maps.iter().chain([&self.hits]) {
            let path = format!("/proc/self/fdinfo/{}", map.as_fd().as_raw_fd());
            let info = std::fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
            let of_map = info.lines().find_map(|line| line.strip_prefix("memlock:"));
            let of_map = of_map.and_then(|number| number.trim().parse::<usize>().ok());
            bytes += of_map.with_context(|| format!("finding memlock in {path}"))?;
        }
        Ok(bytes)
    }

    /// The map of a chunk of hit counters, if there is one.
    fn hits_chunk(&self, chunk: u32) -> Result<Option<MapHandle>> {
        inner::get(&self.more_hits, chunk)
    }

    fn make_room_for_hits(&self, highest: u32) -> Result<()> {
        if highest < Size::HITS_FIRST.0 {
            return Ok(());
        }
        for chunk in 0..=(highest - Size::HITS_FIRST.0) / Size::HITS_CHUNK.0 {
            if self.hits_chunk(chunk)?.is_none() {
                let entries = Size::HITS_CHUNK.0 as usize;
                let map = inner::create(MapType::Array, "hits", 4, size_of::<Hits>(), entries, 0)?;
                inner::put(&self.more_hits, chunk, &map).context("making room for hit counters")?;
            }
        }
        Ok(())
    }

    /// Reads the hit counters with these numbers.
    ///
    /// # Errors
    /// The kernel refused to read them.
    pub fn hits(&self, numbers: &[u32]) -> Result<Vec<Hits>> {
        let first = Size::HITS_FIRST.0;
        let mut chunks: Vec<Option<MapHandle>> = Vec::new();
        let mut all = Vec::with_capacity(numbers.len());
        for number in numbers {
            let mut hits = Hits::default();
            let bytes = if *number < first {
                self.hits.lookup(&number.to_ne_bytes(), MapFlags::ANY)
            } else {
                let (chunk, place) =
                    ((number - first) / Size::HITS_CHUNK.0, (number - first) % Size::HITS_CHUNK.0);
                while chunks.len() <= chunk as usize {
                    chunks.push(self.hits_chunk(chunks.len() as u32)?);
                }
                match &chunks[chunk as usize] {
                    Some(map) => map.lookup(&place.to_ne_bytes(), MapFlags::ANY),
                    None => Ok(None),
                }
            };
            if let Some(bytes) = bytes.context("reading a hit counter")? {
                hits.copy_from_bytes(&bytes).ok().context("a hit counter of a strange size")?;
            }
            all.push(hits);
        }
        Ok(all)
    }

    /// Sets hit counters to zero: their numbers were given to new rules.
    ///
    /// # Errors
    /// The kernel refused to write them.
    pub fn clear_hits(&self, numbers: &[u32]) -> Result<()> {
        let first = Size::HITS_FIRST.0;
        let zero = [0; size_of::<Hits>()];
        let mut chunks: Vec<Option<MapHandle>> = Vec::new();
        for number in numbers {
            if *number < first {
                self.hits
                    .update(&number.to_ne_bytes(), &zero, MapFlags::ANY)
                    .context("clearing a counter")?;
                continue;
            }
            let (chunk, place) =
                ((number - first) / Size::HITS_CHUNK.0, (number - first) % Size::HITS_CHUNK.0);
            while chunks.len() <= chunk as usize {
                chunks.push(self.hits_chunk(chunks.len() as u32)?);
            }
            // A chunk that is not there yet is made of zeros.
            if let Some(map) = &chunks[chunk as usize] {
                map.update(&place.to_ne_bytes(), &zero, MapFlags::ANY).context("clearing a counter")?;
            }
        }
        Ok(())
    }
}

impl Part<'_> {
    fn create(&self, key: usize, value: usize, entries: usize) -> Result<MapHandle> {
        inner::create(self.kind, self.name, key, value, entries, self.flags)
    }
}

/// Writes all pairs, many with one system call where the kernel can do that: from 5.6 for hash tables and arrays.
fn update_all<'a, K: Copy + 'a, V: Copy + 'a>(
    map: &MapHandle,
    pairs: impl ExactSizeIterator<Item = (&'a K, &'a V)>,
    doing: &str,
    progress: Option<Progress<'_>>,
) -> Result<()> {
    let total = pairs.len();
    let mut can_batch = total > 1;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let mut flush = |keys: &mut Vec<u8>, values: &mut Vec<u8>| -> Result<()> {
        let count = (keys.len() / size_of::<K>()) as u32;
        if can_batch {
            match map.update_batch(keys, values, count, MapFlags::ANY, MapFlags::ANY) {
                Ok(()) => {}
                Err(error) if NO_BATCH.contains(&error.kind()) || is_enotsupp(&error) => can_batch = false,
                Err(error) => return Err(error).context("filling a map of the policy"),
            }
        }
        if !can_batch {
            for (key, value) in keys.chunks(size_of::<K>()).zip(values.chunks(size_of::<V>())) {
                map.update(key, value, MapFlags::ANY).context("filling a map of the policy")?;
            }
        }
        keys.clear();
        values.clear();
        Ok(())
    };
    for (done, (key, value)) in pairs.enumerate() {
        // SAFETY: every type that this is called with is plain data without hidden padding, which types.h asserts.
        keys.extend_from_slice(unsafe { plain::as_bytes(key) });
        // SAFETY: the same.
        values.extend_from_slice(unsafe { plain::as_bytes(value) });
        if (done + 1) % BATCH == 0 {
            flush(&mut keys, &mut values)?;
            if let Some(progress) = progress {
                progress(doing, done + 1, total);
            }
        }
    }
    if keys.is_empty() { Ok(()) } else { flush(&mut keys, &mut values) }
}

/// ENOTSUPP of the kernel, which is not an error number of user space.
fn is_enotsupp(error: &libbpf_rs::Error) -> bool {
    const ENOTSUPP: i32 = 524;
    use std::error::Error;
    let io = error.source().and_then(|source| source.downcast_ref::<std::io::Error>());
    io.and_then(std::io::Error::raw_os_error) == Some(ENOTSUPP) || error.to_string().contains("524")
}
