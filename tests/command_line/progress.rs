//! What only a person at a terminal sees: how far a long load is, and colours.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::pty::openpty;
use tempfile::tempdir;

use crate::lab::Lab;
use crate::said::{Said, said};
use crate::support::ensure_eq;
use crate::world::World;

/// What removes the line of the progress.
const CLEAR: &str = "\r\u{1b}[K";
/// More rules than the quickest machine reads before a person would wonder.
const RULES_MAX: usize = 2_000_000;

/// A policy of that many rules.
pub fn write_policy(dir: &Path, rules: usize) -> Result<String> {
    let text: String = (0..rules)
        .map(|n| {
            let (a, b, c) = (n >> 16 & 0xff, n >> 8 & 0xff, n & 0xff);
            format!("[[rule]]\nname = 'r{n}'\ndst = '10.{a}.{b}.{c}'\naction = 'skip'\n")
        })
        .collect();
    let path = dir.join("p.toml");
    fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    Ok(path.display().to_string())
}

/// Runs netoken with a terminal as its standard error; returns also what came there.
fn at_a_terminal(lab: &Lab, args: &str) -> Result<(Said, String)> {
    at_a_terminal_with(lab, args, &[("TERM", "xterm"), ("NO_COLOR", "")])
}

/// The same with these variables.
fn at_a_terminal_with(lab: &Lab, args: &str, vars: &[(&str, &str)]) -> Result<(Said, String)> {
    let pty = openpty(None, None).context("opening a pseudo terminal")?;
    let mut master = File::from(pty.master);
    let reader = thread::spawn(move || {
        let mut bytes = Vec::new();
        // A terminal that nobody holds open any more ends with an error.
        match master.read_to_end(&mut bytes) {
            Err(error) if error.raw_os_error() != Some(libc::EIO) => Err(error),
            _ => Ok(bytes),
        }
    });
    let mut command = lab.netoken(args);
    command.envs(vars.iter().copied());
    let output = command.stderr(pty.slave).output().with_context(|| format!("running netoken {args}"));
    // It holds the terminal open.
    drop(command);
    let bytes = reader.join().map_err(|_| anyhow!("the reader of the terminal panicked"))??;
    Ok((Said::from_output(output?)?, String::from_utf8(bytes).context("what came to the terminal")?))
}

/// Writes ever longer policies until `run` shows what it is doing, and gives back the path of that one and what was shown.
fn until_shown(lab: &Lab, dir: &Path, run: impl Fn(&str) -> String) -> Result<(String, String)> {
    let mut rules = 1 << 15;
    while rules <= RULES_MAX {
        let path = write_policy(dir, rules)?;
        let (said, shown) = at_a_terminal(lab, &run(&path))?;
        said.code(0)?;
        if shown.contains('%') {
            return Ok((path, shown));
        }
        rules *= 2;
    }
    bail!("{RULES_MAX} rules were done before a word was said")
}

/// Fails unless it is lines like "reading rules: 30% of 100000", each in the place of the one before, and none is left.
fn expect_progress(shown: &str, doing: &[&str]) -> Result<()> {
    let mut last = "";
    for line in shown.split(CLEAR) {
        last = line;
        let Some((what, rest)) = line.split_once(": ").filter(|(_, rest)| rest.contains('%')) else {
            continue;
        };
        let (percent, total) = rest.split_once("% of ").with_context(|| format!("{line:?} in {shown:?}"))?;
        ensure!(percent.parse::<u32>()? <= 100 && total.parse::<u32>()? > 0, "{line:?} in {shown:?}");
        ensure!(doing.contains(&what), "what is {what:?}? {shown:?}");
    }
    ensure!(!last.contains('%'), "the last line stays: {shown:?}");
    Ok(())
}

pub fn what_is_wrong_has_colours_where_they_are_wanted() -> Result<()> {
    let (lab, dir) = (Lab::new()?, tempdir()?);
    let path = dir.path().join("p.toml");
    // Of an error and, beside it, of a warning alone.
    for (text, code) in [("mark = 1", 1), ("[[rule]]\nname = 'x'\ninterface = 'none0'\naction = 'skip'\n", 0)]
    {
        fs::write(&path, text)?;
        let check = format!("policy check --allow-missing {}", path.display());
        for (term, no_color, has_colours) in [("xterm", "", true), ("xterm", "1", false), ("dumb", "", false)]
        {
            let vars = [("TERM", term), ("NO_COLOR", no_color)];
            let (said, shown) = at_a_terminal_with(&lab, &check, &vars)?;
            said.code(code)?;
            ensure!(shown.contains("p.toml:"), "{vars:?}: {shown:?}");
            ensure_eq!(shown.contains('\u{1b}'), has_colours, "{vars:?}: {shown:?}");
        }
    }
    Ok(())
}

pub fn a_person_who_waits_sees_how_far_it_is() -> Result<()> {
    let (lab, dir) = (Lab::new()?, tempdir()?);
    let (_, shown) = until_shown(&lab, dir.path(), |path| format!("policy check {path}"))?;
    expect_progress(&shown, &["reading rules"])?;
    // Nothing else was to be said.
    ensure!(shown.starts_with(CLEAR) && shown.ends_with(CLEAR), "{shown:?}");
    Ok(())
}

pub fn a_load_says_how_far_it_is_to_people_only() -> Result<()> {
    let world = World::new()?;
    let (lab, dir) = (&world.lab, tempdir()?);
    world.ok("-i c0 --attach --quiet")?;
    let (path, shown) = until_shown(lab, dir.path(), |path| format!("policy load {path}"))?;
    expect_progress(&shown, &["reading rules", "loading entries"])?;
    let last = shown.rsplit(CLEAR).next().unwrap_or_default();
    ensure!(last.starts_with("instance 'default': "), "the last that was said: {shown:?}");

    let (json, shown) = at_a_terminal(lab, &format!("policy load --json {path}"))?;
    ensure_eq!(shown, "", "what came to the terminal beside JSON");
    ensure!(json.code(0)?.out.starts_with('{'), "no JSON");
    let said = said(&mut lab.netoken(&format!("policy load {path}")))?.code(0)?;
    ensure!(!said.err.contains('%') && !said.err.contains('\u{1b}'), "{said:#?}");
    Ok(())
}
