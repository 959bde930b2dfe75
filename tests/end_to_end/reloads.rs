//! A policy changes in one step: under a steady load every SYN is decided by the old one or the new one, and no
//! connection fails.

use std::fs;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use netoken::policy::Policy;
use netoken::program::Maps;

use crate::lab::PATIENCE;
use crate::sockets::{Listener, connect, is_timeout};
use crate::support::{Need, share_of};
use crate::world::{Family, World};
use crate::{NET, case};

const RELOADS: usize = 500;
/// Every so many go through the command, which also writes down what is in use.
const BY_COMMAND: usize = 25;
const CLIENTS: usize = 2;
/// So many connections may wait to be accepted; the listener has room for more.
const WAITING: usize = 500;

pub fn cases() -> Vec<Trial> {
    // An emulated machine cannot open connections as fast as this asks.
    let timed = [NET, &[Need::RealTime]].concat();
    vec![case("500 reloads under load: every SYN has the token of one policy or the other", &timed, reloads)]
}

/// Two policies that have nothing in common: not the shapes, not the keys, not the records, and no default. A packet that
/// sees parts of both finds no rule.
fn policies(to: SocketAddr) -> [(String, [u8; 8]); 2] {
    let rule = |name: &str, conditions: &str, token: &str| {
        format!("[[rule]]\nname = '{name}'\n{conditions}\naction = 'stamp'\ntoken = '{token}'\n")
    };
    let many = |what: &str| -> String {
        (0..50)
            .map(|n| rule(&format!("{what} {n}"), &format!("dst = '198.51.100.{n}'\n{what} = {n}"), "wrong"))
            .collect()
    };
    let (ip, port) = (to.ip(), to.port());
    [
        (
            many("port") + &rule("one", &format!("port = {port}\nnot_src_port = [1, '3-9']"), "policy-A"),
            *b"policy-A",
        ),
        (
            many("mark")
                + &rule("two", &format!("dst = '{ip}'\nnot_src = ['192.0.2.0/24', '::/0']"), "policy-B"),
            *b"policy-B",
        ),
    ]
}

fn reloads() -> Result<()> {
    let world = World::new(false)?;
    // More connections than ports, of which one that the client closed first is kept for a minute.
    world.set(&world.client, "ipv4/tcp_tw_reuse", "1")?;
    world.set(&world.client, "ipv4/ip_local_port_range", "1024 65535")?;
    let listener = Listener::open(&world, Family::V4)?;
    let policies = policies(listener.addr);
    let files: Vec<_> = (0..2).map(|at| world.lab.run.join(format!("reload-{at}.toml"))).collect();
    for (file, (text, _)) in files.iter().zip(&policies) {
        fs::write(file, text)?;
    }
    world.attach(&format!("--policy {}", files[0].display()))?;
    let maps = Maps::open(&world.lab.run.join("bpf/default"))?;
    let parsed = [Policy::from_toml(&policies[0].0)?, Policy::from_toml(&policies[1].0)?];

    let rounds = share_of(RELOADS)?;
    let (stop, opened, accepted) = (AtomicBool::new(false), AtomicUsize::new(0), AtomicUsize::new(0));
    // Whether the clients have left: until then there may be one more connection, or none.
    let left = AtomicBool::new(false);
    listener.socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let counts = thread::scope(|scope| -> Result<[usize; 2]> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(|| -> Result<()> {
                    while !stop.load(Ordering::Relaxed) {
                        // A machine with much to do may leave the server behind, and what does not fit is lost.
                        let waiting =
                            opened.load(Ordering::Relaxed).saturating_sub(accepted.load(Ordering::Relaxed));
                        if waiting > WAITING {
                            thread::sleep(Duration::from_millis(1));
                            continue;
                        }
                        opened.fetch_add(1, Ordering::Relaxed);
                        connect(&world.lab, &world.client, listener.addr, PATIENCE).context("under load")?;
                    }
                    Ok(())
                })
            })
            .collect();
        let server = scope.spawn(|| -> Result<[usize; 2]> {
            let mut counts = [0; 2];
            let mut last = Instant::now();
            while !left.load(Ordering::Acquire) || counts[0] + counts[1] < opened.load(Ordering::Relaxed) {
                let syn = match listener.accept() {
                    Ok(accepted) => accepted.syn,
                    Err(error) if is_timeout(&error) && last.elapsed() < PATIENCE => continue,
                    Err(error) => return Err(error),
                };
                last = Instant::now();
                accepted.fetch_add(1, Ordering::Relaxed);
                let token = syn.token().context("a SYN without a token")?;
                let which = policies.iter().position(|(_, of)| *of == token);
                counts[which.with_context(|| format!("a strange token {token:02x?}"))?] += 1;
            }
            Ok(counts)
        });
        let reload = || -> Result<()> {
            for round in 1..=rounds {
                match round % BY_COMMAND {
                    0 => drop(world.lab.ok(&format!("policy load {}", files[round % 2].display()))?),
                    _ => maps.set_policy(&parsed[round % 2])?,
                }
            }
            Ok(())
        };
        let reloaded = reload();
        stop.store(true, Ordering::Relaxed);
        let join = |client: thread::ScopedJoinHandle<'_, Result<()>>| {
            client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        // All of them, also if one fails: the server waits for what they have opened.
        let joined: Vec<_> = clients.into_iter().map(join).collect();
        left.store(true, Ordering::Release);
        joined.into_iter().collect::<Result<()>>()?;
        reloaded?;
        server.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    println!("SYNs of the two policies under {rounds} reloads: {counts:?}");
    ensure!(counts[0] + counts[1] == opened.load(Ordering::Relaxed), "{counts:?} of {opened:?} connections");
    ensure!(
        counts.iter().all(|count| *count >= rounds / 2),
        "too few connections to show anything: {counts:?}"
    );
    Ok(())
}
