//! What clients with a token notice of a SYN flood: without protection, with SYN cookies, with a limit of nftables, and
//! with the guard. One CPU sends SYNs from random sources as fast as it can, and the kernel takes each of them in on
//! that CPU; another CPU opens connections that are stamped, a hundred a second.
//!
//! `cargo bench --bench flood`, as root. Makes three network namespaces and removes them; nothing leaves them. Each row
//! takes some five seconds.

#[path = "../tests/support/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "../tests/end_to_end/segment.rs"]
#[allow(dead_code)]
mod segment;
#[path = "../tests/support/mod.rs"]
#[allow(dead_code)]
mod support;
#[path = "../tests/end_to_end/sys.rs"]
#[allow(dead_code)]
mod sys;

use std::fs;
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Lab, ip};
use nix::poll::{PollFd, PollFlags, poll};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use socket2::{Domain, Protocol, Socket, Type};
use support::sh;

/// Connections of one row, and the pause between the beginnings of two.
const CONNECTIONS: u32 = 300;
const PAUSE: Duration = Duration::from_millis(10);
/// What is not served by then has failed. A lost SYN comes again after one second.
const LIMIT: Duration = Duration::from_secs(2);
/// How long the flood runs before the first connection.
const AHEAD: Duration = Duration::from_millis(500);
/// The flood ends after so many SYNs, whatever happens.
const FLOOD_MAX: u64 = 20_000_000;
const BACKLOG: i32 = 1024;
const SERVER: &str = "192.0.2.2";
/// SYNs a second that the rule of nftables lets through.
const NFT_LIMIT: u32 = 2000;

/// How the server is protected.
#[derive(Clone, Copy)]
enum Protection {
    Nothing,
    Cookies,
    Nftables,
    Guard(&'static str),
}

/// What the flood sends.
#[derive(Clone, Copy, PartialEq)]
enum Flood {
    Nothing,
    Plain,
    /// With a token of a key that the server has, and a MAC that is random.
    Forged,
}

/// What became of the clients of one row.
struct Outcome {
    /// Sorted; only of those that were served.
    times: Vec<Duration>,
    /// SYNs of the flood that the server's interface took in.
    flood_per_s: f64,
}

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: it needs root");
        return Ok(());
    }
    if thread::available_parallelism()?.get() < 2 {
        println!("SKIPPED: it needs two CPUs, one for the flood and one for what it must not disturb");
        return Ok(());
    }
    let lab = Lab::new()?;
    let world = World::new(lab)?;
    println!("{:<38} {:>10} {:>9} {:>10} {:>10}", "", "SYNs/s", "clients", "median of", "99 % of");
    println!("{:<38} {:>10} {:>9} {:>10} {:>10}", "", "taken in", "served", "them, ms", "all, ms");
    let mut bars = String::new();
    for (name, protection, flood) in [
        ("no flood", Protection::Cookies, Flood::Nothing),
        ("no protection (tcp_syncookies=0)", Protection::Nothing, Flood::Plain),
        ("SYN cookies (tcp_syncookies=1)", Protection::Cookies, Flood::Plain),
        ("nftables, limit of 2000 SYNs a second", Protection::Nftables, Flood::Plain),
        ("guard at TC", Protection::Guard("tc"), Flood::Plain),
        ("guard at TC, forged tokens", Protection::Guard("tc"), Flood::Forged),
        ("guard at XDP", Protection::Guard("xdp"), Flood::Plain),
        ("guard at XDP, forged tokens", Protection::Guard("xdp"), Flood::Forged),
    ] {
        let outcome = world.row(protection, flood).with_context(|| name.to_string())?;
        println!("{name:<38} {}", outcome.columns());
        let percent = outcome.percent();
        bars.push_str(&format!("{name:<38} {:<50} {percent:>5.1} %\n", "#".repeat((percent / 2.0) as usize)));
    }
    println!("\nclients served within {LIMIT:?}\n{}", bars.trim_end());
    Ok(())
}

impl Outcome {
    fn percent(&self) -> f64 {
        self.times.len() as f64 * 100.0 / f64::from(CONNECTIONS)
    }

