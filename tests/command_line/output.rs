//! Outputs that nobody reads, that are closed, or that are full.

use std::fs::OpenOptions;
use std::io::pipe;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::lab::NETOKEN;
use crate::look::{expect_bare, expect_no_state, expect_ours};
use crate::said::{Said, said, said_to};
use crate::support::ensure_eq;
use crate::world::World;

/// Runs a line of bash in which `netoken` stands for the program, on the client.
pub fn bash(world: &World, line: &str) -> Result<Said> {
    let script = format!("netoken() {{ {NETOKEN} --netns {} \"$@\"; }}; {line}", world.ns);
    said(Command::new("bash").args(["-c", &script]).env("NETOKEN_RUN", &world.lab.run))
}

fn full() -> Result<Stdio> {
    Ok(OpenOptions::new().write(true).open("/dev/full")?.into())
}

fn to_full(world: &World, args: &str) -> Result<Said> {
    said_to(world.lab.netoken(&world.args(args)).stdout(full()?)).with_context(|| args.to_string())
}

/// A pipe whose reader is gone.
fn broken() -> Result<Stdio> {
    let (_, writer) = pipe()?;
    Ok(writer.into())
}

pub fn an_early_reader_ends_the_stream_in_peace() -> Result<()> {
    let world = World::new()?;
    for (flags, first) in [("", "TIME (UTC)"), ("--json", "{\"type\":\"attached\"")] {
        let line = format!("netoken -i c0 --attach {flags} | head -1; echo \"code ${{PIPESTATUS[0]}}\"");
        let said = bash(&world, &line)?.code(0)?;
        ensure!(said.out.starts_with(first) && said.out.ends_with("code 0\n"), "{flags}: {said:#?}");
        expect_ours(&world.ns, "c0", 1)?;
        let last = said.err.lines().last().unwrap_or_default();
        let advice = format!("netoken --iface c0 --netns {} --destroy", world.ns);
        ensure!(last.contains("still attached to c0") && last.ends_with(&advice), "{flags}: {said:#?}");
    }
    world.ok("-i c0 --destroy")?;
    let said =
        bash(&world, "netoken -i c0 --attach --detach-on-exit | head -1; echo \"code ${PIPESTATUS[0]}\"")?;
    ensure!(said.out.ends_with("code 0\n"), "{said:#?}");
    expect_bare(&world.ns, "c0")
}

pub fn a_closed_pipe_is_no_error_anywhere() -> Result<()> {
    let world = World::new()?;
    for args in [
        "--help",
        "-i c0 --attach --quiet",
        "-i c0 --attach --quiet --json",
        "-i c0 --attach",
        "-i c0 --query",
        "-i c0 --query --json",
        "-i c0 --detach --json",
        "-i c0 --destroy --json",
    ] {
        let mut command = world.lab.netoken(&world.args(args));
        said_to(command.stdout(broken()?))?.code(0).with_context(|| args.to_string())?;
    }
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_closed_output_is_no_panic() -> Result<()> {
    let world = World::new()?;
    for args in ["-i c0 --attach --quiet --json", "-i c0 --query", "--query --json", "-i c0 --destroy --json"]
    {
        for closed in [">&-", "2>&-", ">&- 2>&-"] {
            world.ok("-i c0 --attach --quiet")?;
            bash(&world, &format!("netoken {args} {closed}"))?
                .code(0)
                .with_context(|| format!("{args} {closed}"))?;
        }
    }
    Ok(())
}

pub fn an_output_that_is_full_is_an_error() -> Result<()> {
    let world = World::new()?;
    for args in [
        "-i c0 --attach",
        "-i c0 --attach --json",
        "-i c0 --attach --quiet --json",
        "-i c0 --query",
        "-i c0 --query --json",
        "-i c0 --detach --json",
        "-i c0 --destroy --json",
    ] {
        world.ok("-i c0 --attach --quiet")?;
        to_full(&world, args)?.code(1)?.err(&["No space left on device"])?;
    }
    // What was asked for is done all the same.
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn an_error_of_the_output_says_what_it_is_about() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    for args in ["-i c0 --attach", "-i c0 --attach --quiet --json", "-i c0 --query"] {
        let said = to_full(&world, args)?.code(1)?;
        let named = ["output", "printing", "writing"].iter().any(|word| said.err.contains(word));
        ensure!(named, "{args}: what could not be written where? {said:#?}");
    }
    Ok(())
}

pub fn a_stream_that_fails_says_what_stays() -> Result<()> {
    let world = World::new()?;
    let said = to_full(&world, "-i c0 --attach")?.code(1)?;
    expect_ours(&world.ns, "c0", 1)?;
    ensure!(said.err.contains("still attached to c0"), "{said:#?}");
    Ok(())
}

pub fn a_stream_that_fails_still_detaches_on_exit() -> Result<()> {
    let world = World::new()?;
    let said = to_full(&world, "-i c0 --attach --detach-on-exit")?.code(1)?;
    expect_bare(&world.ns, "c0").with_context(|| format!("{said:#?}"))?;
    expect_no_state(&world.lab)
}

pub fn a_full_standard_error_is_no_panic() -> Result<()> {
    let world = World::new()?;
    for args in
        ["-i c0 --attach --quiet", "-i c0 --query", "-i c0 --detach", "-i c0 --destroy", "-i zz --query"]
    {
        let said = bash(&world, &format!("netoken {args} 2>/dev/full; echo \"code $?\""))?;
        ensure!(said.out.ends_with("code 0\n") || said.out.ends_with("code 1\n"), "{args}: {said:#?}");
    }
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_pipe_of_both_that_closes_early_is_no_panic() -> Result<()> {
    let world = World::new()?;
    let said = bash(&world, "netoken -i c0 --attach 2>&1 | head -1; echo \"code ${PIPESTATUS[0]}\"")?;
    ensure_eq!(said.out.lines().last(), Some("code 0"), "the exit code: {said:#?}");
    expect_ours(&world.ns, "c0", 1)
}

/// Few descriptors make an attach fail at one step after another; none of them may leave anything behind.
pub fn an_attach_without_descriptors_leaves_nothing() -> Result<()> {
    let world = World::new()?;
    for (failed, limit) in (4..64).enumerate() {
        let said =
            bash(&world, &format!("ulimit -n {limit}; netoken -i c0 --attach --quiet; echo \"code $?\""))?;
        if said.out.ends_with("code 0\n") {
            ensure!(failed > 2, "{failed} attaches failed: that is not many steps");
            return Ok(());
        }
        expect_bare(&world.ns, "c0")?;
        expect_no_state(&world.lab)?;
    }
    bail!("no attach worked, even with 63 descriptors")
}

/// What it cannot see is not gone.
pub fn a_command_without_descriptors_removes_nothing_of_others() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.syns(1)?;
    let elsewhere = format!("--netns {}", world.server_ns);
    for command in ["--iface s0 --attach --quiet", "--iface s0 --detach", "--iface s0 --destroy", "--destroy"]
    {
        for limit in 3..7 {
            bash(&world, &format!("ulimit -n {limit}; exec {NETOKEN} {elsewhere} {command}"))?;
            let query = world.ok("--query").with_context(|| format!("{command} with {limit} descriptors"))?;
            ensure!(query.contains("1 stamped"), "{command} with {limit} descriptors: {query}");
        }
    }
    Ok(())
}
