//! What `--query` shows, and what `--attach` says beside that it has attached.

use std::fs::{self, File};
use std::io::{Write, pipe};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};

use crate::lab::{OBSERVE, Running};
use crate::look::records;
use crate::said::{said, said_to};
use crate::support::{ensure_eq, sh};
use crate::world::World;

fn query(world: &World, args: &str) -> Result<String> {
    world.ok(&format!("--query {args}"))
}

fn expect(text: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(text.contains(word), "'{word}' expected in\n{text}");
    }
    Ok(())
}

pub fn the_policy_and_what_programs_were_told_are_shown() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("p.toml");
    fs::write(&path, "[[rule]]\nname = 'a'\nport = 9\naction = 'skip'\n")?;
    let shown = path.display().to_string();
    world.ok("-i c0 --attach --quiet")?;
    let by_default = query(&world, "")?;
    expect(&by_default, &["  policy: default: stamp 4e45544f4b454e31; from the command line, loaded 20"])?;
    for word in ["option kind", "ExID", "events for"] {
        ensure!(!by_default.contains(word), "'{word}' is as if nothing was said:\n{by_default}");
    }

    world
        .ok(&format!("-i c1 --attach --quiet --policy {shown} --option-kind 254 --exid 0x1234 --sample 7"))?;
    let said = query(&world, "")?;
    let told = format!("c1 in {}: option kind 254, ExID 0x1234, events for one of 7 SYNs\n", world.ns);
    expect(&said, &[&told, &format!("  policy: 1 rule, no default; from {shown}, loaded 20")])?;
    ensure!(!said.contains(&format!("c0 in {}: option", world.ns)), "c0 was told nothing:\n{said}");

    let said = query(&world, "--json")?;
    for hook in records(&said, "hook")? {
        let told = if hook["interface"] == "c1" { (254, 0x1234, 7) } else { (253, 0x4e54, 1) };
        let is = (&hook["option_kind"], &hook["exid"], &hook["sample"]);
        ensure!(*is.0 == told.0 && *is.1 == told.1 && *is.2 == told.2, "{told:?} expected: {hook}");
    }
    let policies = records(&said, "policy")?;
    ensure!(policies.len() == 1 && policies[0]["instance"] == "default", "{said}");
    ensure!(policies[0]["rules"] == 1 && policies[0]["default"].is_null(), "{said}");
    ensure!(policies[0]["source"] == shown && policies[0]["generation"] == 2, "{said}");
    // `policy show` says the same of it.
    ensure_eq!(records(&world.lab.ok("policy show --json")?, "policy")?, policies, "the policy");
    Ok(())
}

pub fn instances_without_filters_are_shown() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --instance left --token 1111111111111111")?;
    world.syns(3)?;
    world.ok("-i c0 --detach --instance left")?;
    let alone = said(&mut world.lab.netoken(&world.args("--query")))?.code(0)?;
    expect(&alone.err, &["not attached to any interface"])?;
    let line =
        "instance 'left', no filter here: 3 SYNs, 3 stamped\n  policy: default: stamp 1111111111111111";
    ensure!(alone.out.starts_with(line), "{alone:#?}");

    world.ok("-i c0 --attach --quiet")?;
    let both = query(&world, "")?;
    expect(&both, &["instance 'default': 0 SYNs", line])?;
    let both = query(&world, "--json")?;
    ensure_eq!(records(&both, "counters")?.len(), 2, "counters in {both}");
    // Who asks for an interface wants to know of that.
    let one = query(&world, "-i c0")?;
    ensure!(!one.contains("'left'") && one.contains("'default'"), "{one}");
    Ok(())
}

pub fn one_instance_can_be_asked_for() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --attach --quiet --instance blue")?;
    let all = records(&query(&world, "--json")?, "hook")?;
    ensure_eq!(all.len(), 2, "hooks of all instances");
    for name in ["default", "blue"] {
        for iface in ["", "-i c0"] {
            let said = query(&world, &format!("--json --instance {name} {iface}"))?;
            for kind in ["hook", "counters", "policy"] {
                let found = records(&said, kind)?;
                ensure!(found.len() == 1 && found[0]["instance"] == name, "{kind} of {name}: {said}");
            }
        }
    }
    let no_such = world.fails("--query --instance none")?;
    expect(&no_such, &["instance 'none': there is none", "--instance none --attach"])?;
    let no_such = world.fails("--query --instance none -i c0")?;
    expect(&no_such, &["on c0 with instance 'none': there are none", "--instance none --attach"])?;
    world.ok("-i c0 --detach --instance blue")?;
    expect(&query(&world, "--instance blue")?, &["instance 'blue', no filter here: 0 SYNs"])
}

