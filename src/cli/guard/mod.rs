//! `netoken guard`: puts the guard on interfaces, gives it its rules, and says what it does.

use std::io::{self, Write};
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{ArgGroup, ValueEnum};
use serde::Serialize;

use super::args::{Scope, exid, handle, instance};
use crate::guard::counters::GuardCounters;
use crate::guard::events::Seen;
use crate::guard::rules::Rules;
use crate::hooks::clsact::{Loaded, Role, loaded_programs};
use crate::hooks::xdp::Mode;
use crate::netns::Netns;
use crate::program::DEFAULT_KIND;
use crate::state::State;

mod attach;
mod query;
mod remove;
mod rules;
mod watch;

const EXAMPLES: &str = "\
Examples:
  netoken guard --check --rules guard.toml                  is the file right? needs no rights
  netoken guard --iface eth0 --attach --rules guard.toml    let only SYNs with a right token in
  netoken guard --load --rules guard.toml                   other rules, in one step, where it is attached
  netoken guard --query                                     where it is attached, and what it has counted
  netoken guard --watch                                     what comes in, as it comes, until Ctrl-C
  netoken guard --iface eth0 --destroy                      remove it, and its clsact qdisc if nobody else uses it

Begin with mode = \"observe\": everything is counted as if it were enforced, and nothing is dropped.";

/// Let only connections with a right token in
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
#[command(group = ArgGroup::new("guard_mode").required(true).args([
    "attach", "load", "check", "query", "watch", "detach", "destroy",
]))]
#[command(group = ArgGroup::new("guard_attaching").multiple(true)
    .conflicts_with_all(["load", "check", "query", "watch", "detach", "destroy"])
    .args(["hook", "sample", "priority", "handle", "option_kind", "exid"]))]
pub(super) struct GuardArgs {
    /// Interface to act on; may be given more than once
    #[arg(short, long = "iface", visible_alias = "interface", value_name = "NAME")]
    iface: Vec<String>,

    /// Attach, or replace in place, and return
    #[arg(long, requires = "iface", help_heading = "What to do")]
    attach: bool,

    /// Put other rules into use where it is attached
    #[arg(long, requires = "rules", conflicts_with = "iface", help_heading = "What to do")]
    load: bool,

    /// Check the rules, and do nothing
    #[arg(long, requires = "rules", conflicts_with = "iface", help_heading = "What to do")]
    check: bool,

    /// Show where it is attached, and what it has counted
    #[arg(long, help_heading = "What to do")]
    query: bool,

    /// Print every event until Ctrl-C
    #[arg(long, conflicts_with = "iface", help_heading = "What to do")]
    watch: bool,

    /// Remove it; rules and counters stay for the next --attach
    #[arg(long, requires = "iface", help_heading = "What to do")]
    detach: bool,

    /// Remove it, the clsact qdisc if we made it and nobody else uses it, and with the last program of the instance
    /// its rules and counters
    #[arg(long, requires = "iface", help_heading = "What to do")]
    destroy: bool,

    /// File that says what is protected, what is accepted there, and which sources are exempt or blocked [default:
    /// the rules that run]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["query", "watch", "detach", "destroy"])]
    rules: Option<PathBuf>,

    /// Where to attach
    #[arg(long, value_enum, default_value_t = HookArg::Auto, help_heading = "With --attach")]
    hook: HookArg,