    fn columns(&self) -> String {
        // Of all, so that those that were not served count as the slowest.
        let ms = |at: usize| match self.times.get(at) {
            Some(time) => format!("{:.2}", time.as_secs_f64() * 1e3),
            None => "-".to_string(),
        };
        let (median, p99) = (ms(self.times.len() / 2), ms(CONNECTIONS as usize * 99 / 100 - 1));
        format!("{:>10.0} {:>7.1} % {median:>9} {p99:>10}", self.flood_per_s, self.percent())
    }
}

/// The client and the flood have an interface of the server each.
struct World {
    lab: Lab,
    client: String,
    server: String,
    attacker: String,
    rules: String,
}

impl World {
    fn new(mut lab: Lab) -> Result<World> {
        let [client, server, attacker] = lab.add_netns(["client", "server", "flood"])?;
        lab.add_veth((&client, "out0"), (&server, "in0"), true)?;
        lab.add_veth((&attacker, "out0"), (&server, "in1"), true)?;
        lab.up_with(&client, "out0", &["192.0.2.1/24".to_string()])?;
        lab.up_with(&server, "in0", &[format!("{SERVER}/24")])?;
        lab.up_with(&attacker, "out0", &["203.0.113.1/24".to_string()])?;
        lab.up_with(&server, "in1", &["203.0.113.2/24".to_string()])?;
        // Answers to the random sources, which are of 198.18.0.0/15 (RFC 2544), go to where nobody takes them.
        ip(&server, ["route add 198.18.0.0/15 via 203.0.113.1".to_string()])?;
        lab.within(&server, || {
            for setting in ["conf/all/rp_filter", "conf/in1/rp_filter"] {
                fs::write(format!("/proc/sys/net/ipv4/{setting}"), "0").context(setting)?;
            }
            Ok(())
        })?;
        let path = |name| lab.run.with_extension(name).display().to_string();
        let (policy, rules) = (path("policy.toml"), path("guard.toml"));
        lab.ok("key new edge")?;
        fs::write(&policy, "default = { action = 'stamp', token = { tag = 17, key = 'edge' } }")?;
        fs::write(
            &rules,
            format!("[[rule]]\nname = 'all'\ndst = '{SERVER}'\nmode = 'drop'\nkeys = 'edge'\n"),
        )?;
        lab.ok(&format!("--netns {client} --iface out0 --attach --quiet --policy {policy}"))?;
        Ok(World { lab, client, server, attacker, rules })
    }

    fn row(&self, protection: Protection, flood: Flood) -> Result<Outcome> {
        let cookies = if matches!(protection, Protection::Nothing) { "0" } else { "1" };
        self.lab.within(&self.server, || {
            fs::write("/proc/sys/net/ipv4/tcp_syncookies", cookies).context("setting tcp_syncookies")
        })?;
        let nft = |command: &str| sh(&format!("ip netns exec {} nft '{command}'", self.server)).map(drop);
        let guard = |flags: &str| {
            self.lab.ok(&format!("guard --netns {} --iface in0 --iface in1 {flags}", self.server)).map(drop)
        };
        match protection {
            Protection::Nftables => {
                nft("add table inet flood")?;
                nft("add chain inet flood in { type filter hook input priority -300; }")?;
                nft(&format!(
                    "add rule inet flood in tcp flags & (syn|ack) == syn limit rate over {NFT_LIMIT}/second drop"
                ))?;
            }
            Protection::Guard(hook) => guard(&format!("--attach --hook {hook} --rules {}", self.rules))?,
            Protection::Nothing | Protection::Cookies => {}
        }
        let outcome = self.measure(flood);
        match protection {
            Protection::Nftables => nft("delete table inet flood")?,
            Protection::Guard(_) => guard("--destroy")?,
            Protection::Nothing | Protection::Cookies => {}
        }
        outcome
    }

