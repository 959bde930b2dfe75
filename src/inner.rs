//! Maps inside of maps: how a whole set of rules or lists is put into use with one store of a pointer.

use std::os::fd::{AsFd, AsRawFd};

use anyhow::{Context, Result, anyhow};
use libbpf_rs::{MapCore, MapFlags, MapHandle, MapType};

/// Makes a map for at least one entry; sizes are in bytes.
pub(crate) fn create(
    kind: MapType,
    name: &str,
    key: usize,
    value: usize,
    entries: usize,
    map_flags: u32,
) -> Result<MapHandle> {
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        map_flags,
        ..Default::default()
    };
    let entries = u32::try_from(entries.max(1)).context("more entries than a map can have")?;
    MapHandle::create(kind, Some(name), key as u32, value as u32, entries, &options)
        .with_context(|| format!("creating the map '{name}' for {entries} entries; is there memory for it?"))
}

/// Puts a map into an outer one. When this returns, nobody uses what was there before.
pub(crate) fn put(outer: &MapHandle, at: u32, map: &MapHandle) -> Result<()> {
    let fd = map.as_fd().as_raw_fd();
    outer
        .update(&at.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY)
        .with_context(|| format!("putting a map into '{}'", outer.name().to_string_lossy()))
}

/// The map at a place of an outer one.
pub(crate) fn get(outer: &MapHandle, at: u32) -> Result<Option<MapHandle>> {
    let doing = || format!("looking into '{}'", outer.name().to_string_lossy());
    let Some(id) = outer.lookup(&at.to_ne_bytes(), MapFlags::ANY).with_context(doing)? else {
        return Ok(None);
    };
    let id = u32::from_ne_bytes(id.try_into().map_err(|_| anyhow!("a map id of a strange size"))?);
    MapHandle::from_map_id(id).with_context(doing).map(Some)
}

/// Takes out what is at a place. Every change of an outer map waits for a grace period, so what is empty is left alone.
pub(crate) fn take(outer: &MapHandle, at: u32) -> Result<()> {
    if get(outer, at)?.is_some() {
        let doing = || format!("emptying '{}'", outer.name().to_string_lossy());
        outer.delete(&at.to_ne_bytes()).with_context(doing)?;
    }
    Ok(())
}
