//! `netoken guard`: puts the guard on interfaces, gives it its rules, and says what it does.

use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{ArgGroup, ValueEnum};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::args::{Scope, exid, handle, instance};
use super::blocked::{print_alert, print_blocked, unblock_prefix};
use super::table::table;
use crate::clock;
use crate::guard::counters::GuardCounters;
use crate::guard::events::{Reader, Seen};
use crate::guard::program::{GuardMaps, GuardProgram, Kind, Settings};
use crate::guard::rules::Rules;
use crate::hooks::clsact::{
    Attachment, Hooks, Loaded, Place, Qdisc, attached, loaded_programs, remove_unused,
};
use crate::hooks::link::link_header;
use crate::hooks::netlink::{Link, Netlink, Side};
use crate::hooks::xdp::{self, Mode, XdpAttachment, attach_xdp, detach_xdp, undo_xdp};
use crate::keys::file::KeyDir;
use crate::keys::{self, Key};
use crate::netns::Netns;
use crate::policy::values::Prefix;
use crate::privileges;
use crate::program::{DEFAULT_EXID, DEFAULT_KIND, LinkHeader, Program};
use crate::state::{Instance, Lock, State};

const EXAMPLES: &str = "\
Examples:
  netoken guard --check --rules guard.toml                  is the file right? needs no rights
  netoken guard --iface eth0 --attach --rules guard.toml    let only SYNs with a right token in
  netoken guard --load --rules guard.toml                   other rules, in one step, where it is attached
  netoken guard --query                                     where it is attached, and what it has counted
  netoken guard --watch                                     what comes in, as it comes, until Ctrl-C
  netoken guard --unblock 192.0.2.7                         let in again who was blocked automatically
  netoken guard --iface eth0 --destroy                      remove it, and its clsact qdisc if nobody else uses it

Begin with mode = \"observe\": everything is counted as if it were enforced, and nothing is dropped.";

/// Let only connections with a right token in
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
#[command(group = ArgGroup::new("guard_mode").required(true).args([
    "attach", "load", "check", "query", "watch", "unblock", "detach", "destroy",
]))]
#[command(group = ArgGroup::new("guard_attaching").multiple(true)
    .conflicts_with_all(["load", "check", "query", "watch", "unblock", "detach", "destroy"])
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

    /// Let in again the automatically blocked sources that are in this prefix or around it
    #[arg(long, value_name = "PREFIX", conflicts_with = "iface", help_heading = "What to do")]
    unblock: Option<Prefix>,

    /// Remove it; rules and counters stay for the next --attach
    #[arg(long, requires = "iface", help_heading = "What to do")]
    detach: bool,

    /// Remove it, the clsact qdisc if we made it and nobody else uses it, and with the last program of the instance
    /// its rules and counters
    #[arg(long, requires = "iface", help_heading = "What to do")]
    destroy: bool,

    /// File that says what is protected, what is accepted there, and which sources are exempt or blocked [default:
    /// the rules that run]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["query", "watch", "unblock", "detach", "destroy"])]
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

pub(super) fn print_json(record: &impl Serialize) -> Result<()> {
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
        return attach(&args, &scope, rules.as_ref());
    }
    if let (true, Some(rules)) = (args.load, &rules) {
        return load(&scope, rules);
    }
    if args.query {
        return query(&scope);
    }
    if args.watch {
        return watch(&scope);
    }
    if let Some(prefix) = args.unblock {
        return unblock(&scope, prefix);
    }
    remove(&scope, args.destroy)
}

/// The instance's keys, which must suffice for the rules; nothing if it has no key directory.
fn load_keys(doing: &str, instance: &str, rules: Option<&Rules>) -> Result<Option<Vec<Key>>> {
    keys::guard_process()?;
    let dir = KeyDir::of_instance(instance);
    let keys = dir.load()?;
    for ring in rules.map(Rules::rings).unwrap_or_default() {
        if !keys.iter().any(|key| key.ring() == ring && key.is_live()) {
            bail!(
                "{doing}: the rules accept tokens of key ring '{ring}', of which there is no key in {}; copy the key \
                 file of the host that makes them there, or make one with: netoken key new {ring}",
                dir.path().display()
            );
        }
    }
    Ok(dir.exists().then_some(keys))
}

/// Gives an instance its keys, its slots and its rules.
fn set_rules(maps: &GuardMaps, rules: &Rules, keys: Option<&[Key]>) -> Result<()> {
    keys.map_or(Ok(()), |keys| maps.keys.load(keys))?;
    clock::publish(&maps.clock, rules.slots)?;
    maps.set_rules(rules)
}

