//! Network namespaces: by name, by path, from inside and from outside.

use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::lab::NETOKEN;
use crate::look::{expect_bare, expect_no_state, expect_ours, records};
use crate::support::ensure_eq;
use crate::world::World;

pub fn a_query_without_an_interface_lists_every_named_namespace() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    world.lab.ok(&format!("--netns {} -i s0 --attach --quiet", world.server_ns))?;
    let out = world.lab.ok("--query --json")?;
    let hooks = records(&out, "hook")?;
    for (ns, iface) in [(&world.ns, "c0"), (&world.server_ns, "s0")] {
        let found = hooks.iter().filter(|hook| hook["netns"] == **ns).collect::<Vec<_>>();
        ensure!(found.len() == 1 && found[0]["interface"] == iface, "{iface} of {ns} is not in {out}");
    }
    let table = world.lab.ok("--query")?;
    ensure!(table.contains(&world.ns) && table.contains(&world.server_ns), "{table}");

    let here = world.ok("--query --json")?;
    ensure_eq!(records(&here, "hook")?.len(), 1, "hooks of one namespace in {here}");
    Ok(())
}

/// Each namespace is open while all are looked into, and a shell gives few descriptors without being asked.
pub fn more_namespaces_than_descriptors_are_listed() -> Result<()> {
    let mut world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    for number in 0..40 {
        world.lab.add_netns([&format!("more-{number}")])?;
    }
    let mut command = Command::new("sh");
    command.args(["-c", &format!("ulimit -S -n 32; exec {NETOKEN} --query --json")]);
    let output = command.env("NETOKEN_RUN", &world.lab.run).output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let hooks = records(&String::from_utf8(output.stdout)?, "hook")?;
    ensure!(hooks.iter().any(|hook| hook["netns"] == *world.ns), "{hooks:?}");
    Ok(())
}

pub fn a_namespace_has_a_name_or_a_path() -> Result<()> {
    let world = World::new()?;
    let path = format!("/run/netns/{}", world.ns);
    world.lab.ok(&format!("--netns {path} -i c0 --attach --quiet"))?;
    expect_ours(&world.ns, "c0", 1)?;
    let out = world.ok("-i c0 --query --json")?;
    ensure_eq!(records(&out, "hook")?.len(), 1, "hooks in {out}");
    let out = world.lab.ok(&format!("--netns {path} -i c0 --query --json"))?;
    ensure_eq!(records(&out, "hook")?.len(), 1, "hooks in {out}");
    world.lab.ok(&format!("--netns {path} -i c0 --destroy"))?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// Attaches, queries, replaces and destroys, each in an `ip netns exec` of its own.
const FROM_INSIDE: &str = r#"
    inside() { ip netns exec "$NS" "$NETOKEN" -i c0 "$@" || { echo "failed inside: $*"; exit 1; } >&2; }
    outside() { "$NETOKEN" --netns "$NS" -i c0 "$@" || { echo "failed outside: $*"; exit 1; } >&2; }
    inside --attach --quiet --token 00112233aabbccdd
    inside --query --json
    outside --query --json
    inside --attach --quiet
    outside --attach --quiet
    inside --query --json
    inside --detach
    outside --attach --quiet
    inside --destroy
"#;

fn expect_found(world: &World, mut command: Command) -> Result<()> {
    let command = command.env("NETOKEN_RUN", &world.lab.run).env("NS", &world.ns).env("NETOKEN", NETOKEN);
    let output = command.output().context("running sh")?;
    let (out, said) = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
    ensure!(output.status.success(), "{}: {said}", output.status);
    let hooks = records(&out, "hook")?;
    ensure_eq!(hooks.len(), 3, "hooks in {out}{said}");
    ensure!(hooks.iter().all(|hook| hook["instance"] == "default"), "the state is not found again: {out}");
    // The first attach chose the token; all others keep what it chose.
    ensure_eq!(said.matches("as instance 'default' had it").count(), 3, "policies kept in {said}");
    expect_bare(&world.ns, "c0")
}

pub fn commands_inside_ip_netns_exec_find_each_other() -> Result<()> {
    let world = World::new()?;
    let mut command = Command::new("sh");
    command.args(["-ec", FROM_INSIDE]);
    expect_found(&world, command)?;
    expect_no_state(&world.lab)
}

/// The same below a process 1 that we may look into, as on most hosts; a container may not.
pub fn commands_inside_ip_netns_exec_find_each_other_below_another_process_1() -> Result<()> {
    let world = World::new()?;
    let mut command = Command::new("unshare");
    command.args(["--pid", "--fork", "--kill-child", "--mount", "--mount-proc", "sh", "-ec", FROM_INSIDE]);
    expect_found(&world, command)?;
    expect_no_state(&world.lab)
}

/// From another mount namespace, what `ip netns` mounted looks like an empty file.
pub fn a_bare_file_among_the_namespaces_does_not_end_a_query() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let stale = format!("{}-stale", world.ns);
    let path = format!("/run/netns/{stale}");
    std::fs::write(&path, "")?;
    let everywhere = world.lab.run("--query --json");
    let named = world.lab.run(&format!("--netns {stale} -i c0 --query"));
    std::fs::remove_file(&path)?;

    let (everywhere, named) = (everywhere?, named?);
    let said = String::from_utf8_lossy(&everywhere.stderr);
    ensure!(everywhere.status.success(), "{}: {said}", everywhere.status);
    ensure!(
        records(&String::from_utf8(everywhere.stdout)?, "hook")?
            .iter()
            .any(|hook| hook["netns"] == *world.ns)
    );
    let said = String::from_utf8_lossy(&named.stderr);
    ensure_eq!(named.status.code(), Some(1), "the exit code: {said}");
    ensure!(said.contains(&path) && said.contains("/ns/net"), "no remedy: {said}");
    Ok(())
}
