//! Kernels that refuse things: there is a limit on locked memory, or the kernel is locked down. Made for the guests of
//! `scripts/kernels`, as a lockdown lasts until the next boot.

#[path = "support/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "hooks/look.rs"]
#[allow(dead_code)]
mod look;
#[path = "command_line/said.rs"]
#[allow(dead_code)]
mod said;
#[path = "support/mod.rs"]
mod support;
#[path = "hooks/world.rs"]
#[allow(dead_code)]
mod world;

use std::fs;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use lab::{NETOKEN, Running};
use look::{expect_bare, expect_no_state, expect_ours};
use netoken::kernel::Kernel;
use said::said;
use support::{Need, case};
use world::World;

const LOCKDOWN: &str = "/sys/kernel/security/lockdown";

fn main() -> ExitCode {
    let needs =
        [Need::Root, Need::Tool("ip"), Need::Tool("tc"), Need::Tool("ethtool"), Need::Tool("setpriv")];
    let in_guest = [&needs[..], &[Need::Guest]].concat();
    support::run(vec![
        case("a limit on locked memory is explained where the kernel has one", &needs, locked_memory),
        case(
            "a locked-down kernel stamps and guards, and is not blamed for another limit",
            &in_guest,
            lockdown,
        ),
    ])
}

/// Attaches as a root whom the limit on locked memory binds.
fn locked_memory() -> Result<()> {
    let world = World::new()?;
    let script = "ulimit -l 64; exec setpriv --bounding-set -sys_resource \"$@\"";
    let mut command = Command::new("sh");
    command.args(["-c", script, "sh", NETOKEN]).env("NETOKEN_RUN", &world.lab.run);
    let said = said(command.args(world.args("-i c0 --attach --quiet").split_whitespace()))?;
    if Kernel::probe().version() >= Some((5, 11)) {
        said.code(0)?;
        return expect_ours(&world.ns, "c0", 1);
    }
    said.code(1)?.err(&[
        "loading the classifier",
        "limit on locked memory",
        "ulimit -l unlimited",
        "CAP_SYS_RESOURCE",
    ])?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// The stricter of the two modes: it forbids all that the other forbids.
fn lockdown() -> Result<()> {
    let mode = "confidentiality";
    fs::write(LOCKDOWN, mode).with_context(|| format!("writing '{mode}' to {LOCKDOWN}"))?;
    // Asked here: what is known of a kernel is known once.
    let in_force = fs::read_to_string(LOCKDOWN).with_context(|| format!("reading {LOCKDOWN}"))?;
    ensure!(in_force.contains(&format!("[{mode}]")), "{mode} is not in force: {in_force}");
    stamps_and_guards()?;
    locked_memory()
}

fn stamps_and_guards() -> Result<()> {
    let world = World::new()?;
    let mut stream = Running::start(&mut world.lab.netoken(&world.args("-i c0 --attach --json")))?;
    stream.wait_for("the attach", |line| line.contains("\"type\":\"attached\""))?;
    world.expect_token("4e45544f4b454e31", "the token")?;
    stream.wait_for("an event", |line| line.contains("\"type\":\"syn\""))?;
    drop(stream);

    let rule = "[[rule]]\nname = 'server'\ndst = '10.77.0.1'\nmode = 'drop'\ntokens = '4e45544f4b454e31'\n";
    let rules = world.lab.file("guard.toml", rule)?;
    let guard = format!("guard --netns {} --iface c0", world.ns);
    world.lab.ok(&format!("{guard} --attach --hook xdp --rules {}", rules.display()))?;
    world.lab.ok(&format!("{guard} --destroy"))?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}
