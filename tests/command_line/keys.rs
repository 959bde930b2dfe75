//! `netoken key`: what it makes, shows and refuses; and that nobody sees a secret.

use std::fs;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use anyhow::{Context, Result, bail, ensure};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use netoken::keys::file::KeyDir;
use serde_json::Value;

use crate::lab::{Lab, OBSERVE, Running, expect_count, wait_until};
use crate::said::{Said, said};
use crate::support::{ensure_eq, sh};
use crate::world::World;

const KEYED: &str =
    "default = { action = \"stamp\", token = { tag = 17, key = \"edge\", bind = \"server\" } }\n";

pub fn run(lab: &Lab, args: &str) -> Result<Said> {
    said(&mut lab.netoken(args))
}

/// `key list`, one object for each key.
pub fn list(lab: &Lab) -> Result<Vec<Value>> {
    let text = run(lab, "key list --json")?.code(0)?.out;
    text.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}

pub fn states(lab: &Lab) -> Result<Vec<(u64, String)>> {
    let of =
        |key: &Value| Ok((key["id"].as_u64().context("id")?, key["state"].as_str().context("state")?.into()));
    list(lab)?.iter().map(of).collect()
}

/// The secret in a key file, as it is written there.
pub fn secret(lab: &Lab, name: &str) -> Result<String> {
    let text = fs::read_to_string(lab.keys().join("default").join(name))?;
    let line = text.lines().find_map(|line| line.strip_prefix("secret = \"")).context("no secret")?;
    Ok(line.trim_end_matches('"').to_string())
}

pub fn write_policy(lab: &Lab) -> Result<String> {
    fs::create_dir_all(lab.keys())?;
    let path = lab.keys().join("policy.toml");
    fs::write(&path, KEYED)?;
    Ok(path.display().to_string())
}

/// Files that were changed by hand, or copied there, are not what runs.
pub fn what_the_kernel_does_not_know_of_the_files_is_told() -> Result<()> {
    let world = World::new()?;
    let lab = &world.lab;
    let dir = lab.keys().join("default");
    for _ in 0..2 {
        lab.ok("key new edge")?;
    }
    world.ok("-i c0 --attach --quiet")?;
    let loaded =
        || -> Result<Vec<Value>> { Ok(list(lab)?.iter().map(|key| key["loaded"].clone()).collect()) };
    ensure_eq!(loaded()?, [true, true], "loaded by the attach");
    let tells = |what: &[&str]| -> Result<()> {
        let said = run(lab, "key list")?.code(0)?;
        ensure!(what.iter().all(|part| said.err.contains(part)), "{what:?} is not in {said:#?}");
        Ok(())
    };
    let hint = ["key 1 of ring 'edge'", "netoken key load"];
    let path = dir.join("edge-1.key");
    let text = fs::read_to_string(&path)?;
    for change in [
        text.replace("verify-only", "signing"),
        text.replace(&secret(lab, "edge-1.key")?, "000102030405060708090a0b0c0d0e0f"),
        text.lines()
            .filter(|line| !line.starts_with("secret"))
            .collect::<Vec<_>>()
            .join("\n")
            .replace("verify-only", "retired"),
    ] {
        ensure!(change != text, "nothing is changed");
        fs::write(&path, &change)?;
        ensure_eq!(loaded()?[1], false, "{change}");
        tells(&hint)?;
        lab.ok("key load")?;
        ensure_eq!(loaded()?, [true, true], "{change}");
        fs::write(&path, &text)?;
        lab.ok("key load")?;
    }
    fs::remove_file(&path)?;
    ensure_eq!(loaded()?, [true], "the other one");
    tells(&["accepts tokens of key 1", "no file", "netoken key load"])?;
    lab.ok("key load")?;
    ensure!(run(lab, "key list")?.code(0)?.err.is_empty(), "told although it is as the files say");
    world.ok("-i c0 --destroy")?;
    ensure_eq!(loaded()?, [Value::Null], "nothing runs");
    Ok(())
}

