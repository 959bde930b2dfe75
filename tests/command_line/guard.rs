//! `netoken guard --watch` at the terminal.

use std::fs::File;
use std::os::fd::AsFd;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nix::fcntl::{FcntlArg, Flock, FlockArg, fcntl};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, pipe};

use crate::lab::{Running, wait_until};
use crate::said::said;
use crate::support::ensure_eq;
use crate::world::World;

/// Observed, so that everybody is answered.
const RULES: &str =
    "[[rule]]\nname = 'all'\ndst = '10.77.0.0/24'\nmode = 'observe'\ntokens = '4e45544f4b454e31'\n";

/// A guard at the server.
fn guarded() -> Result<World> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", RULES)?;
    world.lab.ok(&format!("guard {} --attach --rules {}", place(&world), rules.display()))?;
    Ok(world)
}

fn place(world: &World) -> String {
    format!("--netns {} --iface s0", world.server_ns)
}

pub fn what_is_watched_stands_under_heads() -> Result<()> {
    let world = guarded()?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch"))?;
    watch.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
    // Events begin when the buffer is open, which is before.
    world.syns(1)?;
    watch.wait_for("one without a token", |line| line.contains("missing"))?;
    // Also a token of zeros is one.
    world.ok("-i c0 --attach --quiet --token 0000000000000000")?;
    world.syns(1)?;
    watch.wait_for("one with another token", |line| line.contains("wrong_static"))?;
    watch.wait_for("the counters", |line| {
        line.starts_with("-- 2 seen, 1 missing, 1 wrong_static; 0 dropped")
    })?;
    let heads: Vec<&String> = watch.seen.iter().filter(|line| line.starts_with("TIME")).collect();
    // There is room for every verdict.
    ensure_eq!(heads.len(), 1, "heads in {:#?}", watch.seen);
    let mut last = heads[0];
    let mut looked_at = 0;
    for line in &watch.seen {
        if line.starts_with("TIME") {
            last = line;
        } else if line.contains("10.77.0.2:9 ") {
            let token = if line.contains("missing") { "-" } else { "0000000000000000" };
            for (head, cell) in [
                ("INTERFACE", "s0"),
                ("DESTINATION", "10.77.0.2:9"),
                ("RULE", "1 (observe)"),
                ("TOKEN", token),
            ] {
                ensure_eq!(line.rfind(cell), last.find(head), "the column of {head}:\n{last}\n{line}");
            }
            looked_at += 1;
        }
    }
    ensure_eq!(looked_at, 2, "packets in {:#?}", watch.seen);
    watch.signal(Signal::SIGINT)?;
    ensure_eq!(watch.end()?.0, Some(0), "exit code");
    Ok(())
}

pub fn each_error_of_the_rules_has_its_place() -> Result<()> {
    let world = World::new()?;
    world.lab.file("list", "192.0.2.1\n  192.0.2.300\n")?;
    let wrong = "slots = { behind = 15, ahead = 1 }
blocked = ['192.0.2.1',
    'x']
blocked_file = 'list'
exempt_file = 'none'
[alerts]
within = '1s'
[auto_block]
refused = 0
within = '10s'
block_for = '1m'
";
    let path = world.lab.file("guard.toml", format!("{wrong}{RULES}"))?;
    let said = said(&mut world.lab.netoken(&format!("guard --check --rules {}", path.display())))?.code(1)?;
    let (path, list) = (path.display(), path.with_file_name("list"));
    for place in [
        format!("{path}:1:9: 'slots': "),
        format!("{path}:3:5: 'blocked': 'x'"),
        format!("{}:2:3: ", list.display()),
        format!("{}:1:1: 'blocked': 192.0.2.1/32 is listed twice", list.display()),
        format!("{path}:5:15: reading the list "),
        format!("{path}:6:1: 'alerts': "),
        format!("{path}:8:1: 'auto_block': "),
    ] {
        ensure!(said.err.contains(&format!("  {place}")), "'{place}' expected: {said:#?}");
    }
    Ok(())
}

