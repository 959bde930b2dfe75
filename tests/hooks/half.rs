//! Nothing half done stays, and nothing that was kept is lost: policy and counters live from the first attach
//! to the last destroy.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::foreign::{add_filter, ifindex};
use crate::lab::{OBSERVE, wait_until};
use crate::look::{
    counter, expect_bare, expect_no_state, expect_ours, expect_unloaded, filters, map_id, ours, records,
};
use crate::support::{ensure_eq, sh};
use crate::world::World;

const TOKEN: &str = "00112233aabbccdd";

pub fn a_missing_second_interface_leaves_nothing() -> Result<()> {
    let world = World::new()?;
    let said = world.fails("-i c0 -i c9 --attach --quiet")?;
    ensure!(said.contains("'c9'") && said.contains("did you mean c0"), "{said}");
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_command_for_a_missing_interface_makes_no_state() -> Result<()> {
    let world = World::new()?;
    for command in ["--query", "--detach", "--destroy"] {
        let said = world.fails(&format!("-i c0 -i c9 {command}"))?;
        ensure!(said.contains("'c9'"), "{command}: {said}");
        expect_no_state(&world.lab).with_context(|| command.to_string())?;
    }
    Ok(())
}

/// On the second interface, by a filter of another kind.
fn take_priority_20(world: &World) -> Result<()> {
    sh(&format!("tc -n {} qdisc add dev c1 clsact", world.ns))?;
    let add = format!("tc -n {} filter add dev c1 egress pref 20", world.ns);
    sh(&format!("{add} protocol ip u32 match ip dst 192.0.2.1/32 classid 1:1")).map(drop)
}

pub fn a_second_interface_that_refuses_leaves_nothing() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    take_priority_20(&world)?;
    let said = world.fails("-i c0 -i c1 --attach --quiet --priority 20")?;
    ensure!(said.contains("c1") && said.contains("has that place"), "{said}");
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_second_interface_that_refuses_leaves_the_first_as_it_was() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok(&format!("-i c0 --attach --quiet --priority 10 --token {TOKEN}"))?;
    let before = ours(&world.ns, "c0")?;
    take_priority_20(&world)?;
    world.fails("-i c0 -i c1 --attach --quiet --priority 20 --exid 0x1234 --token 1111111111111111")?;
    let place = |lines: &[String]| {
        lines.iter().map(|l| l.split(" netoken").next().unwrap_or("").to_string()).collect()
    };
    let (before, after): (Vec<String>, Vec<String>) = (place(&before), place(&ours(&world.ns, "c0")?));
    world.expect_token(TOKEN, "the token, under its own ExID")?;
    ensure_eq!(after, before, "the place of the filter on the first");
    Ok(())
}

pub fn a_failed_attach_keeps_what_detach_kept() -> Result<()> {
    let world = World::new()?;
    world.ok(&format!("-i c0 --attach --quiet --token {TOKEN}"))?;
    world.syns(4)?;
    world.ok("-i c0 --detach")?;
    world.fails("-i nothing --attach --quiet")?;
    world.ok("-i c0 --attach --quiet")?;
    world.expect_token(TOKEN, "the token after a failed attach")?;
    world.expect_counter("default", "stamped", 5, "the counter after a failed attach")?;
    Ok(())
}

/// Who makes tokens and who checks them go by the same slots.
pub fn a_failed_attach_leaves_the_slots_as_they_were() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    // Beside it there is no room for clsact.
    sh(&format!("tc -n {} qdisc add dev c1 ingress", world.ns))?;
    let slot_s = || -> Result<Value> {
        let clocks = records(&world.ok("--query --json")?, "clock")?;
        Ok(clocks.first().context("no clock in the query")?["slot_s"].clone())
    };
    let guard = |ifaces: &str, slot_s: u32| {
        let path = world.lab.file("guard.toml", format!("slots = {{ length = {slot_s} }}\n{OBSERVE}"))?;
        let args = format!("{ifaces} --attach --hook tc --rules {}", path.display());
        let output = world.lab.run(&format!("guard --netns {} {args}", world.ns))?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.success() || said.contains("ingress qdisc"), "{said}");
        Ok(output.status.success())
    };
    // Without a key nobody is shown a clock.
    world.lab.ok("key new edge")?;

    world.ok("-i c0 --attach --quiet")?;
    world.fails("-i c0 -i c1 --attach --quiet --slot 32")?;
    ensure_eq!(slot_s()?, 16, "slots after an attach of the stamp");
    ensure!(!guard("-i c0 -i c1", 8)?, "the guard is on c1");
    ensure_eq!(slot_s()?, 16, "slots after the first attach of the guard");
    ensure!(guard("-i c0", 8)?, "the guard is not on c0");
    ensure_eq!(slot_s()?, 8, "slots of the guard");
    ensure!(!guard("-i c0 -i c1", 4)?, "the guard is on c1");
    ensure_eq!(slot_s()?, 8, "slots after another attach of the guard");

    world.ok("-i c0 --destroy")?;
    world.fails("-i c0 -i c1 --attach --quiet --slot 32")?;
    ensure_eq!(slot_s()?, 8, "slots after an attach of the stamp beside the guard");
    let said = String::from_utf8(world.run("-i c0 --attach --quiet --slot 32")?.stderr)?;
    ensure!(said.contains("have 32 s now, and had 8 s"), "{said}");
    ensure_eq!(slot_s()?, 32, "slots at last");
    Ok(())
}

