//! The stream: what it shows, and how it ends when it is asked to.

use std::fs;
use std::io::{ErrorKind, Write, pipe};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{FcntlArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{NETOKEN, OBSERVE, Running, expect_count, ip, wait_until};
use crate::look::{counter, expect_bare, expect_no_state, expect_ours, has_clsact, ours};
use crate::rules::{dir, write};
use crate::said::sign_of_panic;
use crate::support::{ensure_eq, sh};
use crate::world::World;

fn stream(world: &World, flags: &str) -> Result<Running> {
    let mut stream = Running::start(&mut world.lab.netoken(&world.args(&format!("-i c0 --attach {flags}"))))?;
    stream.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
    Ok(stream)
}

/// Asks it to end, which has to be in peace, and returns all that it said.
fn end(stream: Running, signal: Signal) -> Result<Vec<String>> {
    stream.signal(signal)?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code after {signal}: {lines:#?}");
    ensure!(sign_of_panic(&lines.join("\n")).is_none(), "{lines:#?}");
    Ok(lines)
}

fn shown(lines: &[String]) -> u64 {
    lines.iter().filter(|line| line.contains("10.77.0.2:9")).count() as u64
}

/// The numbers of SYNs and of stamped ones in a line of totals.
fn totals(line: &str) -> Option<(u64, u64)> {
    let (syns, rest) = line.strip_prefix("-- ")?.split_once(" SYN")?;
    let (_, stamped) = rest.split_once(", ")?;
    Some((syns.parse().ok()?, stamped.split_once(" stamped")?.0.parse().ok()?))
}

/// Fails unless the last totals are of so many SYNs, all of them stamped.
fn expect_totals(world: &World, lines: &[String], wanted: u64) -> Result<()> {
    let last = lines.iter().rev().find_map(|line| totals(line)).context("no totals")?;
    ensure_eq!(last.0, last.1, "stamped SYNs");
    expect_count(&world.ns, last.0, wanted, "SYNs in the totals")
}

pub fn ctrl_c_and_sigterm_end_it_in_peace() -> Result<()> {
    let world = World::new()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        let stream = stream(&world, "")?;
        world.syns(1)?;
        let lines = end(stream, signal)?;
        expect_count(&world.ns, shown(&lines), 1, &format!("SYNs shown before {signal}: {lines:#?}"))?;
        ensure!(lines.iter().any(|line| line.starts_with("-- ")), "no totals: {lines:#?}");
        let advice = format!("netoken --iface c0 --netns {} --destroy", world.ns);
        let last = lines.iter().filter(|line| line.contains("still attached to c0")).collect::<Vec<_>>();
        ensure!(last.len() == 1 && last[0].ends_with(&advice), "'{advice}' expected: {lines:#?}");
        expect_ours(&world.ns, "c0", 1)?;
    }
    // The advice is good.
    world.lab.ok(&format!("--iface c0 --netns {} --destroy", world.ns))?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// `nohup` has it ignored; a script that starts it in the background has SIGINT ignored, which is heard all the same.
pub fn a_hangup_that_the_parent_ignores_stays_ignored() -> Result<()> {
    let world = World::new()?;
    let dir = dir()?;
    let path = write(dir.path(), "p.toml", "default = { action = 'stamp', token = '1111111111111111' }\n")?;
    let file = format!(" --watch --policy {}", path.display());
    for flags in ["", &file] {
        let mut command = Command::new("sh");
        command.args(["-c", "trap '' HUP INT; exec \"$@\"", "sh", NETOKEN]);
        command.args(world.args(&format!("-i c0 --attach{flags}")).split_whitespace());
        let mut stream = Running::start(command.env("NETOKEN_RUN", &world.lab.run))?;
        stream.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
        stream.signal(Signal::SIGHUP)?;
        // Longer than a signal takes to be noticed.
        thread::sleep(Duration::from_millis(300));
        ensure!(stream.child.try_wait()?.is_none(), "it has ended: {:#?}", stream.seen);
        world.syns(1)?;
        stream.wait_for("a SYN", |line| line.contains("10.77.0.2:9"))?;
        if !flags.is_empty() {
            // What is no way to load it again is not named as one.
            write(dir.path(), "p.toml", "defalt = 1\n")?;
            stream.wait_for("what to do", |line| line.ends_with("when this is mended, save the file"))?;
        }
        let lines = end(stream, Signal::SIGINT)?;
        ensure!(!lines.iter().any(|line| line.contains("loaded again")), "{lines:#?}");
    }
    Ok(())
}

pub fn detach_on_exit_removes_everything() -> Result<()> {
    let world = World::new()?;
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let stream = stream(&world, "--detach-on-exit")?;
        world.syns(1)?;
        let lines = end(stream, signal)?;
        ensure!(!lines.iter().any(|line| line.contains("still attached")), "{lines:#?}");
        expect_bare(&world.ns, "c0")?;
        expect_no_state(&world.lab)?;
    }
    Ok(())
}

/// Two interfaces make the time between the first filter and the stream long enough to be met.
pub fn a_signal_during_the_attach_detaches_on_exit() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    let mut command = world.lab.netoken(&world.args("-i c0 -i c1 --attach --detach-on-exit"));
    let stream = Running::start(&mut command)?;
    wait_until("the first filter", || Ok((!ours(&world.ns, "c0")?.is_empty()).then_some(())))?;
    end(stream, Signal::SIGTERM)?;
    expect_bare(&world.ns, "c0")?;
    expect_bare(&world.ns, "c1")?;
    expect_no_state(&world.lab)
}

