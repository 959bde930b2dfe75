//! An application that asks who connected: the example server, and curl as its client.

use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use netoken::peer;

use crate::lab::{PATIENCE, host};
use crate::support::ensure_eq;
use crate::world::{FAMILIES, Family, World};
use crate::{case, with};

#[path = "../../examples/who.rs"]
mod who;

pub fn cases() -> Vec<Trial> {
    let curl = with("curl");
    FAMILIES
        .map(|family| {
            let name = format!("peer: the example server says who connected over {}", family.name());
            case(&name, &curl, move || example(family))
        })
        .into()
}

/// What curl gets from the example server.
fn ask(world: &World, family: Family) -> Result<String> {
    let addr = (world.server_addr(family), 0).into();
    let listener = world.lab.within(&world.server, || peer::listen(addr))?;
    let port = listener.local_addr()?.port();
    let url = format!("http://{}/", host(world.server_addr(family), port));
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--noproxy", "*", "--max-time", &PATIENCE.as_secs().to_string(), &url]);
    curl.stdout(Stdio::piped()).stderr(Stdio::piped());
    // A thread's namespace is that of what it starts.
    let child = world.lab.within(&world.client, || curl.spawn().context("starting curl"))?;
    let keys = world.lab.keys().join("default");
    let output = thread::scope(|scope| {
        let curl = scope.spawn(|| child.wait_with_output());
        accept(&listener).and_then(|stream| who::answer(stream, Some(&keys)))?;
        Ok::<_, anyhow::Error>(curl.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?)
    })?;
    ensure!(output.status.success(), "curl {url}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn accept(listener: &std::net::TcpListener) -> Result<std::net::TcpStream> {
    let socket = socket2::SockRef::from(listener);
    socket.set_read_timeout(Some(PATIENCE))?;
    Ok(listener.accept().context("waiting for curl")?.0)
}

fn example(family: Family) -> Result<()> {
    let world = World::new(true)?;
    world.lab.ok("key new edge")?;
    let policy = world.lab.keys().join("policy.toml");
    std::fs::write(&policy, "default = { action = 'stamp', token = { tag = 4711, key = 'edge' } }")?;
    let address = format!("address  {}:", host(world.client_addr(family), 0).trim_end_matches(":0"));
    let expect = |said: &str, lines: &[&str]| {
        ensure!(said.starts_with(&address), "{said}");
        for line in lines {
            ensure!(said.contains(line), "no '{line}' in {said}");
        }
        Ok::<_, anyhow::Error>(())
    };
    let said = ask(&world, family)?;
    expect(&said, &["token    none\n", "verdict  missing\n"])?;
    ensure!(!said.contains("tag"), "{said}");

    world.attach(&format!("--policy {}", policy.display()))?;
    let said = ask(&world, family)?;
    expect(&said, &["token    1267", "tag      4711\n", "verdict  valid\n"])?;
    // A key that the server does not know.
    std::fs::remove_file(world.lab.keys().join("default/edge-0.key"))?;
    let said = ask(&world, family)?;
    expect(&said, &["token    1267", "verdict  unknown_key\n"])?;
    ensure_eq!(said.contains("tag"), false, "a tag that was not checked");
    Ok(())
}
