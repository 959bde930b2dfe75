//! Keyed tokens on real connections: who finds them valid behind NAT, and that a rotation breaks nothing.

use std::fs;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use netoken::clock;
use netoken::keys::Key;
use netoken::keys::file::KeyDir;
use netoken::token::Token;
use netoken::token::keyed::{Bind, Flow, Refusal, Slots, Valid, Verifier};

use crate::lab::{Lab, PATIENCE, wait_until};
use crate::segment::Segment;
use crate::sockets::{Listener, connect, echo, exchange, is_timeout};
use crate::support::{ensure_eq, sh};
use crate::world::{FAMILIES, Family, Hook, OUT, World};
use crate::{case, with};

const TAG: u16 = 4711;
/// How often the keys are rotated while connections are opened.
const ROTATIONS: usize = 3;
/// How many threads open them.
const CLIENTS: usize = 2;

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        for bind in Bind::ALL {
            let nft = with("nft");
            cases.push(case(
                &format!("a keyed token over {name} bound to {bind} is valid at the server"),
                crate::NET,
                move || direct(family, bind),
            ));
            cases.push(case(
                &format!("a masqueraded SYN over {name} bound to {bind} is valid unless that is the flow"),
                &nft,
                move || masqueraded(family, bind),
            ));
            cases.push(case(
                &format!("a SYN over {name} bound to {bind} with both addresses translated is valid only by its ISN"),
                &nft,
                move || translated(family, bind),
            ));
        }
        cases.push(case(
            &format!("keys rotate while connections over {name} are opened, and each SYN is valid"),
            crate::NET,
            move || rotation(family),
        ));
    }
    cases
}

fn attach(world: &World, bind: Bind) -> Result<()> {
    world.lab.ok("key new edge")?;
    let path = world.lab.keys().join("policy.toml");
    fs::write(
        &path,
        format!("default = {{ action = 'stamp', token = {{ tag = {TAG}, key = 'edge', bind = '{bind}' }} }}"),
    )?;
    world.attach(&format!("--policy {}", path.display()))
}

/// The keys of the host that checks, read as it would read them.
fn keys(lab: &Lab) -> Result<Vec<Key>> {
    KeyDir::at(lab.keys().join("default")).load()
}

fn check(keys: &[Key], syn: &Segment, binds: &[Bind]) -> Result<Result<Valid, Refusal>> {
    let token = Token(syn.token().context("no token")?);
    let flow = Flow::new(syn.src, syn.dst, syn.isn)?;
    Ok(Verifier { keys, slots: Slots::default(), binds }.check(token, &flow, clock::now()))
}

/// Fails unless the server finds it valid, or finds the opposite.
fn expect(world: &World, syn: &Segment, bind: Bind, valid: bool) -> Result<()> {
    let keys = keys(&world.lab)?;
    match (check(&keys, syn, &Bind::ALL)?, valid) {
        (Ok(found), true) => {
            ensure_eq!((found.bind, found.tag, found.ring.as_str()), (bind, TAG, "edge"), "what it says");
            // Not by accident: another mode is not enough.
            let others: Vec<Bind> = Bind::ALL.into_iter().filter(|other| *other != bind).collect();
            ensure_eq!(check(&keys, syn, &others)?, Err(Refusal::WrongMac), "the other modes");
        }
        (Err(Refusal::WrongMac), false) => {}
        (other, _) => bail!("{other:?} for {bind}, expected to be valid: {valid}"),
    }
    Ok(())
}

fn direct(family: Family, bind: Bind) -> Result<()> {
    let world = World::new(true)?;
    attach(&world, bind)?;
    let listener = Listener::open(&world, family)?;
    for _ in 0..5 {
        let syn = exchange(&world, &listener)?;
        expect(&world, &syn, bind, true)?;
    }
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("stamped", 5)])
}

/// Client, router with these rules for NAT, server.
fn behind_nat(family: Family, bind: Bind, rules: &[&str]) -> Result<World> {
    let (world, router) = World::routed(true, Hook::Client)?;
    attach(&world, bind)?;
    // The server has no way back to the client but through the address that the router lends it.
    let flag = if family == Family::V4 { "-4" } else { "-6" };
    sh(&format!("ip {flag} -n {} route del default", world.server))?;
    let nft = |command: &str| sh(&format!("ip netns exec {router} nft '{command}'"));
    nft("add table inet nat")?;
    nft("add chain inet nat post { type nat hook postrouting priority 100; }")?;
    nft("add chain inet nat pre { type nat hook prerouting priority -100; }")?;
    rules.iter().try_for_each(|rule| nft(&format!("add rule inet nat {rule}")).map(drop))?;
    Ok(world)
}

fn masqueraded(family: Family, bind: Bind) -> Result<()> {
    let world = behind_nat(family, bind, &[&format!("post oifname {OUT} masquerade random")])?;
    let listener = Listener::open(&world, family)?;
    for _ in 0..3 {
        let syn = exchange(&world, &listener)?;
        ensure!(syn.src.ip() != world.client_addr(family), "the source was not translated");
        expect(&world, &syn, bind, bind != Bind::Flow)?;
    }
    world.expect_no_bad_packets()
}

