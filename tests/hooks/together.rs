//! Two commands at once, and two readers.

use std::fs::{self, File};
use std::io::{ErrorKind, Read};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::lab::{OBSERVE, PATIENCE, Running, ip, wait_until};
use crate::look::{expect_bare, expect_no_state, expect_ours, records};
use crate::support::{ensure_eq, share_of};
use crate::world::World;

/// Interfaces on which nothing is.
const MANY: usize = 200;
const QUERIES: usize = 10;

fn start(world: &World, args: &str) -> Result<Child> {
    let mut command = world.lab.netoken(&world.args(args));
    Ok(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?)
}

/// Waits for all of them; each has to succeed.
fn expect_all(children: Vec<Child>) -> Result<()> {
    let outputs: Vec<_> = children
        .into_iter()
        .map(|mut child| {
            let ended = wait_until("a command to end", || Ok(child.try_wait()?));
            child.kill().ok();
            let output = child.wait_with_output()?;
            ended.map(|_| output)
        })
        .collect::<Result<_>>()?;
    match outputs.iter().find(|output| !output.status.success()) {
        Some(output) => bail!("{}: {}", output.status, String::from_utf8_lossy(&output.stderr)),
        None => Ok(()),
    }
}

pub fn eight_attaches_at_once_leave_one_filter() -> Result<()> {
    let world = World::new()?;
    for _ in 0..8 {
        let children = (0..8).map(|_| start(&world, "-i c0 --attach --quiet")).collect::<Result<Vec<_>>>()?;
        expect_all(children)?;
        expect_ours(&world.ns, "c0", 1)?;
        world.ok("-i c0 --destroy")?;
        expect_bare(&world.ns, "c0")?;
        expect_no_state(&world.lab)?;
    }
    Ok(())
}

pub fn attaches_and_destroys_at_once_leave_one_state() -> Result<()> {
    let world = World::new()?;
    for _ in 0..4 {
        let children = (0..8)
            .map(|n| start(&world, if n % 2 == 0 { "-i c0 --attach --quiet" } else { "-i c0 --destroy" }))
            .collect::<Result<Vec<_>>>()?;
        expect_all(children)?;
        world.ok("-i c0 --attach --quiet")?;
        expect_ours(&world.ns, "c0", 1)?;
        world.ok("-i c0 --destroy")?;
        expect_bare(&world.ns, "c0")?;
        expect_no_state(&world.lab)?;
    }
    Ok(())
}

fn stream(world: &World, flags: &str) -> Result<Running> {
    let mut stream = Running::start(&mut world.lab.netoken(&world.args(&format!("-i c0 --attach {flags}"))))?;
    stream.wait_for("the heads of the columns", |line| line.contains("VERDICT"))?;
    Ok(stream)
}

/// Ends a stream with Ctrl-C and returns how many SYNs it showed.
fn shown(stream: Running) -> Result<usize> {
    stream.signal(Signal::SIGINT)?;
    let (code, lines) = stream.end()?;
    ensure_eq!(code, Some(0), "the exit code of the stream; it said {lines:#?}");
    Ok(lines.iter().filter(|line| line.contains("10.77.0.2:9")).count())
}

pub fn a_second_reader_is_told_who_the_first_is() -> Result<()> {
    let world = World::new()?;
    let first = stream(&world, "")?;
    world.syns(50)?;
    let said = world.fails("-i c0 --attach")?;
    let pid = format!("process {}", first.child.id());
    ensure!(said.contains(&pid), "'{pid}' expected: {said}");
    ensure!(said.contains("--quiet") && said.contains("--instance"), "no remedy: {said}");
    expect_ours(&world.ns, "c0", 1)?;
    world.syns(50)?;
    // Replacing without reading is allowed, and takes nothing away either.
    world.ok("-i c0 --attach --quiet")?;
    world.syns(50)?;
    ensure_eq!(shown(first)?, 150, "SYNs that the first reader showed");
    Ok(())
}

