//! The pinned maps of an instance, when the version of netoken changes between two attaches, up or down.
//!
//! What a policy or rules are compiled to is pinned under names that say its layout. A version finds only what it can
//! read, and who attaches makes the rest anew from what is remembered, see `policy::running` and `guard::running`. What
//! programs of another version go by stays as it is until they are replaced.
//!
//! Any other map keeps its name as long as it keeps its shape and its meaning: who changes the meaning changes the name.
//! One of another shape is set aside for as long as an attach takes, so that one that fails can have it back, and what
//! fits is copied.

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType, OpenMapMut};
use zeroize::Zeroizing;

use crate::guard::types::Size as GuardSize;
use crate::state::{flag_of_pins, shown};
use crate::types::Size;

/// What the name of a pin that is set aside ends in.
const ASIDE: &str = "-aside";

/// Numbers in the values of maps that are made anew refer to these, so they are made anew together.
const NUMBERED: [&str; 2] = ["keys", "rings"];

/// What a person loses with a map that begins empty.
const LOSSES: [(&str, &str); 9] = [
    ("keys", "keys that are in no file"),
    ("counters", "the counters"),
    ("hits", "how often each rule decided"),
    ("key_counts", "what each key was used for"),
    ("clock", "the length of slots, where it was set"),
    ("guard_counters", "the guard's counters"),
    ("guard_accepted", "which tokens were seen: until its slot is over, one may be used again"),
    ("guard_peers", "who opened the connections whose tokens were scrubbed"),
    ("guard_auto_blocked", "who is blocked automatically"),
];

/// The layout of what is in a map, if it is one of those that are made anew for each; the first has number 1.
fn layout(map: &str) -> Option<u32> {
    match map {
        "policies" | "policy_entries" | "policy_records" | "policy_sets" => Some(Size::POLICY_LAYOUT.0),
        "guard_rules" | "guard_lists" | "guard_sources" => Some(GuardSize::GUARD_LAYOUT.0),
        _ => None,
    }
}

/// Where a map is pinned below the directory of an instance.
pub(crate) fn path_of(dir: &Path, map: &str) -> PathBuf {
    match layout(map) {
        None | Some(1) => dir.join(map),
        Some(layout) => dir.join(format!("{map}-{layout}")),
    }
}

/// Opens a pinned map.
pub(crate) fn open(dir: &Path, map: &str) -> Result<MapHandle> {
    MapHandle::from_pinned_path(path_of(dir, map)).with_context(|| format!("opening the pinned map '{map}'"))
}

/// The names of all pins below a directory, and the ids of their maps.
pub(crate) fn ids(dir: &Path) -> Result<Vec<(String, u32)>> {
    let mut found = Vec::new();
    // What has just gone, or is no map, is nobody's.
    for name in names(dir).unwrap_or_default() {
        if let Ok(map) = MapHandle::from_pinned_path(dir.join(&name)) {
            found.push((name, map.info().context("asking for a map's id")?.info.id));
        }
    }
    Ok(found)
}

/// The names of all pins below a directory, sorted.
fn names(dir: &Path) -> Result<Vec<String>> {
    let doing = || format!("listing the pins in {}", shown(dir).display());
    let entries: Result<Vec<_>, io::Error> = fs::read_dir(dir).with_context(doing)?.collect();
    let entries = entries.with_context(doing)?;
    let mut names: Vec<String> =
        entries.iter().filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    Ok(names)
}

/// Fails if those that are pinned are not what this version knows how to read.
pub(crate) fn expect(dir: &Path, wanted: &[Wanted]) -> Result<()> {
    for wanted in wanted {
        let name = &wanted.name;
        let what = match wanted.state(dir)? {
            PinState::Fits | PinState::New => continue,
            PinState::Differs => format!("the pinned map '{name}' is of another layout"),
            PinState::Lacking => format!("there is no pinned map '{name}'"),
        };
        bail!(
            "{what}: another version of netoken was attached, or one that was killed meanwhile; attach this one, which takes \
             over what is in use: netoken {}--iface NAME{} --attach",
            if is_guard(name) { "guard " } else { "" },
            flag_of_pins(dir)
        );
    }
    Ok(())
}

fn is_guard(map: &str) -> bool {
    map.starts_with("guard_")
}

/// The map by which it is known that there are others of its kind: every version has it.
fn counters_of(map: &str) -> &'static str {
    if is_guard(map) { "guard_counters" } else { "counters" }
}

/// A map as this version wants it.
#[derive(Debug)]
pub(crate) struct Wanted {
    name: String,
    kind: MapType,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    map_flags: u32,
}

impl Wanted {
    pub fn new(map: &OpenMapMut<'_>) -> Wanted {
        Wanted {
            name: map.name().to_string_lossy().into_owned(),
            kind: map.map_type(),
            key_size: map.key_size(),
            value_size: map.value_size(),
            max_entries: map.max_entries(),
            map_flags: map.map_flags(),
        }
    }

