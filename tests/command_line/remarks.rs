//! What a person has to be told of guards, rules and keys beside what was asked for.

use std::fs;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::json;

use crate::json::checked;
use crate::lab::{OBSERVE, Running, wait_until};
use crate::look::{map_id, programs_of, records};
use crate::said::{Said, said};
use crate::support::ensure_eq;
use crate::world::World;

const KEYED: &str = "[[rule]]\nname = 'keyed'\ndst = '10.77.0.0/24'\nmode = 'observe'\nkeys = 'edge'\n";

fn run(world: &World, args: &str) -> Result<Said> {
    said(&mut world.lab.netoken(args))
}

/// Writes rules, and returns the path.
fn rules(world: &World, text: &str) -> Result<String> {
    Ok(world.lab.file("guard.toml", text)?.display().to_string())
}

fn place(world: &World) -> String {
    format!("--netns {} --iface s0", world.server_ns)
}

/// A guard at the server.
fn guarded(text: &str) -> Result<World> {
    let world = World::new()?;
    let rules = rules(&world, text)?;
    world.lab.ok(&format!("guard {} --attach --rules {rules}", place(&world)))?;
    Ok(world)
}

fn expect(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "'{word}' expected in\n{text}");
    }
    Ok(())
}

pub fn where_only_guards_are_a_query_tells_where() -> Result<()> {
    let world = guarded(OBSERVE)?;
    let (ns, place) = (&world.server_ns, place(&world));
    let there = format!("guards are attached to s0 in {ns}: netoken guard ");
    let all = run(&world, &format!("--netns {ns} --query"))?.code(0)?;
    expect(&all.err, &[&format!("{there}--netns {ns} --query\n")])?;
    expect(&all.out, &["instance 'default', no filter here: "])?;
    ensure!(!all.err.contains("not attached to any"), "{all:#?}");
    run(&world, &format!("{place} --query"))?.code(1)?.err(&[
        "on s0: there are none",
        &format!("{there}--iface s0 --netns {ns} --query\n"),
        "--attach",
    ])?;
    let json = run(&world, &format!("--netns {ns} --query --json"))?.code(0)?;
    ensure!(json.err.is_empty() && records(&json.out, "counters")?.len() == 1, "{json:#?}");

    // Beside an instance that stamps.
    world.ok("-i c0 --attach --quiet --instance blue")?;
    let both = run(&world, "--query --instance default")?.code(0)?;
    expect(&both.err, &[&format!("{there}--instance default --query\n")])?;
    let both = run(&world, "--query --instance blue")?.code(0)?;
    ensure!(!both.err.contains("guards"), "{both:#?}");
    // Who has a filter as well is in the table.
    world.ok("-i c0 --attach --quiet")?;
    let both = run(&world, "--query --instance default")?.code(0)?;
    ensure!(!both.err.contains("guards"), "{both:#?}");
    Ok(())
}

pub fn a_query_of_the_guard_shows_its_rules_and_the_clock() -> Result<()> {
    let world = guarded(OBSERVE)?;
    let path = rules(&world, KEYED)?;
    let shown = world.lab.ok("guard --query")?;
    expect(&shown, &[&format!("  rules: 1 rule; from {path}, loaded 20")])?;
    ensure!(!shown.contains("CLOCK_"), "nothing is keyed:\n{shown}");
    world.lab.ok("key new edge")?;
    world.lab.ok(&format!("guard --load --rules {path}"))?;
    let shown = world.lab.ok("guard --query")?;
    expect(&shown, &[&format!("  rules: 1 rule; from {path}, loaded 20"), "  keyed tokens go by CLOCK_"])?;
    let json = world.lab.ok("guard --query --json")?;
    checked(json.lines())?;
    let of =
        |kind: &str| records(&json, kind).and_then(|found| found.into_iter().next().context(json.clone()));
    let (rules, clock) = (of("guard_rules")?, of("clock")?);
    ensure!(rules["instance"] == "default" && rules["rules"] == 1 && rules["number"] == 2, "{rules}");
    ensure!(rules["source"] == path && rules["loaded"].is_string(), "{rules}");
    ensure!(clock["instance"] == "default" && clock["slot_s"] == 16, "{clock}");
    Ok(())
}

