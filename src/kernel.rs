//! What the running kernel can do, found out once, and what its refusals mean.

use std::fs;
use std::ptr;
use std::sync::OnceLock;

use anyhow::{Error, anyhow};
use nix::errno::Errno;

/// The oldest kernel that is supported: 5.10.
pub const OLDEST: (u32, u32) = (5, 10);

/// What libbpf prints in front of a verifier's log.
const LOG_BEGINS: &str = "BEGIN PROG LOAD LOG";

/// Facts about the running kernel.
#[derive(Clone, Debug)]
pub struct Kernel {
    /// As `uname -r` prints it.
    pub release: String,
    /// `bpf_check_mtu()`, from 5.12; before it, a program is told the MTU when it is loaded.
    pub has_check_mtu: bool,
    /// `bpf_ktime_get_tai_ns()`, from 6.1; before it, a program reads the boot time.
    pub has_tai: bool,
    /// `bpf_skb_ancestor_cgroup_id()`: not without CONFIG_SOCK_CGROUP_DATA.
    pub has_cgroup_id: bool,
    /// The lockdown mode in force, as /sys/kernel/security/lockdown shows it; none if it cannot be read.
    pub lockdown: Option<String>,
}

impl Kernel {
    /// The running kernel, which is asked the first time.
    pub fn probe() -> &'static Kernel {
        static KERNEL: OnceLock<Kernel> = OnceLock::new();
        KERNEL.get_or_init(Kernel::ask)
    }

    fn ask() -> Kernel {
        let release = nix::sys::utsname::uname();
        let release = release.map(|uname| uname.release().to_string_lossy().into_owned()).unwrap_or_default();
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").ok().and_then(|text| {
            let (_, rest) = text.split_once('[')?;
            rest.split_once(']').map(|(mode, _)| mode.to_string())
        });
        Kernel {
            release,
            has_check_mtu: has_helper(libbpf_sys::BPF_FUNC_check_mtu),
            has_tai: has_helper(libbpf_sys::BPF_FUNC_ktime_get_tai_ns),
            has_cgroup_id: has_helper(libbpf_sys::BPF_FUNC_skb_ancestor_cgroup_id),
            lockdown,
        }
    }

    /// Major and minor version.
    pub fn version(&self) -> Option<(u32, u32)> {
        let mut numbers = self.release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Some((major, minor)),
            _ => None,
        }
    }

    /// Turns a refused load into what was being done, why it failed and what to do now.
    ///
    /// `what` was to be loaded, and `log` is what libbpf printed meanwhile. A verifier's log is long; it goes to a file.
    pub fn explain_load(&self, what: &str, error: Error, log: &str) -> Error {
        let cause = error.downcast_ref::<libbpf_rs::Error>().map(libbpf_rs::Error::kind);
        let denied = cause == Some(libbpf_rs::ErrorKind::PermissionDenied);
        let remedy = if self.version().is_some_and(|version| version < OLDEST) {
            format!("this kernel is {}; netoken needs 5.10 or later", self.release)
        } else if log.contains(LOG_BEGINS) {
            match save_log(log) {
                Ok(path) => format!(
                    "the verifier of kernel {} refused the program; its log is in {path}, please report it",
                    self.release
                ),
                Err(why) => format!("the verifier refused the program; its log could not be saved: {why}"),
            }
        } else if log.contains("parameter mismatch") {
            "the pinned maps are of another version of netoken; attach this one, which takes over what is in use, or \
             use another --instance"
                .to_string()
        } else if denied && self.version().is_some_and(|version| version < (5, 11)) {
            "the limit on locked memory may be too low for kernels before 5.11; raise it with \
             `ulimit -l unlimited`, or run as root with CAP_SYS_RESOURCE, with which it is raised for you"
                .to_string()
        } else if denied {
            format!(
                "it needs CAP_SYS_ADMIN and CAP_NET_ADMIN in the first user namespace (try sudo){}",
                self.lockdown_note()
            )
        } else {
            "see what libbpf said".to_string()
        };
        // A verifier's log is in its file; anything else that libbpf said is short.
        let short = if log.contains(LOG_BEGINS) { "" } else { log };
        let said: Vec<_> = short.lines().filter(|line| line.starts_with("libbpf:")).take(3).collect();
        let said = said.join("; ");
        let said = if said.is_empty() { said } else { format!(" ({said})") };
        anyhow!("loading {what} into the kernel: {error}; {remedy}{said}")
    }

    /// No kernel that the tests run under refuses a classifier because it is locked down, so this is said last.
    fn lockdown_note(&self) -> String {
        match self.lockdown.as_deref() {
            Some(mode @ ("integrity" | "confidentiality")) => {
                format!(
                    "; if it has them, this kernel's lockdown ({mode}) may forbid BPF: boot with lockdown=none"
                )
            }
            _ => String::new(),
        }
    }
}

