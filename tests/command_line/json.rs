//! `--json`: every line is one object of a documented type, and has the keys that the documents show.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::Running;
use crate::said::said;
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// The documents, in which one line shows all keys of each type.
const DOCUMENTS: [(&str, &str); 3] = [
    ("README.md", include_str!("../../README.md")),
    ("docs/policy.md", include_str!("../../docs/policy.md")),
    ("docs/guard.md", include_str!("../../docs/guard.md")),
];

/// Keys that are not always there, by their type.
const OPTIONAL: [(&str, &[&str]); 7] = [
    ("interface", &["new_name", "netns"]),
    ("removed", &["netns", "qdisc", "qdisc_filters"]),
    ("check", &["reason", "ring", "bind", "slot"]),
    ("guard_attached", &["pushed_out", "rings_without_key"]),
    ("guard_removed", &["qdisc", "qdisc_filters"]),
    ("guard_counters", &["lost"]),
    ("guard_rules", &["exempt", "exempt_expired", "blocked", "blocked_expired"]),
];

fn keys(object: &Value) -> BTreeSet<String> {
    object.as_object().into_iter().flatten().map(|(key, _)| key.clone()).collect()
}

/// The keys of each type, as they are documented.
pub fn documented() -> Result<BTreeMap<String, BTreeSet<String>>> {
    let mut types: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for (name, text) in DOCUMENTS {
        for line in text.lines().filter(|line| line.starts_with("{\"type\"")) {
            let object: Value = serde_json::from_str(line).with_context(|| format!("{name}: {line}"))?;
            let kind = object["type"].as_str().with_context(|| format!("{name}: {line}"))?;
            // Of a type that several documents show, or one of them twice, all keys together.
            types.entry(kind.to_string()).or_default().extend(keys(&object));
        }
    }
    Ok(types)
}

/// Every line as an object with the keys of its type.
pub fn checked<'a>(lines: impl Iterator<Item = &'a str>) -> Result<Vec<Value>> {
    let documented = documented()?;
    let mut objects = Vec::new();
    for line in lines {
        let object: Value = serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))?;
        let kind = object["type"].as_str().with_context(|| format!("no type: {line}"))?;
        ensure!(line.starts_with("{\"type\""), "its type is not in front: {line}");
        let wants = documented.get(kind).with_context(|| format!("a type that is not documented: {line}"))?;
        let optional = OPTIONAL.iter().find(|(name, _)| *name == kind).map_or(&[][..], |(_, keys)| *keys);
        let has = keys(&object);
        let differ: Vec<&String> = has.symmetric_difference(wants).collect();
        let unexpected = differ.iter().find(|key| has.contains(**key) || !optional.contains(&key.as_str()));
        ensure!(unexpected.is_none(), "{} is not as documented in {line}", unexpected.map_or("", |key| key));
        objects.push(object);
    }
    Ok(objects)
}

fn of<'a>(objects: &'a [Value], kind: &str) -> Vec<&'a Value> {
    objects.iter().filter(|object| object["type"] == kind).collect()
}

