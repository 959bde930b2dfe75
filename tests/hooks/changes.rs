//! What happens to an interface while somebody watches the stream.

use anyhow::{Result, ensure};

use crate::lab::Running;
use crate::look::{expect_no_state, expect_ours, records};
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// Starts a stream and waits until it shows a SYN, so that it is known to watch.
fn stream(world: &World, flags: &str) -> Result<Running> {
    let mut stream = Running::start(&mut world.lab.netoken(&world.args(&format!("--attach {flags}"))))?;
    stream
        .wait_for("the start of the stream", |line| line.contains("VERDICT") || line.contains("attached"))?;
    world.syns(1)?;
    stream.wait_for("the first SYN", |line| line.contains("10.77.0.2") && line.contains("stamped"))?;
    Ok(stream)
}

/// It reports what fits, and ends with 1 because nothing is left.
fn expect_end(mut stream: Running, what: &str, fits: &[&str]) -> Result<()> {
    stream.wait_for(what, |line| fits.iter().all(|word| line.contains(word)))?;
    let (code, lines) = stream.end()?;
    let all = lines.join("\n");
    ensure!(!all.contains("panicked"), "{all}");
    ensure_eq!(code, Some(1), "the exit code with nothing left; it said {all}");
    ensure!(all.contains("no interface is left"), "{all}");
    ensure!(!all.contains("still attached"), "{all}");
    Ok(())
}

pub fn a_removed_interface_is_reported_and_ends_the_stream() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "-i c0")?;
    sh(&format!("ip -n {} link del c0", world.ns))?;
    expect_end(stream, "a word about the removal", &["c0: ", "removed"])
}

pub fn detach_on_exit_leaves_no_state_after_a_removal() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "-i c0 --detach-on-exit")?;
    sh(&format!("ip -n {} link del c0", world.ns))?;
    expect_end(stream, "a word about the removal", &["c0: ", "removed"])?;
    expect_no_state(&world.lab)
}

pub fn a_moved_interface_is_reported_and_ends_the_stream() -> Result<()> {
    let mut world = World::new()?;
    let stream = stream(&world, "-i c0")?;
    let elsewhere = world.lab.netns("elsewhere")?;
    sh(&format!("ip -n {} link set c0 netns {elsewhere}", world.ns))?;
    expect_end(stream, "a word about the move", &["c0: ", "another network namespace"])?;
    expect_ours(&elsewhere, "c0", 0)
}

pub fn a_deleted_filter_is_reported_and_ends_the_stream() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "-i c0")?;
    sh(&format!("tc -n {} filter del dev c0 egress", world.ns))?;
    expect_end(stream, "a word about the filter", &["c0: ", "filter was removed"])
}

pub fn a_deleted_qdisc_is_reported_and_ends_the_stream() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "-i c0")?;
    sh(&format!("tc -n {} qdisc del dev c0 clsact", world.ns))?;
    expect_end(stream, "a word about the filter", &["c0: ", "filter was removed"])
}

pub fn a_renamed_interface_is_reported_and_streams_on() -> Result<()> {
    let world = World::new()?;
    let mut stream = stream(&world, "-i c0")?;
    world.lab.rename(&world.ns, "c0", "uplink7")?;
    stream.wait_for("a word about the name", |line| line.contains("c0: renamed to uplink7"))?;
    world.syns(1)?;
    stream
        .wait_for("a SYN under the new name", |line| line.contains("uplink7") && line.contains("stamped"))?;
    world.ok("-i uplink7 --query")?;
    stream.signal(nix::sys::signal::Signal::SIGINT)?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code; it said {lines:#?}");
    ensure!(lines.iter().any(|line| line.contains("still attached to uplink7")), "{lines:#?}");
    Ok(())
}

pub fn the_stream_goes_on_while_one_interface_is_left() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let mut stream = stream(&world, "-i c0 -i c1")?;
    sh(&format!("ip -n {} link del c1", world.ns))?;
    stream.wait_for("a word about c1", |line| line.contains("c1: removed"))?;
    world.syns(1)?;
    stream.wait_for("a SYN on c0", |line| line.contains("c0") && line.contains("10.77.0.2"))?;
    world.ok("-i c0 --detach")?;
    expect_end(stream, "a word about c0", &["c0: ", "filter was removed"])
}

pub fn changes_are_json_lines_too() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "-i c0 --json")?;
    world.lab.rename(&world.ns, "c0", "uplink7")?;
    sh(&format!("ip -n {} link del uplink7", world.ns))?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(1), "the exit code; it said {lines:#?}");
    let out: Vec<&str> = lines.iter().map(String::as_str).filter(|line| line.starts_with('{')).collect();
    let events = records(&out.join("\n"), "interface")?;
    let last = events.last().is_some_and(|event| event["interface"].is_string() && event["event"] == "gone");
    ensure!(last, "{out:#?}");
    Ok(())
}
