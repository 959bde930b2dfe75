//! The units for systemd in `examples/systemd`: what they run does what they say.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::lab::OBSERVE;
use crate::support::sh;
use crate::world::World;

/// The arguments that a unit starts netoken with, for an interface of that network namespace; its files are those of the test.
fn arguments(unit: &str, key: &str, ns: &str, dir: &Path) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("examples/systemd").join(unit);
    let text = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let command = format!("{key}=/usr/local/sbin/netoken ");
    let line = text.lines().find_map(|line| line.strip_prefix(&command));
    let line = line.with_context(|| format!("{unit} has no {command}"))?;
    Ok(line.replace("%I", &format!("c0 --netns {ns}")).replace("/etc/netoken", &dir.display().to_string()))
}

pub fn the_units_attach_reload_and_detach() -> Result<()> {
    let world = World::new()?;
    let dir = tempfile::tempdir()?;
    fs::write(dir.path().join("policy.toml"), "default = { action = \"skip\" }\n")?;
    fs::write(dir.path().join("guard.toml"), OBSERVE)?;
    for (unit, side) in [("netoken@.service", "egress"), ("netoken-guard@.service", "ingress")] {
        let filters = || sh(&format!("tc -n {} filter show dev c0 {side}", world.ns));
        let start = |unit, key| world.lab.ok(&arguments(unit, key, &world.ns, dir.path())?);
        start(unit, "ExecStart")?;
        ensure!(filters()?.contains("netoken"), "{unit} attaches nothing");
        start(unit, "ExecReload")?;
        start("netoken-clock.service", "ExecStart")?;
        start(unit, "ExecStop")?;
        ensure!(filters()?.is_empty(), "{unit} leaves its filter");
    }
    world.ok("-i c0 --destroy")?;
    world.lab.ok(&format!("guard -i c0 --netns {} --destroy", world.ns)).map(drop)
}