/// Between two of many interfaces; who has all of them when it hears of the signal stays attached.
pub fn a_signal_during_a_quiet_attach_leaves_all_or_nothing() -> Result<()> {
    let rules = "[[rule]]\nname = 'all'\ndst = '10.0.0.0/8'\nmode = 'observe'\ntokens = '0000000000000001'\n";
    let dir = dir()?;
    let path = write(dir.path(), "guard.toml", rules)?;
    for guard in [false, true] {
        let mut taken_back = 0;
        for _ in 0..20 {
            let world = World::new()?;
            world.second_cable()?;
            // One after the other takes long enough to hear of the signal meanwhile.
            let between: Vec<String> = (0..60).map(|at| format!("a{at}")).collect();
            ip(
                &world.ns,
                between.iter().map(|name| format!("link add {name} type veth peer name to-{name}")),
            )?;
            let all = format!("-i c0 -i {} -i c1 --attach", between.join(" -i "));
            let args = match guard {
                true => format!("guard {} --hook tc --rules {}", world.args(&all), path.display()),
                false => world.args(&format!("{all} --quiet")),
            };
            let process = Running::start(&mut world.lab.netoken(&args))?;
            wait_until("the qdisc", || Ok(has_clsact(&world.ns, "c0")?.then_some(())))?;
            process.signal(Signal::SIGTERM)?;
            let (code, lines) = process.end()?;
            match code {
                Some(0) => ensure!(has_clsact(&world.ns, "c1")?, "{lines:#?}"),
                Some(1) => {
                    ensure!(lines.iter().any(|line| line.contains("stopped by a signal")), "{lines:#?}");
                    let qdiscs = sh(&format!("tc -n {} qdisc show", world.ns))?;
                    ensure!(!qdiscs.contains("clsact"), "{qdiscs}");
                    expect_bare(&world.ns, "c0")?;
                    expect_bare(&world.ns, "c1")?;
                    expect_no_state(&world.lab)?;
                    taken_back += 1;
                }
                other => bail!("{other:?}: {lines:#?}"),
            }
            if taken_back == 2 {
                break;
            }
        }
        ensure_eq!(taken_back, 2, "attaches that were taken back");
    }
    Ok(())
}