/// Or the step would be done, look as if it had failed, and be followed by the next when it is repeated.
pub fn nothing_is_written_for_an_instance_that_cannot_be_told() -> Result<()> {
    let world = World::new()?;
    let lab = &world.lab;
    run(lab, "key new edge")?.code(0)?;
    world.ok("-i c0 --attach --quiet")?;
    fs::remove_file(lab.run.join("bpf/default/policies"))?;
    let files = || sh(&format!("cd {}/default && sha256sum *", lab.keys().display()));
    let before = files()?;
    for step in ["key rotate edge", "key new edge", "key new other"] {
        run(lab, step)?.code(1)?.err(&["instance 'default'", "policies"]).context(step)?;
        ensure_eq!(files()?, before, "the files after {step}");
    }
    // Nor is anything hidden.
    let shown = run(lab, "key list")?.code(1)?;
    ensure!(shown.out.contains("signing") && shown.err.contains("policies"), "{shown:#?}");
    world.ok("-i c0 --attach --quiet")?;
    run(lab, "key rotate edge")?.code(0)?.err(&["key 1 of ring 'edge' (verify-only)"]).map(drop)
}

/// What a hint says to type acts on the same instance.
pub fn hints_name_the_instance() -> Result<()> {
    let lab = Lab::new()?;
    run(&lab, "key list --instance bb")?.code(0)?.err(&["netoken key new RING --instance bb"])?;
    run(&lab, "key rotate edge --instance bb")?.code(1)?.err(&["netoken key new edge --instance bb"])?;
    run(&lab, "key new edge --instance bb")?.code(0)?.err(&["netoken key load --instance bb"])?;
    run(&lab, "key rotate edge --instance bb --step sign")?
        .code(1)?
        .err(&["netoken key rotate edge --step add --instance bb"])?;
    run(&lab, "key rotate edge --instance bb")?
        .code(0)?
        .err(&["netoken key load --instance bb; ", "netoken key rotate edge --instance bb\n"])?;
    run(&lab, "key rotate edge --instance bb")?.code(0)?.err(&["netoken key rotate edge --instance bb\n"])?;
    (0..14).try_for_each(|_| run(&lab, "key new edge --instance bb")?.code(0).map(drop))?;
    run(&lab, "key new edge --instance bb")?.code(1)?.err(&["--step retire --instance bb"])?;
    // The default needs no flag.
    ensure!(!run(&lab, "key new edge")?.code(0)?.err.contains("--instance"), "a flag that says nothing");

    let file = lab.keys().join("uses-a-ring.toml");
    fs::write(&file, KEYED)?;
    let args = format!("-i lo --attach --quiet --instance zz --policy {}", file.display());
    run(&lab, &args)?.code(1)?.err(&["netoken key new edge --instance zz"])?;
    fs::write(&file, "[[rule]]\nname = 'all'\ndst = '192.0.2.0/24'\nmode = 'observe'\nkeys = ['edge']\n")?;
    let args = format!("guard -i lo --attach --instance zz --rules {}", file.display());
    run(&lab, &args)?.code(1)?.err(&["netoken key new edge --instance zz"])?;
    let hint = "netoken guard --iface NAME --instance nope --attach";
    run(&lab, "guard --show --instance nope")?.code(1)?.err(&[hint])?;
    let text = fs::read_to_string(&file)?;
    fs::write(&file, text.replace("keys = ['edge']", "tokens = '4e45544f4b454e31'"))?;
    let args = format!("guard --load --instance nope --rules {}", file.display());
    run(&lab, &args)?.code(1)?.err(&[hint])?;
    Ok(())
}

pub fn a_file_that_others_can_read_is_refused() -> Result<()> {
    let lab = Lab::new()?;
    run(&lab, "key new edge")?.code(0)?;
    let path = lab.keys().join("default/edge-0.key");
    ensure_eq!(fs::metadata(&path)?.mode() & 0o7777, 0o600, "mode of a new key");
    ensure_eq!(fs::metadata(lab.keys().join("default"))?.mode() & 0o7777, 0o700, "mode of the directory");
    let secret = secret(&lab, "edge-0.key")?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640))?;
    for args in ["key list", "key list --json", "key rotate edge", "key new edge", "-i lo --attach --quiet"] {
        let said = run(&lab, args)?.code(1)?.err(&["edge-0.key", "0640", "chmod 600"])?;
        ensure!(!said.err.contains(&secret), "{said:#?}");
    }
    ensure!(sh("tc filter show dev lo egress")?.is_empty(), "attached in spite of it");
    Ok(())
}

/// Fails unless so many tokens were made with the key that is listed at this place.
pub fn expect_made(world: &World, at: usize, wanted: u64) -> Result<()> {
    let made = list(&world.lab)?[at]["made"].as_u64().context("no number of tokens")?;
    expect_count(&world.ns, made, wanted, &format!("tokens made with key {at}"))
}

