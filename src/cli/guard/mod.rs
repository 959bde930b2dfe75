//! `netoken guard`: puts the guard on interfaces, gives it its rules, and says what it does.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use clap::error::ErrorKind;
use clap::{ArgGroup, CommandFactory, ValueEnum};
use serde::{Serialize, Serializer};

use super::args::{Args, Scope, exid, handle, instance};
use super::blocked::unblock_prefix;
use crate::files::Files;
use crate::guard::counters::{GuardCounters, Row, VERDICTS};
use crate::guard::events::Seen;
use crate::guard::program::GuardMaps;
use crate::guard::rules::{Rules, ended};
use crate::guard::running::Outline;
use crate::hooks::loaded::{Loaded, Role, loaded_programs};
use crate::hooks::qdisc::Qdisc;
use crate::hooks::xdp::{Foreign, Mode};
use crate::keys::RingName;
use crate::netns;
use crate::policy::values::Prefix;
use crate::privileges;
use crate::state::State;

mod attach;
pub(super) mod query;
mod remove;
mod rules;
mod show;
mod watch;

const EXAMPLES: &str = "\
Examples:
  Is the file right? Needs no rights:
    netoken guard --check --rules guard.toml
  Let only SYNs with a right token in:
    netoken guard --iface eth0 --attach --rules guard.toml
  Put other rules into use, in one step, where it is attached:
    netoken guard --load --rules guard.toml
  See which rules run, and what each has counted:
    netoken guard --show
  See what loading a file would change:
    netoken guard --diff guard.toml
  See where it is attached, and what it has counted:
    netoken guard --query
  Watch what comes in, until Ctrl-C; the second also loads the file whenever it
  changes:
    netoken guard --watch
    netoken guard --watch --rules guard.toml
  Let in again who was blocked automatically:
    netoken guard --unblock 192.0.2.7
  Remove it, and its clsact qdisc if nobody else uses it:
    netoken guard --iface eth0 --destroy

Begin with mode = \"observe\": everything is counted as if it were enforced, and
nothing is dropped.";

/// Let only connections with a right token in
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
#[command(group = ArgGroup::new("guard_mode").required(true).args([
    "attach", "load", "check", "show", "diff", "query", "watch", "unblock", "detach", "destroy",
]))]
#[command(group = ArgGroup::new("guard_attaching").multiple(true)
    .conflicts_with_all(["load", "check", "show", "diff", "query", "watch", "unblock", "detach", "destroy"])
    .args(["hook", "force", "sample", "priority", "handle", "option_kind", "exid"]))]
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

    /// Show the rules that run, what each has counted, and how long the lists are
    #[arg(long, conflicts_with = "iface", help_heading = "What to do")]
    show: bool,

    /// Show what loading a file would change
    #[arg(long, value_name = "FILE", conflicts_with = "iface", help_heading = "What to do")]
    diff: Option<PathBuf>,

    /// Show where it is attached, and what it has counted
    #[arg(long, help_heading = "What to do")]
    query: bool,

    /// Print every event until Ctrl-C; with --rules load the file, and again on SIGHUP and whenever it, or a file that
    /// it names, changes
    #[arg(long, conflicts_with = "iface", help_heading = "What to do")]
    watch: bool,

    /// Let in again the automatically blocked sources that are in this prefix or around it
    #[arg(long, value_name = "PREFIX", conflicts_with = "iface", help_heading = "What to do")]
    unblock: Option<Prefix>,

    /// Remove it; rules and counters stay for the next --attach
    #[arg(long, requires = "iface", help_heading = "What to do")]
    detach: bool,

    /// Remove it, the clsact qdisc if we made it and nobody else uses it, and with the last program of the instance
    /// its rules and counters; without --iface on all interfaces of this network namespace
    #[arg(long, help_heading = "What to do")]
    destroy: bool,

    /// File that says what is protected, what is accepted there, and which sources are exempt or blocked [default:
    /// the rules that run]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["show", "diff", "query", "unblock", "detach", "destroy"])]
    rules: Option<PathBuf>,

    /// Where to attach: auto is TC with --priority or --handle, else where it is already, else XDP if the driver runs it and
    /// it is no veth, else TC; xdp is by the driver if it can, else by the kernel behind it; tc is clsact ingress
    #[arg(long, value_enum, default_value_t = HookArg::Auto, hide_possible_values = true, help_heading = "With --attach")]
    hook: HookArg,

    /// At XDP: push out somebody else's program, which does not come back with --detach
    #[arg(long, help_heading = "With --attach")]
    force: bool,

    /// Send one event for every N packets of the same verdict and CPU; counters always count all [default: as it is
    /// attached already, or 1]
    #[arg(long, value_name = "N", help_heading = "With --attach",
          value_parser = clap::value_parser!(u32).range(1..))]
    sample: Option<u32>,

    /// With --hook tc: place among the filters of the interface, 1 to 65535 [default: in front of those there]
    #[arg(long, value_name = "N", help_heading = "With --attach", value_parser = clap::value_parser!(u16).range(1..))]
    priority: Option<u16>,

    /// With --hook tc: handle of the filter within its priority [default: the next free one]
    #[arg(long, value_name = "N", help_heading = "With --attach", value_parser = handle)]
    handle: Option<u32>,

    /// Kind byte of the TCP option, 253 or 254 (RFC 4727) [default: as it is attached already, or 253]
    #[arg(long, value_name = "KIND",
          help_heading = "With --attach", value_parser = clap::value_parser!(u8).range(253..=254))]
    option_kind: Option<u8>,

    /// Experiment identifier of the option (RFC 6994) [default: as it is attached already, or 0x4e54]
    #[arg(long, value_name = "ID", help_heading = "With --attach", value_parser = exid)]
    exid: Option<u16>,

    /// Act on the interfaces of another network namespace: a name from `ip netns`, or a path
    #[arg(long, value_name = "NAME|PATH")]
    netns: Option<String>,

    /// Which set of rules, keys and counters to use [default: default; with --query: all]
    #[arg(long, value_name = "NAME", value_parser = instance)]
    instance: Option<String>,

    /// Print one JSON object a line
    #[arg(long)]
    json: bool,

    /// With --show: print the rules and lists as a file
    #[arg(long, requires = "show", conflicts_with = "json")]
    toml: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum HookArg {
    /// Where it is already, else XDP if the driver runs it and nothing passes it by, else TC
    Auto,
    /// XDP: by the driver if it can, else by the kernel behind it
    Xdp,
    /// TC: clsact ingress
    Tc,
}

