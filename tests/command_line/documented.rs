//! What is documented of `--json`: each type is printed by some command, with the keys that the documents show.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;

use crate::json::{checked, documented};
use crate::lab::{Running, wait_until};
use crate::said::said;
use crate::support::ensure_eq;
use crate::tokens::{pcap, record};
use crate::world::World;

const POLICY: &str = "default = { action = 'stamp', token = { tag = 17, key = 'edge' } }\n\
                      [[rule]]\nname = 'local'\ndst = '127.0.0.0/8'\naction = 'skip'\n";
/// Observed, so that everybody is answered.
const RULES: &str = "auto_block = { refused = 1, within = '1h', block_for = '1h' }\n\
                     alerts = { within = '1s', low = 1 }\nblocked = ['192.0.2.1']\n\
                     [[rule]]\nname = 'all'\ndst = '10.77.0.2'\nmode = 'observe'\nkeys = 'edge'\n";
const FLOW: &str = "--src 192.0.2.1:40000 --dst 198.51.100.7:443 --isn 1 --time 2026-11-21T10:56:42Z";

/// Everything that was printed.
struct Printed<'a> {
    world: &'a World,
    text: String,
}

impl Printed<'_> {
    /// Runs a command with `--json`, which says nothing to people.
    fn run(&mut self, args: &str) -> Result<()> {
        let said = said(&mut self.world.lab.netoken(&format!("{args} --json")))?.code(0)?;
        ensure!(!said.out.is_empty(), "{args} printed nothing: {said:#?}");
        self.text.push_str(&said.out);
        Ok(())
    }
}

pub fn every_documented_type_is_printed_as_it_says() -> Result<()> {
    let world = World::new()?;
    let mut printed = Printed { world: &world, text: String::new() };
    let keys = world.lab.keys();
    fs::create_dir_all(&keys)?;
    let write = |name: &str, text: &[u8]| -> Result<String> {
        let path = keys.join(name);
        fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let policy = write("policy.toml", POLICY.as_bytes())?;
    let other = write("other.toml", POLICY.replace("17", "18").as_bytes())?;
    let rules = write("guard.toml", RULES.as_bytes())?;
    let fewer = write("fewer.toml", RULES.replace("blocked = ['192.0.2.1']", "").as_bytes())?;

    printed.run("key new edge")?;
    let source = format!("--keys {}/default", keys.display());
    printed.run(&format!("token make {source} --tag 17 {FLOW}"))?;
    let token = world.lab.ok(&format!("token make {source} --tag 17 {FLOW}"))?;
    printed.run(&format!("token check {} {source} {FLOW}", token.trim()))?;
    let capture = write("one.pcap", &pcap(&[record(1, &[2, 4, 5, 180])]))?;
    printed.run(&format!("token decode {capture}"))?;

    let guard = format!("guard --netns {} --iface s0", world.server_ns);
    printed.run(&format!("{guard} --attach --rules {rules}"))?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch --json"))?;
    // Events begin when the buffer is open, which nobody can see; and an alert comes once in a window.
    for kind in ["\"guarded\"", "guard_alert", "guard_counters"] {
        wait_until(kind, || {
            world.syns(1)?;
            Ok(watch.wait_within(Duration::from_secs(1), |line| line.contains(kind)))
        })?;
    }
    watch.signal(Signal::SIGINT)?;
    printed.text.push_str(&of_json(watch)?);
    for args in [
        format!("{guard} --query"),
        "guard --show".to_string(),
        format!("guard --diff {fewer}"),
        format!("guard --load --rules {fewer}"),
        "guard --unblock 10.77.0.1".to_string(),
        format!("{guard} --destroy"),
    ] {
        printed.run(&args)?;
    }

    let mut stream = Running::start(
        &mut world.lab.netoken(&world.args(&format!("-i c0 --attach --json --policy {policy}"))),
    )?;
    stream.wait_for("the attached record", |line| line.contains("attached"))?;
    world.syns(1)?;
    stream.wait_for("a SYN", |line| line.contains("\"syn\""))?;
    for args in [
        "key load".to_string(),
        "key list".to_string(),
        "key rotate edge".to_string(),
        world.args("--query"),
        format!("policy load {policy}"),
        "policy show".to_string(),
        format!("policy diff {other}"),
        "policy test --dst 127.0.0.1 --port 80".to_string(),
        "policy add --name more --dst 192.0.2.0/24 --action drop".to_string(),
        "policy del more".to_string(),
    ] {
        printed.run(&args)?;
    }
    world.lab.rename(&world.ns, "c0", "c7")?;
    stream.wait_for("the new name", |line| line.contains("renamed"))?;
    stream.signal(Signal::SIGINT)?;
    printed.text.push_str(&of_json(stream)?);
    printed.run(&world.args("-i c7 --destroy"))?;

    let objects = checked(printed.text.lines())?;
    let types: BTreeSet<&str> = objects.iter().filter_map(|object| object["type"].as_str()).collect();
    let documented = documented()?;
    ensure_eq!(types, documented.keys().map(String::as_str).collect(), "types");
    Ok(())
}

/// What a stream has printed for programs. Standard error is for people, with `--json` as well.
fn of_json(stream: Running) -> Result<String> {
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code of {lines:#?}");
    let text: String =
        lines.iter().filter(|line| line.starts_with('{')).map(|line| format!("{line}\n")).collect();
    (!text.is_empty()).then_some(text).context("it printed nothing")
}
