//! What an operator measures: throughput, memory, and how soon after the command the first SYN is stamped. Each
//! of these cases runs alone.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::lab::{Lab, PATIENCE, Running, kernel_counter};
use crate::sockets::{Listener, connect};
use crate::support::{Need, ensure_eq};
use crate::world::{Family, World};
use crate::{NET, alone, streams, sys};

pub fn cases() -> Vec<Trial> {
    let timed = [NET, &[Need::RealTime]].concat();
    vec![
        alone(
            "a bulk transfer keeps nine tenths of its speed with the stamp, and retransmits nothing",
            &timed,
            bulk,
        ),
        alone("a thousand connections leave the streaming process below 12 MiB", NET, memory),
        alone(
            "the first SYN is stamped within 150 ms of the command, or 1 s if it is not optimised",
            &timed,
            first_stamp,
        ),
    ]
}

const BULK: usize = 200 << 20;
const ROUNDS: usize = 12;
const TRIES: usize = 3;

/// What one way of sending has cost, at its best.
#[derive(Clone, Copy, Debug)]
struct Cost {
    seconds: f64,
    retransmitted: u64,
}

impl Cost {
    const NONE: Cost = Cost { seconds: f64::INFINITY, retransmitted: u64::MAX };

    fn best(self, other: Cost) -> Cost {
        Cost {
            seconds: self.seconds.min(other.seconds),
            retransmitted: self.retransmitted.min(other.retransmitted),
        }
    }
}

fn transfer(world: &World, listener: &Listener) -> Result<Cost> {
    let before = kernel_counter(&world.client, "TcpRetransSegs")?;
    let mut client = connect(&world.lab, &world.client, listener.addr, PATIENCE)?;
    // Less in flight than the receiving CPU's backlog holds: what that drops says nothing of the stamp.
    socket2::SockRef::from(&client).set_send_buffer_size(512 << 10)?;
    let mut server = listener.accept()?.stream;
    let start = Instant::now();
    let got = std::thread::scope(|scope| {
        let receiver = scope.spawn(move || -> Result<usize> {
            let mut block = vec![0; 1 << 18];
            let mut sum = 0;
            loop {
                match server.read(&mut block)? {
                    0 => return Ok(sum),
                    len => sum += len,
                }
            }
        });
        let block = vec![0x5a; 1 << 18];
        (0..BULK / block.len()).try_for_each(|_| client.write_all(&block))?;
        drop(client);
        receiver.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })?;
    ensure_eq!(got, BULK, "bytes that arrived");
    let retransmitted = kernel_counter(&world.client, "TcpRetransSegs")? - before;
    Ok(Cost { seconds: start.elapsed().as_secs_f64(), retransmitted })
}

fn bulk() -> Result<()> {
    // A veth has a queue for each CPU. Packets of one connection from two CPUs overtake each other, and what TCP then
    // sends again says nothing of the stamp.
    sys::on_one_cpu(|| {
        let mut said = String::new();
        for _ in 0..TRIES {
            let world = World::new(true)?;
            let listener = Listener::open(&world, Family::V4)?;
            transfer(&world, &listener)?;
            let (mut without, mut with) = (Cost::NONE, Cost::NONE);
            // In turns, so that what else the machine does hits both.
            for _ in 0..ROUNDS {
                without = without.best(transfer(&world, &listener)?);
                world.attach("")?;
                with = with.best(transfer(&world, &listener)?);
                world.lab.ok(&format!("{} --detach", world.place()))?;
            }
            world.expect_no_bad_packets()?;
            said = format!("{} MiB, without: {without:?}, with: {with:?}", BULK >> 20);
            println!("{said}");
            if without.seconds / with.seconds >= 0.9 && with.retransmitted == 0 {
                return Ok(());
            }
        }
        bail!("{said}")
    })?
}

/// Opens a connection and ends it at once, without a trace. True if it was stamped; an error if it was not open
/// in time.
fn touch(listener: &Listener, timeout: Duration) -> Result<bool> {
    let client = TcpStream::connect_timeout(&listener.addr, timeout)?;
    let source = client.local_addr()?;
    loop {
        // An earlier one may have come too late for its client.
        let syn = listener.accept()?.syn;
        if syn.src == source {
            socket2::SockRef::from(&client).set_linger(Some(Duration::ZERO))?;
            return Ok(syn.token().is_some());
        }
    }
}

fn memory() -> Result<()> {
    const LIMIT_KIB: u64 = 12 * 1024;
    const CONNECTIONS: u64 = 1000;
    let world = World::new(true)?;
    let mut stream = streams::start(&world)?;
    let listener = Listener::open(&world, Family::V4)?;
    world.lab.within(&world.client, || {
        for _ in 0..CONNECTIONS {
            ensure!(touch(&listener, PATIENCE)?, "not stamped");
        }
        Ok(())
    })?;
    stream.wait_for("totals of all", |line| {
        let record: Value = serde_json::from_str(line).unwrap_or_default();
        record["type"] == "totals" && record["syns"].as_u64() >= Some(CONNECTIONS)
    })?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", stream.child.id()))?;
    let kib = |name: &str| -> Result<u64> {
        let line = status.lines().find(|line| line.starts_with(name)).context("no such line")?;
        Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
    };
    let (all, of_files) = (kib("VmRSS:")?, kib("RssFile:")?);
    println!(
        "after {CONNECTIONS} connections: {all} kB, of which {of_files} kB are the program file and libraries"
    );
    // The file of a program that is not optimised is larger than all that may be used.
    let counted = if Lab::is_optimised() { all } else { all - of_files };
    ensure!(counted < LIMIT_KIB, "{counted} kB, more than {LIMIT_KIB} kB");
    stream.signal(Signal::SIGINT)?;
    stream.end().map(drop)
}

fn first_stamp() -> Result<()> {
    // Without optimisation the program itself is slow, and nobody runs it so.
    let limit = Duration::from_millis(if Lab::is_optimised() { 150 } else { 1000 });
    // One that nothing came between is enough, and ends it.
    const TRIES: usize = 100;
    let mut best = Duration::MAX;
    for _ in 0..TRIES {
        let world = World::new(true)?;
        let listener = Listener::open(&world, Family::V4)?;
        let took = world.lab.within(&world.client, || {
            let start = Instant::now();
            let mut command = world.lab.netoken(&format!("{} --attach --quiet", world.place()));
            let netoken = Running::start(&mut command)?;
            // While a qdisc is made the kernel sends nothing, and TCP would try again only after a second.
            while !touch(&listener, Duration::from_millis(20)).unwrap_or(false) {
                ensure!(start.elapsed() < PATIENCE, "no SYN was stamped");
            }
            let took = start.elapsed();
            ensure_eq!(netoken.end()?.0, Some(0), "exit code");
            Ok(took)
        })?;
        best = best.min(took);
        if best < limit {
            break;
        }
    }
    println!("from the command to the first stamped SYN: {best:?}");
    ensure!(best < limit, "it took {best:?}, more than {limit:?}");
    Ok(())
}