fn load(scope: &Scope, rules: &Rules) -> Result<()> {
    let doing = format!("loading rules into instance '{}'", scope.instance);
    privileges::check(&doing)?;
    let keys = load_keys(&doing, &scope.instance, Some(rules))?;
    let (state, lock) = State::create()?;
    let loaded = (|| {
        let instance = state.instance(&scope.instance);
        let programs = of_instance(&state, &scope.instance)?;
        if programs.is_empty() {
            bail!(
                "{doing}: its guard is not attached; it gets rules when it is: netoken guard --iface ... --attach"
            );
        }
        // Where it is attached at XDP there is nothing that could be marked.
        if rules.marks() && programs.iter().any(|p| p.role == crate::hooks::clsact::Role::GuardXdp) {
            bail!("{doing}: {NO_MARKS}");
        }
        set_rules(&GuardMaps::open(&instance.pins)?, rules, keys.as_deref())
    })();
    state.remove_if_empty(lock)?;
    loaded?;
    note!("instance '{}' has new rules: {}", scope.instance, rules.summary());
    Ok(())
}

const NO_MARKS: &str = "mode 'mark' needs an skb, which XDP does not have; attach with --hook tc";

fn of_instance(state: &State, instance: &str) -> Result<Vec<Loaded>> {
    use crate::hooks::clsact::Role;
    let of_ours =
        |loaded: &Loaded| loaded.role != Role::Stamp && loaded.instance.as_deref() == Some(instance);
    Ok(loaded_programs(state)?.into_values().filter(of_ours).collect())
}

/// What was done on one interface.
enum Done {
    Tc(Attachment),
    Xdp(Box<GuardProgram>, XdpAttachment),
}

struct Job<'a> {
    args: &'a GuardArgs,
    state: &'a State,
    instance: &'a Instance,
    done: Vec<(Link, Done)>,
}

fn attach(args: &GuardArgs, scope: &Scope, rules: Option<&Rules>) -> Result<()> {
    let doing = format!("attaching the guard to {}", scope.ifaces.join(", "));
    privileges::check(&doing)?;
    if args.hook == HookArg::Xdp && rules.is_some_and(Rules::marks) {
        bail!("{doing}: {NO_MARKS}");
    }
    let links = scope.find(&Netlink::connect()?.links()?)?;
    for link in &links {
        link_header(link)?;
    }
    let keys = load_keys(&doing, &scope.instance, rules)?;

    let (state, lock) = State::create()?;
    let instance = state.instance(&scope.instance);
    let is_new = !instance.pins.exists();
    let mut job = Job { args, state: &state, instance: &instance, done: Vec::new() };
    if let Err(error) = job.attach_all(&lock, &links, rules, keys.as_deref()) {
        job.undo(&lock);
        if is_new {
            remove_unused(&state, &lock, &instance.name).ok();
        }
        state.remove_if_empty(lock).ok();
        return Err(error);
    }
    job.tell(scope)
}