/// The guard has made the maps, which stay.
pub fn a_first_attach_that_fails_beside_a_guard_leaves_no_policy() -> Result<()> {
    let world = World::new()?;
    let path = world.lab.file("guard.toml", OBSERVE)?;
    let guard = |args: &str| world.lab.ok(&format!("guard --netns {} -i c0 {args}", world.ns));
    guard(&format!("--attach --hook xdp --rules {}", path.display()))?;
    sh(&format!("tc -n {} qdisc add dev c0 ingress", world.ns))?;
    let said = world.fails("-i c0 --attach --quiet --token 1111111111111111")?;
    ensure!(said.contains("ingress qdisc"), "{said}");
    let shown = String::from_utf8(world.lab.run("policy show")?.stderr)?;
    ensure!(shown.contains("has no policy"), "{shown}");
    world.ok("--query")?;

    sh(&format!("tc -n {} qdisc del dev c0 ingress", world.ns))?;
    let said = String::from_utf8(world.run("-i c0 --attach --quiet")?.stderr)?;
    ensure!(said.contains("with the default token"), "{said}");
    world.expect_token("4e45544f4b454e31", "the token of the next attach")?;
    world.ok("-i c0 --destroy")?;
    guard("--destroy")?;
    expect_no_state(&world.lab)
}

pub fn detach_keeps_policy_and_counters() -> Result<()> {
    let world = World::new()?;
    world.ok(&format!("-i c0 --attach --quiet --token {TOKEN}"))?;
    world.syns(4)?;
    world.ok("-i c0 --detach")?;
    expect_ours(&world.ns, "c0", 0)?;
    world.syns(3)?;
    world.ok("-i c0 --attach --quiet")?;
    world.expect_token(TOKEN, "the token after detach and attach")?;
    world.expect_counter("default", "syns", 5, "SYNs, without those in between")?;
    Ok(())
}

pub fn the_last_destroy_removes_policy_and_counters() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok(&format!("-i c0 -i c1 --attach --quiet --token {TOKEN}"))?;
    world.syns(4)?;
    let counters = map_id(&world.lab, "default", "counters")?;

    let begin = Instant::now();
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    let elsewhere =
        "instance 'default' is still used on another interface or in another network namespace: its policy";
    ensure!(said.contains(elsewhere) && said.contains("stay"), "{said}");
    // What is attached here it need not wait for; where it does, that is ten seconds.
    ensure!(begin.elapsed() < Duration::from_secs(9), "it took {:?}", begin.elapsed());
    world.expect_counter("default", "stamped", 4, "the counter after the first destroy")?;
    world.ok("-i c0 --attach --quiet")?;
    world.expect_token(TOKEN, "the token after the first destroy")?;

    world.ok("-i c0 --destroy")?;
    let said = String::from_utf8(world.run("-i c1 --destroy")?.stderr)?;
    ensure!(!said.contains("still used"), "{said}");
    expect_no_state(&world.lab)?;
    expect_unloaded(counters)?;
    world.ok("-i c0 --attach --quiet")?;
    ensure_eq!(counter(&world.lab, &world.ns, "default", "syns")?, 0, "the counter after the last destroy");
    world.expect_token("4e45544f4b454e31", "the token is the default again")?;
    Ok(())
}

