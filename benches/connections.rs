//! What the classifier costs where it is used: connections a second, alone and with a request that nginx answers, and
//! bulk throughput over veth pairs: with nothing attached, not even a qdisc; with what any classifier needs; with one
//! that does nothing; and with ours. What is added is for each connection, and for each packet of 64 KiB.
//!
//! All of them are there at once, each on a pair of its own, and take turns of a few milliseconds: a machine whose speed
//! changes is as fast for one as for the next. In each round all of them move on to the next pair.
//!
//! `cargo bench --bench connections`, as root; in front of it, `nice -n -20` helps on a busy machine. Makes two network
//! namespaces and removes them.

#[path = "../tests/support/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "../tests/support/nginx.rs"]
mod nginx;
#[path = "../tests/support/mod.rs"]
#[allow(dead_code)]
mod support;

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Lab, kernel_counter};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

/// Each arm is on each pair equally often.
const ROUNDS: usize = 4 * ARMS.len();
/// Of each arm in one round, and how many connections or writes make one sample: a few milliseconds.
const SAMPLES: usize = 30;
const CONNECTIONS: u32 = 100;
const REQUESTS: u32 = 40;
const BLOCKS: u32 = 300;
/// Bytes of a write: as many segments, with timestamps, as go into one packet where the device cuts it up.
const BLOCK: usize = 45 * 1448;
const PORT: u16 = 7000;
const WEB_PORT: u16 = 8080;

/// What is attached to the client's interface of a pair.
#[derive(Clone, Copy)]
enum Attached {
    Nothing,
    /// By tc, below a clsact qdisc.
    Filter(&'static str),
    Clsact,
    /// Ours: an instance, the hook, and a policy that has only this default.
    Ours(&'static str, &'static str, &'static str),
}

use Attached::{Clsact, Filter, Nothing, Ours};

/// Those that the others are compared with: nothing at all, what any classifier takes, and ours without the stamp.
const BASES: [(&str, usize); 3] = [("of nothing", 0), ("of an empty", 2), ("of skipped", 3)];
const ARMS: [(&str, Attached); 7] = [
    ("nothing attached", Nothing),
    ("clsact alone", Clsact),
    // The shortest program: it returns -1, which says "continue".
    ("an empty classifier", Filter("bpf direct-action bytecode '1,6 0 0 4294967295,'")),
    ("ours, every SYN skipped", Ours("skipped", "clsact", "{ action = 'skip' }")),
    ("ours, stamped", Ours("stamped", "clsact", "{ action = 'stamp', token = '4e45544f4b454e31' }")),
    ("ours at tcx, stamped", Ours("tcx", "tcx", "{ action = 'stamp', token = '4e45544f4b454e31' }")),
    (
        "ours, stamped with a key",
        Ours("keyed", "clsact", "{ action = 'stamp', token = { tag = 17, key = 'edge', bind = 'flow' } }"),
    ),
];

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: it needs root");
        return Ok(());
    }
    let bench = Bench::new()?;
    let listener = bench.lab.within(&bench.server, listen)?;
    bench.report("connections a second", 1e9, |place| connections(place, &listener))?;
    bench.report("bulk transfer, MB/s", BLOCK as f64 * 1e3, |place| bulk(place, &listener))?;
    if let Some(why) = support::Need::Tool("nginx").missing() {
        println!("connections with a request: SKIPPED: {why}");
        return Ok(());
    }
    let dir = tempfile::tempdir().context("making a directory for nginx")?;
    fs::write(dir.path().join("page"), [b'x'; 1000]).context("writing a page")?;
    let server = nginx::nginx(&bench.server, &format!("0.0.0.0:{WEB_PORT}"), dir.path())?;
    stay_on_one_cpu(Pid::from_raw(server.child.id().cast_signed()))?;
    bench.report("with a request to nginx", 1e9, |place| rate_of(REQUESTS, || request(place)))
}

/// A pair of interfaces by its number, and the server's address on it.
fn interface(place: usize) -> String {
    format!("pair{place}")
}

fn server(place: usize, port: u16) -> SocketAddr {
    ([10, 99, place as u8, 2], port).into()
}