pub fn a_killed_reader_does_not_block_the_next() -> Result<()> {
    let world = World::new()?;
    let mut first = stream(&world, "")?;
    first.child.kill()?;
    first.child.wait()?;
    expect_ours(&world.ns, "c0", 1)?;
    let second = stream(&world, "")?;
    world.syns(5)?;
    ensure_eq!(shown(second)?, 5, "SYNs that the second reader showed");
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

pub fn a_killed_reader_leaves_nothing_behind_a_destroy() -> Result<()> {
    let world = World::new()?;
    let mut reader = stream(&world, "")?;
    reader.child.kill()?;
    reader.child.wait()?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// As a query does that runs at the same time, only longer.
pub fn a_destroy_waits_for_one_who_looks() -> Result<()> {
    for _ in 0..10 {
        if is_waited_for()? {
            return Ok(());
        }
    }
    bail!("this machine is too slow to look for less than the three seconds that a destroy waits");
}

/// False if we looked for nearly as long as a destroy waits, because the machine stood still.
fn is_waited_for() -> Result<bool> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let bpf = world.lab.run.join("bpf");
    let look = File::open(&bpf)?;
    let began = Instant::now();
    let mut destroy = start(&world, "-i c0 --destroy")?;
    wait_until("the pins to go", || Ok((!bpf.join("default").exists()).then_some(())))?;
    let until = Instant::now() + Duration::from_millis(300);
    while Instant::now() < until && destroy.try_wait()?.is_none() {
        thread::sleep(Duration::from_millis(5));
    }
    drop(look);
    if began.elapsed() > Duration::from_millis(2500) {
        destroy.kill()?;
        destroy.wait()?;
        return Ok(false);
    }
    expect_all(vec![destroy])?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)?;
    Ok(true)
}

/// Who keeps the file system busy for longer than a command waits.
pub fn what_was_removed_is_told_before_what_failed() -> Result<()> {
    let world = World::new()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = format!("guard --netns {} -i c0", world.ns);
    for (attach, destroy, kind) in [
        (world.args("-i c0 --attach --quiet"), world.args("-i c0 --destroy --json"), Some("removed")),
        (format!("{guard} --attach --rules {}", rules.display()), format!("{guard} --destroy"), None),
    ] {
        world.lab.ok(&attach)?;
        let look = File::open(world.lab.run.join("bpf"))?;
        let output = world.lab.run(&destroy)?;
        drop(look);
        let (out, said) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        ensure_eq!(output.status.code(), Some(1), "the exit code of {destroy}: {said}");
        ensure!(said.ends_with("all else is done\n") && said.contains("unmounting"), "{said}");
        match kind {
            Some(kind) => ensure_eq!(records(&out, kind)?.len(), 1, "records of {kind} in {out}"),
            None => ensure!(said.starts_with("c0: guard removed"), "{said}"),
        }
        expect_bare(&world.ns, "c0")?;
    }
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// What it waits for may take long, and be for a person to end.
pub fn a_command_that_waits_names_the_one_it_waits_for() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let bpf = world.lab.run.join("bpf");
    let look = File::open(&bpf)?;
    let destroy = start(&world, "-i c0 --destroy")?;
    wait_until("the pins to go", || Ok((!bpf.join("default").exists()).then_some(())))?;
    // It would give up by itself after three seconds.
    let (id, stat) = (Pid::from_raw(destroy.id().cast_signed()), format!("/proc/{}/stat", destroy.id()));
    kill(id, Signal::SIGSTOP)?;
    wait_until("it to stop", || Ok(fs::read_to_string(&stat)?.contains(") T ").then_some(())))?;
    let mut attach = Running::start(&mut world.lab.netoken(&world.args("-i c0 --attach --quiet")))?;
    let waits = format!("waiting for process {} (", destroy.id());
    attach.wait_for("whom it waits for", |line| {
        line.contains(&waits) && line.contains("--destroy) to finish")
    })?;
    drop(look);
    kill(id, Signal::SIGCONT)?;
    expect_all(vec![destroy])?;
    ensure_eq!(attach.end()?.0, Some(0), "the exit code of the attach");
    expect_ours(&world.ns, "c0", 1)?;
    // Who has finished is not named.
    ensure_eq!(fs::read_to_string(world.lab.run.join("lock"))?, "", "what the lock says");
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// What happens to the instance while a command waits for its turn is done by hand: a real destroy is too quick.
pub fn a_command_that_waited_for_a_destroy_makes_nothing_anew() -> Result<()> {
    let world = World::new()?;
    let policy = world.lab.file("policy.toml", "default = { action = 'skip' }\n")?;
    for command in [format!("policy load {}", policy.display()), "guard --show".to_string()] {
        world.ok("-i c0 --attach --quiet")?;
        let lock = File::options().read(true).write(true).open(world.lab.run.join("lock"))?;
        let lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
        let mut waits = Running::start(&mut world.lab.netoken(&command))?;
        waits.wait_for("that it waits", |line| line.contains("waiting for another netoken command"))?;
        fs::remove_dir_all(world.lab.run.join("bpf/default"))?;
        fs::remove_dir_all(world.lab.run.join("default.policy"))?;
        drop(lock);
        let (code, said) = waits.end()?;
        ensure_eq!(code, Some(1), "the exit code; it said {said:#?}");
        ensure!(said.iter().any(|line| line.contains("there is no")), "{command}: {said:#?}");
        expect_no_state(&world.lab)?;
        world.ok("-i c0 --attach --quiet")?;
        world.ok("-i c0 --destroy")?;
    }
    Ok(())
}

/// `policy show --toml | less` may last.
pub fn a_policy_that_somebody_reads_can_be_changed() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let rules: String =
        (1..4000).map(|n| format!("[[rule]]\nname = '{n}'\nport = {n}\naction = 'skip'\n")).collect();
    let policy = world.lab.file("policy.toml", rules)?;
    world.lab.ok(&format!("policy load {}", policy.display()))?;
    let mut show = world.lab.netoken("policy show --toml").stdout(Stdio::piped()).spawn()?;
    let mut out = show.stdout.take().context("its output")?;
    let mut first = [0];
    out.read_exact(&mut first)?;
    // More than a pipe holds is still to come.
    ensure!(show.try_wait()?.is_none(), "all of it has been read");
    world.lab.ok("policy add --name more --mark 1 --action skip")?;
    let mut rest = String::new();
    out.read_to_string(&mut rest)?;
    ensure!(rest.contains("name = \"3999\"") || rest.contains("name = '3999'"), "it was cut off");
    ensure!(show.wait()?.success(), "it failed");
    Ok(())
}