    fn measure(&self, flood: Flood) -> Result<Outcome> {
        // Another port for each row: what waits in the queue of one is gone with it.
        let listener = self.lab.within(&self.server, listen)?;
        let to = listener.local_addr()?.as_socket().context("a socket without an address")?;
        let done = AtomicBool::new(false);
        thread::scope(|scope| {
            let serving = scope.spawn(|| serve(&listener, &done));
            let (begin, before) = (Instant::now(), self.taken_in()?);
            let flooding = scope.spawn(|| match flood {
                Flood::Nothing => Ok(()),
                _ => self.lab.within(&self.attacker, || self.flood(to, flood, &done)),
            });
            thread::sleep(AHEAD);
            let times = self.lab.within(&self.client, || connect_all(to));
            done.store(true, Ordering::Relaxed);
            flooding.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            let flood_per_s = (self.taken_in()? - before) as f64 / begin.elapsed().as_secs_f64();
            serving.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
            Ok(Outcome { times: times?, flood_per_s })
        })
    }

    /// Packets that have reached the server by the interface of the flood. What a full queue in front of it drops is
    /// not among them.
    fn taken_in(&self) -> Result<u64> {
        let text = self.lab.within(&self.server, || Ok(fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("in1:"));
        let packets = line
            .and_then(|line| line.split_whitespace().nth(1))
            .with_context(|| format!("no in1 in {text}"))?;
        Ok(packets.parse()?)
    }

    /// Sends SYNs until the others are done.
    fn flood(&self, to: SocketAddr, flood: Flood, done: &AtomicBool) -> Result<()> {
        stay_on(1)?;
        let SocketAddr::V4(to) = to else { anyhow::bail!("{to} is not IPv4") };
        let socket = Socket::new(Domain::PACKET, Type::RAW, None).context("opening a packet socket")?;
        sys::bind_packet(&socket, "out0")?;
        let mut frame = Frame::new(&self.mac_of("in1")?, flood == Flood::Forged)?;
        let mut sent = 0u64;
        while sent < FLOOD_MAX && !done.load(Ordering::Relaxed) {
            match socket.send(frame.next(*to.ip(), to.port())) {
                Ok(_) => sent += 1,
                // No room for the moment: the device is the limit.
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Err(error) => return Err(error).context("sending a SYN"),
            }
        }
        Ok(())
    }

    fn mac_of(&self, interface: &str) -> Result<String> {
        let text = sh(&format!("ip -n {} link show {interface}", self.server))?;
        let mac = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        Ok(mac.with_context(|| format!("no address in {text}"))?.to_string())
    }
}

/// A SYN that is another one each time.
struct Frame {
    bytes: Vec<u8>,
    random: u64,
}

const IP: usize = 14;
const TCP: usize = IP + 20;
/// MSS, SACK, window scale and NOPs, as of a common client.
const OPTIONS: [u8; 12] = [2, 4, 5, 180, 4, 2, 1, 3, 3, 7, 1, 1];
const TOKEN_AT: usize = TCP + 20 + OPTIONS.len();

impl Frame {
    fn new(mac: &str, has_token: bool) -> Result<Frame> {
        let mut bytes = Vec::new();
        for part in mac.trim().split(':') {
            bytes.push(u8::from_str_radix(part, 16).with_context(|| format!("the address {mac}"))?);
        }
        ensure!(bytes.len() == 6, "the address {mac}");
        bytes.extend([2, 0, 0, 0, 0, 1, 8, 0]);
        let options_len = OPTIONS.len() + if has_token { 12 } else { 0 };
        bytes.extend([0x45, 0, 0, (40 + options_len) as u8, 0, 0, 0x40, 0, 64, 6, 0, 0]);
        bytes.extend([0; 8]);
        bytes.extend([0; 12]);
        bytes.extend([((20 + options_len) as u8 / 4) << 4, 2, 0xfa, 0xf0, 0, 0, 0, 0]);
        bytes.extend(OPTIONS);
        if has_token {
            bytes.extend([253, 12, 0x4e, 0x54, 0, 17, 0, 0, 0, 0, 0, 0]);
        }
        let seed = netoken::clock::now().as_nanos() as u64;
        Ok(Frame { bytes, random: seed | 1 })
    }

    fn random(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }

