//! Names of interfaces and namespaces that are wrong, or have nothing attached.

use anyhow::{Context, Result, ensure};
use nix::sys::stat::Mode;
use nix::unistd::mkfifo;

use crate::lab::Lab;
use crate::look::expect_no_state;
use crate::said::{netoken, said};
use crate::world::World;

const MODES: [&str; 4] = ["--attach --quiet", "--query", "--detach", "--destroy"];

pub fn an_unknown_namespace_is_named() -> Result<()> {
    for netns in ["no-such-namespace", "/no/such/namespace"] {
        netoken(&["--netns", netns, "--iface", "lo", "--query"])?.code(1)?.err(&[
            "network namespace",
            netns,
            "No such file",
        ])?;
    }
    Ok(())
}

pub fn an_unknown_namespace_gets_a_list_of_those_known() -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("known")?;
    for mode in MODES {
        said(&mut lab.netoken(&format!("--netns no-such-namespace -i lo {mode}")))?
            .code(1)?
            .err(&["no-such-namespace", &ns])
            .context(mode)?;
    }
    // A file that is no namespace is an error as well, also a pipe into which nobody writes.
    let file = lab.file("file", "")?.display().to_string();
    let pipe = format!("{file}-pipe");
    mkfifo(pipe.as_str(), Mode::S_IRWXU)?;
    for path in [file, pipe] {
        said(&mut lab.netoken(&format!("--netns {path} -i lo --query")))?
            .code(1)?
            .err(&[&path, "not a network namespace"])?;
    }
    expect_no_state(&lab)
}

pub fn an_unknown_interface_gets_near_names() -> Result<()> {
    let world = World::new()?;
    for mode in MODES {
        let said = said(&mut world.lab.netoken(&world.args(&format!("-i co {mode}"))))?.code(1)?;
        said.err(&["'co'", "no such interface", "did you mean", "c0", &world.ns]).context(mode)?;
    }
    said(&mut world.lab.netoken(&world.args("-i zzzzzz --attach")))?
        .code(1)?
        .err(&["'zzzzzz'", "there are: lo, c0"])
        .map(drop)
}

pub fn a_query_where_nothing_is_attached() -> Result<()> {
    let world = World::new()?;
    let query = |args: &str| said(&mut world.lab.netoken(&world.args(args)));
    for args in ["-i c0 --query", "-i c0 --query --json"] {
        query(args)?.code(1)?.err(&["on c0: there are none", "--iface c0 --netns", "--attach"])?;
    }
    query("--query")?.code(0)?.err(&["not attached to any interface"])?;
    query("--destroy")?.code(0)?.err(&["not attached to any interface"])?;
    let said = query("--query --json")?.code(0)?;
    ensure!(said.out.is_empty() && said.err.is_empty(), "{said:#?}");
    expect_no_state(&world.lab)
}

/// As with --iface: it may be longer than any other name of an interface.
pub fn an_alternative_name_can_stand_in_a_policy() -> Result<()> {
    let world = World::new()?;
    let long = "the-cable-that-leads-to-the-other-side-of-the-street";
    crate::support::sh(&format!("ip -n {} link property add dev c0 altname {long}", world.ns))?;
    let dir = crate::rules::dir()?;
    for (interface, token) in
        [(long.to_string(), "1111111111111111"), (format!("{}:{long}", world.ns), "2222222222222222")]
    {
        let rule =
            format!("[[rule]]\nname = 'x'\ninterface = '{interface}'\naction = 'stamp'\ntoken = '{token}'\n");
        let path = crate::rules::write(dir.path(), "p.toml", &rule)?;
        world.ok(&format!("-i {long} --attach --quiet --policy {}", path.display()))?;
        world.expect_token(token, "the token of the rule")?;
    }
    Ok(())
}
