//! `netoken policy`: checking, loading and looking at the policy of an instance.

use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use clap::{Args, Subcommand};
use serde::Serialize;

use super::args::instance;
use super::outdated;
use crate::files::Files;
use crate::keys::file::keys_for;
use crate::netns;
use crate::policy::Policy;
use crate::policy::read::{Checked, Options, read_file};
use crate::policy::report::Report;
use crate::policy::running::{self, LoadError};
use crate::privileges;
use crate::program::Maps;
use crate::rings;
use crate::state::{Instance, Lock, State, instance_flag};

mod ask;
mod check;
mod diff;
mod edit;
mod show;

const EXAMPLES: &str = "\
Examples:
  Is it right? Shows every error with its line; needs no rights:
    netoken policy check policy.toml
  Put it into use in one step:
    netoken policy load policy.toml
  See what is in use, and how often each rule decided:
    netoken policy show
  See what loading it would change:
    netoken policy diff policy.toml
  Which rule decides over such a SYN, and why?
    netoken policy test --dst 192.0.2.1 --port 443
  Put a rule in front of the others, and take it out again:
    netoken policy add --name blocked --dst 198.51.100.0/24 --action drop
    netoken policy del blocked

The language is described in docs/policy.md.";

/// Check, load, show or change the policy of an instance
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    Check(check::CheckArgs),
    Load(LoadArgs),
    Show(show::ShowArgs),
    Diff(diff::DiffArgs),
    Test(ask::TestArgs),
    Add(Box<edit::AddArgs>),
    Del(edit::DelArgs),
}

/// What every one of them can be told.
#[derive(Debug, Args)]
struct Common {
    /// Which set of policy and counters
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = instance)]
    instance: String,

    /// Names of interfaces are those of this network namespace: a name from `ip netns`, or a path
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,

    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

/// Put a policy into use, in one step
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  netoken policy load policy.toml")]
struct LoadArgs {
    /// The policy
    file: PathBuf,

    /// A cgroup or interface that does not exist is a warning
    #[arg(long)]
    allow_missing: bool,

    #[command(flatten)]
    common: Common,
}

/// Runs what was asked for.
pub(super) fn run(args: PolicyArgs) -> Result<()> {
    match args.command {
        PolicyCommand::Check(args) => check::run(&args),
        PolicyCommand::Load(args) => load(&args),
        PolicyCommand::Show(args) => show::run(&args),
        PolicyCommand::Diff(args) => diff::run(&args),
        PolicyCommand::Test(args) => ask::run(&args),
        PolicyCommand::Add(args) => edit::add(&args),
        PolicyCommand::Del(args) => edit::del(&args),
    }
}

fn load(args: &LoadArgs) -> Result<()> {
    args.common.enter()?;
    let progress = Progress::new(args.common.json);
    let checked = read(&args.file, args.allow_missing, &progress)?;
    privileges::check(&format!("loading the policy {}", args.file.display()))?;
    let (state, _lock) = args.common.open()?;
    let instance = state.instance(&args.common.instance);
    let maps = instance.maps()?;
    load_keys(&instance, &maps, &checked.policy)?;
    let generation = put(&instance, &maps, &checked, &args.file, &progress)?;
    let told = tell_loaded(&args.common, &state, &checked.policy, generation);
    // The process ends; to take a million rules apart before would take a person's time.
    std::mem::forget(checked);
    told
}

/// What was put into use, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "loaded")]
struct Loaded<'a> {
    instance: &'a str,
    generation: u64,
    rules: usize,
}

fn tell_loaded(common: &Common, state: &State, policy: &Policy, generation: u64) -> Result<()> {
    if common.json {
        let loaded = Loaded { instance: &common.instance, generation, rules: policy.rules.len() };
        writeln!(io::stdout(), "{}", serde_json::to_string(&loaded)?)
            .context("writing to standard output")?;
    } else {
        note!("instance '{}': {}", common.instance, policy.summary());
    }
    outdated::tell(state, &common.instance, false)
}

/// Puts a policy that was read into use. The kernel has the keys that it makes tokens with.
///
/// # Errors
/// The running one is then unchanged.
pub(super) fn put(
    instance: &Instance,
    maps: &Maps,
    checked: &Checked,
    file: &Path,
    progress: &Progress,
) -> Result<u64> {
    let source = std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf());
    let told = |doing: &str, done: usize, total: usize| progress.show(doing, done, total);
    let loaded = running::load(instance, maps, &checked.policy, &source.display().to_string(), Some(&told));
    progress.clear();
    loaded.map_err(|error| match error {
        LoadError::Refused(refused) => refuse(&checked.refuse(&refused)),
        LoadError::Other(error) => error,
    })
}