/// As an attach leaves it that was killed.
pub fn an_instance_that_is_not_whole_does_not_hide_the_others() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --attach --quiet --instance cut")?;
    world.ok("-i c0 --detach --instance cut")?;
    fs::remove_file(world.lab.run.join("bpf/cut/policies"))?;
    let shown = said(&mut world.lab.netoken(&world.args("--query")))?.code(0)?;
    expect(&shown.out, &["instance 'default': 0 SYNs"])?;
    expect(&shown.err, &["instance 'cut'", "'policies'", "--attach or --destroy mends it"])?;
    world.ok("-i c0 --attach --quiet --instance cut")?;
    expect(&query(&world, "")?, &["instance 'cut': 0 SYNs"])
}

/// Nor by what it leaves undone for a moment. Who stands still hides nothing.
pub fn a_command_that_changes_something_raises_no_alarm() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    world.lab.ok(&format!("guard --netns {} -i c0 --attach --rules {}", world.ns, rules.display()))?;
    let pins = |name: &str| world.lab.run.join("bpf").join(name);
    let queries = [world.args("--query"), format!("guard --netns {} --query", world.ns)];
    let expect_whole = |query: &str, out: &str| {
        ensure!(out.contains("instance 'default': 0 ") && !out.contains("lost"), "{query}: {out}");
        Ok(())
    };
    for query in &queries {
        let lock = File::options().read(true).write(true).open(world.lab.run.join("lock"))?;
        let mut held = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        write!(held, "process 1 (a command)")?;
        fs::rename(pins("default"), pins("elsewhere"))?;
        let running = Running::start(&mut world.lab.netoken(query))?;
        thread::sleep(Duration::from_millis(300));
        fs::rename(pins("elsewhere"), pins("default"))?;
        held.set_len(0)?;
        drop(held);
        let (code, lines) = running.end()?;
        ensure_eq!(code, Some(0), "the exit code of {query}: {lines:#?}");
        expect_whole(query, &lines.join("\n"))?;
    }
    // One that stands still, and the name that one leaves that was killed.
    let lock = File::options().read(true).write(true).open(world.lab.run.join("lock"))?;
    let mut held = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    held.set_len(0)?;
    write!(held, "process 1 (a command)")?;
    for query in &queries {
        let shown = said(&mut world.lab.netoken(query))?.code(0)?;
        expect_whole(query, &shown.out)?;
        expect(&shown.err, &["process 1 (a command) has not finished"])?;
    }
    drop(held);
    for query in &queries {
        let shown = said(&mut world.lab.netoken(query))?.code(0)?;
        expect_whole(query, &shown.out)?;
        ensure!(shown.err.is_empty(), "{query}: {shown:#?}");
    }
    Ok(())
}