impl Job<'_> {
    fn attach_all(
        &mut self,
        lock: &Lock,
        links: &[Link],
        rules: Option<&Rules>,
        keys: Option<&[Key]>,
    ) -> Result<()> {
        self.instance.create()?;
        // So that every command finds an instance whole, whichever side was attached first.
        Program::make_maps(&self.instance.pins)?;
        let netns_ino = Netns::current()?.inode();
        let mut ready = false;
        for link in links {
            for kind in self.candidates(link, rules)? {
                let settings = Settings {
                    kind,
                    sample: self.args.sample,
                    netns_ino,
                    option_kind: self.args.option_kind,
                    exid: self.args.exid.unwrap_or(DEFAULT_EXID),
                    faults: 0,
                };
                let program = GuardProgram::load(settings, Some(&self.instance.pins))?;
                if !ready {
                    self.prepare(&program.maps, rules, keys)?;
                    ready = true;
                }
                match self.attach_one(lock, link, program, kind) {
                    // The driver cannot, and nobody asked for more than what fits.
                    Err(_) if self.args.hook == HookArg::Auto && kind == Kind::Xdp => continue,
                    attached => attached?,
                }
                break;
            }
        }
        Ok(())
    }

    /// Rules come before the program: it must not see a packet without them.
    fn prepare(&self, maps: &GuardMaps, rules: Option<&Rules>, keys: Option<&[Key]>) -> Result<()> {
        match rules {
            Some(rules) => set_rules(maps, rules, keys),
            None if maps.table()?.is_none() => bail!(
                "attaching the guard: instance '{}' has no rules yet; say which with --rules FILE",
                self.instance.name
            ),
            None => keys.map_or(Ok(()), |keys| maps.keys.load(keys)),
        }
    }

    /// What may be attached to an interface, the best first.
    fn candidates(&self, link: &Link, rules: Option<&Rules>) -> Result<Vec<Kind>> {
        let has_ethernet = link_header(link)? == LinkHeader::Ethernet;
        let tc = if has_ethernet { Kind::Tc } else { Kind::TcLayer3 };
        Ok(match self.args.hook {
            HookArg::Tc => vec![tc],
            HookArg::Xdp if !has_ethernet => bail!(
                "attaching the guard to {}: it has no Ethernet header, which XDP wants to see; use --hook tc",
                link.name
            ),
            HookArg::Xdp => vec![Kind::Xdp],
            HookArg::Auto => {
                let programs = loaded_programs(self.state)?;
                let ours = |loaded: &Loaded| loaded.instance.as_deref() == Some(self.instance.name.as_str());
                let at_tc = attached(&mut Netlink::connect()?, link.index, Side::Ingress, &programs)?
                    .iter()
                    .any(|filter| ours(&filter.loaded));
                let wants_tc = self.args.priority.is_some() || self.args.handle.is_some();
                match has_ethernet && !at_tc && !wants_tc && !rules.is_some_and(Rules::marks) {
                    true => vec![Kind::Xdp, tc],
                    false => vec![tc],
                }
            }
        })
    }

    /// Afterwards exactly one program of this instance is on the interface's way in.
    fn attach_one(&mut self, lock: &Lock, link: &Link, program: GuardProgram, kind: Kind) -> Result<()> {
        let name = &self.instance.name;
        let mut hooks = Hooks::open_side(self.state, Side::Ingress)?;
        if kind == Kind::Xdp {
            let or_generic = self.args.hook == HookArg::Xdp;
            let done = attach_xdp(self.state, lock, link, name, program.as_fd(), or_generic)?;
            self.done.push((link.clone(), Done::Xdp(Box::new(program), done)));
            if hooks.detach(lock, link, name)? > 0 {
                hooks.destroy_clsact(lock, link)?;
            }
        } else {
            let place = Place { priority: self.args.priority, handle: self.args.handle };
            let done = hooks.attach(lock, link, name, program.as_fd(), place)?;
            self.done.push((link.clone(), Done::Tc(done)));
            detach_xdp(self.state, lock, link, name)?;
        }
        Ok(())
    }

    /// Last things first.
    fn undo(&mut self, lock: &Lock) {
        for (link, done) in std::mem::take(&mut self.done).iter().rev() {
            let undone = match done {
                Done::Xdp(program, done) => undo_xdp(lock, link, program.as_fd(), done),
                Done::Tc(done) => Hooks::open_side(self.state, Side::Ingress)
                    .and_then(|mut hooks| hooks.undo(lock, link, &self.instance.name, done)),
            };
            if let Err(error) = undone {
                note!("netoken: {error:#}");
            }
        }
    }

    fn tell(&self, scope: &Scope) -> Result<()> {
        for (link, done) in &self.done {
            let (hook, replaced, why) = match done {
                Done::Tc(done) => ("clsact ingress", done.replaced(), None),
                Done::Xdp(_, done) => (hook_name(done.mode), done.replaced(), done.why_generic.as_deref()),
            };
            if scope.json {
                print_json(&Record::GuardAttached { interface: &link.name, hook, replaced })?;
                continue;
            }
            let how = if replaced { "replaced in place on" } else { "attached to" };
            let why = why.map_or(String::new(), |why| format!(" (natively the driver refused: {why})"));
            note!("guard {how} {}: {hook}{why}", link.name);
        }
        Ok(())
    }
}

fn hook_name(mode: Mode) -> &'static str {
    match mode {
        Mode::Native => "xdp native",
        Mode::Generic => "xdp generic",
    }
}

/// One program of ours on an interface.
struct Hook {
    netns: String,
    interface: String,
    hook: &'static str,
    program: u32,
    loaded: Loaded,
    filters_before: usize,
}