/// What a program may do that sees packets first.
const RISK: &str = "before the guard and may let packets pass it by";

/// What puts the guard in front of tcx programs.
const TO_THE_FRONT: &str = "--hook xdp";

/// bpf_redirect_peer() gives a packet to the stack behind the other end of a veth, where its XDP has had its turn.
const PASSED_BY: &str = "bpf_redirect_peer(), which Cilium uses, passes XDP of a veth by";
const SEES_IT: &str = "--hook tc sees it";

/// What `netoken guard --json` prints, by its `type`; what is attached is printed by [`super::found`].
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Record<'a> {
    GuardAttached {
        interface: &'a str,
        hook: &'a str,
        replaced: bool,
        /// Somebody else's XDP program that was there.
        #[serde(skip_serializing_if = "Option::is_none")]
        pushed_out: Option<&'a Foreign>,
        /// Those that its rules name, whose tokens it refuses.
        #[serde(skip_serializing_if = "BTreeSet::is_empty")]
        rings_without_key: &'a BTreeSet<RingName>,
    },
    GuardLoaded {
        instance: &'a str,
        rules: usize,
        #[serde(flatten)]
        lists: Lists,
    },
    GuardCounters {
        instance: &'a str,
        #[serde(flatten)]
        counters: &'a GuardCounters,
        /// With `--watch`: events for which there was no room since it began.
        #[serde(skip_serializing_if = "Option::is_none")]
        lost: Option<u64>,
    },
    GuardRules {
        instance: &'a str,
        /// Counts what was put into use.
        number: u64,
        loaded: String,
        source: &'a str,
        rules: usize,
        /// With `--show`, as all that is said of lists.
        #[serde(flatten)]
        lists: Option<Lists>,
    },
    GuardRule {
        /// Its place, from 1.
        rule: usize,
        name: &'a str,
        /// What it says, in one line.
        says: String,
        /// Key rings whose tokens it refuses because they have no key.
        rings_without_key: Vec<RingName>,
        /// Packets that it decided about, since it has its name.
        seen: u64,
        #[serde(flatten)]
        verdicts: Verdicts<'a>,
    },
    Guarded {
        interface: &'a str,
        #[serde(flatten)]
        seen: &'a Seen,
    },
    GuardRemoved {
        interface: &'a str,
        /// How many programs of ours were removed.
        programs: usize,
        /// Only with `--destroy`: what became of the clsact qdisc.
        #[serde(flatten)]
        qdisc: Option<Qdisc>,
    },
}