    fn state(&self, dir: &Path) -> Result<PinState> {
        Ok(match path_of(dir, &self.name).exists() {
            true if self.fits(&open(dir, &self.name)?)? => PinState::Fits,
            true => PinState::Differs,
            false if dir.join(counters_of(&self.name)).exists() => PinState::Lacking,
            false => PinState::New,
        })
    }

    /// By the same rules as libbpf.
    fn fits(&self, map: &MapHandle) -> Result<bool> {
        // Which is the kernel's choice where it is left open: one for each CPU.
        let entries = map.max_entries();
        let max_entries = if self.max_entries == 0 { entries } else { self.max_entries };
        let flags = map.info().context("asking for the flags of a map")?.info.map_flags;
        Ok((map.map_type(), map.key_size(), map.value_size(), entries, flags)
            == (self.kind, self.key_size, self.value_size, max_entries, self.map_flags))
    }
}

/// What is pinned where a map is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum PinState {
    Fits,
    /// One of another shape.
    Differs,
    /// Nothing, although there are others of the kind.
    Lacking,
    /// Nothing, and there never was.
    New,
}

/// The pins of an instance while an attach makes them those of this version. Dropping it brings back what was there.
#[derive(Debug)]
pub(crate) struct Renewal {
    dir: PathBuf,
    wanted: Vec<Wanted>,
    /// Names of pins.
    aside: Vec<String>,
    /// Names of pins that were not there, although others were.
    absent: Vec<String>,
    /// Names of maps that the instance lacks although it has others of the kind.
    lacking: Vec<String>,
}

impl Renewal {
    /// Sets aside what does not fit. The caller holds the lock of the state.
    ///
    /// # Errors
    /// A pin can be neither opened nor moved; then all is as it was.
    pub fn begin(dir: &Path, mut wanted: Vec<Wanted>) -> Result<Renewal> {
        // Stamp and guard share some.
        wanted.sort_by(|a, b| a.name.cmp(&b.name));
        wanted.dedup_by(|a, b| a.name == b.name);
        let dir_path = dir.to_path_buf();
        let (aside, absent, lacking) = (Vec::new(), Vec::new(), Vec::new());
        let mut renewal = Renewal { dir: dir_path, wanted, aside, absent, lacking };
        renewal.recover()?;
        let is_new = names(dir)?.is_empty();
        let mut misfits = Vec::new();
        for wanted in &renewal.wanted {
            let (state, pin) = (wanted.state(dir)?, file_name(&path_of(dir, &wanted.name)));
            if state == PinState::Lacking {
                renewal.lacking.push(wanted.name.clone());
            }
            match state {
                PinState::Differs => misfits.push(pin),
                PinState::Lacking | PinState::New if !is_new => renewal.absent.push(pin),
                _ => {}
            }
        }
        if misfits.iter().any(|name| NUMBERED.contains(&name.as_str())) {
            misfits = names(dir)?;
        }
        for name in misfits {
            rename(dir, &name, &set_aside(&name))?;
            renewal.aside.push(name);
        }
        Ok(renewal)
    }

    /// Brings back what an attach that was killed had set aside.
    fn recover(&self) -> Result<()> {
        for name in names(&self.dir)? {
            if let Some(before) = name.strip_suffix(ASIDE) {
                rename(&self.dir, &name, before)?;
            }
        }
        Ok(())
    }

    /// Another version had this map, or part of an instance, and under the name that this one knows there was none.
    pub fn lacks(&self, map: &str) -> bool {
        self.lacking.iter().any(|lacking| lacking == map)
    }

    /// Copies what fits into the maps that are there now. To be done once they are made, and before they are used.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn carry_over(&mut self) -> Result<()> {
        let mut pairs = Vec::new();
        for wanted in &self.wanted {
            let path = path_of(&self.dir, &wanted.name);
            let name = file_name(&path);
            if self.aside.contains(&name) {
                let before = MapHandle::from_pinned_path(self.dir.join(set_aside(&name)))?;
                pairs.push((&*wanted.name, before, MapHandle::from_pinned_path(&path)?));
            }
        }
        let is_lost = |name: &str| pairs.iter().any(|(of, from, to)| *of == name && !are_alike(from, to));
        // A key names its ring by number, and is another one when it comes back from its file.
        let keeps_keys = !NUMBERED.into_iter().any(is_lost);
        let is_of_keys = |name: &str| NUMBERED.contains(&name) || name == "key_counts";
        for (name, from, to) in &pairs {
            if are_alike(from, to) && (keeps_keys || !is_of_keys(name)) {
                copy(from, to).with_context(|| format!("copying what is in the map '{name}'"))?;
            } else {
                self.lacking.push(name.to_string());
            }
        }
        Ok(())
    }

    /// Forgets what was there before, with all pins of the kind that this version does not know. Returns what a person
    /// should know of it: nothing if there was nothing of another version.
    pub fn finish(mut self) -> Option<String> {
        let known: Vec<String> =
            self.wanted.iter().map(|wanted| file_name(&path_of(&self.dir, &wanted.name))).collect();
        let knows_guard = known.iter().any(|name| is_guard(name));
        let aside = std::mem::take(&mut self.aside);
        self.absent.clear();
        let has_other_guard = !knows_guard && aside.iter().any(|name| is_guard(name));
        for name in names(&self.dir).unwrap_or_default() {
            let is_ours = aside.iter().any(|before| set_aside(before) == name);
            if is_ours || !known.contains(&name) && (knows_guard || !is_guard(&name)) {
                // If one stays, the next attach begins there again.
                fs::remove_file(self.dir.join(&name)).ok();
            }
        }
        // They are set aside where their numbers would mean other keys, and are made anew by who knows them.
        self.lacking.extend(aside.iter().filter(|name| !known.contains(*name)).cloned());
        if self.lacking.is_empty() && aside.is_empty() {
            return None;
        }
        let lost: Vec<&str> =
            LOSSES.iter().filter(|(map, _)| self.lacks(map)).map(|(_, loss)| *loss).collect();
        let lost = if lost.is_empty() { String::new() } else { format!("; not kept: {}", lost.join("; ")) };
        let guard =
            if has_other_guard { "; its guard stays as it is until that is attached, too" } else { "" };
        Some(format!(
            "taken over from another version of netoken; on other interfaces that stays as it is until it is attached there, \
             too{guard}{lost}"
        ))
    }
}

