//! A state directory that cannot be, or is not, what it should be.

use std::fs;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use libbpf_rs::{MapHandle, MapType};

use crate::lab::NETOKEN;
use crate::look::{expect_bare, expect_no_state, expect_ours, ours};
use crate::said::said;
use crate::support::ensure_eq;
use crate::world::World;

pub fn a_directory_that_cannot_be_made_is_an_error_with_a_remedy() -> Result<()> {
    let world = World::new()?;
    for dir in ["/proc/xyz", "/etc/hostname/below", "/sys/xyz", "/sys"] {
        let mut command = world.lab.netoken(&world.args("-i c0 --attach --quiet"));
        said(command.env("NETOKEN_RUN", dir))?.code(1)?.err(&[dir, "NETOKEN_RUN"]).context(dir)?;
        expect_bare(&world.ns, "c0")?;
    }
    Ok(())
}

/// Also where the command runs in a mount namespace of its own and the state is made in the first one.
pub fn a_relative_directory_is_below_the_current_one() -> Result<()> {
    let world = World::new()?;
    for name in ["below", "./deeper/below"] {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &world.ns, NETOKEN, "-i", "c0", "--attach", "--quiet"]);
        said(command.current_dir(&world.lab.run).env("NETOKEN_RUN", name))?.code(0).context(name)?;
        ensure!(world.lab.run.join(name).join("bpf/default").exists(), "{name} is not where it should be");
        let mut command = world.lab.netoken(&world.args("-i c0 --destroy"));
        said(command.current_dir(&world.lab.run).env("NETOKEN_RUN", name))?.code(0).context(name)?;
        expect_bare(&world.ns, "c0")?;
    }
    Ok(())
}

/// Puts a map of another layout where the counters are pinned.
fn break_counters(world: &World) -> Result<()> {
    let pin = world.lab.run.join("bpf/default/counters");
    fs::remove_file(&pin).context("removing the pin")?;
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    let mut map = MapHandle::create(MapType::Array, Some("counters"), 4, 48, 3, &options)?;
    map.pin(&pin).context("pinning a map of another layout")
}

pub fn a_pin_of_another_layout_is_another_version() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --detach")?;
    break_counters(&world)?;
    said(&mut world.lab.netoken(&world.args("-i c0 --attach --quiet")))?.code(1)?.err(&[
        "another version of netoken",
        "--destroy",
        "--instance",
    ])?;
    expect_ours(&world.ns, "c0", 0)?;
    // What the message recommends works: another instance, and a destroy.
    world.ok("-i c0 --attach --quiet --instance other")?;
    world.ok("-i c0 --destroy --instance other")?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)?;
    world.ok("-i c0 --attach --quiet").map(drop)
}

/// What fails is a map, as a kernel that is really so old is not to be had. What the kernel says of its age it says
/// itself: by this personality it is a 2.6.
pub fn a_kernel_that_is_too_old_is_named() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.ok("-i c0 --detach")?;
    break_counters(&world)?;
    let mut command = Command::new("setarch");
    command.args(["--uname-2.6", NETOKEN]).env("NETOKEN_RUN", &world.lab.run);
    command.args(world.args("-i c0 --attach --quiet").split_whitespace());
    said(&mut command)?.code(1)?.err(&[
        "loading the classifier",
        "this kernel is 2.6.",
        "needs 5.10 or later",
    ])?;
    expect_ours(&world.ns, "c0", 0)
}

pub fn a_pin_of_another_layout_does_not_hurt_what_runs() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    let before = ours(&world.ns, "c0")?;
    break_counters(&world)?;
    said(&mut world.lab.netoken(&world.args("-i c0 --attach --quiet --token 2222222222222222")))?
        .code(1)?
        .err(&["another version of netoken"])?;
    ensure_eq!(ours(&world.ns, "c0")?, before, "the filter");
    world.expect_token("1111111111111111", "the token")?;
    let policies = world.lab.run.join("bpf/default/policies");
    ensure!(policies.exists(), "a refused attach removed the pins of an instance that runs");
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_query_names_a_broken_instance() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    fs::remove_file(world.lab.run.join("bpf/default/policies"))?;
    let said = said(&mut world.lab.netoken(&world.args("-i c0 --query")))?.code(1)?;
    ensure!(said.err.contains("instance 'default'") && said.err.contains("policies"), "{said:#?}");
    // The next attach repairs it.
    world.ok("-i c0 --attach --quiet")?;
    expect_ours(&world.ns, "c0", 1)?;
    world.ok("-i c0 --query").map(drop)
}
