//! Priority and handle: chosen, moved, taken.

use anyhow::{Result, ensure};

use crate::lab::OBSERVE;
use crate::look::{expect_ours, filters, ours};
use crate::support::{ensure_eq, sh};
use crate::world::World;

fn expect_place(world: &World, place: &str) -> Result<()> {
    expect_ours(&world.ns, "c0", 1)?;
    let found = ours(&world.ns, "c0")?;
    ensure!(found[0].contains(place), "'{place}' expected: {found:?}");
    Ok(())
}

pub fn priority_and_handle_can_be_chosen() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --priority 77 --handle 0x1234")?;
    expect_place(&world, "pref 77 bpf chain 0 handle 0x1234 ")?;
    // What is not said is kept.
    world.ok("-i c0 --attach --quiet")?;
    expect_place(&world, "pref 77 bpf chain 0 handle 0x1234 ")?;
    world.ok("-i c0 --attach --quiet --priority 77")?;
    expect_place(&world, "pref 77 bpf chain 0 handle 0x1234 ")?;
    world.ok("-i c0 --destroy")?;
    world.ok("-i c0 --attach --quiet --handle 9")?;
    expect_place(&world, " handle 0x9 ")?;
    world.ok("-i c0 --attach --quiet --priority 65535")?;
    expect_place(&world, "pref 65535 ")
}

pub fn another_place_leaves_exactly_one_filter() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 00112233aabbccdd")?;
    world.syns(2)?;
    for (flags, place) in [
        ("--priority 50", "pref 50 "),
        ("--priority 40 --handle 3", "pref 40 bpf chain 0 handle 0x3 "),
        ("--priority 40 --handle 5", "pref 40 bpf chain 0 handle 0x5 "),
        ("--priority 1", "pref 1 "),
    ] {
        world.ok(&format!("-i c0 --attach --quiet {flags}"))?;
        expect_place(&world, place).map_err(|error| error.context(flags))?;
    }
    world.syns(3)?;
    world.expect_counter("default", "stamped", 5, "counters after the moves")?;
    ensure!(
        world.one_syn()?.windows(8).any(|w| w == 0x0011_2233_aabb_ccdd_u64.to_be_bytes()),
        "the policy is lost"
    );
    Ok(())
}

pub fn another_handle_stays_within_the_priority() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --priority 40 --handle 3")?;
    world.ok("-i c0 --attach --quiet --handle 4")?;
    expect_place(&world, "pref 40 bpf chain 0 handle 0x4 ")
}

pub fn a_taken_place_is_an_error_that_says_so() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    let add = format!("tc -n {} filter add dev c0 egress", world.ns);
    sh(&format!("{add} pref 10 protocol ip u32 match ip dst 192.0.2.1/32 classid 1:1"))?;
    sh(&format!("{add} pref 20 handle 0x7 bpf da bytecode '1,6 0 0 4294967295,'"))?;
    world.ok("-i c0 --attach --quiet --priority 30")?;
    let before = filters(&world.ns, "c0", "egress")?;
    for (flags, expect) in [
        ("--priority 10", ["priority 10", "'u32'", "--priority"]),
        ("--priority 20 --handle 7", ["priority 20", "handle 0x7", "--handle"]),
    ] {
        let said = world.fails(&format!("-i c0 --attach --quiet {flags}"))?;
        ensure!(expect.iter().all(|word| said.contains(word)), "{flags}: {expect:?} expected: {said}");
        ensure!(said.contains("has that place"), "{flags}: {said}");
        ensure_eq!(filters(&world.ns, "c0", "egress")?, before, "the filters after {flags}");
    }
    // There is room beside a bpf filter under another handle.
    world.ok("-i c0 --attach --quiet --priority 20 --handle 8")?;
    expect_place(&world, "pref 20 bpf chain 0 handle 0x8 ")
}

pub fn the_default_is_in_front_of_what_is_there() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    sh(&format!("tc -n {} filter add dev c0 egress bpf da bytecode '1,6 0 0 0,'", world.ns))?;
    world.ok("-i c0 --attach --quiet")?;
    let all = filters(&world.ns, "c0", "egress")?;
    ensure!(all.len() == 2 && all[0].contains("netoken_egress"), "ours is not first: {all:#?}");
    world.syns(1)?;
    world.expect_counter("default", "stamped", 1, "SYNs stamped in front of an accept")?;
    Ok(())
}

/// Left to itself the kernel chooses a place behind priorities below 32768.
pub fn the_default_is_in_front_of_a_low_priority_too() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    sh(&format!("tc -n {} filter add dev c0 egress pref 7 bpf da bytecode '1,6 0 0 0,'", world.ns))?;
    world.ok("-i c0 --attach --quiet")?;
    expect_place(&world, "pref 6 bpf chain 0 handle 0x1 ")?;
    world.syns(1)?;
    world.expect_counter("default", "stamped", 1, "SYNs stamped in front of an accept")?;
    Ok(())
}

pub fn a_place_that_cannot_be_is_wrong_usage() -> Result<()> {
    let world = World::new()?;
    for flags in [
        "--priority 0",
        "--handle 0",
        "--priority 65536",
        "--handle x",
        "--handle 0x100000000",
        "--hook xdp",
        // A place among filters, where there are none.
        "--hook tcx --priority 7",
        "--hook tcx --handle 7",
    ] {
        let output = world.run(&format!("-i c0 --attach --quiet {flags}"))?;
        let said = String::from_utf8(output.stderr)?;
        ensure_eq!(output.status.code(), Some(2), "{flags}: {said}");
    }
    expect_ours(&world.ns, "c0", 0)
}

/// Also when the rules are those that run: XDP has no marks, and would leave them away without a word.
pub fn a_guard_that_marks_goes_where_there_are_marks() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let rules = "[[rule]]\nname = 'all'\ndst = '::/0'\nmode = 'mark'\nmark = { valid = 1, refused = 2 }\n\
                 tokens = '0000000000000001'\n";
    let path = world.lab.file("marks.toml", rules)?;
    let guard = |args: &str| format!("guard --netns {} {args}", world.ns);
    world.lab.ok(&guard(&format!("-i c0 --attach --rules {}", path.display())))?;
    let refused = world.lab.run(&guard("-i c1 --attach --hook xdp"))?;
    let said = String::from_utf8(refused.stderr)?;
    ensure!(refused.status.code() == Some(1) && said.contains("--hook tc"), "{said}");
    world.lab.ok(&guard("-i c1 --attach"))?;
    for iface in ["c0", "c1"] {
        let found = filters(&world.ns, iface, "ingress")?;
        ensure!(found.len() == 1 && found[0].contains("netoken_guard"), "{iface}: {found:#?}");
    }
    Ok(())
}

/// It may be passed by as the first would be.
pub fn a_guard_of_another_instance_is_no_reason_to_stand_behind_others() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let attach = |flags: &str| {
        let rules = rules.display();
        world.lab.run(&format!("guard --netns {} -i c0 --attach --hook tc --rules {rules} {flags}", world.ns))
    };
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    sh(&format!(
        "tc -n {} filter add dev c0 ingress pref 1 bpf da bytecode '1,6 0 0 4294967295,'",
        world.ns
    ))?;
    ensure!(attach("--priority 5")?.status.success(), "its place was named");
    let other = attach("--instance other")?;
    let said = String::from_utf8(other.stderr)?;
    ensure!(other.status.code() == Some(1) && said.contains("a filter of priority 1 is there"), "{said}");
    // It keeps the place that it has.
    ensure!(attach("")?.status.success(), "its place is its own");
    Ok(())
}
