//! An application that asks who connected: the example server, and curl as its client.

use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread;

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use netoken::peer::{self, Peers};

use crate::guard::{KEYED, STATIC, attach, keyed_policy, rules};
use crate::lab::{PATIENCE, host};
use crate::segment::TOKEN;
use crate::support::ensure_eq;
use crate::world::{FAMILIES, Family, World};
use crate::{NET, case, with};

#[path = "../../examples/who.rs"]
mod who;

pub fn cases() -> Vec<Trial> {
    let curl = with("curl");
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = format!("peer: the example server says who connected over {}", family.name());
        cases.push(case(&name, &curl, move || example(family)));
        for hook in ["xdp", "tc"] {
            let name = format!("peer: a token that --hook {hook} scrubs over {} is known", family.name());
            cases.push(case(&name, &curl, move || scrubbed(family, hook)));
        }
    }
    cases.push(case("peer: an application without any rights reads who connected", NET, without_rights));
    cases.push(case(
        "peer: where there is no guard, and of what is no connection, the error says what to do",
        NET,
        refused,
    ));
    cases
}

/// What curl gets from the example server.
fn ask(world: &World, family: Family, guard: Option<Arc<Peers>>) -> Result<String> {
    let addr = (world.server_addr(family), 0).into();
    let listener = world.lab.within(&world.server, || peer::listen(addr))?;
    let port = listener.local_addr()?.port();
    let url = format!("http://{}/", host(world.server_addr(family), port));
    let mut curl = Command::new("curl");
    curl.args(["-sS", "--noproxy", "*", "--max-time", &PATIENCE.as_secs().to_string(), &url]);
    curl.stdout(Stdio::piped()).stderr(Stdio::piped());
    // A thread's namespace is that of what it starts.
    let child = world.lab.within(&world.client, || curl.spawn().context("starting curl"))?;
    let judges = who::Judges { keys: Some(world.lab.keys().join("default")), guard };
    let (told, output) = thread::scope(|scope| {
        let curl = scope.spawn(|| child.wait_with_output());
        let told = accept(&listener).and_then(|stream| who::answer(stream, &judges))?;
        Ok::<_, anyhow::Error>((told, curl.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?))
    })?;
    ensure!(output.status.success(), "curl {url}: {}", String::from_utf8_lossy(&output.stderr));
    ensure_eq!(String::from_utf8(output.stdout)?, told, "what curl got");
    Ok(told)
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
    let said = ask(&world, family, None)?;
    expect(&said, &["token    none\n", "verdict  missing\n"])?;
    ensure!(!said.contains("tag"), "{said}");

    world.attach(&format!("--policy {}", policy.display()))?;
    let said = ask(&world, family, None)?;
    expect(&said, &["token    1267", "tag      4711\n", "verdict  valid\n"])?;
    // A key that the server does not know.
    std::fs::remove_file(world.lab.keys().join("default/edge-0.key"))?;
    let said = ask(&world, family, None)?;
    expect(&said, &["token    1267", "verdict  unknown_key\n"])?;
    ensure_eq!(said.contains("tag"), false, "a tag that was not checked");
    Ok(())
}

/// The maps of this world's guard. The directory of its state is told by the environment, which belongs to a process.
fn peers(world: &World) -> Result<Peers> {
    Peers::open_below(&world.lab.run.join("bpf/default"))
}

fn scrubbed(family: Family, hook: &str) -> Result<()> {
    let world = World::new(true)?;
    let policy = keyed_policy(&world)?;
    let rules = rules(&world, "observe", &format!("{KEYED}\nscrub = true"))?;
    attach(&world, hook, &rules)?;
    let guard = Arc::new(peers(&world)?);
    // Who has none is not made out to be somebody.
    let said = ask(&world, family, Some(Arc::clone(&guard)))?;
    ensure!(said.contains("token    none\nverdict  missing\n"), "{said}");
    world.attach(&format!("--policy {policy}"))?;
    let said = ask(&world, family, Some(guard))?;
    for line in ["token    0011", "tag      17\n", "verdict  valid by rule 1 of the guard\n"] {
        ensure!(said.contains(line), "no '{line}' in {said}");
    }
    // The SYN itself does not show it any more.
    let said = ask(&world, family, None)?;
    ensure!(said.contains("token    none\nverdict  missing\n"), "{said}");
    world.expect_no_bad_packets()
}

/// Gives up every right of this thread, and of no other: the system call itself is for one thread.
fn give_up_rights() -> Result<()> {
    const NOBODY: libc::uid_t = 65_534;
    // SAFETY: numbers only.
    let results = unsafe {
        [
            libc::syscall(libc::SYS_setresgid, NOBODY, NOBODY, NOBODY),
            libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY),
        ]
    };
    ensure_eq!(results, [0, 0], "becoming nobody");
    let status = std::fs::read_to_string("/proc/thread-self/status")?;
    ensure!(status.contains("CapEff:\t0000000000000000\n"), "it has rights: {status}");
    Ok(())
}

fn without_rights() -> Result<()> {
    let world = World::new(true)?;
    world.attach("")?;
    for family in FAMILIES {
        let addr = (world.server_addr(family), 0).into();
        let listener = world.lab.within(&world.server, || {
            give_up_rights()?;
            peer::listen(addr)
        })?;
        let addr = listener.local_addr()?;
        let client = crate::sockets::connect(&world.lab, &world.client, addr, PATIENCE)?;
        let stream = accept(&listener)?;
        let peer = world.lab.within(&world.server, || {
            give_up_rights()?;
            Ok(peer::of(&stream)?)
        })?;
        ensure_eq!(peer.flow().src(), client.local_addr()?, "who it was");
        ensure_eq!(peer.token().map(|token| token.0), Some(TOKEN), "token");
    }
    Ok(())
}

fn refused() -> Result<()> {
    let world = World::new(true)?;
    let said = format!("{:#}", peers(&world).err().context("it was opened")?);
    ensure!(said.contains("attach it with: netoken guard --iface NAME --attach"), "{said}");
    let other = Peers::open_below(&world.lab.run.join("bpf/blue"));
    let said = format!("{:#}", other.err().context("it was opened")?);
    ensure!(said.contains("netoken guard --iface NAME --instance blue --attach"), "{said}");
    attach(&world, "auto", &rules(&world, "drop", STATIC)?)?;
    let guard = peers(&world)?;
    let listener = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let said = format!("{:#}", guard.of(&listener).err().context("a socket without a peer has one")?);
    ensure!(said.contains("no connected socket"), "{said}");
    Ok(())
}