pub fn a_policy_without_a_signing_key_is_refused() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    let why = world.fails(&format!("-i c0 --attach --quiet --policy {policy}"))?;
    ensure!(why.contains("key ring 'edge'") && why.contains("netoken key new edge"), "{why}");
    world.lab.ok("key new edge --verify-only")?;
    world.fails(&format!("-i c0 --attach --quiet --policy {policy}"))?;
    world.lab.ok("key rotate edge")?;
    world.ok(&format!("-i c0 --attach --quiet --policy {policy}"))?;
    world.syns(2)?;
    world.expect_counter("default", "stamped", 2, "SYNs stamped")?;
    expect_made(&world, 0, 2)?;
    Ok(())
}

/// The kernel has room for 16 rings at a time, and not for 16 names for ever.
pub fn a_ring_that_nothing_needs_makes_room_for_another() -> Result<()> {
    let world = World::new()?;
    let dir = world.lab.keys().join("default");
    let policy = |ring: &str| {
        world.lab.file(
            "policy.toml",
            format!(
                "default = {{ action = 'stamp', token = {{ tag = 1, key = '{ring}', bind = 'flow' }} }}\n"
            ),
        )
    };
    // The guard's rules go on to name the first, of which the key is away for a while.
    let rules = "[[rule]]\nname = 'a'\ndst = '::/0'\nmode = 'observe'\nkeys = 'ring0'\n";
    let rules = world.lab.file("guard.toml", rules)?;
    world.lab.ok("key new ring0")?;
    world.ok(&format!("-i c0 --attach --quiet --policy {}", policy("ring0")?.display()))?;
    world.lab.ok(&format!(
        "guard --netns {} -i c0 --attach --hook tc --rules {}",
        world.ns,
        rules.display()
    ))?;
    for number in 1..40 {
        let (ring, before) = (format!("ring{number}"), format!("ring{}", number - 1));
        run(&world.lab, &format!("key new {ring} --id {}", number % 8))?.code(0)?;
        world.lab.ok(&format!("policy load {}", policy(&ring)?.display()))?;
        world.syns(1)?;
        let id = if number == 1 { 0 } else { (number - 1) % 8 };
        fs::rename(dir.join(format!("{before}-{id}.key")), dir.join(format!("{before}.away")))?;
        run(&world.lab, "key load")?.code(0)?.err(&["1 key"])?;
    }
    world.expect_counter("default", "stamped", 39, "SYNs stamped")?;
    // What the guard's rules name keeps its number, though it has no key.
    let rings = MapHandle::from_pinned_path(world.lab.run.join("bpf/default/rings"))?;
    let first = rings.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?.context("no ring")?;
    ensure!(first[4..].starts_with(b"ring0\0"), "{first:?}");
    fs::rename(dir.join("ring0.away"), dir.join("ring0-0.key"))?;
    run(&world.lab, "key load")?.code(0)?.err(&["2 keys"])?;
    // As many as there are ids.
    for number in 40..54 {
        run(&world.lab, &format!("key new ring{number}"))?.code(0)?;
    }
    Ok(())
}

pub fn the_files_decide_what_the_kernel_knows() -> Result<()> {
    let world = World::new()?;
    run(&world.lab, "key load")?.code(1)?.err(&["does not run", "attached"])?;
    let policy = write_policy(&world.lab)?;
    world.lab.ok("key new edge")?;
    world.ok(&format!("-i c0 --attach --quiet --policy {policy}"))?;
    world.syns(1)?;
    // A file that comes from another host, and one that goes.
    let dir = world.lab.keys().join("default");
    fs::rename(dir.join("edge-0.key"), dir.join("away"))?;
    let lost = "no key of ring 'edge' signs any more: rules in use that name it leave their SYNs as they are";
    run(&world.lab, "key load")?.code(0)?.err(&["0 keys", lost])?;
    world.syns(1)?;
    world.expect_counter("default", "no_key", 1, "SYNs without a key")?;
    fs::rename(dir.join("away"), dir.join("edge-0.key"))?;
    run(&world.lab, "key load --json")?.code(0)?;
    world.syns(1)?;
    world.expect_counter("default", "stamped", 2, "SYNs stamped")?;
    // From a directory that is not there nothing is loaded, and none is made.
    let nowhere = world.lab.keys().join("nowhere");
    let mut load = world.lab.netoken("key load");
    said(load.env("NETOKEN_KEYS", &nowhere))?
        .code(1)?
        .err(&["there is no such directory", "NETOKEN_KEYS"])?;
    ensure!(!nowhere.exists(), "it made the directory");
    world.syns(1)?;
    world.expect_counter("default", "stamped", 3, "SYNs stamped")?;
    // A guard is told as well.
    let rules = "[[rule]]\nname = 'a'\ndst = '::/0'\nmode = 'observe'\nkeys = 'edge'\n";
    let rules = world.lab.file("guard.toml", rules)?;
    let guard = format!("guard --netns {} -i c0 --attach --hook tc --rules {}", world.ns, rules.display());
    world.lab.ok(&guard)?;
    fs::rename(dir.join("edge-0.key"), dir.join("away"))?;
    run(&world.lab, "key load")?.code(0)?.err(&[
        "ring 'edge' has no key any more",
        "the guard's rules in use",
        lost,
    ])?;
    fs::rename(dir.join("away"), dir.join("edge-0.key"))?;
    run(&world.lab, "key load")?.code(0)?;
    world.lab.ok(&format!("guard --netns {} -i c0 --destroy", world.ns))?;
    // Attaching again reads them as well, and keeps the policy.
    fs::rename(dir.join("edge-0.key"), dir.join("away"))?;
    world.ok("-i c0 --attach --quiet")?;
    world.syns(1)?;
    world.expect_counter("default", "no_key", 2, "SYNs without a key")?;
    Ok(())
}

