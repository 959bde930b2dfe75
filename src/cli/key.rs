//! `netoken key`: makes, lists and rotates what keyed tokens are made with.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use serde::Serialize;

use super::args::instance;
use super::table::table;
use crate::guard;
use crate::guard::program::GuardMaps;
use crate::keys::file::{DEFAULT_DIR, DIR_VARIABLE, KeyDir, KeyLock};
use crate::keys::live::{LiveKeys, Losses, Use};
use crate::keys::rotate::{Known, Step, date, free_id, next_step, retire, sign};
use crate::keys::{self, Key, RingName, Secret, State, signer};
use crate::policy;
use crate::program::Maps;
use crate::rings;
use crate::state::{Instance, Lock, State as RunState, instance_flag};

const EXAMPLES: &str = "\
Examples:
  Make the first key of ring 'edge', which signs:
    netoken key new edge
  See what there is, and what has been done with it; never a secret:
    netoken key list
  A rotation: make the next key; copy its file to every host, load it there;
  let it sign; give up the one before, once it is idle, and copy its file, too:
    netoken key rotate edge
    netoken key load
    netoken key rotate edge
    netoken key rotate edge

A policy uses it: token = { tag = 17, key = \"edge\", bind = \"server\" }
Keys are files in /etc/netoken/keys/INSTANCE; NETOKEN_KEYS names another
/etc/netoken/keys.";

/// Make, list and rotate the keys of keyed tokens
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub(super) struct KeyArgs {
    #[command(subcommand)]
    command: KeyCommand,

    /// Which instance the keys are for
    #[arg(long, value_name = "NAME", default_value = "default", value_parser = instance, global = true)]
    instance: String,

    /// Print one JSON object a line
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum KeyCommand {
    /// Make a key from the kernel's random source; the first one of a ring signs
    #[command(after_help = "Example:\n  netoken key new edge")]
    New {
        /// Name of the ring, as policies use it
        ring: RingName,
        /// Id of the key, 0 to 15 [default: one that is free]
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..16))]
        id: Option<u8>,
        /// Do not let it sign, even if it is the first one
        #[arg(long)]
        verify_only: bool,
    },
    /// Show keys, their state, and what has been done with them on this host
    #[command(after_help = "Example:\n  netoken key list")]
    List,
    /// Do the next step of a rotation: add a key, let it sign, retire the one before
    #[command(
        after_help = "Example, for the second step and no other:\n  netoken key rotate edge --step sign"
    )]
    Rotate {
        /// Name of the ring
        ring: RingName,
        /// Do this step: add makes a key that only verifies, at any time; sign lets the newest key sign and retire gives up
        /// those that are older, and each fails unless it is due
        #[arg(long, hide_possible_values = true)]
        step: Option<Step>,
        /// Retire a key although it is still seen
        #[arg(long)]
        force: bool,
        /// For how many seconds a key must not have been seen before it is retired
        #[arg(long, value_name = "SECONDS", default_value_t = 60)]
        idle: u64,
    },
    /// Give the running instance the keys that the files hold
    #[command(after_help = "Example:\n  netoken key load")]
    Load,
}

impl KeyArgs {
    /// What leads another command to the same keys.
    fn flag(&self) -> String {
        instance_flag(&self.instance)
    }
}

/// One key, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "key")]
struct KeyRecord {
    ring: RingName,
    id: u8,
    state: State,
    /// RFC 3339 in UTC.
    created: String,
    age_s: u64,
    /// Null if the instance does not run.
    made: Option<u64>,
    accepted: Option<u64>,
    last_used: Option<String>,
    /// Whether the running instance goes by what its file says.
    loaded: Option<bool>,
}

/// What a command has done, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "key_changed")]
struct Changed<'a> {
    ring: RingName,
    /// `add`, `sign` or `retire`.
    step: String,
    ids: &'a [u8],
    /// The running instance has been told.
    loaded: bool,
}

/// What the running instance was given, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "keys_loaded")]
struct KeysLoaded<'a> {
    ids: &'a [u8],
}

pub(super) fn run(args: KeyArgs) -> Result<()> {
    keys::guard_process()?;
    let dir = KeyDir::of_instance(&args.instance);
    match args.command {
        KeyCommand::New { ring, id, verify_only } => new(&args, &dir, ring, id, verify_only),
        KeyCommand::List => list(&args, &dir),
        KeyCommand::Rotate { ring, step, force, idle } => {
            rotate(&args, &dir, ring, step, force, Duration::from_secs(idle))
        }
        KeyCommand::Load => load(&args, &dir),
    }
}