pub fn rules_whose_keys_are_gone_are_marked() -> Result<()> {
    let world = World::new()?;
    world.lab.ok("key new edge")?;
    let path = rules(&world, KEYED)?;
    let guard = format!("guard {} --attach", place(&world));
    world.lab.ok(&format!("{guard} --rules {path}"))?;
    let policy = "default = { action = 'stamp', token = { tag = 17, key = 'edge' } }\n\
                  [[rule]]\nname = 'fixed'\nport = 1\naction = 'skip'\n";
    let policy = world.lab.file("policy.toml", policy)?;
    world.ok(&format!("-i c0 --attach --quiet --policy {}", policy.display()))?;

    let marks = |is_lost: bool| -> Result<()> {
        let shown = [world.lab.ok("guard --show")?, world.lab.ok("policy show")?];
        for (shown, mark) in shown.iter().zip([
            "keys edge, binds server  [ring 'edge' has no key: all its tokens are refused; copy its key file here, then: netoken key load]\n",
            "  [no key of ring 'edge' signs: its SYNs get no token; see netoken key list]\n",
        ]) {
            ensure!(shown.contains(mark) == is_lost && shown.contains("  [") == is_lost, "{is_lost}:\n{shown}");
        }
        let shown = [world.lab.ok("guard --show --json")?, world.lab.ok("policy show --json")?].concat();
        checked(shown.lines())?;
        let lost = if is_lost { json!(["edge"]) } else { json!([]) };
        ensure_eq!(records(&shown, "guard_rule")?[0]["rings_without_key"], lost, "{shown}");
        let rules = records(&shown, "rule")?;
        ensure!(rules[0]["ring_without_key"].is_null(), "{shown}");
        let lost = if is_lost { json!("edge") } else { json!(null) };
        ensure_eq!(rules[1]["ring_without_key"], lost, "{shown}");
        for flags in ["", " --json"] {
            let attached = run(&world, &format!("{guard}{flags}"))?.code(0)?;
            let told = "instance 'default': ring 'edge' has no key: the guard's rules in use that name it refuse all its tokens";
            ensure!(attached.err.contains(told) == is_lost, "{is_lost}: {attached:#?}");
            if !flags.is_empty() {
                let object = &checked(attached.out.lines())?[0];
                ensure!(object.get("rings_without_key") == is_lost.then_some(&json!(["edge"])), "{object}");
            }
        }
        Ok(())
    };
    marks(false)?;
    let dir = world.lab.keys().join("default");
    fs::rename(dir.join("edge-0.key"), dir.join("away"))?;
    world.lab.ok("key load")?;
    marks(true)?;
    fs::rename(dir.join("away"), dir.join("edge-0.key"))?;
    world.lab.ok("key load")?;
    marks(false)
}

pub fn a_load_that_comes_too_soon_says_what_uses_its_file() -> Result<()> {
    let world = guarded(OBSERVE)?;
    world.lab.ok(&format!("guard {} --detach", place(&world)))?;
    // The kernel unloads it a moment later.
    let counters = map_id(&world.lab, "default", "guard_counters")?;
    wait_until("the guard to be unloaded", || Ok(programs_of(counters).is_empty().then_some(())))?;
    let path = rules(&world, &OBSERVE.replace("'all'", "'new'"))?;
    let refused = run(&world, &format!("guard --load --rules {path}"))?
        .code(1)?
        .err(&[&format!("netoken guard --iface NAME --attach --rules {path}\n")])?;
    // Followed to the letter.
    let advice = refused.err.trim_end().rsplit_once("netoken ").context("no advice")?.1;
    let advice = advice.replace("--iface NAME", &place(&world));
    world.lab.ok(&advice)?;
    expect(&world.lab.ok("guard --show")?, &["rule 1 'new'"])
}

pub fn who_unblocks_what_the_rules_block_is_told() -> Result<()> {
    let lists = "exempt = ['192.0.2.64/26']\n\
                 blocked = ['192.0.2.0/24', { src = '198.51.100.7', until = '2020-01-01T00:00:00Z' }]\n";
    let world = guarded(&format!("{lists}{OBSERVE}"))?;
    let path = rules(&world, OBSERVE)?;
    for (prefix, entry) in [
        ("192.0.2.7", Some("192.0.2.0/24")),
        ("192.0.0.0/16", Some("192.0.2.0/24")),
        // Who is on both lists is exempt.
        ("192.0.2.65", None),
        // It has ended.
        ("198.51.100.7", None),
        ("203.0.113.1", None),
    ] {
        let told = run(&world, &format!("guard --unblock {prefix}"))?.code(0)?;
        expect(&told.err, &[&format!("0 sources of {prefix}")])?;
        let note = entry.map(|entry| {
            format!("the rules block {entry} by a list of their own: change {path}, or the list that it names, and then: netoken guard --load --rules {path}\n")
        });
        match &note {
            Some(note) => expect(&told.err, &[note])?,
            None => ensure!(!told.err.contains("by a list"), "{told:#?}"),
        }
        let told = run(&world, &format!("guard --unblock {prefix} --json"))?.code(0)?;
        let object = &checked(told.out.lines())?[0];
        ensure!(object["blocked_by_rules"] == usize::from(entry.is_some()), "{object}");
    }
    Ok(())
}

