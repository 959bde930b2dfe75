//! The stamp at tcx, where it is in front of all filters.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use libbpf_sys::{BPF_F_BEFORE, BPF_TCX_EGRESS};
use netoken::hooks::netlink::Side;
use netoken::hooks::tcx;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::foreign::{ifindex, tcx_link, tcx_link_of};
use crate::lab::Running;
use crate::look::{counter, expect_bare, expect_no_state, expect_ours, has_clsact, ours, records};
use crate::many::programs;
use crate::replace::while_connecting;
use crate::support::{ensure_eq, sh};
use crate::world::World;

const TOKEN: &str = "00112233aabbccdd";

/// Ids of the programs at tcx, in their order.
fn there(world: &World, iface: &str) -> Result<Vec<u32>> {
    let index = ifindex(world, iface)?.cast_unsigned();
    world.lab.within(&world.ns, || tcx::ids(index, Side::Egress))
}

/// The only hook of ours that a query shows.
fn hook(world: &World) -> Result<Value> {
    let hooks = records(&world.ok("-i c0 --query --json")?, "hook")?;
    ensure!(hooks.len() == 1, "one hook expected: {hooks:#?}");
    Ok(hooks[0].clone())
}

/// Behind all that is there; with BPF_F_BEFORE in front of it.
fn somebody_else(world: &World, iface: &str, flags: u32) -> Result<OwnedFd> {
    let index = ifindex(world, iface)?;
    world.lab.within(&world.ns, || tcx_link(index, BPF_TCX_EGRESS, flags))
}

pub fn attaching_twice_keeps_the_hook_and_destroy_leaves_nothing() -> Result<()> {
    let world = World::new()?;
    let said =
        String::from_utf8(world.run(&format!("-i c0 --attach --quiet --hook tcx --token {TOKEN}"))?.stderr)?;
    ensure!(said.contains("attached to c0 egress, at tcx"), "{said}");
    world.expect_token(TOKEN, "the token")?;
    // No qdisc, no filter.
    expect_bare(&world.ns, "c0")?;
    let first = hook(&world)?;
    ensure_eq!(first["hook"], "tcx egress", "the hook of {first}");
    ensure!(first["handle"].is_null() && first["priority"].is_null(), "{first}");
    let said = String::from_utf8(world.run("-i c0 --attach --quiet --sample 10")?.stderr)?;
    ensure!(said.contains("replaced in place on c0 egress, at tcx"), "{said}");
    ensure!(said.contains("--sample from 1 to 10"), "{said}");
    let second = hook(&world)?;
    ensure!(second["hook"] == first["hook"] && second["program"] != first["program"], "{second}");
    ensure_eq!(there(&world, "c0")?.len(), 1, "programs at tcx");
    world.expect_token(TOKEN, "the token after that")?;
    world.expect_counter("default", "stamped", 2, "SYNs stamped in all")?;

    world.ok("-i c0 --detach")?;
    ensure_eq!(there(&world, "c0")?.len(), 0, "programs at tcx after --detach");
    world.ok("-i c0 --attach --quiet --hook tcx")?;
    world.expect_token(TOKEN, "the token that was kept")?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("c0: filter removed"), "{said}");
    ensure_eq!(there(&world, "c0")?.len(), 0, "programs at tcx after --destroy");
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn programs_of_others_stay_in_their_order_behind_ours() -> Result<()> {
    let world = World::new()?;
    let _links = (somebody_else(&world, "c0", 0)?, somebody_else(&world, "c0", 0)?);
    let before = there(&world, "c0")?;
    ensure_eq!(before.len(), 2, "programs of others");
    for command in
        ["--attach --quiet --hook tcx", "--attach --quiet", "--detach", "--attach --quiet --hook tcx"]
    {
        world.ok(&format!("-i c0 {command}"))?;
        let mut now = there(&world, "c0")?;
        if !command.contains("detach") {
            let ours = hook(&world)?;
            ensure_eq!(ours["tcx_before"], 0, "programs in front of ours after {command}");
            ensure_eq!(now.remove(0), ours["program"], "the first program after {command}");
        }
        ensure_eq!(now, before, "the programs of others after {command}");
    }
    world.ok("-i c0 --destroy")?;
    ensure_eq!(there(&world, "c0")?, before, "the programs of others after --destroy");
    expect_no_state(&world.lab)
}

