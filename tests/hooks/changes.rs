//! What happens to an interface while somebody watches the stream.

use anyhow::{Result, ensure};
use nix::sys::signal::Signal;

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
    stream.signal(Signal::SIGINT)?;
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

/// What comes back under the same name has other maps, of which nothing comes to who has the former ones open.
pub fn another_instance_of_the_same_name_ends_the_stream_and_stays() -> Result<()> {
    for flags in ["", "--detach-on-exit"] {
        let world = World::new()?;
        let policy = |token: &str| {
            world.lab.file("policy.toml", format!("default = {{ action = 'stamp', token = '{token}' }}\n"))
        };
        let path = policy("1111111111111111")?;
        let mut stream = stream(&world, &format!("-i c0 --policy {} --watch {flags}", path.display()))?;
        stream.pause()?;
        world.ok("-i c0 --destroy")?;
        world.ok("-i c0 --attach --quiet --token 2222222222222222")?;
        policy("3333333333333333")?;
        stream.signal(Signal::SIGCONT)?;
        stream.wait_for("why it ends", |line| line.contains("instance 'default' was destroyed"))?;
        let (code, lines) = stream.end()?;
        ensure_eq!(code, Some(1), "the exit code; it said {lines:#?}");
        ensure!(!lines.iter().any(|line| line.contains("loaded again")), "{lines:#?}");
        ensure!(!lines.iter().any(|line| line.contains("still attached")), "{lines:#?}");
        expect_stays(&world)?;
    }
    Ok(())
}

/// The new instance is as it was attached.
fn expect_stays(world: &World) -> Result<()> {
    expect_ours(&world.ns, "c0", 1)?;
    world.expect_token("2222222222222222", "the token of the new instance")?;
    let shown = world.lab.ok("policy show")?;
    ensure!(shown.contains("2222222222222222"), "{shown}");
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// The same if that happens while a reload waits for who does it.
pub fn a_reload_that_has_waited_leaves_another_instance_alone() -> Result<()> {
    let world = World::new()?;
    let path =
        world.lab.file("policy.toml", "default = { action = 'stamp', token = '1111111111111111' }\n")?;
    let mut stream = stream(&world, &format!("-i c0 --policy {}", path.display()))?;
    let lock = world.lab.hold_lock()?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("that it waits", |line| line.contains("waiting for"))?;
    stream.pause()?;
    drop(lock);
    world.ok("-i c0 --destroy")?;
    world.ok("-i c0 --attach --quiet --token 2222222222222222")?;
    stream.signal(Signal::SIGCONT)?;
    stream.wait_for("what became of the reload", |line| {
        line.contains("loading the policy again: instance 'default' was destroyed")
    })?;
    ensure_eq!(stream.end()?.0, Some(1), "the exit code");
    expect_stays(&world)
}

/// After its last look: a reload waits for the lock, and a signal ends that.
pub fn an_interface_that_is_renamed_at_last_is_detached_on_exit() -> Result<()> {
    let world = World::new()?;
    let path =
        world.lab.file("policy.toml", "default = { action = 'stamp', token = '1111111111111111' }\n")?;
    let mut stream = stream(&world, &format!("-i c0 --detach-on-exit --policy {}", path.display()))?;
    let lock = world.lab.hold_lock()?;
    stream.signal(Signal::SIGHUP)?;
    stream.wait_for("that it waits", |line| line.contains("waiting for"))?;
    world.lab.rename(&world.ns, "c0", "uplink7")?;
    stream.signal(Signal::SIGTERM)?;
    stream.wait_for("the end of the reload", |line| line.contains("stopped while waiting for"))?;
    drop(lock);
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code; it said {lines:#?}");
    ensure!(lines.iter().any(|line| line.contains("uplink7: filter removed")), "{lines:#?}");
    expect_ours(&world.ns, "uplink7", 0)?;
    expect_no_state(&world.lab)
}
