//! Without the rights that it takes, the error says which.

use std::fs::File;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};

use crate::lab::{Lab, NETOKEN};
use crate::look::expect_no_state;
use crate::said::{Said, said};
use crate::world::World;

const MODES: [&str; 5] =
    ["-i lo --attach", "-i lo --attach --quiet", "--query", "-i lo --detach", "-i lo --destroy"];

/// Runs it as nobody. The program may lie where nobody can look, so it is handed over open.
fn as_nobody(lab: &Lab, args: &str) -> Result<Said> {
    if !nix::unistd::geteuid().is_root() {
        return said(&mut lab.netoken(args));
    }
    let mut command = Command::new("sh");
    let script = "exec setpriv --reuid=65534 --clear-groups /proc/self/fd/3 \"$@\" 3<&0 </dev/null";
    command.args(["-c", script, "sh"]).args(args.split_whitespace());
    command.env("NETOKEN_RUN", &lab.run).env("NETOKEN_KEYS", lab.keys());
    command.stdin(Stdio::from(File::open(NETOKEN)?)).stdout(Stdio::piped()).stderr(Stdio::piped());
    let output = command.output()?;
    Said::from_output(output)
}

/// Runs it as root with these capabilities only.
fn with_only(world: &World, capabilities: &str, args: &str) -> Result<Said> {
    let mut command = Command::new("setpriv");
    command.args(["--bounding-set", &format!("-all,{capabilities}"), NETOKEN]);
    said(command.args(world.args(args).split_whitespace()).env("NETOKEN_RUN", &world.lab.run))
}

pub fn without_rights_the_capabilities_and_the_remedy_are_named() -> Result<()> {
    let lab = Lab::new()?;
    for mode in MODES {
        as_nobody(&lab, mode)?
            .code(1)?
            .err(&["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON", "sudo"])
            .context(mode)?;
    }
    expect_no_state(&lab)
}

pub fn keys_are_for_root_alone() -> Result<()> {
    let lab = Lab::new()?;
    lab.ok("key new edge")?;
    for args in ["key list", "key list --json", "key load", "key rotate edge", "key new other"] {
        as_nobody(&lab, args)?.code(1)?.err(&["key", "Permission denied", "try sudo"]).context(args)?;
    }
    let file = lab.keys().join("default/edge-0.key").display().to_string();
    let flow = "--tag 1 --src 192.0.2.1:1 --dst 192.0.2.2:2 --isn 3";
    as_nobody(&lab, &format!("token make --key-file {file} {flow}"))?.code(1)?.err(&[&file, "try sudo"])?;
    Ok(())
}

pub fn each_missing_capability_is_named() -> Result<()> {
    let world = World::new()?;
    // CAP_SYS_ADMIN, to enter the namespace, includes the two younger ones.
    let said = with_only(&world, "+sys_admin", "-i c0 --attach --quiet")?.code(1)?;
    said.err(&["attaching to c0", "lacks CAP_NET_ADMIN;", "sudo"])?;
    expect_no_state(&world.lab)
}

pub fn without_the_right_to_mount_the_error_says_so() -> Result<()> {
    let world = World::new()?;
    let mut command = Command::new("ip");
    command.args(["netns", "exec", &world.ns, "setpriv", "--bounding-set"]);
    command.args(["-all,+net_admin,+bpf,+perfmon", NETOKEN, "-i", "c0", "--attach", "--quiet"]);
    said(command.env("NETOKEN_RUN", &world.lab.run))?.code(1)?.err(&["CAP_SYS_ADMIN", "sudo"])?;
    expect_no_state(&world.lab)
}
