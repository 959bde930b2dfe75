//! `netoken policy check`: reads a policy as a load would, and changes nothing. Needs no rights.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Args;

use super::{Progress, read, refuse};
use crate::netns;
use crate::policy::compile::{Naming, compile};

/// Check a policy: every error is shown with its line; nothing is changed
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  netoken policy check policy.toml --shapes")]
pub(super) struct CheckArgs {
    /// The policy
    file: PathBuf,

    /// A cgroup or interface that does not exist is a warning
    #[arg(long)]
    allow_missing: bool,

    /// Also show the shapes: how often a packet is looked up at most
    #[arg(long)]
    shapes: bool,

    /// Names of interfaces are those of this network namespace: a name from `ip netns`, or a path
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,
}

pub(super) fn run(args: &CheckArgs) -> Result<()> {
    if let Some(netns) = &args.netns {
        netns::enter(netns)?;
    }
    let checked = read(&args.file, args.allow_missing, &Progress::new(false))?;
    let compiled =
        compile(&checked.policy, Naming::none(), &[]).map_err(|error| refuse(&checked.refuse(&error)))?;
    let tell = || -> io::Result<()> {
        let mut out = io::stdout().lock();
        writeln!(out, "{}: {}", args.file.display(), checked.policy.summary())?;
        if args.shapes {
            let (entries, records, sets) =
                (compiled.entries.len(), compiled.records.len() - 1, compiled.sets.len());
            writeln!(out, "{entries} entries, {records} records, {sets} values in sets, shapes:")?;
            for shape in &compiled.shapes {
                writeln!(out, "  {shape}")?;
            }
        }
        out.flush()
    };
    tell().context("writing to standard output")
}