struct Bench {
    lab: Lab,
    client: String,
    server: String,
    policy: tempfile::NamedTempFile,
}

impl Bench {
    fn new() -> Result<Bench> {
        let mut lab = Lab::new()?;
        let (client, server) = (lab.netns("client")?, lab.netns("server")?);
        for place in 0..ARMS.len() {
            let name = interface(place);
            lab.veth((&client, &name), (&server, &name), true)?;
            lab.addr(&client, &name, &format!("10.99.{place}.1/24"))?;
            lab.addr(&server, &name, &format!("10.99.{place}.2/24"))?;
        }
        lab.ok("key new edge --instance keyed")?;
        let policy = tempfile::NamedTempFile::new().context("making a file for policies")?;
        Ok(Bench { lab, client, server, policy })
    }

    fn tc(&self, command: &str) -> Result<()> {
        support::sh(&format!("tc -n {} {command}", self.client)).map(drop)
    }

    fn netoken(&self, place: usize, what: &str) -> Result<()> {
        self.lab.ok(&format!("--netns {} --iface {} {what}", self.client, interface(place))).map(drop)
    }

    fn attach(&self, place: usize, what: Attached) -> Result<()> {
        match what {
            Nothing => Ok(()),
            Clsact => self.tc(&format!("qdisc add dev {} clsact", interface(place))),
            Filter(filter) => {
                self.attach(place, Clsact)?;
                self.tc(&format!("filter add dev {} egress {filter}", interface(place)))
            }
            Ours(instance, hook, default) => {
                fs::write(&self.policy, format!("default = {default}")).context("writing a policy")?;
                let policy = self.policy.path().display();
                let what = format!("--attach --quiet --hook {hook} --instance {instance} --policy {policy}");
                self.netoken(place, &what)
            }
        }
    }

    fn detach(&self, place: usize, what: Attached) -> Result<()> {
        match what {
            Nothing => Ok(()),
            Clsact | Filter(_) => self.tc(&format!("qdisc del dev {} clsact", interface(place))),
            Ours(instance, ..) => self.netoken(place, &format!("--destroy --instance {instance}")),
        }
    }

    /// `one` is what there is one of at a rate of 1, in nanoseconds.
    fn report(&self, what: &str, one: f64, sample: impl Fn(usize) -> Result<f64> + Sync) -> Result<()> {
        let mut rates = ARMS.map(|_| Vec::new());
        let mut resent = [0; ARMS.len()];
        for round in 0..ROUNDS {
            let places: Vec<usize> = (0..ARMS.len()).map(|arm| (arm + round) % ARMS.len()).collect();
            for (place, (_, attached)) in places.iter().zip(ARMS) {
                self.attach(*place, attached)?;
            }
            self.lab.within(&self.client, || {
                stay_on_one_cpu(THIS_THREAD)?;
                for turn in 0..SAMPLES * ARMS.len() {
                    // Whom it follows upon makes a difference, and is not always the same.
                    let arm =
                        if round % 2 == 0 { turn } else { SAMPLES * ARMS.len() - 1 - turn } % ARMS.len();
                    let before = kernel_counter(&self.client, "TcpRetransSegs")?;
                    rates[arm].push(sample(places[arm])?);
                    resent[arm] += kernel_counter(&self.client, "TcpRetransSegs")? - before;
                }
                Ok(())
            })?;
            for (place, (_, attached)) in places.iter().zip(ARMS) {
                self.detach(*place, attached)?;
            }
        }
        print!("{what:<35}");
        BASES.iter().for_each(|(head, _)| print!("  {head:<14}"));
        println!("{:>10}", "added");
        for ((name, _), own) in ARMS.iter().zip(&rates) {
            print!("  {name:<24} {:>8.0}", median(own));
            for (_, base) in BASES {
                let Ratio { value, error } = Ratio::of(own, &rates[base]);
                print!("  {value:<5.3} +-{error:<5.3} ");
            }
            let added: Vec<f64> = own.iter().zip(&rates[0]).map(|(a, b)| one / a - one / b).collect();
            println!("{:>7.0} ns", median(&added));
        }
        if resent.iter().any(|segments| *segments > 0) {
            println!("  {resent:?} segments were sent again, which costs more than any classifier");
        }
        Ok(())
    }
}

