//! The BPF objects that are built into this program: their maps by name, pinned or not, what they were told when they
//! were loaded, and what libbpf says meanwhile.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};
use libbpf_rs::{MapCore, MapFlags, MapHandle, Object, OpenMapMut, OpenObject, PrintLevel};
use plain::Plain;

use crate::pins::{Wanted, path_of};
use crate::state::shown;

/// The map of a loaded object that has this name.
pub(crate) fn map(object: &Object, name: &str) -> Result<MapHandle> {
    let found = object.maps().find(|map| map.name() == name);
    let found = found.with_context(|| format!("no map '{name}' was loaded"))?;
    MapHandle::try_from(&found).with_context(|| format!("keeping the map '{name}' open"))
}

/// Has the maps with these names loaded from their pins below `dir`, or pinned there.
pub(crate) fn pin_below(dir: &Path, object: &mut OpenObject, names: &[&str]) -> Result<()> {
    named(object, names)?.into_iter().try_for_each(|mut map| {
        let path = path_of(dir, &map.name().to_string_lossy());
        map.set_pin_path(&path).with_context(|| format!("choosing {} as a pin", shown(&path).display()))
    })
}

/// How this version makes the maps with these names.
pub(crate) fn wanted(object: &mut OpenObject, names: &[&str]) -> Result<Vec<Wanted>> {
    Ok(named(object, names)?.iter().map(Wanted::new).collect())
}

fn named<'a>(object: &'a mut OpenObject, names: &[&str]) -> Result<Vec<OpenMapMut<'a>>> {
    let is_named = |map: &OpenMapMut<'_>| names.iter().any(|name| map.name() == *name);
    let maps: Vec<_> = object.maps_mut().filter(is_named).collect();
    if maps.len() != names.len() {
        bail!("of the maps {names:?} only {} are built in", maps.len());
    }
    Ok(maps)
}

/// What stands at an offset of the read-only data of the program that has these maps. That is `len_bytes` long, if it is of
/// this version: longer than the skeleton knows, as compilers put constants of their own behind it.
pub(crate) fn settings_among<T: Plain + Default>(
    map_ids: &[u32],
    len_bytes: u32,
    offset: usize,
) -> Option<T> {
    let maps = map_ids.iter().filter_map(|id| MapHandle::from_map_id(*id).ok());
    let settings = maps.into_iter().find(|map| map.name().to_string_lossy().ends_with(".rodata"))?;
    let bytes = settings.lookup(&0u32.to_ne_bytes(), MapFlags::ANY).ok()??;
    if bytes.len() != len_bytes as usize {
        return None;
    }
    let mut config = T::default();
    config.copy_from_bytes(bytes.get(offset..)?).ok()?;
    Some(config)
}

/// Runs `f` and returns with its result what libbpf had to say: the reasons, and the verifier's log.
pub(crate) fn messages<T>(f: impl FnOnce() -> T) -> (T, String) {
    static LOG: Mutex<String> = Mutex::new(String::new());
    // One at a time: libbpf has one printer for the whole process.
    static TURN: Mutex<()> = Mutex::new(());

    fn keep(_: PrintLevel, message: String) {
        LOG.lock().unwrap_or_else(|e| e.into_inner()).push_str(&message);
    }

    let _turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let before = libbpf_rs::set_print(Some((PrintLevel::Warn, keep)));
    LOG.lock().unwrap_or_else(|e| e.into_inner()).clear();
    let result = f();
    libbpf_rs::set_print(before);
    let log = std::mem::take(&mut *LOG.lock().unwrap_or_else(|e| e.into_inner()));
    (result, log)
}
