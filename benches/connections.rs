//! What the classifier costs where it is used: connections a second and bulk throughput over a veth pair, with nothing
//! attached, not even a qdisc; with what any classifier needs; with one that does nothing; and with ours. Rounds of all
//! alternate in one run. What is added is for each connection, and for each packet of 64 KiB.
//!
//! `cargo bench --bench connections`, as root; in front of it, `nice -n -20` helps on a busy machine. Makes two network
//! namespaces and removes them.

#[path = "../tests/support/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "../tests/support/mod.rs"]
#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use lab::{Lab, kernel_counter};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

const ROUNDS: usize = 20;
/// Samples of one round, and the connections of one of them: a few milliseconds, so that among many some are not
/// disturbed, on a busy machine as well.
const SAMPLES: usize = 40;
const CONNECTIONS: u32 = 100;
/// Connections of one round, samples of one, and writes of one of those.
const STREAMS: usize = 10;
const TRANSFERS: usize = 10;
const BLOCKS: usize = 100;
/// Bytes of a write: as many segments, with timestamps, as go into one packet where the device cuts it up.
const BLOCK: usize = 45 * 1448;
const ADDR: &str = "192.0.2.2:7000";

/// What is attached to the client's interface.
#[derive(Clone, Copy)]
enum Attached {
    Nothing,
    /// By tc, below a clsact qdisc.
    Filter(&'static str),
    Clsact,
    /// Ours, with a policy that has only this default.
    Ours(&'static str),
}

use Attached::{Clsact, Filter, Nothing, Ours};

const NOTHING: usize = 0;
const EMPTY: usize = 2;
const ARMS: [(&str, Attached); 6] = [
    ("nothing attached", Nothing),
    ("clsact alone", Clsact),
    // The shortest program: it returns -1, which says "continue".
    ("an empty classifier", Filter("bpf direct-action bytecode '1,6 0 0 4294967295,'")),
    ("ours, every SYN skipped", Ours("{ action = 'skip' }")),
    ("ours, stamped", Ours("{ action = 'stamp', token = '4e45544f4b454e31' }")),
    (
        "ours, stamped with a key",
        Ours("{ action = 'stamp', token = { tag = 17, key = 'edge', bind = 'flow' } }"),
    ),
];

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
    lab.ok("key new edge")?;
    let policy = tempfile::NamedTempFile::new().context("making a file for policies")?;
    let bench = Bench { lab, client, server, policy };
    bench.report("connections a second", 1e9, connections)?;
    bench.report("bulk transfer, MB/s", BLOCK as f64 * 1e3, bulk)
}

struct Bench {
    lab: Lab,
    client: String,
    server: String,
    policy: tempfile::NamedTempFile,
}

impl Bench {
    fn tc(&self, command: &str) -> Result<()> {
        support::sh(&format!("tc -n {} {command}", self.client)).map(drop)
    }

    fn netoken(&self, what: &str) -> Result<()> {
        self.lab.ok(&format!("--netns {} --iface veth0 {what}", self.client)).map(drop)
    }

    fn attach(&self, what: Attached) -> Result<()> {
        match what {
            Nothing => Ok(()),
            Clsact => self.tc("qdisc add dev veth0 clsact"),
            Filter(filter) => {
                self.attach(Clsact)?;
                self.tc(&format!("filter add dev veth0 egress {filter}"))
            }
            Ours(default) => {
                fs::write(&self.policy, format!("default = {default}")).context("writing a policy")?;
                self.netoken(&format!("--attach --quiet --policy {}", self.policy.path().display()))
            }
        }
    }

    fn detach(&self, what: Attached) -> Result<()> {
        match what {
            Nothing => Ok(()),
            Clsact | Filter(_) => self.tc("qdisc del dev veth0 clsact"),
            Ours(_) => self.netoken("--destroy"),
        }
    }

