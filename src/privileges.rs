//! Which capabilities this process has, checked before anything is tried with them.

use std::fs;

use anyhow::{Context, Result, bail};

/// Bit numbers of include/uapi/linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Checks that BPF programs can be listed, loaded and attached. `doing` begins the message if not.
///
/// # Errors
/// A capability is missing; the message names it.
pub fn check(doing: &str) -> Result<()> {
    let status = fs::read_to_string("/proc/self/status").context("reading /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("finding the effective capabilities in /proc/self/status")?;
    let missing = missing(effective);
    if !missing.is_empty() {
        bail!("{doing}: this process lacks {}; run it as root (try sudo)", missing.join(", "));
    }
    Ok(())
}

fn missing(effective: u64) -> Vec<&'static str> {
    let has = |bit: u32| effective & (1 << bit) != 0;
    let mut missing = Vec::new();
    missing.extend((!has(CAP_NET_ADMIN)).then_some("CAP_NET_ADMIN"));
    // CAP_BPF and CAP_PERFMON are enough to load a program, but not to list those that are loaded
    // (bpf_prog_get_next_id), and without that list we would not know our own filters again.
    missing.extend((!has(CAP_SYS_ADMIN)).then_some("CAP_SYS_ADMIN"));
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(0), ["CAP_NET_ADMIN", "CAP_SYS_ADMIN"]);
        assert!(missing(1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN).is_empty());
        assert_eq!(missing(1 << CAP_NET_ADMIN), ["CAP_SYS_ADMIN"]);
    }
}
