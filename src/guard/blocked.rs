//! Sources that the kernel has blocked automatically, because they were refused too often: which there are, and letting
//! them in again. When that happens is decided in `src/bpf/guard_block.h`.

use std::net::Ipv6Addr;
use std::time::SystemTime;

use anyhow::{Context, Result};
use libbpf_rs::{MapCore, MapFlags};
use plain::Plain;
use serde::Serialize;

use super::program::GuardMaps;
use super::types::{AutoBlocked, RawAutoBlock, Size, SourceKey};
use crate::events::model::Clock;
use crate::pins;
use crate::policy::values::Prefix;

// SAFETY: integers and arrays of them, without hidden padding, which guard_types.h asserts.
unsafe impl Plain for SourceKey {}
// SAFETY: the same.
unsafe impl Plain for AutoBlocked {}

/// A source that is blocked now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Blocked {
    /// Its addresses.
    #[serde(serialize_with = "as_text")]
    pub src: Prefix,
    /// When it is not blocked any more, RFC 3339 in UTC.
    #[serde(serialize_with = "rfc3339")]
    pub until: SystemTime,
    /// Packets of it that were refused since.
    pub refused: u64,
    #[serde(skip)]
    key: Vec<u8>,
}

fn as_text<S: serde::Serializer>(src: &Prefix, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(src)
}

fn rfc3339<S: serde::Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&humantime::format_rfc3339_seconds(*time))
}

/// The sources that are blocked now, those for longest last.
///
/// # Errors
/// The kernel refused to read the map.
pub fn read(maps: &GuardMaps) -> Result<Vec<Blocked>> {
    let (clock, now) = (Clock::now(), SystemTime::now());
    let mut found = Vec::new();
    // Rules that do not block, or not such a prefix, never ask for what others have left.
    let Some(rules) = maps.table()?.map(|table| table.auto_block).filter(|rules| rules.within_ns != 0) else {
        return Ok(found);
    };
    for key in pins::keys(&maps.auto_blocked) {
        // It may have given way to another one since.
        let Some(value) =
            maps.auto_blocked.lookup(&key, MapFlags::ANY).context("reading a source that is blocked")?
        else {
            continue;
        };
        let blocked = decode(&key, &value, clock).context("a blocked source of a strange form")?;
        if blocked.until > now && is_asked_for(&rules, &blocked.key) {
            found.push(blocked);
        }
    }
    found.sort_by_key(|blocked| blocked.until);
    Ok(found)
}

/// Lets in again what is blocked of a prefix or around it, and says how many sources that were.
///
/// # Errors
/// The kernel refused to read or change the map.
pub fn unblock(maps: &GuardMaps, prefix: Prefix) -> Result<usize> {
    let mut count = 0;
    for blocked in read(maps)? {
        if prefix.covers(blocked.src) || blocked.src.covers(prefix) {
            match maps.auto_blocked.delete(&blocked.key) {
                // It gave way to another one meanwhile.
                Err(error) if error.kind() == libbpf_rs::ErrorKind::NotFound => continue,
                deleted => deleted.with_context(|| format!("unblocking {}", blocked.src))?,
            }
            count += 1;
        }
    }
    Ok(count)
}

/// Whether the guard looks for prefixes of that length.
fn is_asked_for(rules: &RawAutoBlock, key: &[u8]) -> bool {
    let mut source = SourceKey::default();
    let bits = if source.copy_from_bytes(key).is_ok() { source.prefixlen } else { 0 };
    bits == if source.family == 4 { rules.prefixlen4 } else { rules.prefixlen6 }
}

fn decode(key: &[u8], value: &[u8], clock: Clock) -> Option<Blocked> {
    let (mut source, mut blocked) = (SourceKey::default(), AutoBlocked::default());
    source.copy_from_bytes(key).ok()?;
    blocked.copy_from_bytes(value).ok()?;
    let bits = source.prefixlen.checked_sub(Size::SOURCE_FAMILY_BITS.0)?;
    let addr = Ipv6Addr::from(source.addr);
    let text = match source.family {
        4 => format!("{}/{}", addr.to_ipv4_mapped()?, bits.checked_sub(96)?),
        _ => format!("{addr}/{bits}"),
    };
    let src = text.parse().ok()?;
    let until = clock.at(blocked.until_ns);
    Some(Blocked { src, until, refused: blocked.refused, key: key.to_vec() })
}
