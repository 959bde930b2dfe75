//! Whether the kernel lets one packet's way out be interrupted by that of another on the same CPU. The programs keep what
//! they know of a packet in memory of the CPU, and rely on having it for themselves until they have ended.
//!
//! That is so wherever bottom halves are off, except on PREEMPT_RT since commit 3253cb49cbad (Linux 6.18), which made it a
//! choice: CONFIG_PREEMPT_RT_NEEDS_BH_LOCK.

use std::fs::{self, File};
use std::io::Read;

use anyhow::{Result, bail};
use flate2::read::GzDecoder;
use nix::sys::utsname::uname;

use crate::kernel::Kernel;

const OPTION: &str = "CONFIG_PREEMPT_RT_NEEDS_BH_LOCK";
/// The oldest series of which newer stable releases may have the choice.
const OLDEST: (u32, u32) = (6, 12);

/// Fails on a kernel where two packets would mix.
///
/// # Errors
/// It is such a kernel, or a PREEMPT_RT kernel that may be one and whose configuration cannot be read.
pub fn check(doing: &str) -> Result<()> {
    // Some kernels say it in one place, some in the other.
    let says_so = fs::read_to_string("/sys/kernel/realtime").is_ok_and(|text| text.trim() == "1");
    let version = uname().map(|uname| uname.version().to_string_lossy().into_owned()).unwrap_or_default();
    if !says_so && !version.contains("PREEMPT_RT") {
        return Ok(());
    }
    let kernel = Kernel::probe();
    decide(doing, kernel, config(&kernel.release).as_deref())
}

fn decide(doing: &str, kernel: &Kernel, config: Option<&str>) -> Result<()> {
    let why = match config {
        Some(config) if config.lines().any(|line| line == format!("{OPTION}=y")) => return Ok(()),
        Some(config) if config.contains(OPTION) => format!("has PREEMPT_RT without {OPTION}"),
        // Of before there was a choice.
        Some(_) => return Ok(()),
        None if kernel.version() < Some(OLDEST) => return Ok(()),
        None => format!(
            "has PREEMPT_RT, and perhaps not {OPTION}: neither /proc/config.gz nor /boot/config-{} can be read",
            kernel.release
        ),
    };
    bail!(
        "{doing}: this kernel ({}) {why}; there one packet can interrupt another on the same CPU, and the headers of both \
         would mix; use a kernel with {OPTION}=y, or without PREEMPT_RT",
        kernel.release
    )
}

/// The configuration of the running kernel, where it tells.
fn config(release: &str) -> Option<String> {
    let mut text = String::new();
    match File::open("/proc/config.gz") {
        Ok(packed) => GzDecoder::new(packed).read_to_string(&mut text).ok().map(|_| text),
        Err(_) => fs::read_to_string(format!("/boot/config-{release}")).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn said(release: &str, config: Option<&str>) -> Option<String> {
        let kernel = Kernel { release: release.to_string(), ..Kernel::probe().clone() };
        decide("attaching to eth0", &kernel, config).err().map(|error| error.to_string())
    }

    #[test]
    fn a_kernel_where_packets_would_mix_is_refused() {
        let unset = "CONFIG_PREEMPT_RT=y\n# CONFIG_PREEMPT_RT_NEEDS_BH_LOCK is not set\n";
        let error = said("6.18.1-rt", Some(unset)).unwrap();
        assert!(
            error.starts_with("attaching to eth0: this kernel (6.18.1-rt) has PREEMPT_RT without"),
            "{error}"
        );
        assert_eq!(said("6.18.1-rt", Some("CONFIG_PREEMPT_RT=y\nCONFIG_PREEMPT_RT_NEEDS_BH_LOCK=y\n")), None);
        assert_eq!(said("6.12.1-rt", Some("CONFIG_PREEMPT_RT=y\n")), None);
    }

    #[test]
    fn where_it_does_not_tell_its_age_decides() {
        assert_eq!(said("6.1.0-rt", None), None);
        let error = said("6.18.1-rt", None).unwrap();
        assert!(error.contains("/boot/config-6.18.1-rt"), "{error}");
    }

    #[test]
    fn the_configuration_is_read_where_it_is() {
        let release = &Kernel::probe().release;
        let there = ["/proc/config.gz".to_string(), format!("/boot/config-{release}")];
        let is_there = there.iter().any(|path| fs::metadata(path).is_ok());
        assert_eq!(config(release).is_some_and(|text| text.contains("CONFIG_NET=y")), is_there);
    }
}
