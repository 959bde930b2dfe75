//! Which capabilities this process has, checked before anything is tried with them.

use std::fs;

use anyhow::{Context, Result, bail};

/// Bit numbers of include/uapi/linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Checks that BPF programs can be loaded and attached. `doing` begins the message if not.
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
    if !has(CAP_NET_ADMIN) {
        missing.push("CAP_NET_ADMIN");
    }
    // CAP_SYS_ADMIN includes the two younger ones.
    if !has(CAP_SYS_ADMIN) {
        missing.extend((!has(CAP_BPF)).then_some("CAP_BPF"));
        missing.extend((!has(CAP_PERFMON)).then_some("CAP_PERFMON"));
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named() {
        assert_eq!(missing(0), ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]);
        assert!(missing(1 << CAP_NET_ADMIN | 1 << CAP_SYS_ADMIN).is_empty());
        assert_eq!(missing(1 << CAP_NET_ADMIN | 1 << CAP_BPF), ["CAP_PERFMON"]);
    }
}