/// The key that signs for the first ring, as the kernel knows it.
fn signer(lab: &Lab) -> Result<u32> {
    let rings = MapHandle::from_pinned_path(lab.run.join("bpf/default/rings"))?;
    let ring = rings.lookup(&0u32.to_ne_bytes(), MapFlags::ANY)?.context("no ring")?;
    let signer = ring.first_chunk().map(|first| u32::from_ne_bytes(*first));
    signer.and_then(|signer| signer.checked_sub(1)).context("no key signs")
}

/// Lets the other one of two keys sign, as far as files go.
fn swap(dir: &KeyDir) -> Result<()> {
    for id in 0..2 {
        let path = dir.file_of("edge".parse()?, id);
        let text = fs::read_to_string(&path)?;
        let (from, to) = ("state = \"signing\"", "state = \"verify-only\"");
        let (from, to) = if text.contains(from) { (from, to) } else { (to, from) };
        fs::write(&path, text.replace(from, to))?;
    }
    Ok(())
}

/// What they had read before would undo the rotation in the kernel, and with it bring back a key that was retired.
pub fn who_gives_keys_to_the_kernel_waits_for_a_rotation() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    world.lab.ok("key new edge")?;
    world.lab.ok("key rotate edge")?;
    let rules = world.lab.file(
        "guard.toml",
        "[[rule]]\nname = 'all'\ndst = '192.0.2.0/24'\nmode = 'observe'\nkeys = ['edge']\n",
    )?;
    let rules = rules.display();
    let dir = KeyDir::at(world.lab.keys().join("default"));
    let commands = [
        world.args(&format!("-i c0 --attach --quiet --policy {policy}")),
        world.args("-i c0 --attach --quiet"),
        format!("policy load {policy}"),
        "policy add --name web --port 80 --action skip".to_string(),
        format!("guard --netns {} -i c0 --attach --hook tc --rules {rules}", world.ns),
        format!("guard --netns {} -i c0 --attach --hook tc", world.ns),
        format!("guard --load --rules {rules}"),
    ];
    for (number, args) in (1..).zip(commands) {
        let lock = dir.lock()?;
        let mut command = Running::start(&mut world.lab.netoken(&args))?;
        command
            .wait_for("it to wait", |line| line.contains("to finish with the keys in"))
            .context(args.clone())?;
        swap(&dir)?;
        drop(lock);
        let (code, lines) = command.end()?;
        ensure_eq!(code, Some(0), "exit code of {args}: {lines:#?}");
        ensure_eq!(signer(&world.lab)?, number % 2, "the key that signs after {args}");
    }
    Ok(())
}