/// A pager that shows its first page, a terminal after Ctrl-S.
pub fn an_output_that_nobody_reads_does_not_keep_it_alive() -> Result<()> {
    let world = World::new()?;
    for (flags, both, stays) in [("", false, 1), ("", true, 1), ("--json --detach-on-exit", false, 0)] {
        let (reader, writer) = pipe()?;
        fcntl(&reader, FcntlArg::F_SETPIPE_SZ(4096))?;
        let mut command = world.lab.netoken(&world.args(&format!("-i c0 --attach {flags}")));
        command.stdout(writer.try_clone()?);
        match both {
            true => command.stderr(writer),
            false => command.stderr(Stdio::null()),
        };
        let mut child = command.spawn()?;
        drop(command);
        wait_until("the filter", || Ok((!ours(&world.ns, "c0")?.is_empty()).then_some(())))?;
        let shown = || world.syns(50).and_then(|()| Ok(syns(&world)? > 200));
        wait_until("more than the pipe takes", || Ok(shown()?.then_some(())))?;
        if !both {
            fill(&reader)?;
        }
        // It is in the write, or waits for it to be possible, and reads no events any more.
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
        let ended = wait_until("the stream to end", || Ok(child.try_wait()?));
        child.kill().ok();
        child.wait()?;
        ensure_eq!(ended.with_context(|| flags)?.code(), Some(0), "the exit code");
        expect_ours(&world.ns, "c0", stays)?;
        world.ok("-i c0 --destroy")?;
        drop(reader);
    }
    Ok(())
}

/// Fills a pipe of one page to the last byte, once there is something in it, and whoever polls before he writes waits. A
/// short line might find room otherwise.
fn fill(pipe: &impl AsRawFd) -> Result<()> {
    let path = format!("/proc/self/fd/{}", pipe.as_raw_fd());
    let mut writer = fs::OpenOptions::new().write(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    let is_ready = || poll(&mut [PollFd::new(writer.as_fd(), PollFlags::POLLOUT)], PollTimeout::ZERO);
    wait_until("something in the pipe", || Ok((is_ready()? == 0).then_some(())))?;
    loop {
        match writer.write(b" ") {
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    }
}

fn syns(world: &World) -> Result<u64> {
    counter(&world.lab, &world.ns, "default", "syns")
}

pub fn detach_on_exit_leaves_what_others_use() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    world.ok("-i c0 --attach --quiet --instance blue")?;
    end(stream(&world, "--detach-on-exit")?, Signal::SIGINT)?;
    expect_ours(&world.ns, "c0", 1)?;
    world.syns(1)?;
    world.expect_counter("blue", "stamped", 1, "SYNs stamped by the other instance")?;
    Ok(())
}

/// Or somebody tries something out on an interface in production, and Ctrl-C takes all of it away.
pub fn detach_on_exit_names_what_was_there_before() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 --attach --quiet")?;
    for flags in ["", "--json"] {
        let args = world.args(&format!("-i c0 -i c1 --attach --detach-on-exit {flags}"));
        let mut stream = Running::start(&mut world.lab.netoken(&args))?;
        stream.wait_for("a word about it", |line| line.starts_with("c0 was stamped before"))?;
        let lines = end(stream, Signal::SIGINT)?;
        ensure!(!lines.iter().any(|line| line.starts_with("c1 was")), "{lines:#?}");
        expect_bare(&world.ns, "c0")?;
        world.ok("-i c0 --attach --quiet")?;
    }
    // Where it stays, there is nothing to say.
    let lines = end(stream(&world, "")?, Signal::SIGINT)?;
    ensure!(!lines.iter().any(|line| line.contains("was stamped before")), "{lines:#?}");
    Ok(())
}