/// Whatever the moment, an instance that is attached or detached again and again is there with its policy.
pub fn a_query_meets_an_attach_at_any_moment() -> Result<()> {
    let world = World::new()?;
    let over = AtomicBool::new(false);
    let change = || {
        (0..20).try_for_each(|_| {
            world.ok("-i c0 --attach --quiet")?;
            world.ok("-i c0 --destroy").map(drop)
        })
    };
    thread::scope(|scope| {
        let changes = scope.spawn(|| {
            let changed = change();
            over.store(true, Ordering::Release);
            changed
        });
        while !over.load(Ordering::Acquire) {
            let shown = said(&mut world.lab.netoken(&world.args("--query")))?.code(0)?;
            let is_there = shown.out.contains("default: stamp") && shown.err.is_empty();
            let is_gone = shown.out.is_empty() && shown.err.starts_with("netoken is not attached");
            // Where it takes long, as in an emulated machine, one comes after the other.
            let is_warned = shown.err.contains("may be shown half done");
            ensure!(is_there || is_gone || is_warned, "{shown:#?}");
        }
        changes.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Neither those before it nor those behind it; and a pipe that nobody reads does not make a success of it.
pub fn an_attached_instance_that_cannot_be_read_does_not_hide_the_others() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = format!("guard --netns {} -i c0", world.ns);
    for name in ["a", "b", "c"] {
        world.ok(&format!("-i c0 --attach --quiet --instance {name}"))?;
        world.lab.ok(&format!("{guard} --attach --hook tc --instance {name} --rules {}", rules.display()))?;
    }
    for (query, map, counters) in [
        (world.args("-i c0 --query"), "policies", "SYNs"),
        (format!("{guard} --query"), "guard_counters", "seen"),
    ] {
        fs::remove_file(world.lab.run.join("bpf/b").join(map))?;
        let shown = said(&mut world.lab.netoken(&query))?.code(1)?;
        expect(
            &shown.out,
            &[&format!("instance 'a': 0 {counters}"), &format!("instance 'c': 0 {counters}")],
        )?;
        ensure!(!shown.out.contains("instance 'b'"), "{shown:#?}");
        expect(&shown.err, &[map])?;
        for flags in ["", " --json"] {
            let (reader, writer) = pipe()?;
            drop(reader);
            let query = format!("{query}{flags}");
            said_to(world.lab.netoken(&query).stdout(writer))?.code(1).context(query)?;
        }
    }
    Ok(())
}

pub fn an_interface_that_is_down_is_told() -> Result<()> {
    let world = World::new()?;
    let attach =
        |flags: &str| said(&mut world.lab.netoken(&world.args(&format!("-i c0 --attach --quiet {flags}"))));
    let up = attach("")?.code(0)?;
    ensure!(!up.err.contains("is down"), "{up:#?}");
    sh(&format!("ip -n {} link set c0 down", world.ns))?;
    for flags in ["", "--json"] {
        let down = attach(flags)?.code(0)?;
        let notes = down.err.lines().filter(|line| line.starts_with("c0 is down: ")).count();
        ensure!(notes == 1, "{down:#?}");
        // The advice is good.
        let advice = down.err.lines().find_map(|line| line.strip_prefix("c0 is down: ")?.split_once(": "));
        sh(advice.context("no advice")?.1)?;
        ensure!(!attach(flags)?.err.contains("is down"), "{advice:?} did not help");
        sh(&format!("ip -n {} link set c0 down", world.ns))?;
    }
    Ok(())
}

pub fn a_setting_that_an_attach_changes_is_told() -> Result<()> {
    let world = World::new()?;
    for (flags, change) in [
        ("--exid 0x1234 --sample 7", None),
        ("--exid 0x1234 --sample 7", None),
        // What is not said is as it was.
        ("", None),
        ("--sample 1", Some("--sample from 7 to 1")),
        (
            "--option-kind 254 --exid 0x4e54",
            Some("--option-kind from 253 to 254, --exid from 0x1234 to 0x4e54"),
        ),
        ("", None),
        ("--option-kind 253", Some("--option-kind from 254 to 253")),
    ] {
        let attached =
            said(&mut world.lab.netoken(&world.args(&format!("-i c0 --attach --quiet {flags}"))))?.code(0)?;
        let told: Vec<&str> = attached.err.lines().filter(|line| line.contains("changed")).collect();
        let expected = change.map(|change| format!("c0: this attach changed {change}"));
        ensure_eq!(told, Vec::from_iter(expected.as_deref()), "what '{flags}' said: {attached:#?}");
    }
    // One of another instance is not replaced.
    let other =
        said(&mut world.lab.netoken(&world.args("-i c0 --attach --quiet --sample 3 --instance blue")))?;
    ensure!(!other.err.contains("changed"), "{other:#?}");
    Ok(())
}

/// Both sides of an instance go by the same.
pub fn slots_that_change_are_told_and_the_window_is_the_guards() -> Result<()> {
    let world = World::new()?;
    let rules = |slots: &str| world.lab.file("guard.toml", format!("slots = {{ {slots} }}\n{OBSERVE}"));
    let place = format!("guard --netns {} -i c0", world.ns);
    let path = rules("length = 16, behind = 2, ahead = 1")?.display().to_string();
    let told = |command: &str| -> Result<Vec<String>> {
        let said = said(&mut world.lab.netoken(command))?.code(0)?;
        let is_told = |line: &&str| line.contains("slots");
        Ok(said.err.lines().filter(is_told).map(str::to_string).collect())
    };
    let length = |now: u32, before: u32| {
        format!("slots of keyed tokens have {now} s now, and had {before} s; who checks tokens has to agree")
    };
    let window = "tokens are accepted 2 slots behind and 1 ahead now, and were 1 slots behind and 1 ahead";
    let of_default = |what: &str| vec![format!("instance 'default': {what}")];

    ensure_eq!(told(&format!("{place} --attach --rules {path}"))?, Vec::<String>::new(), "a new instance");
    let stamp = |slot: u32| told(&world.args(&format!("-i c0 --attach --quiet --slot {slot}")));
    ensure_eq!(stamp(16)?, Vec::<String>::new(), "the length as before");
    ensure_eq!(stamp(32)?, of_default(&length(32, 16)), "another length");
    let shown = world.lab.ok("guard --show")?;
    ensure!(shown.contains("slots = { length = 32, behind = 2, ahead = 1 }"), "{shown}");
    rules("length = 16, behind = 1, ahead = 1")?;
    let back = "tokens are accepted 1 slots behind and 1 ahead now, and were 2 slots behind and 1 ahead";
    let both = format!("{}; {back}", length(16, 32));
    ensure_eq!(told(&format!("guard --load --rules {path}"))?, of_default(&both), "a load");
    rules("length = 16, behind = 2, ahead = 1")?;
    ensure_eq!(told(&format!("{place} --attach --rules {path}"))?, of_default(window), "the guard's attach");
    Ok(())
}
