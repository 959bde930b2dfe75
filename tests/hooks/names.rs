//! Names that others give, in whatever encoding: the kernel takes nearly any byte.

use std::os::fd::AsFd;

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

use crate::foreign::{add_filter, ifindex, load};
use crate::lab::Running;
use crate::look::{expect_no_state, expect_ours, records};
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// In Latin-1, and so no UTF-8.
const NAME: &[u8] = b"Z\xfcrich";

/// To c1 an alias, another name and a name like that, and to c0 a filter of somebody else.
fn give_names(world: &World) -> Result<()> {
    let (ns, index) = (&world.ns, ifindex(world, "c0")?);
    sh(&format!(
        r#"name=$(printf 'Z\374rich')
        ip -n {ns} link set dev c1 alias "$name" && ip -n {ns} link property add dev c1 altname "$name-2" &&
        ip -n {ns} link set dev c1 down && ip -n {ns} link set dev c1 name "$name""#
    ))?;
    let program = load("theirs")?;
    world.lab.within(ns, || add_filter(index, 1, libc::ETH_P_ALL, program.as_fd(), NAME))
}

pub fn names_that_are_no_text_hinder_no_command() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let mut stream = Running::start(&mut world.lab.netoken(&world.args("-i c0 --attach --priority 9")))?;
    stream.wait_for("the heads", |line| line.contains("VERDICT"))?;
    give_names(&world)?;
    // By the second it has looked at what has changed.
    for _ in 0..2 {
        world.syns(1)?;
        stream.wait_for("a SYN", |line| line.contains("stamped") && line.contains(" c0 "))?;
    }
    stream.signal(Signal::SIGINT)?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code; it said {lines:#?}");

    for query in [world.args("--query --json"), "--query --json".to_string()] {
        let hooks = records(&world.lab.ok(&query)?, "hook")?;
        let here: Vec<_> = hooks.iter().filter(|hook| hook["netns"] == *world.ns).collect();
        ensure_eq!(here.len(), 1, "hooks in {hooks:#?}");
        ensure_eq!(here[0]["filters_before"], 1, "filters of others");
    }
    world.lab.ok(&format!("guard --netns {} --query", world.ns))?;
    world.ok("-i c0 --attach --quiet")?;
    expect_ours(&world.ns, "c0", 1)?;
    let said = world.fails("-i c2 --query")?;
    ensure!(said.contains("did you mean c0"), "{said}");
    world.ok("-i c0 --detach")?;
    expect_ours(&world.ns, "c0", 0)?;
    world.ok("-i c0 --attach --quiet")?;
    let said = String::from_utf8(world.run("--destroy")?.stderr)?;
    ensure!(said.contains("c0: filter removed, clsact qdisc kept: 1 other filter"), "{said}");
    expect_no_state(&world.lab)
}

/// An interface may be renamed by the root of a container, and is listed on the terminal of the host's.
pub fn names_have_no_power_over_a_terminal() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    sh(&format!(
        r#"name=$(printf 'c\033[31m'); ip -n {0} link set dev c1 down && ip -n {0} link set dev c1 name "$name""#,
        world.ns
    ))?;
    let shown = r"c\u{1b}[31m";
    let said = String::from_utf8(world.run("-i c\x1b[31m --attach --quiet")?.stderr)?;
    ensure!(said.contains(&format!("attached to {shown} egress")), "{said}");
    for said in [said, world.ok("--query")?, world.fails("-i x --query")?, world.ok("--query --json")?] {
        ensure!(!said.contains('\x1b') && said.contains("u{1b}[31m"), "{said}");
    }
    Ok(())
}