pub fn entries_that_have_ended_are_counted() -> Result<()> {
    let world = World::new()?;
    let old = "until = '2020-01-01T00:00:00Z' }";
    let one = rules(&world, &format!("blocked = ['192.0.2.1', {{ src = '192.0.2.2', {old}]\n{OBSERVE}"))?;
    let check = |path: &str| run(&world, &format!("guard --check --rules {path}"))?.code(0);
    expect(&check(&one)?.err, &["1 rule, 0 prefixes exempt, 2 prefixes blocked; 1 entry has expired\n"])?;
    let two = format!("exempt = [{{ src = '192.0.2.3', {old}]\n{}", fs::read_to_string(&one)?);
    let two = world.lab.file("two.toml", two)?.display().to_string();
    expect(&check(&two)?.err, &["1 prefix exempt, 2 prefixes blocked; 2 entries have expired\n"])?;
    let attached = run(&world, &format!("guard {} --attach --rules {one}", place(&world)))?.code(0)?;
    expect(&attached.err, &["1 entry of the lists has expired"])?;
    let loaded = run(&world, &format!("guard --load --rules {two}"))?.code(0)?;
    expect(&loaded.err, &["2 entries have expired"])?;
    let loaded = run(&world, &format!("guard --load --json --rules {two}"))?.code(0)?;
    let object = &checked(loaded.out.lines())?[0];
    ensure!(object["exempt_expired"] == 1 && object["blocked_expired"] == 1, "{object}");
    let none = rules(&world, OBSERVE)?;
    ensure!(!check(&none)?.err.contains("expired"), "nothing has expired");
    Ok(())
}

pub fn a_rule_that_an_earlier_one_hides_is_told() -> Result<()> {
    let world = World::new()?;
    let rule = |name: &str, of: &str| {
        format!("[[rule]]\nname = '{name}'\n{of}\nmode = 'observe'\ntokens = '0000000000000001'\n")
    };
    let text = rule("a", "dst = ['10.77.0.0/16', '::/0']\nport = [80, '8000-9000']")
        + &rule("b", "dst = ['10.77.0.2', 'fd00::/8']\nport = ['8080-8090', 80]")
        + &rule("c", "dst = '10.77.0.2'\nport = [80, 81]")
        + &rule("d", "dst = '10.0.0.0/8'\nport = 80");
    let path = rules(&world, &text)?;
    let guard = format!("guard {} --attach", place(&world));
    for command in ["guard --check", &guard, "guard --load"] {
        let told = run(&world, &format!("{command} --rules {path}"))?.code(0)?;
        let warnings: Vec<&str> = told.err.lines().filter(|line| line.starts_with("warning: ")).collect();
        ensure_eq!(
            warnings,
            ["warning: rule 'b' can never match: 'a' matches all of it before"],
            "{command}"
        );
    }
    Ok(())
}

pub fn heads_are_not_repeated_for_a_long_verdict_or_name() -> Result<()> {
    let world = World::new()?;
    let name = "a name of twenty-two c";
    let mut stamp = Running::start(&mut world.lab.netoken(&stamping(&world, name)?))?;
    let rules = rules(&world, &OBSERVE.replace("'observe'", "'drop'"))?;
    world.lab.ok(&format!("guard {} --attach --rules {rules}", place(&world)))?;
    let mut guard = Running::start(&mut world.lab.netoken("guard --watch"))?;
    for stream in [&mut stamp, &mut guard] {
        stream.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
    }
    send_one(&world)?;
    stamp.wait_for("a SYN", |line| line.contains(name))?;
    guard.wait_for("a SYN", |line| line.contains("wrong_static!"))?;
    for stream in [stamp, guard] {
        stream.signal(Signal::SIGINT)?;
        let (_, lines) = stream.end()?;
        let heads = lines.iter().filter(|line| line.starts_with("TIME (UTC)")).count();
        ensure_eq!(heads, 1, "heads in {lines:#?}");
    }
    Ok(())
}

pub fn a_long_name_of_a_rule_is_cut_for_people_only() -> Result<()> {
    let world = World::new()?;
    let long = "ä".repeat(30);
    let args = stamping(&world, &long)?;
    let cut = format!("  {}…  1111111111111111", "ä".repeat(23));
    for (flags, shown) in [("", cut), (" --json", format!(r#""rule_name":"{long}""#))] {
        let mut stream = Running::start(&mut world.lab.netoken(&format!("{args}{flags}")))?;
        stream.wait_for("the attach", |line| line.contains("attached") || line.contains("replaced"))?;
        send_one(&world)?;
        stream.wait_for("the name", |line| line.contains(&shown))?;
        stream.signal(Signal::SIGINT)?;
        stream.end()?;
    }
    Ok(())
}

/// The arguments that stamp by a rule of that name.
fn stamping(world: &World, name: &str) -> Result<String> {
    let policy =
        format!("[[rule]]\nname = '{name}'\nport = 9\naction = 'stamp'\ntoken = '1111111111111111'\n");
    let policy = world.lab.file("policy.toml", policy)?;
    Ok(world.args(&format!("-i c0 --attach --policy {}", policy.display())))
}

/// A SYN that nobody answers.
fn send_one(world: &World) -> Result<()> {
    let addr = "10.77.0.2:9".parse()?;
    world.lab.within(&world.ns, || {
        // It is dropped, or answered by a reset.
        std::net::TcpStream::connect_timeout(&addr, std::time::Duration::from_millis(300)).ok();
        Ok(())
    })
}