/// No output shows a secret, no pin is open to others, and a process that streams has no copy left of it.
pub fn nobody_sees_a_secret() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    world.lab.ok("key new edge")?;
    world.lab.ok("key rotate edge")?;
    let secrets = [secret(&world.lab, "edge-0.key")?, secret(&world.lab, "edge-1.key")?];
    let mut stream = Running::start(
        &mut world.lab.netoken(&world.args(&format!("-i c0 --attach --json --policy {policy}"))),
    )?;
    stream.wait_for("the stream to begin", |line| line.contains("\"attached\""))?;
    world.syns(2)?;
    stream.wait_for("a SYN", |line| line.contains("\"stamped\""))?;

    let pid = stream.child.id();
    let text = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}"));
    let core = text("limits")?;
    let core =
        core.lines().find(|line| line.starts_with("Max core file size")).context("no limit of cores")?;
    ensure_eq!(core.split_whitespace().nth(4), Some("0"), "soft limit in '{core}'");
    for secret in &secrets {
        ensure!(!text("cmdline")?.contains(secret) && !text("environ")?.contains(secret), "in the arguments");
        let found = find_in_memory(pid, secret)?;
        ensure!(found.is_empty(), "the secret is in the memory of a process that streams: {found:?}");
    }
    // A search that finds nothing proves nothing unless it can find something.
    ensure!(
        !find_in_memory(pid, &hex(policy.as_bytes()))?.is_empty(),
        "the search does not even find an argument"
    );

    for args in
        ["key list", "key list --json", "key load", "key load --json", "key rotate edge", "key new edge"]
    {
        let said = run(&world.lab, args)?.code(0)?;
        for secret in &secrets {
            ensure!(!said.out.contains(secret) && !said.err.contains(secret), "{args}: {said:#?}");
        }
    }
    let query = world.ok("--query --json")?;
    ensure!(secrets.iter().all(|secret| !query.contains(secret)), "{query}");
    ensure!(
        stream.seen.iter().all(|line| secrets.iter().all(|secret| !line.contains(secret))),
        "in the stream"
    );

    let pins = world.lab.run.join("bpf/default");
    for entry in fs::read_dir(&pins)? {
        let entry = entry?;
        ensure_eq!(entry.metadata()?.mode() & 0o777, 0o600, "mode of the pin {:?}", entry.file_name());
    }
    ensure_eq!(fs::metadata(&pins)?.mode() & 0o077, 0, "mode of the directory of pins");
    let denied = sh(&format!(
        "setpriv --reuid 65534 --regid 65534 --clear-groups cat {}/keys 2>&1 || true",
        pins.display()
    ))?;
    ensure!(denied.contains("denied"), "somebody else gets to the pin: {denied}");
    Ok(())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Where a process has those bytes, or their hexadecimal digits, in memory that it can write.
fn find_in_memory(pid: u32, digits: &str) -> Result<Vec<String>> {
    let bytes: Vec<u8> = (0..digits.len() / 2)
        .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16))
        .collect::<Result<_, _>>()?;
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let mut memory = fs::File::open(format!("/proc/{pid}/mem"))?;
    let (mut found, mut searched) = (Vec::new(), 0);
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let (range, rest) = line.split_once(' ').context("a line of maps")?;
        let (from, to) = range.split_once('-').context("a range")?;
        let (from, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        if rest.contains("[vvar") || to - from > 1 << 30 {
            continue;
        }
        let mut part = vec![0; (to - from) as usize];
        memory.seek(SeekFrom::Start(from))?;
        // Device memory, as the perf buffers are, cannot be read so.
        if memory.read_exact(&mut part).is_err() {
            continue;
        }
        searched += part.len();
        for needle in [&bytes[..], digits.as_bytes(), &bytes[..8], &bytes[8..16]] {
            if part.windows(needle.len()).any(|window| window == needle) {
                found.push(line.to_string());
            }
        }
    }
    if searched < 1 << 16 {
        bail!("only {searched} bytes of the memory of {pid} could be read");
    }
    Ok(found)
}

pub fn slots_have_the_length_that_was_asked_for() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    world.lab.ok("key new edge")?;
    let clock = || -> Result<Value> {
        let text = world.ok("--query --json")?;
        let line = text.lines().find(|line| line.contains("\"clock\"")).context("no clock in the query")?;
        Ok(serde_json::from_str(line)?)
    };
    world.ok(&format!("-i c0 --attach --quiet --policy {policy}"))?;
    ensure_eq!(clock()?["slot_s"], 16, "slots at first");
    let said = String::from_utf8(world.run("-i c0 --attach --quiet --slot 30")?.stderr)?;
    ensure!(said.contains("slots of keyed tokens have 30 s now, and had 16 s"), "{said}");
    ensure_eq!(clock()?["slot_s"], 30, "slots as asked for");
    let said = String::from_utf8(world.run("-i c0 --attach --quiet")?.stderr)?;
    ensure!(!said.contains("slots"), "nothing of them has changed: {said}");
    let clock = clock()?;
    ensure_eq!(clock["slot_s"], 30, "slots as they were");
    let now = netoken::clock::now().as_secs();
    let unix = clock["unix_s"].as_u64().context("unix_s")?;
    ensure!(now.abs_diff(unix) <= 5, "the classifier thinks that it is {unix}, and it is {now}");
    ensure_eq!(clock["slot"].as_u64(), Some(unix / 30), "slot");
    ensure!(world.ok("--query")?.contains("keyed tokens go by CLOCK_"), "the query does not name the clock");
    Ok(())
}