pub fn a_destroy_says_if_the_other_program_uses_the_instance() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = |args: &str| world.lab.run(&format!("guard --netns {} -i c0 {args}", world.ns));
    let attach = || {
        let output = guard(&format!("--attach --hook tc --rules {}", rules.display()))?;
        ensure!(output.status.success(), "{output:?}");
        Ok(())
    };
    let said = |output: Output| String::from_utf8(output.stderr);
    let elsewhere = "on another interface or in another network namespace";

    attach()?;
    world.ok("-i c0 -i c1 --attach --quiet")?;
    let stamp = said(world.run("-i c0 --destroy")?)?;
    ensure!(stamp.contains(&format!("still used by its guard, and {elsewhere}: its policy")), "{stamp}");
    let stamp = said(world.run("-i c1 --destroy")?)?;
    ensure!(stamp.contains("still used by its guard: its policy and counters stay"), "{stamp}");
    world.ok("-i c0 --attach --quiet")?;
    let of_guard = said(guard("--destroy")?)?;
    ensure!(of_guard.contains("still used by its stamp: its rules, keys and counters stay"), "{of_guard}");
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// One for a protocol of its own, which has another place in the kernel.
pub fn an_attach_that_cannot_remove_the_old_one_changes_nothing() -> Result<()> {
    let world = World::new()?;
    world.ok(&format!("-i c0 --attach --quiet --priority 10 --handle 3 --token {TOKEN}"))?;
    add_for_ip(&world)?;
    let before = filters(&world.ns, "c0", "egress")?;
    ensure_eq!(before.len(), 2, "filters in {before:#?}");
    for place in ["--priority 50", "--priority 10 --handle 9", ""] {
        let said = world.fails(&format!("-i c0 --attach --quiet {place}"))?;
        ensure!(said.contains("removing our filter (priority 20"), "'{place}': {said}");
        ensure_eq!(filters(&world.ns, "c0", "egress")?, before, "the filters after '{place}'");
    }
    world.expect_token(TOKEN, "the token as before")?;
    Ok(())
}

pub fn an_interface_that_refuses_keeps_nothing_on_the_others() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 -i c1 --attach --quiet --priority 10")?;
    add_for_ip(&world)?;
    let guard = world.lab.run(&format!("guard --netns {} --destroy", world.ns))?;
    ensure!(guard.status.success(), "{guard:?}");
    let said = world.fails("-i c0 -i c1 --destroy")?;
    ensure!(said.contains("removing our filter (priority 20"), "{said}");
    ensure!(said.contains("c1: filter removed, clsact qdisc removed"), "{said}");
    expect_bare(&world.ns, "c1")?;
    // What is there and cannot be removed is not gone.
    let left = filters(&world.ns, "c0", "egress")?;
    ensure!(left.len() == 1 && left[0].contains("pref 20"), "{left:#?}");
    sh(&format!("tc -n {} filter del dev c0 egress", world.ns))?;
    world.ok("--destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// Puts the program that is on c0 there once more, for one protocol, as nobody here does.
fn add_for_ip(world: &World) -> Result<()> {
    let index = ifindex(world, "c0")?;
    let hooks = records(&world.ok("-i c0 --query --json")?, "hook")?;
    let id = hooks[0]["program"].as_u64().context("no program")?;
    let program = libbpf_rs::Program::fd_from_id(id as u32)?;
    world.lab.within(&world.ns, || add_filter(index, 20, libc::ETH_P_IP, program.as_fd(), b"theirs"))
}

/// Neither for what is attached in a namespace with a name, nor where only a process holds it.
pub fn a_destroy_waits_for_nothing_that_is_attached_elsewhere() -> Result<()> {
    let world = World::new()?;
    let mut holder = Command::new("unshare").args(["--net", "sleep", "60"]).spawn()?;
    let nameless = format!("/proc/{}/ns/net", holder.id());
    let both = [format!("--netns {} --iface s0", world.server_ns), format!("--netns {nameless} --iface lo")];
    let quick = (|| {
        let here = fs::metadata("/proc/thread-self/ns/net")?.ino();
        wait_until("a namespace of its own", || Ok((fs::metadata(&nameless)?.ino() != here).then_some(())))?;
        both.iter().try_for_each(|place| expect_quick(&world, place))
    })();
    holder.kill()?;
    holder.wait()?;
    quick
}

fn expect_quick(world: &World, elsewhere: &str) -> Result<()> {
    world.ok("-i c0 --attach --quiet")?;
    world.lab.ok(&format!("{elsewhere} --attach --quiet"))?;
    let begin = Instant::now();
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("instance 'default' is still used"), "{elsewhere}: {said}");
    // Where it waits, that is ten seconds.
    ensure!(begin.elapsed() < Duration::from_secs(9), "{elsewhere}: it took {:?}", begin.elapsed());
    world.lab.ok(&format!("{elsewhere} --destroy"))?;
    expect_no_state(&world.lab)
}