impl<'a> Record<'a> {
    /// Of rules that were not read.
    fn outline(instance: &'a str, outline: &'a Outline) -> Record<'a> {
        let Outline { number, loaded, source, rules } = outline;
        Record::GuardRules {
            instance,
            number: *number,
            loaded: loaded.clone(),
            source,
            rules: *rules,
            lists: None,
        }
    }
}

/// How long the lists are.
#[derive(Serialize)]
struct Lists {
    exempt: usize,
    /// Of those, how many have ended.
    exempt_expired: usize,
    blocked: usize,
    blocked_expired: usize,
}

impl Lists {
    fn of(rules: &Rules) -> Lists {
        Lists {
            exempt: rules.exempt.len(),
            exempt_expired: ended(&rules.exempt),
            blocked: rules.blocked.len(),
            blocked_expired: ended(&rules.blocked),
        }
    }
}

/// Packets by verdict, with a field for each.
struct Verdicts<'a>(&'a Row);

impl Verdicts<'_> {
    fn iter(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        VERDICTS.iter().map(|(number, name)| (*name, self.0[*number as usize]))
    }
}

impl Serialize for Verdicts<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

pub(super) fn print_json(record: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(record)?).context("writing to standard output")
}

impl GuardArgs {
    /// The file of the rules, as it is remembered.
    fn source(&self) -> String {
        let file = self.rules.as_deref().unwrap_or(Path::new(""));
        std::path::absolute(file).unwrap_or_else(|_| file.to_path_buf()).display().to_string()
    }

    /// Ends the process if what is said of the place belongs to another hook.
    fn expect_place(&self) {
        let is_chosen = self.priority.is_some() || self.handle.is_some();
        if self.hook == HookArg::Xdp && is_chosen {
            let why = "--priority and --handle are about filters of clsact, and not of XDP";
            Args::command().error(ErrorKind::ArgumentConflict, why).exit();
        }
    }
}

pub(super) fn run(args: GuardArgs) -> Result<()> {
    let files = Files::default();
    let rules = args.rules.as_deref().map(|path| Rules::read(path, &files)).transpose()?;
    rules.iter().for_each(tell_warnings);
    if let (true, Some(rules)) = (args.check, &rules) {
        note!("the rules are right: {}", rules.summary_now());
        return Ok(());
    }
    if let Some(netns) = &args.netns {
        netns::enter(netns)?;
    }
    let scope = Scope {
        ifaces: args.iface.clone(),
        netns: args.netns.clone(),
        is_one_instance: args.instance.is_some(),
        instance: args.instance.clone().unwrap_or("default".to_string()),
        json: args.json,
    };
    if args.attach {
        args.expect_place();
        return attach::attach(&args, &scope, rules.as_ref());
    }
    if let (true, Some(rules)) = (args.load, &rules) {
        return rules::load(&scope, rules, &args.source(), None);
    }
    if args.show {
        return show::show(&scope, args.toml);
    }
    if let Some(file) = &args.diff {
        return show::diff(&scope, file);
    }
    if args.query {
        return query::query(&scope);
    }
    if args.watch {
        return watch::watch(&scope, args.rules.as_deref().zip(rules.as_ref()), files, &args.source());
    }
    if let Some(prefix) = args.unblock {
        return unblock(&scope, prefix);
    }
    remove::remove(&scope, args.destroy)
}

/// As those of a policy are told.
fn tell_warnings(rules: &Rules) {
    rules.warnings().iter().for_each(|warning| note!("warning: {warning}"));
}

fn unblock(scope: &Scope, prefix: Prefix) -> Result<()> {
    let doing = format!("unblocking {prefix} in instance '{}'", scope.instance);
    privileges::check(&doing)?;
    let state = State::find()?.filter(|state| state.instance(&scope.instance).pins.exists());
    let Some(state) = state else { bail!("{doing}: there is no such instance") };
    let instance = state.instance(&scope.instance);
    let maps = GuardMaps::open(&instance.pins).with_context(|| doing.clone())?;
    unblock_prefix(scope.json, &instance, &maps, prefix)
}

/// The loaded programs of an instance.
fn of_instance(state: &State, instance: &str) -> Result<Vec<Loaded>> {
    let programs = loaded_programs(state)?.of_instance(instance);
    let guards = programs.all().filter(|(_, loaded)| loaded.role != Role::Stamp);
    Ok(guards.map(|(_, loaded)| loaded.clone()).collect())
}

fn hook_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Native => "xdp native",
        Mode::Generic => "xdp generic",
    }
}