pub fn attach_prints_one_object_a_line() -> Result<()> {
    let world = World::new()?;
    let mut stream = Running::start(&mut world.lab.netoken(&world.args("-i c0 --attach --json")))?;
    stream.wait_for("the attached record", |line| line.contains("attached"))?;
    world.syns(3)?;
    for _ in 0..3 {
        stream.wait_for("a SYN", |line| line.contains("\"syn\""))?;
    }
    world.lab.rename(&world.ns, "c0", "c7")?;
    stream.wait_for("the new name", |line| line.contains("renamed"))?;
    stream.signal(Signal::SIGINT)?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code of {lines:#?}");
    // Standard error is for people, with --json as well.
    let objects =
        checked(lines.iter().map(String::as_str).filter(|line| !line.starts_with("still attached")))?;

    let attached = of(&objects, "attached");
    ensure_eq!(attached.len(), 1, "attached records");
    ensure!(attached[0]["interface"] == "c0" && attached[0]["replaced"] == false, "{attached:#?}");
    ensure!(attached[0]["made_qdisc"] == true && attached[0]["priority"].is_u64(), "{attached:#?}");
    let syns = of(&objects, "syn");
    ensure_eq!(syns.len(), 3, "SYN records");
    for syn in syns {
        ensure!(syn["interface"] == "c0" && syn["dst"] == "10.77.0.2" && syn["dport"] == 9, "{syn:#?}");
        ensure!(syn["verdict"] == "stamped" && syn["dropped"] == false && syn["rule"] == 0, "{syn:#?}");
        ensure!(syn["token"] == "4e45544f4b454e31" && syn["isn"].is_u64(), "{syn:#?}");
        let grown = syn["new_options_len"].as_u64().zip(syn["old_options_len"].as_u64());
        ensure!(grown.is_some_and(|(new, old)| new == old + 12), "{syn:#?}");
        ensure!(syn["time"].as_str().is_some_and(|time| time.ends_with('Z') && time.len() == 27), "{syn:#?}");
    }
    let totals = of(&objects, "totals");
    let last = totals.last().context("no totals")?;
    ensure!(last["stamped"] == 3 && last["syns"] == 3 && last["lost"] == 0, "{last:#?}");
    let changes = of(&objects, "interface");
    ensure!(changes.len() == 1 && changes[0]["event"] == "renamed", "{changes:#?}");
    ensure!(changes[0]["interface"] == "c0" && changes[0]["new_name"] == "c7", "{changes:#?}");
    Ok(())
}

pub fn query_prints_one_object_a_line() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --priority 7 --handle 8 --instance blue")?;
    world.syns(2)?;
    let said = said(&mut world.lab.netoken(&world.args("--query --json")))?.code(0)?;
    let objects = checked(said.out.lines())?;
    let hooks = of(&objects, "hook");
    ensure_eq!(hooks.len(), 1, "hooks in {objects:#?}");
    let hook = hooks[0];
    ensure!(
        hook["interface"] == "c0" && hook["netns"] == *world.ns && hook["instance"] == "blue",
        "{hook:#?}"
    );
    ensure!(hook["priority"] == 7 && hook["handle"] == 8 && hook["hook"] == "clsact egress", "{hook:#?}");
    let program = hook["program"].as_u64().context("no program id")?;
    let tc = sh(&format!("tc -n {} filter show dev c0 egress", world.ns))?;
    ensure!(tc.contains(&format!(" id {program} ")), "program {program} is not what tc shows: {tc}");
    ensure!(hook["since"].as_str().is_some_and(|since| since.ends_with('Z')), "{hook:#?}");
    let counters = of(&objects, "counters");
    ensure!(counters.len() == 1 && counters[0]["instance"] == "blue", "{objects:#?}");
    ensure!(counters[0]["stamped"] == 2, "{objects:#?}");
    ensure!(hook["option_kind"] == 253 && hook["exid"] == 0x4e54 && hook["sample"] == 1, "{hook:#?}");
    let netns = fs::metadata(format!("/run/netns/{}", world.ns))?.ino();
    ensure_eq!(hook["netns_inode"], netns, "the inode number of the namespace");
    let policies = of(&objects, "policy");
    ensure!(policies.len() == 1 && policies[0]["instance"] == "blue", "{objects:#?}");
    ensure!(policies[0]["rules"] == 0 && policies[0]["default"] == "stamp 4e45544f4b454e31", "{policies:#?}");
    ensure!(said.err.is_empty(), "{said:#?}");

    // The table says the same.
    let table = world.ok("--query")?;
    for word in [&*world.ns, "c0", "clsact egress", &program.to_string(), "0x8", "7", "blue", "2 stamped"] {
        ensure!(table.contains(word), "'{word}' is not in the table:\n{table}");
    }
    Ok(())
}

pub fn detach_and_destroy_print_one_object_a_line() -> Result<()> {
    let world = World::new()?;
    let removed = |command: &str| -> Result<Value> {
        let said = said(&mut world.lab.netoken(&world.args(&format!("-i c0 {command} --json"))))?.code(0)?;
        ensure!(said.err.is_empty(), "{said:#?}");
        let objects = checked(said.out.lines())?;
        ensure!(objects.len() == 1 && objects[0]["type"] == "removed", "{objects:#?}");
        Ok(objects[0].clone())
    };
    let object = removed("--detach")?;
    ensure!(object["filters"] == 0 && object.get("qdisc").is_none(), "{object:#?}");

    world.ok("-i c0 --attach --quiet --json")?;
    let object = removed("--detach")?;
    ensure!(object["filters"] == 1 && object["interface"] == "c0", "{object:#?}");

    world.ok("-i c0 --attach --quiet")?;
    let object = removed("--destroy")?;
    ensure!(object["filters"] == 1 && object["qdisc"] == "removed", "{object:#?}");
    let object = removed("--destroy")?;
    ensure!(object["filters"] == 0 && object["qdisc"] == "absent", "{object:#?}");

    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    let object = removed("--destroy")?;
    ensure_eq!(object["qdisc"], "foreign", "{object:#?}");
    sh(&format!("tc -n {} qdisc del dev c0 clsact", world.ns))?;

    world.ok("-i c0 --attach --quiet")?;
    sh(&format!("tc -n {} filter add dev c0 ingress bpf da bytecode '1,6 0 0 4294967295,'", world.ns))?;
    let object = removed("--destroy")?;
    ensure!(object["qdisc"] == "in_use" && object["qdisc_filters"] == 1, "{object:#?}");

    sh(&format!("tc -n {} filter del dev c0 ingress; tc -n {0} chain add dev c0 ingress chain 7", world.ns))?;
    ensure_eq!(removed("--destroy")?["qdisc"], "has_chains", "with a chain of somebody else");
    Ok(())
}