pub fn destroy_without_an_interface_takes_all() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 -i c1 --attach --quiet")?;
    world.ok("--destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_bare(&world.ns, "c1")?;
    expect_no_state(&world.lab)?;
    // Also what only a detach has left, and it says so.
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --detach")?;
    sh(&format!("tc -n {} qdisc del dev c0 clsact", world.ns))?;
    let said = String::from_utf8(world.run("--destroy")?.stderr)?;
    ensure!(
        said.contains("not attached to any interface here; its policy and counters are removed"),
        "{said}"
    );
    expect_no_state(&world.lab)
}

/// A guard that one of two interfaces refuses is afterwards where it was on the other, at the hook where it was.
pub fn a_guard_that_cannot_move_everywhere_stays_where_it_was() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let rules = rules.display();
    let guard = |args: &str| world.lab.run(&format!("guard --netns {} {args}", world.ns));
    let ok = |args: &str| {
        let output = guard(args)?;
        ensure!(output.status.success(), "guard {args}: {output:?}");
        Ok(String::from_utf8(output.stdout)?)
    };
    // Of c0, without what names the program, which may be another one.
    let place = || -> Result<Vec<String>> {
        let hooks = records(&ok("-i c0 --query --json")?, "guard_hook")?;
        Ok(hooks
            .iter()
            .map(|hook| format!("{} {} {}", hook["hook"], hook["priority"], hook["handle"]))
            .collect())
    };

    ok(&format!("-i c1 --attach --hook xdp --instance blue --rules {rules}"))?;
    ok(&format!("-i c0 --attach --hook tc --priority 9 --handle 5 --rules {rules}"))?;
    let before = place()?;
    let said = String::from_utf8(guard("-i c0 -i c1 --attach --hook xdp")?.stderr)?;
    ensure!(said.contains("instance 'blue'"), "{said}");
    ensure_eq!(place()?, before, "after XDP of the second was taken");
    ok("-i c1 --destroy --instance blue")?;

    ok("-i c0 --attach --hook xdp")?;
    let before = place()?;
    ensure_eq!(before.len(), 1, "hooks");
    sh(&format!("tc -n {} qdisc add dev c1 clsact", world.ns))?;
    sh(&format!(
        "tc -n {} filter add dev c1 ingress pref 1 bpf da bytecode '1,6 0 0 4294967295,'",
        world.ns
    ))?;
    let said = String::from_utf8(guard("-i c0 -i c1 --attach --hook tc")?.stderr)?;
    ensure!(said.contains("a filter of priority 1 is there"), "{said}");
    ensure_eq!(place()?, before, "after the first place of the second was taken");
    expect_bare(&world.ns, "c0")?;
    ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// What ran goes on counting where it was, and what failed was in use at no time.
pub fn rules_of_a_guard_that_fails_are_never_in_use() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    // Beside it there is no room for clsact.
    sh(&format!("tc -n {} qdisc add dev s1 ingress", world.server_ns))?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let others =
        world.lab.file("others.toml", OBSERVE.replace("'all'", "'others'").replace("observe", "drop"))?;
    let guard = |args: &str| world.lab.run(&format!("guard --netns {} {args}", world.server_ns));
    let attached = guard(&format!("-i s0 --attach --hook tc --rules {}", rules.display()))?;
    ensure!(attached.status.success(), "{attached:?}");
    world.syns(3)?;
    let shown = || world.lab.ok("guard --show --json");
    let before = shown()?;
    ensure!(before.contains("\"seen\":3"), "{before}");
    let failed = guard(&format!("-i s0 -i s1 --attach --hook tc --rules {}", others.display()))?;
    let said = String::from_utf8(failed.stderr)?;
    ensure!(failed.status.code() == Some(1) && said.contains("ingress qdisc"), "{said}");
    // The number counts what was ever put into use.
    ensure_eq!(shown()?, before, "the rules that run");
    world.syns(1)?;
    ensure!(shown()?.contains("\"seen\":4"), "{}", shown()?);
    let attached = guard(&format!("-i s0 --attach --hook tc --rules {}", others.display()))?;
    ensure!(attached.status.success(), "{attached:?}");
    ensure!(shown()?.contains("\"name\":\"others\""), "{}", shown()?);
    Ok(())
}