/// By which it is found where the interface is moved to.
pub fn at_tcx_each_interface_has_a_program_of_its_own() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 -i c1 --attach --quiet --hook tcx")?;
    let at_tcx = programs(&world, "")?;
    ensure!(at_tcx.len() == 2 && at_tcx[0] != at_tcx[1], "{at_tcx:?}");
    // There they stay.
    world.ok("-i c0 -i c1 --attach --quiet")?;
    let again = programs(&world, "")?;
    ensure!(again.len() == 2 && again[0] != again[1] && again[0] > at_tcx[1], "{at_tcx:?}, then {again:?}");
    Ok(())
}

pub fn it_moves_between_clsact_and_tcx_and_no_syn_passes_unstamped() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    while_connecting(&world, 10, || {
        world.ok("-i c0 --attach --quiet --hook tcx")?;
        expect_bare(&world.ns, "c0")?;
        world.ok("-i c0 --attach --quiet --hook clsact")?;
        ensure_eq!(there(&world, "c0")?.len(), 0, "programs at tcx");
        expect_ours(&world.ns, "c0", 1)
    })
}

pub fn moving_leaves_a_clsact_of_others() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    world.ok("-i c0 --attach --quiet")?;
    let said = String::from_utf8(world.run("-i c0 --attach --quiet --hook tcx")?.stderr)?;
    ensure!(said.contains("moved on c0 egress, at tcx"), "{said}");
    expect_ours(&world.ns, "c0", 0)?;
    ensure!(has_clsact(&world.ns, "c0")?, "the qdisc of somebody else is gone");
    // A place is one among filters.
    let said = String::from_utf8(world.run("-i c0 --attach --quiet --priority 7")?.stderr)?;
    ensure!(said.contains("moved on c0 egress (priority 7"), "{said}");
    ensure_eq!(there(&world, "c0")?.len(), 0, "programs at tcx");
    world.ok("-i c0 --destroy")?;
    ensure!(has_clsact(&world.ns, "c0")?, "the qdisc of somebody else is gone");
    expect_no_state(&world.lab)
}

pub fn a_second_interface_that_is_full_leaves_the_first_as_it_was() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok(&format!("-i c0 --attach --quiet --priority 10 --handle 3 --token {TOKEN}"))?;
    let place = |line: &str| line.split(" netoken").next().unwrap_or_default().to_string();
    let before = place(&ours(&world.ns, "c0")?[0]);
    // bpf_mprog_max() of include/linux/bpf_mprog.h.
    let mut links: Vec<OwnedFd> = (0..63).map(|_| somebody_else(&world, "c1", 0)).collect::<Result<_>>()?;
    let said = world.fails("-i c0 -i c1 --attach --quiet --hook tcx --token 1111111111111111")?;
    ensure!(said.contains("c1") && said.contains("no room for more"), "{said}");
    ensure_eq!(there(&world, "c0")?.len(), 0, "programs at tcx");
    ensure_eq!(place(&ours(&world.ns, "c0")?[0]), before, "the place of the filter on the first");
    world.expect_token(TOKEN, "the token as before")?;

    // And back: from tcx.
    links.clear();
    world.ok("-i c0 --attach --quiet --hook tcx")?;
    // Of others, on either side of it.
    for flags in [0, BPF_F_BEFORE, BPF_F_BEFORE] {
        links.push(somebody_else(&world, "c0", flags)?);
    }
    let before = there(&world, "c0")?;
    ensure_eq!(before.len(), 4, "programs at tcx");
    sh(&format!("tc -n {} qdisc add dev c1 ingress", world.ns))?;
    world.fails("-i c0 -i c1 --attach --quiet --hook clsact --token 1111111111111111")?;
    ensure_eq!(there(&world, "c0")?, before, "the program at tcx");
    expect_bare(&world.ns, "c0")?;
    world.expect_token(TOKEN, "the token as before")
}