fn translated(family: Family, bind: Bind) -> Result<()> {
    let nat = if family == Family::V4 { "ip" } else { "ip6" };
    let server = SocketAddr::new(family.addr(2, 2), 8080);
    let rules =
        [format!("post oifname {OUT} masquerade"), format!("pre tcp dport 80 dnat {nat} to {server}")];
    let world = behind_nat(family, bind, &rules.each_ref().map(String::as_str))?;
    let listener = Listener::open_with(&world.lab, &world.server, server, |_| Ok(()))?;
    let router = SocketAddr::new(family.addr(1, 254), 80);
    for _ in 0..3 {
        let mut client = connect(&world.lab, &world.client, router, PATIENCE)?;
        let mut server = listener.accept()?;
        echo(&mut client, &mut server.stream)?;
        expect(&world, &server.syn, bind, bind == Bind::Isn)?;
    }
    world.expect_no_bad_packets()
}

/// What the checking host knows, and what it has seen.
struct Server {
    keys: Mutex<Vec<Key>>,
    done: AtomicBool,
    checked: AtomicUsize,
    /// One counter for each key id.
    by_key: [AtomicUsize; 16],
}

impl Server {
    fn serve(&self, listener: &Listener) -> Result<()> {
        listener.socket.set_read_timeout(Some(Duration::from_millis(100)))?;
        while !self.done.load(Ordering::Relaxed) {
            let accepted = match listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if is_timeout(&error) => continue,
                Err(error) => return Err(error),
            };
            let keys = self.keys.lock().map_err(|_| anyhow::anyhow!("the other side failed"))?;
            match check(&keys, &accepted.syn, &[Bind::Server])? {
                Ok(valid) => self.by_key[usize::from(valid.key_id)].fetch_add(1, Ordering::Relaxed),
                Err(refusal) => bail!("SYN {}: {refusal}", self.checked.load(Ordering::Relaxed)),
            };
            self.checked.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits for some more SYNs.
    fn wait_for_more(&self, more: usize) -> Result<()> {
        let target = self.checked.load(Ordering::Relaxed) + more;
        wait_until("more connections", || {
            ensure!(!self.done.load(Ordering::Relaxed), "somebody else failed");
            Ok((self.checked.load(Ordering::Relaxed) >= target).then_some(()))
        })
    }
}

fn rotation(family: Family) -> Result<()> {
    let world = World::new(true)?;
    attach(&world, Bind::Server)?;
    let listener = Listener::open(&world, family)?;
    let server = Server {
        keys: Mutex::new(keys(&world.lab)?),
        done: AtomicBool::new(false),
        checked: AtomicUsize::new(0),
        by_key: Default::default(),
    };
    let learn = || -> Result<()> {
        let read = keys(&world.lab)?;
        *server.keys.lock().map_err(|_| anyhow::anyhow!("the server failed"))? = read;
        Ok(())
    };
    let stop = |result: Result<()>| {
        server.done.store(true, Ordering::Relaxed);
        result
    };
    let open = || -> Result<usize> {
        let mut opened = 0;
        while !server.done.load(Ordering::Relaxed) {
            drop(connect(&world.lab, &world.client, listener.addr, PATIENCE)?);
            opened += 1;
        }
        Ok(opened)
    };
    let began = Instant::now();
    let opened = thread::scope(|scope| -> Result<usize> {
        let accepting = scope.spawn(|| stop(server.serve(&listener)));
        let clients: Vec<_> = (0..CLIENTS).map(|_| scope.spawn(open)).collect();
        let rotated = (0..ROTATIONS).try_for_each(|_| {
            server.wait_for_more(50)?;
            world.lab.ok("key rotate edge --step add")?;
            learn()?;
            server.wait_for_more(50)?;
            world.lab.ok("key rotate edge --step sign")?;
            server.wait_for_more(50)?;
            wait_until("the old key to be idle", || {
                Ok(world.lab.ok("key rotate edge --step retire --idle 1").ok().map(drop))
            })?;
            learn()?;
            server.wait_for_more(50)
        });
        let rotated = stop(rotated);
        accepting.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        rotated?;
        clients
            .into_iter()
            .map(|client| client.join().map_err(|_| anyhow::anyhow!("a client panicked"))?)
            .sum()
    })?;
    let by_key: Vec<usize> = server.by_key.iter().map(|count| count.load(Ordering::Relaxed)).collect();
    println!("{opened} connections in {:?}, by key {by_key:?}", began.elapsed());
    ensure!(by_key[..=ROTATIONS].iter().all(|count| *count >= 50), "{by_key:?}");
    let counters = world.counters()?;
    ensure_eq!(counters["no_key"], 0, "SYNs without a key: {counters}");
    ensure_eq!(counters["stamped"], counters["syns"], "SYNs stamped: {counters}");
    world.expect_no_bad_packets()
}