    fn next(&mut self, to: Ipv4Addr, port: u16) -> &[u8] {
        let (one, other) = (self.random(), self.random());
        // The slot is that of now or not; of sixteen SYNs three have one that is accepted.
        let src = 198 << 24 | 18 << 16 | (one as u32 & 0x1_ffff);
        let bytes = &mut self.bytes;
        bytes[IP + 12..IP + 16].copy_from_slice(&src.to_be_bytes());
        bytes[IP + 16..IP + 20].copy_from_slice(&to.octets());
        bytes[IP + 10..IP + 12].fill(0);
        let sum = !segment::sum(&[&bytes[IP..TCP]]);
        bytes[IP + 10..IP + 12].copy_from_slice(&sum.to_be_bytes());
        bytes[TCP..TCP + 2].copy_from_slice(&(1024 | (one >> 32) as u16).to_be_bytes());
        bytes[TCP + 2..TCP + 4].copy_from_slice(&port.to_be_bytes());
        bytes[TCP + 4..TCP + 8].copy_from_slice(&(other as u32).to_be_bytes());
        if bytes.len() > TOKEN_AT {
            // Key 0, which the server has.
            bytes[TOKEN_AT + 6] = (other >> 32) as u8 & 0xf;
            bytes[TOKEN_AT + 7..TOKEN_AT + 12].copy_from_slice(&one.to_be_bytes()[..5]);
        }
        bytes[TCP + 16..TCP + 18].fill(0);
        let len = ((bytes.len() - TCP) as u32).to_be_bytes();
        let sum = !segment::sum(&[&bytes[IP + 12..TCP], &len, &[0, 6], &bytes[TCP..]]);
        bytes[TCP + 16..TCP + 18].copy_from_slice(&sum.to_be_bytes());
        &self.bytes
    }
}

fn listen() -> Result<Socket> {
    let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
    socket.bind(&format!("{SERVER}:0").parse::<SocketAddr>()?.into()).context("choosing a port")?;
    socket.listen(BACKLOG).context("listening")?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    Ok(socket)
}

/// A wait for a connection that ended without one, and may begin again: a signal ends one that has a timeout.
fn is_passing(kind: io::ErrorKind) -> bool {
    matches!(kind, io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}

/// Greets everybody with one byte.
fn serve(listener: &Socket, done: &AtomicBool) -> Result<()> {
    stay_on(0)?;
    while !done.load(Ordering::Relaxed) {
        match listener.accept() {
            // One that has gone meanwhile is counted by the client.
            Ok((mut socket, _)) => drop(socket.write(b"!")),
            Err(error) if is_passing(error.kind()) => {}
            Err(error) => return Err(error).context("accepting a connection"),
        }
    }
    Ok(())
}

/// Opens connections, and returns how long it took until each was greeted, of those that were.
fn connect_all(to: SocketAddr) -> Result<Vec<Duration>> {
    stay_on(0)?;
    let (begin, mut begun) = (Instant::now(), 0);
    let mut open: Vec<(Socket, Instant)> = Vec::new();
    let mut times = Vec::new();
    while begun < CONNECTIONS || !open.is_empty() {
        while begun < CONNECTIONS && begin.elapsed() >= PAUSE * begun {
            begun += 1;
            let socket = Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::TCP))?;
            socket.set_nonblocking(true)?;
            let now = Instant::now();
            match socket.connect(&to.into()) {
                Err(error) if error.raw_os_error() != Some(libc::EINPROGRESS) => {
                    return Err(error).with_context(|| format!("connecting to {to}"));
                }
                _ => open.push((socket, now)),
            }
        }
        let mut fds: Vec<PollFd<'_>> =
            open.iter().map(|(socket, _)| PollFd::new(socket.as_fd(), PollFlags::POLLIN)).collect();
        poll(&mut fds, 1u8).context("waiting for answers")?;
        let ready: Vec<bool> = fds.iter().map(|fd| fd.any().unwrap_or(false)).collect();
        let mut ready = ready.into_iter();
        open.retain_mut(|(socket, since)| {
            let took = since.elapsed();
            let is_ready = ready.next().unwrap_or(false);
            if is_ready && matches!(socket.read(&mut [0]), Ok(1)) {
                times.push(took);
            }
            !is_ready && took < LIMIT
        });
    }
    times.sort_unstable();
    Ok(times)
}

/// Keeps the calling thread on one CPU.
fn stay_on(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).context("staying on one CPU")
}
