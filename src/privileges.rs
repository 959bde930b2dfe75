//! Which capabilities this process has, checked before anything is tried with them.

use std::fs;

use anyhow::{Context, Result, bail};

/// Bit numbers of include/uapi/linux/capability.h.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;

/// Checks that BPF programs can be loaded, attached and found again. `doing` begins the message if not.
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
    // CAP_BPF and CAP_PERFMON would do for loading, but not for finding what is loaded: the kernel lists programs
    // (BPF_PROG_GET_NEXT_ID) for CAP_SYS_ADMIN only, and without the list our own filter looks like a foreign one.
    let needed = [(CAP_NET_ADMIN, "CAP_NET_ADMIN"), (CAP_SYS_ADMIN, "CAP_SYS_ADMIN")];
    needed.into_iter().filter(|(bit, _)| effective & (1 << bit) == 0).map(|(_, name)| name).collect()
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