pub fn the_end_of_an_entry_is_a_time_in_any_usual_form() -> Result<()> {
    let world = World::new()?;
    let check = |until: &str, code: i32| {
        let text = format!("blocked = [{{ src = '192.0.2.1', until = {until} }}]\n{RULES}");
        let path = world.lab.file("guard.toml", text)?;
        let mut check = world.lab.netoken(&format!("guard --check --rules {}", path.display()));
        said(&mut check)?.code(code).context(until.to_string())
    };
    for until in ["2026-12-01T00:00:00+01:00", "2026-12-01T00:00:00Z", "2026-12-01T00:00:00.5Z"] {
        check(until, 0)?;
        check(&format!("'{until}'"), 0)?;
    }
    for until in ["2026-12-01", "'2026-12-01'", "'tomorrow'"] {
        let refused = check(until, 1)?;
        let (_, advice) = refused.err.split_once("write it like ").context(until)?;
        check(advice.split([',', '\n']).next().unwrap_or_default(), 0)?;
    }
    Ok(())
}

pub fn a_new_name_of_an_interface_is_shown_at_once() -> Result<()> {
    let world = guarded()?;
    let mut watch =
        Running::start(&mut world.lab.netoken(&format!("guard --netns {} --watch", world.server_ns)))?;
    watch.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
    world.syns(1)?;
    watch.wait_for("the first name", |line| line.contains("missing") && line.contains(" s0 "))?;
    world.lab.rename(&world.server_ns, "s0", "s7")?;
    world.syns(1)?;
    watch.wait_for("the second name", |line| line.contains("missing") && line.contains(" s7 "))?;
    watch.signal(Signal::SIGINT)?;
    ensure_eq!(watch.end()?.0, Some(0), "exit code");
    Ok(())
}

pub fn an_output_that_nobody_reads_does_not_keep_it_alive() -> Result<()> {
    let world = guarded()?;
    let (reader, writer) = pipe()?;
    fcntl(&reader, FcntlArg::F_SETPIPE_SZ(4096))?;
    let mut command = world.lab.netoken("guard --watch --json");
    let mut child = command.stdout(writer).stderr(Stdio::null()).spawn()?;
    drop(command);
    // More than fits into the pipe and what it buffers itself. It begins to read some time after it was started.
    let mut first = [0; 1];
    wait_until("its first bytes", || {
        world.syns(1)?;
        let mut fds = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        Ok((poll(&mut fds, PollTimeout::ZERO)? > 0).then_some(()))
    })?;
    ensure_eq!(nix::unistd::read(&reader, &mut first)?, 1, "bytes");
    world.syns(300)?;
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
    let ended = wait_until("the end of the watch", || Ok(child.try_wait()?));
    child.kill().ok();
    child.wait()?;
    ensure_eq!(ended?.code(), Some(0), "the exit code");
    drop(reader);
    Ok(())
}

/// Nor does it have to be killed.
pub fn an_attach_that_nobody_listens_to_keeps_nobody_waiting() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", RULES)?;
    let guard = format!("guard {} --attach --json --rules {}", place(&world), rules.display());
    for attach in [guard, world.args("-i c0 --attach --quiet --json")] {
        let (_reader, writer) = pipe()?;
        let len = fcntl(&writer, FcntlArg::F_SETPIPE_SZ(4096))?;
        nix::unistd::write(&writer, &vec![b'\n'; len as usize])?;
        let mut child = world.lab.netoken(&attach).stdout(writer).stderr(Stdio::null()).spawn()?;
        let done = (|| {
            let is_attached = || world.lab.ok(&format!("guard {} --query", place(&world))).is_ok();
            let is_stamped = || world.ok("-i c0 --query").is_ok();
            wait_until("it to be attached", || {
                Ok((if attach.starts_with("guard") { is_attached() } else { is_stamped() }).then_some(()))
            })?;
            wait_until("the lock of the state", || {
                let file = File::open(world.lab.run.join("lock"))?;
                Ok(Flock::lock(file, FlockArg::LockExclusiveNonblock).ok().map(drop))
            })?;
            ensure!(child.try_wait()?.is_none(), "it has ended");
            kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM)?;
            wait_until("its end", || Ok(child.try_wait()?)).map(drop)
        })();
        child.kill().ok();
        child.wait()?;
        done.context(attach)?;
    }
    Ok(())
}