fn find(scope: &Scope, state: &State) -> Result<Vec<Hook>> {
    let places = match scope.ifaces.is_empty() && scope.netns.is_none() {
        true => Netns::all()?,
        false => vec![Netns::current()?],
    };
    let programs = loaded_programs(state)?;
    let named = scope.netns.as_deref().unwrap_or_default();
    let mut found = Vec::new();
    for netns in places {
        let name = if netns.name.is_empty() { named.to_string() } else { netns.name.clone() };
        netns.run(|| {
            let mut netlink = Netlink::connect()?;
            let mut links = netlink.links()?;
            if !scope.ifaces.is_empty() {
                links = scope.find(&links)?;
            }
            for link in links {
                let mut push = |hook, program, loaded, filters_before| {
                    let (netns, interface) = (name.clone(), link.name.clone());
                    found.push(Hook { netns, interface, hook, program, loaded, filters_before });
                };
                if let Some(ours) = xdp::attached_xdp(link.index, &programs)? {
                    push(hook_name(ours.mode), ours.program, ours.loaded, 0);
                }
                for ours in attached(&mut netlink, link.index, Side::Ingress, &programs)? {
                    push("clsact ingress", ours.program, ours.loaded, ours.before);
                }
            }
            Ok(())
        })?;
    }
    Ok(found)
}

fn query(scope: &Scope) -> Result<()> {
    privileges::check("looking for attached programs")?;
    let state = State::find()?;
    let hooks = match &state {
        Some(state) => find(scope, state)?,
        None => scope.find(&Netlink::connect()?.links()?).map(|_| Vec::new())?,
    };
    let (Some(state), false) = (&state, hooks.is_empty()) else {
        if !scope.ifaces.is_empty() {
            bail!(
                "looking for the guard on {0}: it is not there; attach it with: netoken guard {1} --attach --rules FILE",
                scope.ifaces.join(", "),
                scope.flags(&scope.ifaces[0])
            );
        }
        if !scope.json {
            note!("the guard is not attached to any interface");
        }
        return Ok(());
    };
    let boot =
        SystemTime::now() - clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from);
    let since = |hook: &Hook| humantime::format_rfc3339_seconds(boot + hook.loaded.loaded_at).to_string();
    if scope.json {
        for hook in &hooks {
            print_json(&Record::GuardHook {
                netns: &hook.netns,
                interface: &hook.interface,
                hook: hook.hook,
                program: hook.program,
                instance: hook.loaded.instance.as_deref(),
                since: since(hook),
                filters_before: hook.filters_before,
            })?;
        }
    } else {
        let heads = ["NETNS", "INTERFACE", "HOOK", "PROGRAM", "INSTANCE", "SINCE (UTC)"];
        let rows: Vec<_> = hooks
            .iter()
            .map(|hook| {
                [
                    if hook.netns.is_empty() { "-".to_string() } else { hook.netns.clone() },
                    hook.interface.clone(),
                    hook.hook.to_string(),
                    hook.program.to_string(),
                    hook.loaded.instance.clone().unwrap_or("(pins lost)".to_string()),
                    since(hook),
                ]
            })
            .collect();
        let mut out = io::stdout().lock();
        table(&mut out, heads, &rows).context("writing to standard output")?;
        for hook in hooks.iter().filter(|hook| hook.filters_before > 0) {
            writeln!(
                out,
                "{}: {} other filters run before the guard and may let packets pass it by",
                hook.interface, hook.filters_before
            )?;
        }
        writeln!(out)?;
    }
    let mut instances: Vec<&str> = hooks.iter().filter_map(|hook| hook.loaded.instance.as_deref()).collect();
    instances.sort_unstable();
    instances.dedup();
    for instance in instances {
        let maps = GuardMaps::open(&state.instance(instance).pins)?;
        print_counters(scope, instance, &GuardCounters::read(&maps)?, None)?;
        print_blocked(scope.json, instance, &maps)?;
    }
    Ok(())
}

fn print_counters(scope: &Scope, instance: &str, counters: &GuardCounters, lost: Option<u64>) -> Result<()> {
    if scope.json {
        return print_json(&Record::GuardCounters { instance, counters, lost });
    }
    let mut out = io::stdout().lock();
    let lost = lost.filter(|lost| *lost > 0).map_or(String::new(), |lost| format!("; {lost} events lost"));
    writeln!(out, "instance '{instance}': {}{lost}", counters.line()).context("writing to standard output")
}

/// Longest time between two looks at the counters.
const PERIOD: Duration = Duration::from_secs(1);
const POLL: Duration = Duration::from_millis(200);