/// Who holds the lock may be stuck.
pub fn a_second_signal_ends_the_wait_of_detach_on_exit() -> Result<()> {
    let world = World::new()?;
    for second in [Signal::SIGINT, Signal::SIGTERM] {
        let mut stream = stream(&world, "--detach-on-exit")?;
        let lock = world.lab.hold_lock()?;
        stream.signal(Signal::SIGINT)?;
        stream.wait_for("that it waits", |line| line.contains("waiting for another netoken command"))?;
        stream.signal(second)?;
        let (code, lines) = stream.end()?;
        drop(lock);
        ensure_eq!(code, Some(1), "the exit code: {lines:#?}");
        let said = lines.join("\n");
        ensure!(said.contains("detaching from c0: stopped while waiting for"), "{said}");
        let advice = format!(
            "still attached to c0; remove it with: netoken --iface c0 --netns {} --destroy",
            world.ns
        );
        ensure!(said.contains(&advice), "'{advice}' expected: {said}");
        expect_ours(&world.ns, "c0", 1)?;
        world.ok("-i c0 --destroy")?;
        expect_no_state(&world.lab)?;
    }
    Ok(())
}

/// Their lock is in the directory while the destroy runs, so it is for them to remove it.
pub fn a_destroy_leaves_nothing_for_who_streams_or_watches() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = format!("guard --netns {} -i c0", world.ns);
    world.lab.ok(&format!("{guard} --attach --rules {}", rules.display()))?;
    for (reader, destroy) in [
        ("guard --watch".to_string(), format!("{guard} --destroy")),
        (world.args("-i c0 --attach"), world.args("-i c0 --destroy")),
    ] {
        let mut reader = Running::start(&mut world.lab.netoken(&reader))?;
        reader.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
        // It notices the destroy when that has finished.
        reader.pause()?;
        world.lab.ok(&destroy)?;
        reader.signal(Signal::SIGCONT)?;
        let (code, lines) = reader.end()?;
        ensure_eq!(code, Some(1), "the exit code: {lines:#?}");
        ensure!(!world.lab.run.exists(), "the state directory is still there: {lines:#?}");
    }
    Ok(())
}

pub fn every_syn_is_shown_once() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "")?;
    world.syns(200)?;
    let lines = end(stream, Signal::SIGINT)?;
    expect_count(&world.ns, shown(&lines), 200, "SYNs shown")?;
    expect_totals(&world, &lines, 200)
}

pub fn what_is_counted_is_shown_before_the_count() -> Result<()> {
    let world = World::new()?;
    let mut stream = stream(&world, "")?;
    // Both are due when it goes on: events that nobody has taken out of the buffer, and totals.
    stream.pause()?;
    world.syns(200)?;
    thread::sleep(Duration::from_millis(1100));
    stream.signal(Signal::SIGCONT)?;
    stream.wait_for("the totals", |line| totals(line).is_some_and(|(syns, _)| syns >= 200))?;
    expect_count(&world.ns, shown(&stream.seen), 200, "SYNs shown before the totals")?;
    expect_totals(&world, &stream.seen, 200)?;
    end(stream, Signal::SIGINT).map(drop)
}

pub fn the_columns_stand_under_their_heads() -> Result<()> {
    let world = World::new()?;
    let long = "a23456789012345";
    sh(&format!(
        "ip -n {} link set c0 down; ip -n {0} link set c0 name {long}; ip -n {0} link set {long} up",
        world.ns
    ))?;
    let args = world.args(&format!("-i lo -i {long} --attach"));
    let mut stream = Running::start(&mut world.lab.netoken(&args))?;
    stream.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
    world.syns_to("127.0.0.1:9", 1)?;
    stream.wait_for("a SYN on lo", |line| line.contains("127.0.0.1:9"))?;
    world.syns(1)?;
    stream.wait_for("a SYN on the other", |line| line.contains("10.77.0.2:9"))?;
    let lines: Vec<&String> =
        stream.seen.iter().filter(|line| line.contains(':') || line.contains("VERDICT")).collect();
    let mut heads = None;
    let mut looked_at = 0;
    for line in lines {
        if line.starts_with("TIME") {
            heads = Some(line);
        } else if line.contains(":9 ") {
            // Names and addresses of common length fit a terminal of common width.
            ensure!(!line.contains("  lo ") || line.len() < 120, "{} columns: {line}", line.len());
            let heads = heads.context("no heads")?;
            for (head, cell) in [("VERDICT", "stamped"), ("RULE", "default"), ("TOKEN", "4e45544f4b454e31")] {
                ensure_eq!(line.find(cell), heads.find(head), "the column of {head}:\n{heads}\n{line}");
            }
            looked_at += 1;
        }
    }
    ensure_eq!(looked_at, 2, "SYNs in {:#?}", stream.seen);
    end(stream, Signal::SIGINT).map(drop)
}