/// Whether a classifier may call a helper.
fn has_helper(helper: libbpf_sys::bpf_func_id) -> bool {
    // SAFETY: no options are passed; libbpf documents a null pointer for that.
    let answer = unsafe {
        libbpf_sys::libbpf_probe_bpf_helper(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, helper, ptr::null())
    };
    answer == 1
}

/// Writes a verifier's log where only root reads it, because it holds addresses of the kernel.
fn save_log(log: &str) -> Result<String, Errno> {
    use std::io::Write;
    use std::os::fd::AsFd;

    let template = std::env::temp_dir().join("netoken-verifier-XXXXXX");
    let (fd, path) = nix::unistd::mkstemp(&template)?;
    let mut file = fs::File::from(fd.as_fd().try_clone_to_owned().map_err(|_| Errno::EIO)?);
    file.write_all(log.as_bytes()).map_err(|_| Errno::EIO)?;
    Ok(path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel(release: &str, lockdown: Option<&str>) -> Kernel {
        Kernel {
            release: release.into(),
            has_check_mtu: true,
            has_tai: true,
            has_cgroup_id: true,
            lockdown: lockdown.map(Into::into),
        }
    }

    fn denied() -> Error {
        libbpf_rs::Error::from_raw_os_error(Errno::EPERM as i32).into()
    }

    #[test]
    fn a_release_has_a_version() {
        assert_eq!(kernel("5.10.0-32-cloud-amd64", None).version(), Some((5, 10)));
        assert_eq!(kernel("6.18.44-fc", None).version(), Some((6, 18)));
        assert_eq!(kernel("", None).version(), None);
    }

    #[test]
    fn every_refusal_names_its_remedy() {
        for (kernel, log, expect) in [
            (kernel("4.19.1", None), "", "needs 5.10"),
            (kernel("6.1.0", Some("confidentiality")), "", "try sudo"),
            (kernel("6.1.0", Some("integrity")), "", "lockdown=none"),
            (kernel("5.10.1", None), "", "ulimit -l unlimited"),
            // Not its doing: these kernels allow BPF then.
            (kernel("5.10.1", Some("integrity")), "", "ulimit -l unlimited"),
            (kernel("6.1.0", Some("none")), "", "try sudo"),
            (
                kernel("6.1.0", None),
                "libbpf: couldn't reuse pinned map: parameter mismatch",
                "another version",
            ),
        ] {
            let message = kernel.explain_load("the guard", denied(), log).to_string();
            assert!(message.contains("loading the guard") && message.contains(expect), "{message}");
        }
    }

    #[test]
    fn a_verifier_log_is_saved_and_named() {
        let log = "libbpf: -- BEGIN PROG LOAD LOG --\nR1 invalid mem access\n";
        let message = kernel("6.1.0", None).explain_load("the guard", denied(), log).to_string();
        let path = message.split("its log is in ").nth(1).unwrap().split(',').next().unwrap();
        assert_eq!(fs::read_to_string(path).unwrap(), log);
        fs::remove_file(path).unwrap();
    }
}
