//! What the classifier costs where it is used: connections a second and bulk throughput over a veth pair with
//! nothing attached, not even a qdisc; with a policy that skips every SYN, which is the price of any classifier;
//! with the stamp; and with a keyed one. Rounds of all four alternate in one run.
//!
//! `cargo bench --bench connections`, as root. Makes two network namespaces and removes them.

#[path = "../tests/support/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "../tests/support/mod.rs"]
#[allow(dead_code)]
mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::Lab;
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const ROUNDS: usize = 15;
/// Samples of one round, and the connections of one of them: a few milliseconds, so that among many some are not
/// disturbed, on a busy machine as well.
const SAMPLES: usize = 40;
const CONNECTIONS: u32 = 100;
const BULK_BYTES: usize = 512 << 20;
const ADDR: &str = "192.0.2.2:7000";

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: it needs root");
        return Ok(());
    }
    let mut lab = Lab::new()?;
    let (client, server) = (lab.netns("client")?, lab.netns("server")?);
    lab.veth((&client, "veth0"), (&server, "veth0"), true)?;
    lab.addr(&client, "veth0", "192.0.2.1/24")?;
    lab.addr(&server, "veth0", "192.0.2.2/24")?;

    let dir = tempfile::tempdir().context("making a directory for a policy")?;
    let skip = dir.path().join("skip.toml");
    std::fs::write(&skip, "default = { action = 'skip' }").context("writing a policy")?;
    let keyed = dir.path().join("keyed.toml");
    std::fs::write(
        &keyed,
        "default = { action = 'stamp', token = { tag = 17, key = 'edge', bind = 'flow' } }",
    )
    .context("writing a policy")?;
    lab.ok("key new edge")?;
    let hook = format!("--netns {client} --iface veth0");
    let attach = format!("{hook} --attach --quiet");
    let with = |policy: &std::path::Path| Some(format!("{attach} --policy {}", policy.display()));
    let arms = [None, with(&skip), Some(attach.clone()), with(&keyed)];
    let bench = Bench { lab: &lab, client, server, destroy: format!("{hook} --destroy"), arms };

    println!(
        "{:<22} {:>9} {:>18} {:>18} {:>18}",
        "", "nothing", "skip, ratio", "stamp, ratio", "keyed, ratio"
    );
    bench.report("connections a second", connections)?;
    bench.report("bulk transfer, MB/s", bulk)
}

struct Bench<'a> {
    lab: &'a Lab,
    client: String,
    server: String,
    destroy: String,
    /// How to attach for each column.
    arms: [Option<String>; 4],
}

impl Bench<'_> {
    /// Alternates rounds, prints the best of each: what disturbs a round only makes it slower.
    fn report(&self, what: &str, round: fn(&TcpListener) -> Result<f64>) -> Result<()> {
        let listener = self.lab.within(&self.server, listen)?;
        let mut best = [0f64; 4];
        for _ in 0..ROUNDS {
            for (best, attach) in best.iter_mut().zip(&self.arms) {
                if let Some(attach) = attach {
                    self.lab.ok(attach)?;
                }
                *best = best.max(self.lab.within(&self.client, || round(&listener))?);
                if attach.is_some() {
                    self.lab.ok(&self.destroy)?;
                }
            }
        }
        let [nothing, skip, stamp, keyed] = best;
        println!(
            "{what:<22} {nothing:>9.0} {skip:>11.0} {:>6.3} {stamp:>11.0} {:>6.3} {keyed:>11.0} {:>6.3}",
            skip / nothing,
            stamp / nothing,
            keyed / nothing
        );
        Ok(())
    }
}

fn listen() -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&ADDR.parse::<SocketAddr>()?.into()).context("choosing the address to listen at")?;
    socket.listen(CONNECTIONS.cast_signed() + 10).context("listening")?;
    Ok(socket.into())
}

/// All in one thread on one CPU: over veth the whole handshake runs inside connect(), so that nothing waits for
/// a wake-up and what the stamp costs is seen in full. Nobody accepts meanwhile; the backlog holds them all.
fn connections(listener: &TcpListener) -> Result<f64> {
    let addr: SocketAddr = ADDR.parse()?;
    stay_on(0)?;
    let mut best = 0f64;
    for _ in 0..SAMPLES {
        let start = Instant::now();
        for _ in 0..CONNECTIONS {
            connect_and_reset(addr)?;
        }
        best = best.max(f64::from(CONNECTIONS) / start.elapsed().as_secs_f64());
        for _ in 0..CONNECTIONS {
            listener.accept()?;
        }
    }
    Ok(best)
}

/// Keeps the calling thread on one CPU: moving about is the largest noise there is.
fn stay_on(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("staying on one CPU")
}

/// Closing with a reset leaves no TIME-WAIT behind, which would use up the ports.
fn connect_and_reset(addr: SocketAddr) -> Result<()> {
    let socket = socket2::Socket::from(TcpStream::connect_timeout(&addr, Duration::from_secs(5))?);
    socket.set_linger(Some(Duration::ZERO)).context("asking for a reset at the end")
}

fn bulk(listener: &TcpListener) -> Result<f64> {
    let addr: SocketAddr = ADDR.parse()?;
    thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<usize> {
            stay_on(1)?;
            let (mut socket, _) = listener.accept()?;
            let mut buffer = vec![0; 1 << 18];
            let mut total = 0;
            loop {
                match socket.read(&mut buffer)? {
                    0 => return Ok(total),
                    n => total += n,
                }
            }
        });
        stay_on(0)?;
        let block = vec![0x5a; 1 << 18];
        let start = Instant::now();
        let mut socket = TcpStream::connect(addr)?;
        for _ in 0..BULK_BYTES / block.len() {
            socket.write_all(&block)?;
        }
        drop(socket);
        let received = reader.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        ensure!(received == BULK_BYTES, "{received} bytes of {BULK_BYTES} arrived");
        Ok(BULK_BYTES as f64 / 1e6 / start.elapsed().as_secs_f64())
    })
}