pub fn a_sample_counts_all_and_shows_some() -> Result<()> {
    let world = World::new()?;
    let stream = stream(&world, "--sample 10")?;
    world.lab.within(&world.ns, || {
        // One event for every ten of the same CPU, so all of them are sent from one.
        let mut one = CpuSet::new();
        one.set(0)?;
        sched_setaffinity(Pid::from_raw(0), &one)?;
        for _ in 0..100 {
            TcpStream::connect("10.77.0.2:9").expect_err("nobody listens there");
        }
        Ok(())
    })?;
    let lines = end(stream, Signal::SIGINT)?;
    expect_count(&world.ns, shown(&lines), 10, &format!("SYNs shown of 100: {lines:#?}"))?;
    world.expect_counter("default", "stamped", 100, "SYNs counted")?;
    expect_totals(&world, &lines, 100)
}

/// Without CAP_IPC_LOCK all buffers of a user share a limit (kernel.perf_event_mlock_kb).
fn within_the_limit(world: &World, args: &str) -> Result<Running> {
    let mut command = Command::new("bash");
    let script = "ulimit -l 0; exec setpriv --bounding-set -ipc_lock \"$@\"";
    command.args(["-c", script, "bash", NETOKEN]).args(world.args(args).split_whitespace());
    Running::start(command.env("NETOKEN_RUN", &world.lab.run))
}

fn expect_no_room(stream: Running) -> Result<()> {
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(1), "the exit code: {lines:#?}");
    let said = lines.join("\n");
    ensure!(said.contains("perf_event_mlock_kb") && !said.contains("libbpf:"), "no remedy: {said}");
    Ok(())
}

/// Starts streams on the second cable until one finds the limit used up; returns the others.
fn use_up_the_limit(world: &World) -> Result<Vec<Running>> {
    let mut streams: Vec<Running> = Vec::new();
    // One stream takes a fourth of it, or more, whatever the number of CPUs.
    for number in 0..6 {
        let mut stream = within_the_limit(world, &format!("-i c1 --attach --instance full{number}"))?;
        if stream.wait_for("the heads of the columns", |line| line.contains("VERDICT")).is_ok() {
            streams.push(stream);
            continue;
        }
        expect_no_room(stream)?;
        return Ok(streams);
    }
    bail!("{} streams began, so the limit was never reached", streams.len())
}

/// Nothing where nothing was, and otherwise what was there. One case, because the limit is one for all.
pub fn a_stream_that_cannot_begin_leaves_all_as_it_was() -> Result<()> {
    let world = World::new()?;
    world.second_cable()?;
    world.ok("-i c0 --attach --quiet --token 1111111111111111")?;
    let streams = use_up_the_limit(&world)?;
    expect_ours(&world.ns, "c1", streams.len())?;

    expect_no_room(within_the_limit(&world, "-i c0 --attach --token 2222222222222222")?)?;
    expect_ours(&world.ns, "c0", 1)?;
    world.expect_token("1111111111111111", "the token after an attach that failed")?;
    streams.into_iter().try_for_each(|stream| end(stream, Signal::SIGTERM).map(drop))
}
