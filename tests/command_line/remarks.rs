//! What a person has to be told of guards, rules and keys beside what was asked for.

use anyhow::{Context, Result, ensure};

use crate::json::checked;
use crate::lab::OBSERVE;
use crate::look::records;
use crate::said::{Said, said};
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