pub fn two_instances_can_be_at_two_hooks() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    world.ok("-i c0 --attach --quiet --token 2222222222222222 --instance blue --hook tcx")?;
    world.expect_token("2222222222222222", "the token of the one in front")?;
    let read = |instance, name| counter(&world.lab, &world.ns, instance, name);
    ensure_eq!(read("blue", "stamped")?, 1, "stamped by blue");
    ensure_eq!(read("default", "already_stamped")?, 1, "found stamped by default");
    let hooks = records(&world.ok("-i c0 --query --json")?, "hook")?;
    ensure_eq!(hooks.len(), 2, "hooks");
    // Ours are no strangers to each other.
    ensure!(hooks.iter().all(|hook| hook["tcx_before"] == 0 && hook["filters_before"] == 0), "{hooks:#?}");
    world.ok("-i c0 --destroy --instance blue")?;
    world.expect_token("1111111111111111", "the token of the one that is left")?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_program_that_somebody_removes_is_reported() -> Result<()> {
    let world = World::new()?;
    let mut stream = Running::start(&mut world.lab.netoken(&world.args("-i c0 --attach --hook tcx")))?;
    stream.wait_for("the heads", |line| line.contains("VERDICT"))?;
    world.syns(1)?;
    stream.wait_for("a SYN", |line| line.contains("stamped") && line.contains(" c0 "))?;
    let (index, id) = (ifindex(&world, "c0")?, there(&world, "c0")?[0]);
    let program = libbpf_rs::Program::fd_from_id(id)?;
    world.lab.within(&world.ns, || {
        // SAFETY: the descriptor is open, and a null pointer is no options.
        let result = unsafe {
            libbpf_sys::bpf_prog_detach_opts(program.as_raw_fd(), index, BPF_TCX_EGRESS, std::ptr::null())
        };
        ensure!(result == 0, "removing it: {result}");
        Ok(())
    })?;
    drop(program);
    stream.wait_for("a word about it", |line| {
        line.contains("c0: ") && line.contains("our filter was removed")
    })?;
    ensure_eq!(stream.end()?.0, Some(1), "exit code with nothing left");
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// Starts a stream and moves its interface away; returns where that is now.
fn moved_away(world: &mut World, flags: &str) -> Result<(Running, String)> {
    let args = world.args(&format!("-i c0 --attach --hook tcx {flags}"));
    let mut stream = Running::start(&mut world.lab.netoken(&args))?;
    stream.wait_for("the attach", |line| line.contains("attached"))?;
    world.syns(1)?;
    stream.wait_for("a SYN", |line| line.contains("stamped") && line.contains("10.77.0.2"))?;
    let elsewhere = world.lab.netns("elsewhere")?;
    sh(&format!("ip -n {} link set c0 netns {elsewhere}", world.ns))?;
    Ok((stream, elsewhere))
}

pub fn a_program_that_moves_with_its_interface_is_reported() -> Result<()> {
    let mut world = World::new()?;
    let (mut stream, elsewhere) = moved_away(&mut world, "")?;
    let said = stream.wait_for("a word about it", |line| {
        line.contains(&format!("c0: moved to network namespace {elsewhere}, where our program goes on"))
    })?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(1), "exit code with nothing left here; it said {lines:#?}");
    let index = world.lab.within(&elsewhere, || Ok(nix::net::if_::if_nametoindex("c0")?))?;
    let there = || world.lab.within(&elsewhere, || tcx::ids(index, Side::Egress));
    ensure_eq!(there()?.len(), 1, "programs at tcx where it is now");
    // The advice is good.
    let (_, advice) = said.split_once("netoken ").context("no advice")?;
    world.lab.ok(advice)?;
    ensure_eq!(there()?.len(), 0, "programs at tcx where it is now");
    expect_no_state(&world.lab)?;

    let mut world = World::new()?;
    let (mut stream, elsewhere) = moved_away(&mut world, "--json")?;
    let line = stream.wait_for("the same as JSON", |line| line.contains("interface\",\"interface"))?;
    let change: Value = serde_json::from_str(&line)?;
    ensure!(change["event"] == "moved" && change["netns"] == elsewhere.as_str(), "{change}");
    ensure!(change["interface"] == "c0" && change["new_name"] == "c0", "{change}");
    world.lab.ok(&format!("--netns {elsewhere} --destroy")).map(drop)
}