/// A stream puts a clock right that went wrong, as it does after a step of the wall clock; so does who watches a guard,
/// which may be all that there is on a host.
pub fn a_stream_and_a_watch_follow_a_step_of_the_clock_within_two_seconds() -> Result<()> {
    let world = World::new()?;
    let policy = write_policy(&world.lab)?;
    world.lab.ok("key new edge")?;
    let map =
        follows(&world, &world.args(&format!("-i c0 --attach --json --policy {policy}")), "\"attached\"")?;
    // Without either, any command does it.
    let right = netoken::clock::published(&map)?;
    let mut wrong = right;
    wrong.tai_offset_ns += 3_600_000_000_000;
    for args in ["key list", "-i c0 --query"] {
        netoken::clock::write(&map, &wrong)?;
        world.lab.ok(&if args.starts_with('-') { world.args(args) } else { args.to_string() })?;
        ensure_eq!(netoken::clock::published(&map)?.tai_offset_ns, right.tai_offset_ns, "after {args}");
    }
    world.ok("-i c0 --destroy")?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    world.lab.ok(&format!("guard --netns {} -i c0 --attach --rules {}", world.ns, rules.display()))?;
    follows(&world, "guard --watch", "TIME (UTC)").map(drop)
}

/// Runs what streams until it has put the clock right several times, and returns the clock. It prints `first` when it has
/// begun.
fn follows(world: &World, args: &str, first: &str) -> Result<libbpf_rs::MapHandle> {
    let mut stream = Running::start(&mut world.lab.netoken(args))?;
    stream.wait_for("the stream to begin", |line| line.contains(first))?;
    let map = libbpf_rs::MapHandle::from_pinned_path(world.lab.run.join("bpf/default/clock"))?;
    let step = |step_s: i64| -> Result<std::time::Duration> {
        let right = netoken::clock::published(&map)?;
        let mut wrong = right;
        wrong.tai_offset_ns += step_s * 1_000_000_000;
        wrong.boot_offset_ns += step_s * 1_000_000_000;
        netoken::clock::write(&map, &wrong)?;
        let began = std::time::Instant::now();
        wait_until("the stream to put the clock right", || {
            let now = netoken::clock::published(&map)?;
            let off = now.boot_offset_ns.abs_diff(right.boot_offset_ns);
            Ok((now.tai_offset_ns == right.tai_offset_ns && off < 50_000_000).then_some(()))
        })?;
        Ok(began.elapsed())
    };
    for step_s in [3600, -3600, 37, -1] {
        // A machine that stands still for a while shows nothing; one that is late each time does.
        let mut took = step(step_s)?;
        for _ in 1..5 {
            if took.as_secs_f64() < 2.0 {
                break;
            }
            took = step(step_s)?;
        }
        println!("{args}: a step of {step_s} s was picked up after {took:?}");
        ensure!(took.as_secs_f64() < 2.0, "{args}: a step of {step_s} s was picked up after {took:?}");
    }
    Ok(map)
}

/// A time namespace shows a command another boot time than the one that the classifier reads.
pub fn a_time_namespace_does_not_shift_the_clock() -> Result<()> {
    let world = World::new()?;
    world.lab.ok("key new edge")?;
    world.ok("-i c0 --attach --quiet")?;
    let map = libbpf_rs::MapHandle::from_pinned_path(world.lab.run.join("bpf/default/clock"))?;
    let right = netoken::clock::published(&map)?;
    let mut wrong = right;
    wrong.boot_offset_ns += 77_000_000_000;
    netoken::clock::write(&map, &wrong)?;
    let mut command = std::process::Command::new("unshare");
    command.args(["--time", "--boottime", "86400", crate::lab::NETOKEN, "key", "list"]);
    command.env("NETOKEN_RUN", &world.lab.run).env("NETOKEN_KEYS", world.lab.keys());
    said(&mut command)?.code(0)?;
    let now = netoken::clock::published(&map)?;
    let off = now.boot_offset_ns.abs_diff(right.boot_offset_ns);
    ensure!(off < 1_000_000_000, "a command in a time namespace was off by {off} ns");
    Ok(())
}
