//! Many interfaces: what is the same for all of them is done once.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::lab::{Lab, OBSERVE, ip};
use crate::look::{expect_bare, expect_ours, records};
use crate::support::{ensure_eq, share_of};
use crate::world::World;

/// Of cables, each with two interfaces.
const MANY: usize = 300;
/// So many times fewer are few.
const TIMES: usize = 10;

/// Ids of the programs, in the order of the interfaces; `command` is empty for the stamp.
pub fn programs(world: &World, command: &str) -> Result<Vec<u64>> {
    let kind = if command.is_empty() { "hook" } else { "guard_hook" };
    let out = world.lab.ok(&format!("{command} --netns {} --query --json", world.ns))?;
    let mut hooks = Vec::new();
    for hook in records(&out, kind)? {
        hooks.push((hook["interface"].to_string(), hook["program"].as_u64().context("no program")?));
    }
    hooks.sort_unstable();
    Ok(hooks.into_iter().map(|(_, program)| program).collect())
}

pub fn interfaces_that_are_told_the_same_share_a_program() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = |hook: &str| format!("--attach --hook {hook} --rules {}", rules.display());
    let of_both = |command: &str| {
        let programs = programs(&world, command)?;
        ensure!(programs.len() == 2, "{command} --query: {programs:?}");
        anyhow::Ok((programs[0], programs[1]))
    };
    for (command, attach) in [("", "--attach --quiet"), ("guard", &guard("tc")), ("guard", &guard("xdp"))] {
        world.lab.ok(&format!("{command} --netns {} -i c0 -i c1 {attach}", world.ns))?;
        let (one, other) = of_both(command)?;
        ensure_eq!(one, other, "the programs of '{command} {attach}'");
    }
    // What each was told stays.
    world.ok("-i c1 --attach --quiet --sample 3")?;
    world.ok("-i c0 -i c1 --attach --quiet")?;
    let (one, other) = of_both("")?;
    ensure!(one != other, "two that were told otherwise are one program");
    // One goes without the other.
    world.ok("-i c0 -i c1 --attach --quiet --sample 1")?;
    let (one, other) = of_both("")?;
    ensure_eq!(one, other, "the programs");
    world.ok("-i c0 --destroy")?;
    world.lab.ok(&format!("guard --netns {} -i c0 --destroy", world.ns))?;
    expect_bare(&world.ns, "c0")?;
    expect_ours(&world.ns, "c1", 1)?;
    ensure_eq!(programs(&world, "")?, [other], "what is left");
    ensure_eq!(programs(&world, "guard")?.len(), 1, "guards that are left");
    Ok(())
}

/// The time that each takes must not grow with their number.
pub fn many_interfaces_take_no_longer_each() -> Result<()> {
    let many = share_of(MANY)?.max(TIMES);
    let (fast, slow) = (look(many / TIMES)?, look(many)?);
    let times = slow.as_secs_f64() / fast.as_secs_f64();
    // As many times as long would be fair. Where each is found by a list of all, it is more than four times that.
    let fair = TIMES as f64;
    ensure!(times < fair * 2.0, "{slow:?} for {many} cables, {fast:?} for {}", many / TIMES);
    Ok(())
}

/// How long the commands take that look at every interface.
fn look(cables: usize) -> Result<Duration> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("many")?;
    ip(&ns, (0..cables).map(|at| format!("link add a{at} type veth peer name b{at}")))?;
    let rules = lab.file("guard.toml", OBSERVE)?;
    lab.ok(&format!("guard --netns {ns} -i a0 --attach --rules {}", rules.display()))?;
    let query = || {
        let begun = Instant::now();
        lab.ok(&format!("guard --netns {ns} --query")).map(|_| begun.elapsed())
    };
    let times = (0..3).map(|_| query()).collect::<Result<Vec<_>>>()?;
    times.into_iter().min().context("no time")
}