/// An instance that runs, kept as it is.
struct Running {
    /// By which the paths of the instance are valid.
    _state: RunState,
    /// Before that of the keys, as in every command that needs both.
    _lock: Lock,
    instance: Instance,
    maps: Maps,
}

impl Running {
    fn find(name: &str) -> Result<Option<Running>> {
        let Some((state, lock)) = RunState::with_instance(name)? else { return Ok(None) };
        let instance = state.instance(name);
        let maps = instance.maps()?;
        Ok(Some(Running { _state: state, _lock: lock, instance, maps }))
    }

    fn load(&self, keys: &[Key]) -> Result<()> {
        rings::load(&self.instance, &self.maps.keys, keys, [])
    }
}

/// The maps of the instance, if it runs, for who changes nothing.
fn live(instance: &str) -> Result<Option<LiveKeys>> {
    let Some(state) = RunState::find()? else { return Ok(None) };
    let instance = state.instance(instance);
    if !instance.exists() {
        return Ok(None);
    }
    Ok(Some(instance.maps()?.keys))
}

/// `running` was opened before anything was written: a step that fails behind that looks as if it had not been done, and who
/// repeats it does the next one.
fn tell_kernel(args: &KeyArgs, running: Option<&Running>, keys: &[Key]) -> Result<bool> {
    let Some(running) = running else { return Ok(false) };
    running.load(keys).with_context(|| {
        format!(
            "the files are written, and the kernel does not know of it; do not repeat that, but run: netoken key load{}",
            args.flag()
        )
    })?;
    Ok(true)
}

fn new(args: &KeyArgs, dir: &KeyDir, ring: RingName, id: Option<u8>, verify_only: bool) -> Result<()> {
    let running = Running::find(&args.instance)?;
    let lock = dir.lock()?;
    let mut keys = dir.load()?;
    let first = !keys.iter().any(|key| key.ring() == ring && key.is_live());
    let id = add(args, dir, &lock, &mut keys, ring, id)?;
    let signs = first && !verify_only;
    if signs {
        sign(&mut keys, ring)?;
        save(dir, &lock, &keys, &[id])?;
    }
    let loaded = tell_kernel(args, running.as_ref(), &keys)?;
    tell(args, ring, Step::Add, &[id], loaded, |out| {
        let path = dir.file_of(ring, id);
        let use_of = if signs { "signing" } else { "verify-only" };
        writeln!(out, "made key {id} of ring '{ring}' ({use_of}): {}", path.display())?;
        writeln!(
            out,
            "copy that file to every host that checks its tokens, and run there: netoken key load{}",
            args.flag()
        )
    })
}

/// Makes a key that only verifies, and writes it.
fn add(
    args: &KeyArgs,
    dir: &KeyDir,
    lock: &KeyLock,
    keys: &mut Vec<Key>,
    ring: RingName,
    id: Option<u8>,
) -> Result<u8> {
    let id = match id {
        Some(id) => id,
        None => free_id(keys, &args.instance)?,
    };
    if let Some(at) = keys.iter().position(|key| key.id() == id) {
        let old = &keys[at];
        if old.is_live() {
            bail!(
                "making key {id} of ring '{ring}': ring '{}' has a key with that id, and a token names its key by it \
                 alone; leave --id away to get a free one",
                old.ring()
            );
        }
        dir.remove(old, lock)?;
        keys.remove(at);
    }
    let key = Key::new(ring, id, Secret::random()?, date(keys, ring, SystemTime::now()))?;
    dir.save(&key, lock)?;
    keys.push(key);
    Ok(id)
}

fn save(dir: &KeyDir, lock: &KeyLock, keys: &[Key], ids: &[u8]) -> Result<()> {
    keys.iter().filter(|key| ids.contains(&key.id())).try_for_each(|key| dir.save(key, lock))
}

