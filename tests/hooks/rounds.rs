//! Many rounds leave nothing behind: no filter, qdisc, pin, mount, descriptor, program or map.

use std::fs;
use std::os::fd::AsFd;

use anyhow::{Context, Result, ensure};
use libbpf_rs::MapCore;
use netoken::hooks::clsact::{Hooks, Place};
use netoken::hooks::link::find_link;
use netoken::hooks::netlink::Side;
use netoken::hooks::qdisc::Qdisc;
use netoken::hooks::unused::{Lost, remove_unused};
use netoken::policy::Policy;
use netoken::program::{Program, Settings};
use netoken::state::{DIR_VARIABLE, State};
use netoken::token::Token;

use crate::look::{expect_bare, expect_no_state, expect_ours, expect_unloaded, map_id};
use crate::support::{ensure_eq, share_of};
use crate::world::World;

const ROUNDS: usize = 200;

pub fn two_hundred_rounds_of_commands_leave_nothing() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let counters = map_id(&world.lab, "default", "counters")?;
    for round in 0..share_of(ROUNDS)? {
        world.ok("-i c0 --attach --quiet")?;
        world.ok("-i c0 --attach --quiet")?;
        if round % 20 == 0 {
            expect_ours(&world.ns, "c0", 1)?;
        }
        world.ok("-i c0 --detach")?;
    }
    expect_ours(&world.ns, "c0", 0)?;
    ensure_eq!(map_id(&world.lab, "default", "counters")?, counters, "the counters' map");
    // Also when the kernel still has many programs to free.
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab).with_context(|| format!("destroy said: {said}"))?;
    expect_unloaded(counters)
}

/// The same through the library, where a descriptor that is lost stays lost. In a process of its own: other
/// cases open descriptors in this one.
pub fn two_hundred_rounds_in_one_process_leave_nothing() -> Result<()> {
    let world = World::new()?;
    let output = std::process::Command::new(std::env::current_exe()?)
        .env(DIR_VARIABLE, &world.lab.run)
        .env(ALONE, &world.ns)
        .output()
        .context("running the rounds")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)?;
    let maps = String::from_utf8(output.stdout)?;
    ensure_eq!(maps.lines().count(), 2, "map ids in {maps}");
    maps.lines().try_for_each(|id| expect_unloaded(id.parse()?))
}

/// Names the namespace for [`alone`]; without it this is an ordinary test run.
pub const ALONE: &str = "NETOKEN_TEST_ROUNDS_IN";

/// The rounds, in this process. Prints the ids of the maps.
pub fn alone(ns: &str) -> Result<()> {
    netoken::netns::Netns::open(ns)?.enter()?;
    // The first round opens what libraries keep; it counts as the ground.
    println!("{}", rounds(1)?);
    let before = descriptors()?;
    println!("{}", rounds(share_of(ROUNDS)?)?);
    let after = descriptors()?;
    ensure!(before == after, "descriptors before: {before:#?}, after: {after:#?}");
    Ok(())
}

fn descriptors() -> Result<Vec<String>> {
    let mut open = Vec::new();
    for entry in fs::read_dir("/proc/self/fd")? {
        let target = fs::read_link(entry?.path());
        open.extend(target.ok().map(|path| path.display().to_string()));
    }
    // The one that lists them.
    open.retain(|path| !path.starts_with("/proc/") || !path.ends_with("/fd"));
    open.sort();
    Ok(open)
}

/// Attaches, replaces and detaches that often, then destroys. Returns the id of the counters' map.
fn rounds(count: usize) -> Result<u32> {
    let (state, lock) = State::create()?;
    let instance = state.instance("default");
    let mut hooks = Hooks::open(&state, Side::Egress)?;
    let link = find_link(&hooks.links()?, "c0", "")?.clone();
    instance.create()?;
    let load = || Program::load(Settings::default(), Some(&instance.pins));
    let mut programs = [load()?, load()?];
    let id = programs[0].maps.counters.info()?.info.id;
    for round in 0..count {
        // Loading takes most of the time; what is attached and replaced is another one in every round.
        if round % 10 == 9 {
            programs[1] = load()?;
        }
        programs.swap(0, 1);
        for (program, replaced) in programs.iter().zip([false, true]) {
            program.maps.set_policy(&Policy::stamp_all(Token::DEFAULT))?;
            let attachment = hooks.attach(&lock, &link, "default", program.as_fd(), Place::default())?;
            ensure_eq!(attachment.replaced(), replaced, "whether it was replaced");
        }
        ensure_eq!(hooks.attached(&link, "default")?.len(), 1, "filters of ours");
        ensure_eq!(hooks.detach(&lock, &link, "default")?, 1, "filters removed");
    }
    ensure_eq!(hooks.destroy_clsact(&lock, &link)?, Qdisc::Removed, "what became of the qdisc");
    drop(programs);
    ensure!(
        remove_unused(&state, &lock, "default", &Lost::now(&state)?)?.is_empty(),
        "the instance is still in use"
    );
    drop(hooks);
    state.remove_if_empty(lock)?;
    Ok(id)
}