    /// Alternates rounds of all arms. `one` is what there is one of at a rate of 1, in nanoseconds.
    fn report(&self, what: &str, one: f64, round: fn(&TcpListener) -> Result<Vec<f64>>) -> Result<()> {
        let listener = self.lab.within(&self.server, listen)?;
        let mut results = ARMS.map(|_| Rounds { rates: [0.0; ROUNDS], resent: 0 });
        for number in 0..ROUNDS {
            let mut order: Vec<usize> = (0..ARMS.len()).collect();
            // Whatever follows upon another does so only every second time.
            if number % 2 == 1 {
                order.reverse();
            }
            for arm in order {
                let (_, attached) = ARMS[arm];
                self.attach(attached)?;
                let before = kernel_counter(&self.client, "TcpRetransSegs")?;
                let samples = self.lab.within(&self.client, || round(&listener))?;
                results[arm].rates[number] = quantile(samples, 0.9);
                results[arm].resent += kernel_counter(&self.client, "TcpRetransSegs")? - before;
                self.detach(attached)?;
            }
        }
        println!("{what:<35} {:>16} {:>13} {:>10} {:>7}", "of nothing", "of an empty", "added", "resent");
        for ((name, _), rounds) in ARMS.iter().zip(&results) {
            rounds.print(name, one, &results[NOTHING], &results[EMPTY]);
        }
        Ok(())
    }
}

/// What one arm came to.
struct Rounds {
    /// Of each round the rate that its better samples reach: what disturbs one only makes it slower, and the very
    /// best are luck.
    rates: [f64; ROUNDS],
    resent: u64,
}

impl Rounds {
    /// Medians of what the rounds came to, each over what the same round had with another arm, and how far from that
    /// half of the rounds are.
    fn print(&self, name: &str, one: f64, nothing: &Rounds, empty: &Rounds) {
        let ratios = |to: &Rounds| self.rates.iter().zip(to.rates).map(|(a, b)| a / b).collect::<Vec<f64>>();
        let added = self.rates.iter().zip(nothing.rates).map(|(a, b)| one / a - one / b).collect();
        let ratio = median(ratios(nothing));
        let distances = ratios(nothing).into_iter().map(|one| (one - ratio).abs()).collect();
        println!(
            "  {name:<24} {:>8.0} {ratio:>8.3} +-{:.3} {:>13.3} {:>7.0} ns {:>7}",
            median(self.rates.to_vec()),
            median(distances),
            median(ratios(empty)),
            median(added),
            self.resent,
        );
    }
}

fn quantile(mut values: Vec<f64>, share: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    values[((values.len() - 1) as f64 * share) as usize]
}

fn median(values: Vec<f64>) -> f64 {
    quantile(values, 0.5)
}

fn listen() -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    socket.bind(&ADDR.parse::<SocketAddr>()?.into()).context("choosing the address to listen at")?;
    socket.listen(CONNECTIONS.cast_signed() + 10).context("listening")?;
    Ok(socket.into())
}

/// All in one thread on one CPU: over veth the whole handshake runs inside connect(), so that nothing waits for
/// a wake-up and what the stamp costs is seen in full. Nobody accepts meanwhile; the backlog holds them all.
fn connections(listener: &TcpListener) -> Result<Vec<f64>> {
    let addr: SocketAddr = ADDR.parse()?;
    stay_on_one_cpu()?;
    let sample = |_| {
        let start = Instant::now();
        for _ in 0..CONNECTIONS {
            connect_and_reset(addr)?;
        }
        let rate = f64::from(CONNECTIONS) / start.elapsed().as_secs_f64();
        for _ in 0..CONNECTIONS {
            listener.accept()?;
        }
        Ok(rate)
    };
    (0..SAMPLES).map(sample).collect()
}

/// Keeps the calling thread on one CPU: moving about is noise. And a veth has a queue for each CPU: packets of one
/// connection from two of them overtake each other, and TCP sends again what it takes for lost.
fn stay_on_one_cpu() -> Result<()> {
    let mut set = CpuSet::new();
    set.set(0)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("staying on one CPU")
}

/// Closing with a reset leaves no TIME-WAIT behind, which would use up the ports.
fn connect_and_reset(addr: SocketAddr) -> Result<()> {
    let socket = socket2::Socket::from(TcpStream::connect_timeout(&addr, Duration::from_secs(5))?);
    socket.set_linger(Some(Duration::ZERO)).context("asking for a reset at the end")
}

/// In one thread as well: what is sent lies at the other end by then. Several connections, as where in memory their
/// buffers lie makes a difference. In MB a second.
fn bulk(listener: &TcpListener) -> Result<Vec<f64>> {
    stay_on_one_cpu()?;
    let mut block = vec![0x5a; BLOCK];
    let mut rates = Vec::new();
    for _ in 0..STREAMS {
        let mut client = TcpStream::connect(ADDR)?;
        let (mut server, _) = listener.accept()?;
        for _ in 0..TRANSFERS {
            let start = Instant::now();
            for _ in 0..BLOCKS {
                client.write_all(&block)?;
                server.read_exact(&mut block)?;
            }
            rates.push((BLOCKS * BLOCK) as f64 / 1e6 / start.elapsed().as_secs_f64());
        }
    }
    Ok(rates)
}