impl Drop for Renewal {
    fn drop(&mut self) {
        for name in &self.absent {
            fs::remove_file(self.dir.join(name)).ok();
        }
        for name in &self.aside {
            if let Err(error) = rename(&self.dir, &set_aside(name), name) {
                note!("netoken: {error:#}");
            }
        }
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn set_aside(name: &str) -> String {
    format!("{name}{ASIDE}")
}

fn rename(dir: &Path, from: &str, to: &str) -> Result<()> {
    fs::rename(dir.join(from), dir.join(to)).with_context(|| format!("renaming the pin '{from}' to '{to}'"))
}

/// What is in the one means the same in the other.
fn are_alike(from: &MapHandle, to: &MapHandle) -> bool {
    let shape = |map: &MapHandle| (map.map_type(), map.key_size(), map.value_size());
    let can_be_copied = [MapType::Array, MapType::PercpuArray, MapType::LruHash].contains(&to.map_type());
    can_be_copied && shape(from) == shape(to)
}

/// Each key of a map once.
pub(crate) fn keys(map: &MapHandle) -> impl Iterator<Item = Vec<u8>> + '_ {
    each_once(map.keys(), map.max_entries())
}

/// The kernel begins anew where the key that was seen last has just given way to another, as happens in a full map under
/// load: without an end, that could go on for ever.
fn each_once(keys: impl Iterator<Item = Vec<u8>>, max_entries: u32) -> impl Iterator<Item = Vec<u8>> {
    let mut seen = HashSet::new();
    // Some rounds, for those behind the place where it began anew.
    keys.take(4 * max_entries as usize).filter(move |key| seen.insert(key.clone()))
}

/// Copies the entries for which there is room.
fn copy(from: &MapHandle, to: &MapHandle) -> Result<()> {
    for key in keys(from) {
        let index = key.first_chunk().map(|index| u32::from_ne_bytes(*index));
        if to.map_type() != MapType::LruHash && index >= Some(to.max_entries()) {
            break;
        }
        if from.map_type() == MapType::PercpuArray {
            if let Some(values) = from.lookup_percpu(&key, MapFlags::ANY)? {
                to.update_percpu(&key, &values, MapFlags::ANY)?;
            }
        } else if let Some(value) = from.lookup(&key, MapFlags::ANY)?.map(Zeroizing::new) {
            to.update(&key, &value, MapFlags::ANY)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guard::types::{SourcePage, Table};
    use crate::types::{Entry, Facts, Generation, Record, SetKey};

    /// If this fails, programs that are attached would take the new values for old ones: raise the number of the layout
    /// with the sizes. It has to be raised as well if the same bytes mean something else.
    #[test]
    fn another_layout_has_another_number() {
        let policy = [
            size_of::<Generation>(),
            size_of::<Facts>(),
            size_of::<Entry>(),
            size_of::<Record>(),
            size_of::<SetKey>(),
        ];
        assert_eq!((Size::POLICY_LAYOUT.0, policy), (1, [4672, 64, 40, 80, 24]));
        let rules = [size_of::<Table>(), size_of::<SourcePage>()];
        assert_eq!((GuardSize::GUARD_LAYOUT.0, rules), (3, [8824, 6304]));
    }

    #[test]
    fn a_look_that_begins_anew_again_and_again_finds_each_key_once() {
        let keys = [1, 2, 3].map(|key| vec![key]);
        let found: Vec<Vec<u8>> = each_once(keys.iter().cycle().cloned(), 5).collect();
        assert_eq!(found, keys);
    }

    #[test]
    fn the_first_layout_has_the_plain_names() {
        let dir = Path::new("/dir");
        assert_eq!(path_of(dir, "policies"), Path::new("/dir/policies"));
        assert_eq!(path_of(dir, "guard_rules"), Path::new("/dir/guard_rules-3"));
        assert_eq!(path_of(dir, "guard_counters"), Path::new("/dir/guard_counters"));
    }
}