fn rotate(
    args: &KeyArgs,
    dir: &KeyDir,
    ring: RingName,
    wanted: Option<Step>,
    force: bool,
    idle: Duration,
) -> Result<()> {
    let flag = args.flag();
    let running = Running::find(&args.instance)?;
    let lock = dir.lock()?;
    let mut keys = dir.load()?;
    if !keys.iter().any(|key| key.ring() == ring && key.is_live()) {
        bail!("rotating the keys of ring '{ring}': it has none; make one with: netoken key new {ring}{flag}");
    }
    let due = next_step(&keys, ring);
    let step = wanted.unwrap_or(due);
    if step != due && step != Step::Add {
        bail!(
            "rotating the keys of ring '{ring}': step '{step}' is not due; what comes next is: netoken key rotate \
             {ring} --step {due}{flag}"
        );
    }
    let ids = match step {
        Step::Add => vec![add(args, dir, &lock, &mut keys, ring, None)?],
        Step::Sign => {
            let (next, before) = sign(&mut keys, ring)?;
            // The one that stops last: after a crash in between both sign by their files, of which the newest counts.
            for id in [next].into_iter().chain(before) {
                save(dir, &lock, &keys, &[id])?;
            }
            vec![next]
        }
        Step::Retire => {
            let use_of =
                |id| running.as_ref().map_or(Ok(Use::default()), |running| running.maps.keys.use_of(id));
            let known = known(dir, running.as_ref(), signer(&keys, ring))?;
            let ids = retire(&mut keys, ring, use_of, &known, SystemTime::now(), idle, force)?;
            save(dir, &lock, &keys, &ids)?;
            ids
        }
    };
    let loaded = tell_kernel(args, running.as_ref(), &keys)?;
    let said: Vec<String> =
        ids.iter().map(|id| done(args, ring, step, *id, &dir.file_of(ring, *id))).collect();
    tell(args, ring, step, &ids, loaded, |out| writeln!(out, "{}", said.join("\n")))
}

/// What a step of a rotation did with a key, and what comes next.
fn done(args: &KeyArgs, ring: RingName, step: Step, id: u8, file: &Path) -> String {
    let (flag, file) = (args.flag(), file.display());
    match step {
        Step::Add => format!(
            "made key {id} of ring '{ring}' (verify-only): {file}\n\
             copy that file to every host that checks its tokens, run there: netoken key load{flag}; \
             and then here: netoken key rotate {ring}{flag}"
        ),
        Step::Sign => format!(
            "key {id} of ring '{ring}' signs; on other hosts that stamp with this ring as well, it does once its \
             file is copied there as it is now: {file}\n\
             when the one before is idle everywhere, retire it: netoken key rotate {ring}{flag}"
        ),
        Step::Retire => format!(
            "retired key {id} of ring '{ring}'; its secret is gone here\n\
             other hosts accept it until they have its file as it is now: copy {file} to each, \
             and run there: netoken key load{flag}"
        ),
    }
}

/// From when on it is known on this host what is done with keys: since the instance counts; if it does not run, since
/// tokens are made with another key.
fn known(dir: &KeyDir, running: Option<&Running>, signing: Option<&Key>) -> Result<Known> {
    if let Some(Running { instance, .. }) = running {
        let why = format!("instance '{}' counts since then", instance.name);
        return Ok(Known { since: instance.counts_keys_since()?, why });
    }
    let Some(signing) = signing else {
        return Ok(Known { since: SystemTime::UNIX_EPOCH, why: "no key signs".to_string() });
    };
    // A key's file is written when it begins to sign.
    let path = dir.file_of(signing.ring(), signing.id());
    let since = fs::metadata(&path).and_then(|file| file.modified());
    Ok(Known {
        since: since.with_context(|| format!("looking at the key {}", path.display()))?,
        why: format!("key {} signs since then", signing.id()),
    })
}

fn load(args: &KeyArgs, dir: &KeyDir) -> Result<()> {
    let doing = format!("loading the keys in {}", dir.path().display());
    // Who may not read them is told that first; what counts is read under both locks.
    dir.load()?;
    let Some(running) = Running::find(&args.instance)? else {
        bail!("{doing}: instance '{}' does not run; it gets them when it is attached", args.instance);
    };
    // From a directory that is not there, an instance would lose all that it has.
    let Some(keys) = dir.hold()? else {
        bail!("{doing}: there is no such directory; {DIR_VARIABLE} names another place than {DEFAULT_DIR}");
    };
    let losses = running.maps.keys.losses(&keys)?;
    running.load(&keys)?;
    let ids: Vec<u8> = keys.iter().filter(|key| key.is_live()).map(Key::id).collect();
    match args.json {
        true => print_json(&KeysLoaded { ids: &ids })?,
        false => {
            let keys = if ids.len() == 1 { "key" } else { "keys" };
            note!("instance '{}' has {} {keys}", args.instance, ids.len());
        }
    }
    tell_losses(&running.instance, &running.maps, &losses);
    Ok(())
}

/// What was taken away from the policy or the rules in use, which are only read if something was. What is not remembered any
/// more is not known.
fn tell_losses(instance: &Instance, maps: &Maps, losses: &Losses) {
    if !losses.signing.is_empty()
        && let Ok(running) = policy::running::read(instance, maps)
    {
        for ring in running.policy.rings().intersection(&losses.signing) {
            note!(
                "no key of ring '{ring}' signs any more: rules in use that name it leave their SYNs as they are"
            );
        }
    }
    if !losses.all.is_empty()
        && instance.has_guard()
        && let Ok(maps) = GuardMaps::open(&instance.pins)
        && let Ok(running) = guard::running::read(instance, &maps)
    {
        for ring in running.rules.rings().intersection(&losses.all) {
            note!(
                "ring '{ring}' has no key any more: the guard's rules in use that name it refuse all its tokens"
            );
        }
    }
}