/// A program that is loaded between two looks of the query is ours all the same. Many interfaces make it look for long.
pub fn every_query_shows_what_is_replaced_in_place_meanwhile() -> Result<()> {
    let world = World::new()?;
    let links = (0..MANY / 2).map(|n| format!("link add name d{n} type veth peer name e{n}"));
    ip(&world.ns, links)?;
    world.second_cable()?;
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = format!("guard --netns {}", world.ns);
    let attach_guard = format!("{guard} -i c1 --attach --hook tc --rules {}", rules.display());
    for (attach, query, kind) in [
        (world.args("-i c1 --attach --quiet"), world.args("--query --json"), "hook"),
        (attach_guard, format!("{guard} --query --json"), "guard_hook"),
    ] {
        world.lab.ok(&attach)?;
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let attaches = scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    world.lab.ok(&attach)?;
                }
                anyhow::Ok(())
            });
            let looks = (0..share_of(QUERIES)?).try_for_each(|round| {
                let out = world.lab.ok(&query)?;
                let hooks = records(&out, kind)?;
                ensure!(
                    hooks.len() == 1 && hooks[0]["instance"] == "default",
                    "round {round} of {query}: {out}"
                );
                Ok(())
            });
            done.store(true, Ordering::Relaxed);
            looks.and(attaches.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        })?;
    }
    Ok(())
}

pub fn two_instances_have_two_readers() -> Result<()> {
    let world = World::new()?;
    let first = stream(&world, "")?;
    let second = stream(&world, "--instance blue")?;
    world.syns(20)?;
    ensure_eq!(shown(first)?, 20, "SYNs that the reader of 'default' showed");
    ensure_eq!(shown(second)?, 20, "SYNs that the reader of 'blue' showed");
    world.ok("-i c0 --destroy")?;
    world.ok("-i c0 --destroy --instance blue")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// The events of an instance are of all its interfaces, whoever attached them and wherever they are.
pub fn a_reader_knows_interfaces_that_others_attached() -> Result<()> {
    let world = World::new()?;
    let mut first = stream(&world, "")?;
    world.lab.ok(&format!("--netns {} -i s0 --attach --quiet", world.server_ns))?;
    world.syns(1)?;
    first.wait_for("a SYN of its own interface", |line| line.contains(" c0 "))?;
    world.lab.within(&world.server_ns, || {
        let refused = TcpStream::connect_timeout(&"10.77.0.1:9".parse()?, PATIENCE);
        ensure!(
            refused.is_err_and(|error| error.kind() == ErrorKind::ConnectionRefused),
            "somebody answered"
        );
        Ok(())
    })?;
    first.wait_for("a SYN of the other's", |line| line.contains(" s0 ") && line.contains("10.77.0.1:9"))?;
    world.lab.ok(&format!("--netns {} -i s0 --destroy", world.server_ns))?;
    ensure_eq!(shown(first)?, 1, "SYNs of its own interface that it showed");
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}