    /// Send one event for every N packets of the same verdict and CPU; counters always count all
    #[arg(long, value_name = "N", default_value_t = 1, help_heading = "With --attach",
          value_parser = clap::value_parser!(u32).range(1..))]
    sample: u32,

    /// With --hook tc: place among the filters of the interface, 1 to 65535 [default: in front of those there]
    #[arg(long, value_name = "N", help_heading = "With --attach", value_parser = clap::value_parser!(u16).range(1..))]
    priority: Option<u16>,

    /// With --hook tc: handle of the filter within its priority [default: the next free one]
    #[arg(long, value_name = "N", help_heading = "With --attach", value_parser = handle)]
    handle: Option<u32>,

    /// Kind byte of the TCP option, 253 or 254 (RFC 4727)
    #[arg(long, value_name = "KIND", default_value_t = DEFAULT_KIND,
          help_heading = "With --attach", value_parser = clap::value_parser!(u8).range(253..=254))]
    option_kind: u8,

    /// Experiment identifier of the option (RFC 6994) [default: 0x4e54]
    #[arg(long, value_name = "ID", help_heading = "With --attach", value_parser = exid)]
    exid: Option<u16>,

    /// Act on the interfaces of another network namespace: a name from `ip netns`, or a path
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,

    /// Which set of rules, keys and counters to use
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = instance)]
    instance: String,

    /// Print one JSON object a line
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HookArg {
    /// Where it is already, else XDP if the driver runs it, else TC
    Auto,
    /// XDP: by the driver if it can, else by the kernel behind it
    Xdp,
    /// TC: clsact ingress
    Tc,
}

/// Everything that `netoken guard --json` prints, by its `type`.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Record<'a> {
    GuardAttached {
        interface: &'a str,
        hook: &'a str,
        replaced: bool,
    },
    GuardHook {
        /// Name of the network namespace; empty for the one that the command ran in.
        netns: &'a str,
        interface: &'a str,
        hook: &'a str,
        program: u32,
        /// None if the pins of its instance are gone.
        instance: Option<&'a str>,
        since: String,
        /// Foreign filters that see a packet first and may let it pass the guard by.
        filters_before: usize,
    },
    GuardCounters {
        instance: &'a str,
        #[serde(flatten)]
        counters: &'a GuardCounters,
        /// With `--watch`: events for which there was no room since it began.
        #[serde(skip_serializing_if = "Option::is_none")]
        lost: Option<u64>,
    },
    Guarded {
        #[serde(flatten)]
        seen: &'a Seen,
    },
    GuardRemoved {
        interface: &'a str,
        /// How many programs of ours were removed.
        programs: usize,
        #[serde(skip_serializing_if = "Option::is_none")]
        qdisc: Option<&'a str>,
    },
}

fn print_json(record: &Record<'_>) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(record)?).context("writing to standard output")
}

pub(super) fn run(args: GuardArgs) -> Result<()> {
    let rules = args.rules.as_deref().map(Rules::from_file).transpose()?;
    if let (true, Some(rules)) = (args.check, &rules) {
        note!("the rules are right: {}", rules.summary());
        return Ok(());
    }
    if let Some(netns) = &args.netns {
        Netns::open(netns)?.enter()?;
    }
    let scope = Scope {
        ifaces: args.iface.clone(),
        netns: args.netns.clone(),
        instance: args.instance.clone(),
        json: args.json,
    };
    if args.attach {
        return attach::attach(&args, &scope, rules.as_ref());
    }
    if let (true, Some(rules)) = (args.load, &rules) {
        return rules::load(&scope, rules);
    }
    if args.query {
        return query::query(&scope);
    }
    if args.watch {
        return watch::watch(&scope);
    }
    remove::remove(&scope, args.destroy)
}

/// The loaded programs of an instance.
fn of_instance(state: &State, instance: &str) -> Result<Vec<Loaded>> {
    let of_ours =
        |loaded: &Loaded| loaded.role != Role::Stamp && loaded.instance.as_deref() == Some(instance);
    Ok(loaded_programs(state)?.into_values().filter(of_ours).collect())
}

fn hook_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Native => "xdp native",
        Mode::Generic => "xdp generic",
    }
}

fn print_counters(scope: &Scope, instance: &str, counters: &GuardCounters, lost: Option<u64>) -> Result<()> {
    if scope.json {
        return print_json(&Record::GuardCounters { instance, counters, lost });
    }
    let mut out = io::stdout().lock();
    let lost = lost.filter(|lost| *lost > 0).map_or(String::new(), |lost| format!("; {lost} events lost"));
    writeln!(out, "instance '{instance}': {}{lost}", counters.line()).context("writing to standard output")
}