fn tell(
    args: &KeyArgs,
    ring: RingName,
    step: Step,
    ids: &[u8],
    loaded: bool,
    text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<()> {
    if args.json {
        return print_json(&Changed { ring, step: step.to_string(), ids, loaded });
    }
    text(&mut io::stderr().lock()).ok();
    if !loaded {
        note!("instance '{}' does not run; it gets its keys when it is attached", args.instance);
    }
    Ok(())
}

fn print_json(record: &impl Serialize) -> Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(record)?).context("writing to standard output")
}

fn list(args: &KeyArgs, dir: &KeyDir) -> Result<()> {
    let keys = dir.load()?;
    // What cannot be known of the instance hides nothing of the files.
    let (live, unknown) = match live(&args.instance) {
        Ok(live) => (live, Ok(())),
        Err(error) => (None, Err(error.context("looking for what has been done with the keys"))),
    };
    let compared = live.as_ref().map(|live| live.compare(&keys)).transpose()?;
    let now = SystemTime::now();
    let records = keys
        .iter()
        .map(|key| {
            let used = live.as_ref().map(|live| live.use_of(key.id())).transpose()?;
            Ok(KeyRecord {
                ring: key.ring(),
                id: key.id(),
                state: key.state(),
                created: humantime::format_rfc3339_seconds(key.created()).to_string(),
                age_s: now.duration_since(key.created()).unwrap_or_default().as_secs(),
                made: used.map(|used| used.made),
                accepted: used.map(|used| used.accepted),
                last_used: used
                    .and_then(|used| used.last())
                    .map(|last| humantime::format_rfc3339_seconds(last).to_string()),
                loaded: compared.as_ref().map(|(same, _)| same.contains(&key.id())),
            })
        })
        .collect::<Result<Vec<_>>>()?;
    let tell_outdated =
        || compared.iter().for_each(|(same, beside)| tell_outdated(args, &keys, same, beside));
    if args.json {
        records.iter().try_for_each(print_json)?;
        tell_outdated();
        return unknown;
    }
    if records.is_empty() {
        tell_outdated();
        note!(
            "there are no keys in {}; make one with: netoken key new RING{}",
            dir.path().display(),
            args.flag()
        );
        return unknown;
    }
    let number = |value: Option<u64>| value.map_or("-".to_string(), |value| value.to_string());
    let rows: Vec<_> = records
        .iter()
        .map(|key| {
            [
                key.ring.to_string(),
                key.id.to_string(),
                key.state.name().to_string(),
                humantime::format_duration(Duration::from_secs(rough(key.age_s))).to_string(),
                number(key.made),
                number(key.accepted),
                key.last_used.clone().unwrap_or("-".to_string()),
            ]
        })
        .collect();
    let mut out = io::stdout().lock();
    table(&mut out, ["RING", "ID", "STATE", "AGE", "MADE", "ACCEPTED", "LAST USED (UTC)"], &rows)
        .context("writing to standard output")?;
    tell_outdated();
    let mut rings: Vec<RingName> = keys.iter().map(Key::ring).collect();
    rings.sort_unstable();
    rings.dedup();
    for ring in rings.into_iter().filter(|ring| signer(&keys, *ring).is_none()) {
        note!("no key of ring '{ring}' signs: rules that name it leave their SYNs as they are");
    }
    unknown
}

/// In what the running instance is not as the files say.
fn tell_outdated(args: &KeyArgs, keys: &[Key], same: &BTreeSet<u8>, beside: &BTreeSet<u8>) {
    let remedy = format!("until: netoken key load{}", args.flag());
    for key in keys.iter().filter(|key| !same.contains(&key.id())) {
        note!(
            "the running instance does not know the file of key {} of ring '{}' {remedy}",
            key.id(),
            key.ring()
        );
    }
    for id in beside {
        note!(
            "the running instance accepts tokens of key {id}, of which there is no file any more, {remedy}"
        );
    }
}

/// Nobody wants to know the age of a month in seconds.
fn rough(seconds: u64) -> u64 {
    match seconds {
        0..600 => seconds,
        600..86_400 => seconds / 60 * 60,
        _ => seconds / 3600 * 3600,
    }
}