fn watch(scope: &Scope) -> Result<()> {
    let doing = format!("watching the guard of instance '{}'", scope.instance);
    privileges::check(&doing)?;
    let Some(state) = State::find()? else { bail!("{doing}: it is not attached anywhere") };
    let instance = state.instance(&scope.instance);
    if of_instance(&state, &scope.instance)?.is_empty() {
        bail!("{doing}: it is not attached anywhere");
    }
    let maps = GuardMaps::open(&instance.pins)?;
    // Another one than that of the stamp, whose events have a reader of their own.
    let reading = Instance {
        name: format!("{}.guard", instance.name),
        pins: instance.pins.clone(),
        policy_dir: instance.policy_dir.clone(),
    };
    let _reading = state.lock_reader(&reading)?;
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    ctrlc::set_handler(move || flag.store(true, Ordering::Relaxed)).context("preparing for Ctrl-C")?;
    let mut reader = Reader::open(&maps)?;
    if !scope.json {
        note!("watching; Ctrl-C ends it, and the guard stays attached");
    }
    let mut counted = GuardCounters::read(&maps)?;
    let mut last = Instant::now();
    loop {
        let ends = stop.load(Ordering::Relaxed);
        for seen in reader.read(if ends { Duration::ZERO } else { POLL })? {
            print_seen(scope, &seen)?;
        }
        for alert in reader.alerts() {
            print_alert(scope.json, &instance.name, &alert)?;
        }
        if ends || last.elapsed() >= PERIOD {
            last = Instant::now();
            let now = GuardCounters::read(&maps)?;
            if now != counted {
                print_counters(scope, &instance.name, &now, Some(reader.lost(&now)?))?;
                counted = now;
            }
        }
        if ends {
            return Ok(());
        }
    }
}

fn unblock(scope: &Scope, prefix: Prefix) -> Result<()> {
    let doing = format!("unblocking {prefix} in instance '{}'", scope.instance);
    privileges::check(&doing)?;
    let state = State::find()?.filter(|state| state.instance(&scope.instance).pins.exists());
    let Some(state) = state else { bail!("{doing}: there is no such instance") };
    let maps = GuardMaps::open(&state.instance(&scope.instance).pins).with_context(|| doing.clone())?;
    unblock_prefix(scope.json, &scope.instance, &maps, prefix)
}

fn print_seen(scope: &Scope, seen: &Seen) -> Result<()> {
    if scope.json {
        return print_json(&Record::Guarded { seen });
    }
    let time = humantime::format_rfc3339_micros(seen.time).to_string();
    let end = |addr: Option<std::net::SocketAddr>| addr.map_or("?".to_string(), |addr| addr.to_string());
    let verdict = format!("{}{}", seen.verdict, if seen.dropped { "!" } else { "" });
    let rule = if seen.rule == 0 {
        "-".to_string()
    } else {
        format!("{} ({})", seen.rule, seen.mode.unwrap_or("-"))
    };
    let token = seen.token.map_or("-".to_string(), |token| token.to_string());
    let mut out = io::stdout().lock();
    writeln!(
        out,
        "{}  {verdict:<16}  {:<21}  {:<21}  {:08x}  {rule:<11}  {token}",
        &time[11..26],
        end(seen.src),
        end(seen.dst),
        seen.isn
    )
    .context("writing to standard output")
}

fn remove(scope: &Scope, destroy: bool) -> Result<()> {
    privileges::check(&format!("detaching the guard from {}", scope.ifaces.join(", ")))?;
    let links = scope.find(&Netlink::connect()?.links()?)?;
    let (state, lock) = State::create()?;
    let mut hooks = Hooks::open_side(&state, Side::Ingress)?;
    let mut done = Vec::new();
    for link in &links {
        let programs = hooks.detach(&lock, link, &scope.instance)?
            + usize::from(detach_xdp(&state, &lock, link, &scope.instance)?);
        let qdisc = if destroy { Some(hooks.destroy_clsact(&lock, link)?) } else { None };
        done.push((link, programs, qdisc));
    }
    let in_use = destroy && !remove_unused(&state, &lock, &scope.instance)?;
    drop(hooks);
    state.remove_if_empty(lock)?;

    for (link, programs, qdisc) in done {
        let qdisc = qdisc.and_then(|qdisc| match qdisc {
            Qdisc::Absent => None,
            Qdisc::Removed => Some("clsact qdisc removed: we made it and nobody else uses it"),
            Qdisc::Foreign => Some("clsact qdisc kept: somebody else made it"),
            Qdisc::InUse(_) => Some("clsact qdisc kept: other filters are on it"),
            Qdisc::HasChains => Some("clsact qdisc kept: somebody else's chain is on it"),
        });
        if scope.json {
            print_json(&Record::GuardRemoved { interface: &link.name, programs, qdisc })?;
            continue;
        }
        let what = if programs > 0 { "guard removed" } else { "the guard was not attached" };
        note!("{}: {what}{}", link.name, qdisc.map_or(String::new(), |qdisc| format!(", {qdisc}")));
    }
    if in_use {
        note!("instance '{}' is still used elsewhere: its rules, keys and counters stay", scope.instance);
    }
    Ok(())
}