/// Gives the kernel the keys that a policy makes tokens with.
///
/// # Errors
/// A ring has no key that signs, or the kernel refused.
pub(super) fn load_keys(instance: &Instance, maps: &Maps, policy: &Policy) -> Result<()> {
    let rings = policy.rings();
    if rings.is_empty() {
        return Ok(());
    }
    let keys = keys_for(&instance.name, rings.iter().copied())
        .with_context(|| format!("loading the policy of instance '{}'", instance.name))?;
    keys.map_or(Ok(()), |keys| rings::load(instance, &maps.keys, &keys, rings))
}

/// Reads a policy, and tells on standard error what is worth a look in it.
///
/// # Errors
/// It has errors; the message shows all of them.
pub(super) fn read(file: &Path, allow_missing: bool, progress: &Progress) -> Result<Checked> {
    read_by(&Files::default(), file, allow_missing, progress)
}

/// The same by way of `files`, which knows all of them afterwards, also if this fails.
pub(super) fn read_by(
    files: &Files,
    file: &Path,
    allow_missing: bool,
    progress: &Progress,
) -> Result<Checked> {
    let told = |doing: &str, done: usize, total: usize| progress.show(doing, done, total);
    let options = Options { allow_missing, progress: Some(&told), ..Options::default() };
    let checked = read_file(file, files, &options);
    progress.clear();
    let checked = checked.map_err(|report| refuse(&report))?;
    warn(&checked.report);
    Ok(checked)
}

fn warn(report: &Report) {
    if !report.is_empty() {
        note!("{}", report.render(has_colours()).trim_end());
    }
}

/// Whether standard error is a terminal that shows colours, and nobody wants it without: https://no-color.org.
fn has_colours() -> bool {
    let is_unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    is_for_people() && !is_unwanted
}

/// Whether standard error is a terminal that knows more than letters.
fn is_for_people() -> bool {
    io::stderr().is_terminal() && std::env::var_os("TERM").is_none_or(|term| term != "dumb")
}

/// A report as an error, in colours on a terminal.
fn refuse(report: &Report) -> anyhow::Error {
    match has_colours() {
        true => anyhow!("the policy cannot be used; nothing was changed\n{}", report.render(true).trim_end()),
        false => anyhow!("{report}"),
    }
}

impl Common {
    /// Goes where names of interfaces are looked up.
    fn enter(&self) -> Result<()> {
        self.netns.as_ref().map_or(Ok(()), |netns| netns::enter(netns))
    }

    /// The state, if the instance exists; nobody else changes it until the lock is dropped.
    fn open(&self) -> Result<(State, Lock)> {
        State::with_instance(&self.instance)?.with_context(|| {
            format!(
                "looking for the policy of instance '{}': there is no such instance; make one by attaching: netoken \
                 --iface NAME --attach --quiet{}",
                self.instance,
                instance_flag(&self.instance)
            )
        })
    }
}

/// Tells a person who waits how far it is; nothing to a file or a pipe.
pub(super) struct Progress {
    /// When it may be told next, and whether something stands there.
    shown: Mutex<(Instant, bool)>,
    is_on: bool,
}

impl Progress {
    /// What takes less than this need not be told.
    const PATIENCE: Duration = Duration::from_millis(300);
    const PAUSE: Duration = Duration::from_millis(100);

    /// With `json` the one who waits is a program.
    pub fn new(json: bool) -> Progress {
        Progress::if_wanted(!json && is_for_people())
    }

    /// For what nobody waits for.
    pub fn none() -> Progress {
        Progress::if_wanted(false)
    }

    fn if_wanted(is_on: bool) -> Progress {
        Progress { shown: Mutex::new((Instant::now() + Progress::PATIENCE, false)), is_on }
    }

    fn show(&self, doing: &str, done: usize, total: usize) {
        let mut shown = self.shown.lock().unwrap_or_else(|e| e.into_inner());
        if self.is_on && Instant::now() >= shown.0 {
            *shown = (Instant::now() + Progress::PAUSE, true);
            let percent = done * 100 / total.max(1);
            let _ = write!(io::stderr(), "\r\x1b[K{doing}: {percent}% of {total}");
        }
    }

    fn clear(&self) {
        let mut shown = self.shown.lock().unwrap_or_else(|e| e.into_inner());
        if std::mem::take(&mut shown.1) {
            let _ = write!(io::stderr(), "\r\x1b[K");
        }
    }
}