/// As with `guard --watch | head -1`, also while nothing comes in.
pub fn an_output_that_is_closed_ends_it() -> Result<()> {
    let world = guarded()?;
    for flags in ["", "--json"] {
        // Not inherited, or the watch would read its own output.
        let (reader, writer) = std::io::pipe()?;
        let mut command = world.lab.netoken(&format!("guard --watch {flags}"));
        let mut child = command.stdout(writer).stderr(Stdio::null()).spawn()?;
        drop(command);
        let lock = world.lab.run.join("default.guard.reader");
        wait_until("the watch to begin", || Ok(lock.exists().then_some(())))?;
        drop(reader);
        let ended = wait_until("the end of the watch", || Ok(child.try_wait()?));
        child.kill().ok();
        child.wait()?;
        ensure_eq!(ended?.code(), Some(0), "the exit code with '{flags}'");
        ensure!(!lock.exists(), "its lock is still there");
    }
    Ok(())
}

/// A guard that is attached again has other maps, of which one who watches the old ones would never hear.
pub fn a_destroyed_guard_ends_the_watch() -> Result<()> {
    let world = guarded()?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch"))?;
    watch.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
    // A detach keeps the instance, and what watches it.
    world.lab.ok(&format!("guard {} --detach", place(&world)))?;
    watch.wait_for("a word about it", |line| line.contains("not attached anywhere any more"))?;
    world.lab.ok(&format!("guard {} --attach", place(&world)))?;
    watch.wait_for("a word about that", |line| line.contains("is attached again"))?;
    world.syns(1)?;
    watch.wait_for("a packet", |line| line.contains("missing"))?;
    world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
    let (code, lines) = watch.end()?;
    let last = lines.last().context("nothing was said")?;
    ensure!(code == Some(1) && last.contains("instance 'default': it was destroyed"), "{code:?} {lines:#?}");
    Ok(())
}

/// Also if that happens while a reload waits for who does it.
pub fn a_watch_leaves_the_rules_of_another_guard_alone() -> Result<()> {
    for waits in [false, true] {
        let world = guarded()?;
        let rules = world.lab.file("guard.toml", RULES)?;
        let others = world.lab.file("others.toml", RULES.replace("'all'", "'others'"))?;
        let args = format!("guard --watch --rules {}", rules.display());
        let mut watch = Running::start(&mut world.lab.netoken(&args))?;
        watch.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
        if waits {
            let _lock = world.lab.hold_lock()?;
            watch.signal(Signal::SIGHUP)?;
            watch.wait_for("that it waits", |line| line.contains("waiting for"))?;
            watch.pause()?;
        } else {
            watch.pause()?;
            watch.signal(Signal::SIGHUP)?;
        }
        world.lab.ok(&format!("guard {} --destroy", place(&world)))?;
        world.lab.ok(&format!("guard {} --attach --rules {}", place(&world), others.display()))?;
        watch.signal(Signal::SIGCONT)?;
        let (code, lines) = watch.end()?;
        let last = lines.last().context("nothing was said")?;
        ensure!(
            code == Some(1) && last.contains("instance 'default': it was destroyed"),
            "{code:?} {lines:#?}"
        );
        let shown = world.lab.ok("guard --show")?;
        ensure!(shown.contains("others"), "{shown}");
    }
    Ok(())
}

/// Its events are not those of the stamp, which have a reader of their own.
pub fn a_second_reader_is_told_who_the_first_is() -> Result<()> {
    let world = guarded()?;
    let mut stamp = Running::start(&mut world.lab.netoken(&world.args("-i c0 --attach")))?;
    stamp.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
    let mut watch = Running::start(&mut world.lab.netoken("guard --watch"))?;
    watch.wait_for("the heads", |line| line.starts_with("TIME (UTC)"))?;
    let second = world.lab.run("guard --watch")?;
    let said = String::from_utf8(second.stderr)?;
    ensure_eq!(second.status.code(), Some(1), "exit code of the second, which said: {said}");
    let first = format!("guard's events of instance 'default': process {} ", watch.child.id());
    ensure!(said.contains(&first) && said.ends_with("stop that one\n"), "{said}");
    for reader in [watch, stamp] {
        reader.signal(Signal::SIGINT)?;
        ensure_eq!(reader.end()?.0, Some(0), "exit code");
    }
    Ok(())
}
