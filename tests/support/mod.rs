//! What the test programs share: the list of cases, what a case needs, and saying aloud when it cannot run.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Mutex, PoisonError};

use libtest_mimic::{Arguments, Failed, Trial};
use nix::sys::signal::{SigHandler, Signal, signal};

/// What a case needs to run at all.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code)]
pub enum Need {
    /// Effective user id 0.
    Root,
    /// A program on the PATH.
    Tool(&'static str),
    /// A kernel of at least this version.
    Kernel(u32, u32),
    /// So many CPUs.
    Cpus(usize),
    /// A limit on the memory of event buffers, which `perf_event_paranoid` of -1 lifts.
    BufferLimit,
    /// A machine on which time says something, which an emulated one is not.
    RealTime,
    /// A guest of `scripts/kernels`, which does not outlive the test.
    Guest,
    /// What is known beforehand, and why it is not so.
    Is(bool, &'static str),
    /// A shell command that succeeds in a network namespace of its own.
    Works(&'static str),
}

impl Need {
    /// Why it is not met, if it is not.
    pub fn missing(self) -> Option<String> {
        match self {
            Need::Root => (!nix::unistd::geteuid().is_root()).then(|| "it needs root".to_string()),
            Need::Tool(name) => {
                let path = std::env::var_os("PATH").unwrap_or_default();
                let mut dirs = std::env::split_paths(&path)
                    .chain([Path::new("/usr/sbin").into(), Path::new("/sbin").into()]);
                (!dirs.any(|dir| dir.join(name).exists())).then(|| format!("{name} is not installed"))
            }
            Need::Cpus(count) => {
                let has = std::thread::available_parallelism().map_or(1, usize::from);
                (has < count).then(|| format!("it needs {count} CPUs, there are {has}"))
            }
            Need::BufferLimit => std::fs::read_to_string("/proc/sys/kernel/perf_event_paranoid")
                .is_ok_and(|text| text.trim() == "-1")
                .then(|| "kernel.perf_event_paranoid is -1, which lifts the limit on buffers".to_string()),
            Need::RealTime => std::env::var_os(EMULATED)
                .map(|_| format!("it measures time, and {EMULATED} says that this machine is emulated")),
            // Its own kernel says so; a variable could be set by anybody.
            Need::Guest => (!std::fs::read_to_string("/proc/cmdline")
                .is_ok_and(|line| line.contains(EMULATED)))
            .then(|| "it needs a machine that is thrown away, a guest of scripts/kernels".to_string()),
            Need::Is(is_so, why_not) => (!is_so).then(|| why_not.to_string()),
            Need::Works(command) => why_not(command),
            Need::Kernel(major, minor) => {
                let kernel = netoken::kernel::Kernel::probe();
                (kernel.version() < Some((major, minor)))
                    .then(|| format!("it needs kernel {major}.{minor}, this is {}", kernel.release))
            }
        }
    }
}

/// Set in the guests of `scripts/kernels`.
const EMULATED: &str = "NETOKEN_TEST_EMULATED";
/// How much of what is repeated at random is done, in per cent.
const PERCENT: &str = "NETOKEN_TEST_PERCENT";
/// A part of the name of a case that is to fail: that a failure is seen can so be shown.
const BREAK: &str = "NETOKEN_TEST_BREAK";

/// How often to do what is done `full` times where there is time.
///
/// # Errors
/// NETOKEN_TEST_PERCENT is not a number.
#[allow(dead_code)]
pub fn share_of(full: usize) -> anyhow::Result<usize> {
    let Ok(text) = std::env::var(PERCENT) else { return Ok(full) };
    let percent: usize = text.parse().map_err(|error| anyhow::anyhow!("{PERCENT}={text}: {error}"))?;
    let share = (full * percent / 100).max(1);
    eprintln!("{share} rounds of {full}, because of {PERCENT}={percent}");
    Ok(share)
}

/// What a command says if it fails in a network namespace that is gone afterwards. Each is asked once.
fn why_not(command: &'static str) -> Option<String> {
    static ASKED: Mutex<BTreeMap<&str, Option<String>>> = Mutex::new(BTreeMap::new());
    let ask = || {
        let output = Command::new("unshare").args(["--net", "sh", "-c", command]).output();
        match output {
            Ok(output) if output.status.success() => None,
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                Some(format!("`{command}` says {}", said.split_whitespace().collect::<Vec<_>>().join(" ")))
            }
            Err(error) => Some(format!("unshare: {error}")),
        }
    };
    ASKED.lock().unwrap_or_else(PoisonError::into_inner).entry(command).or_insert_with(ask).clone()
}

/// One test: a promise for a name, and what it needs.
pub fn case(
    name: &str,
    needs: &[Need],
    test: impl FnOnce() -> Result<(), anyhow::Error> + Send + 'static,
) -> Trial {
    let missing: Vec<String> = needs.iter().filter_map(|need| need.missing()).collect();
    if !missing.is_empty() {
        eprintln!("SKIPPED {name}: {}", missing.join(", "));
    }
    let broken = std::env::var(BREAK).is_ok_and(|part| name.contains(&part));
    let run = move || {
        anyhow::ensure!(!broken, "it is made to fail by {BREAK}");
        test()
    };
    Trial::test(name, move || run().map_err(|error| Failed::from(format!("{error:#}"))))
        .with_ignored_flag(!missing.is_empty())
}

/// Runs the cases as the arguments of `cargo test` ask.
pub fn run(cases: Vec<Trial>) -> ExitCode {
    // Under nohup, what is started here would go on as if the signal had never come.
    // SAFETY: there is one thread yet, and no handler.
    unsafe { signal(Signal::SIGHUP, SigHandler::SigDfl) }.expect("SIGHUP can be set");
    libtest_mimic::run(&Arguments::from_args(), cases).exit_code()
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// It could not be started or did not succeed; the message holds what it printed.
#[allow(dead_code)]
pub fn sh(command: &str) -> anyhow::Result<String> {
    let output = Command::new("sh").arg("-c").arg(command).output()?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        anyhow::bail!(
            "`{command}` failed ({}): {stdout}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
    }
    Ok(stdout)
}

/// Fails the case unless the condition holds.
#[allow(unused_macros)]
macro_rules! ensure_eq {
    ($left:expr, $right:expr, $($message:tt)+) => {{
        let (left, right) = (&$left, &$right);
        if left != right {
            anyhow::bail!("{}: {left:?} is not {right:?}", format_args!($($message)+));
        }
    }};
}
#[allow(unused_imports)]
pub(crate) use ensure_eq;

/// Each case under the name of its function.
#[allow(unused_macros)]
macro_rules! cases {
    ($needs:expr; $($module:ident: $($function:ident)*;)*) => {
        vec![$($($crate::support::case(
            concat!(stringify!($module), "::", stringify!($function)),
            $needs,
            $module::$function,
        ),)*)*]
    };
}
#[allow(unused_imports)]
pub(crate) use cases;

/// Bytes as a hex dump of one line.
#[allow(dead_code)]
pub struct Hex<'a>(pub &'a [u8]);

impl fmt::Display for Hex<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