/// How many times as fast one is as another.
struct Ratio {
    value: f64,
    /// Standard error: of the median of many values that are distributed about normally.
    error: f64,
}

impl Ratio {
    /// Each sample is compared with the one that was taken in the same turn.
    fn of(one: &[f64], other: &[f64]) -> Ratio {
        let ratios: Vec<f64> = one.iter().zip(other).map(|(one, other)| one / other).collect();
        let value = median(&ratios);
        let deviations: Vec<f64> = ratios.iter().map(|ratio| (ratio - value).abs()).collect();
        // 1.4826 makes a standard deviation of the median one, and 1.2533 that of a median of that of a mean.
        Ratio { value, error: 1.2533 * 1.4826 * median(&deviations) / (ratios.len() as f64).sqrt() }
    }
}

fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn listen() -> Result<TcpListener> {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None)?;
    let all: SocketAddr = ([0, 0, 0, 0], PORT).into();
    socket.bind(&all.into()).context("choosing the address to listen at")?;
    socket.listen(CONNECTIONS.cast_signed() + 10).context("listening")?;
    Ok(socket.into())
}

/// How many there are in a second, of so many.
fn rate_of(count: u32, mut one: impl FnMut() -> Result<()>) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..count {
        one()?;
    }
    Ok(f64::from(count) / start.elapsed().as_secs_f64())
}

/// All in one thread on one CPU: over veth the whole handshake runs inside connect(), so that nothing waits for
/// a wake-up and what the stamp costs is seen in full. Nobody accepts meanwhile; the backlog holds them all.
fn connections(place: usize, listener: &TcpListener) -> Result<f64> {
    let rate = rate_of(CONNECTIONS, || connect_and_reset(server(place, PORT)))?;
    for _ in 0..CONNECTIONS {
        listener.accept()?;
    }
    Ok(rate)
}

/// For the kernel: the calling thread.
const THIS_THREAD: Pid = Pid::from_raw(0);

/// Keeps a thread on one CPU: moving about is noise. And a veth has a queue for each CPU: packets of one
/// connection from two of them overtake each other, and TCP sends again what it takes for lost.
fn stay_on_one_cpu(thread: Pid) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(0)?;
    sched_setaffinity(thread, &set).context("staying on one CPU")
}

/// Closing with a reset leaves no TIME-WAIT behind, which would use up the ports.
fn connect_and_reset(addr: SocketAddr) -> Result<()> {
    let socket = socket2::Socket::from(TcpStream::connect_timeout(&addr, Duration::from_secs(5))?);
    socket.set_linger(Some(Duration::ZERO)).context("asking for a reset at the end")
}

/// In one thread as well: what is sent lies at the other end by then. Each sample has a connection of its own, as where
/// in memory its buffers lie makes a difference. In MB a second.
fn bulk(place: usize, listener: &TcpListener) -> Result<f64> {
    let mut block = vec![0x5a; BLOCK];
    let mut client = TcpStream::connect(server(place, PORT))?;
    let (mut server, _) = listener.accept()?;
    let mut transfer = || {
        client.write_all(&block)?;
        server.read_exact(&mut block)?;
        Ok(())
    };
    // Until the windows are open.
    rate_of(BLOCKS / 3, &mut transfer)?;
    Ok(rate_of(BLOCKS, transfer)? * BLOCK as f64 / 1e6)
}

/// A connection as people use them: the server accepts it, on the same CPU, and answers.
fn request(place: usize) -> Result<()> {
    let mut socket = TcpStream::connect(server(place, WEB_PORT))?;
    socket.write_all(b"GET /page HTTP/1.0\r\n\r\n").context("asking for a page")?;
    let mut answer = Vec::with_capacity(2000);
    socket.read_to_end(&mut answer).context("reading the page")?;
    ensure!(answer.starts_with(b"HTTP/1.1 200") && answer.len() > 1000, "nginx did not send the page");
    // Of the server's end, which closed first, nothing is left to wait for.
    socket2::Socket::from(socket).set_linger(Some(Duration::ZERO)).context("asking for a reset at the end")
}