pub fn a_program_that_has_moved_is_detached_on_exit() -> Result<()> {
    let mut world = World::new()?;
    let (stream, elsewhere) = moved_away(&mut world, "--detach-on-exit")?;
    expect_detached_there(&world, stream, &elsewhere, 1)?;

    // A script is told where it was as well.
    let mut world = World::new()?;
    let (stream, elsewhere) = moved_away(&mut world, "--detach-on-exit --json")?;
    let (_, lines) = stream.end()?;
    let removed = lines.iter().find(|line| line.contains("\"removed\"")).context("no record")?;
    let record = format!(
        r#"{{"type":"removed","interface":"c0","netns":"{elsewhere}","filters":1,"qdisc":"absent"}}"#
    );
    ensure_eq!(*removed, record, "the record of {lines:#?}");

    // After its last look: a reload waits for the lock, and a signal ends that.
    let mut world = World::new()?;
    let path =
        world.lab.file("policy.toml", "default = { action = 'stamp', token = '1111111111111111' }\n")?;
    let args = format!("-i c0 --attach --hook tcx --detach-on-exit --policy {}", path.display());
    let mut stream = Running::start(&mut world.lab.netoken(&world.args(&args)))?;
    stream.wait_for("the heads", |line| line.contains("VERDICT"))?;
    let lock = world.lab.hold_lock()?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("that it waits", |line| line.contains("waiting for"))?;
    let elsewhere = world.lab.netns("elsewhere")?;
    sh(&format!("ip -n {} link set c0 netns {elsewhere}", world.ns))?;
    stream.signal(Signal::SIGTERM)?;
    stream.wait_for("the end of the reload", |line| line.contains("stopped while waiting for"))?;
    drop(lock);
    expect_detached_there(&world, stream, &elsewhere, 0)
}

fn expect_detached_there(world: &World, stream: Running, elsewhere: &str, expected: i32) -> Result<()> {
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(expected), "exit code; it said {lines:#?}");
    let told = format!("c0 in network namespace {elsewhere}: filter removed");
    ensure!(lines.iter().any(|line| line.contains(&told)), "'{told}' expected: {lines:#?}");
    let index = world.lab.within(elsewhere, || Ok(nix::net::if_::if_nametoindex("c0")?))?;
    let there = world.lab.within(elsewhere, || tcx::ids(index, Side::Egress))?;
    ensure_eq!(there.len(), 0, "programs at tcx where it is now");
    expect_no_state(&world.lab)
}

/// By a program of ours that a BPF link of somebody else holds there.
pub fn an_attach_that_cannot_remove_another_of_ours_changes_nothing() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok(&format!("-i c0 -i c1 --attach --quiet --hook tcx --token {TOKEN}"))?;
    let index = ifindex(&world, "c0")?;
    let of_c1 = libbpf_rs::Program::fd_from_id(there(&world, "c1")?[0])?;
    let link = world.lab.within(&world.ns, || tcx_link_of(of_c1.as_fd(), index, BPF_TCX_EGRESS, 0))?;
    let before = there(&world, "c0")?;
    ensure_eq!(before.len(), 2, "programs at tcx");
    let said = world.fails("-i c0 --attach --quiet")?;
    ensure!(said.contains("removing our program at tcx of c0"), "{said}");
    ensure_eq!(there(&world, "c0")?, before, "the programs at tcx");
    world.expect_token(TOKEN, "the token as before")?;
    drop((link, of_c1));
    world.ok("-i c0 -i c1 --destroy")?;
    ensure_eq!(there(&world, "c0")?.len(), 0, "programs at tcx after --destroy");
    expect_no_state(&world.lab)
}

/// Of a kernel before 6.6.
pub fn without_tcx_the_error_says_so() -> Result<()> {
    let world = World::new()?;
    let said = world.fails("-i c0 --attach --quiet --hook tcx")?;
    ensure!(said.contains("came with Linux 6.6") && said.contains("--hook clsact"), "{said}");
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}
