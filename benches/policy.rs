//! What a policy costs: a lookup, by number of rules and shapes; loading it; and the kernel's memory.
//!
//! `cargo bench --bench policy`, as root. Nothing is attached. A lookup is measured as a SYN that the policy skips, in the
//! classifier itself, less the same with a program that does nothing. *hot* is one and the same SYN again and again, which the last
//! shape decides, so that all of them are looked up; *spread* is SYNs to rules all over the policy, each run alone, timed
//! by the kernel (BPF_ENABLE_STATS): memory that is not in the CPU's caches counts there, and so does the timing
//! itself, with and without rules.

use std::fmt::Write as _;
use std::os::fd::{AsFd, AsRawFd};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use libbpf_sys::bpf_test_run_opts;
use netoken::policy::Policy;
use netoken::policy::compile::{Compiled, Naming, compile};
use netoken::policy::read::{Options, read_text};
use netoken::program::{Program, Settings};

const RULES: [usize; 5] = [1, 10, 1_000, 100_000, 1_000_000];
const SHAPES: [usize; 3] = [1, 4, 16];
/// Short and many: a round that nothing interrupts is the quickest, also on a machine that has other things to do.
const REPEAT: i32 = 5_000;
const ROUNDS: usize = 300;
const SPREAD: usize = 20_000;

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: it needs root");
        return Ok(());
    }
    let program = Program::load(Settings::default(), None)?;
    program.maps.set_policy(&Policy::from_toml("default = { action = 'skip' }")?)?;
    let bare = hot(&program, &frame(0, 0, 1))?;
    let bare_spread = spread(&program, 1, 1)?;
    let other = hot(&program, &no_syn())?;
    println!(
        "default only: {:.0} ns more than a packet that is no SYN; the rest is added to that\n",
        bare - other
    );

    println!("added to a lookup     {:>27} {:>29}", "hot", "spread");
    print!("{:>9}  shapes ->", "rules");
    println!("{0:>9} {1:>9} {2:>9} {0:>9} {1:>9} {2:>9}", SHAPES[0], SHAPES[1], SHAPES[2]);
    let mut loads = Vec::new();
    for rules in RULES {
        let mut cells = [[None; SHAPES.len()]; 2];
        for (at, shapes) in SHAPES.into_iter().enumerate().filter(|(_, shapes)| *shapes <= rules) {
            let load = load(&program, &text(rules, shapes))?;
            cells[0][at] = Some(hot(&program, &frame(rules - 1, shapes - 1, shapes))? - bare);
            cells[1][at] = Some(spread(&program, rules, shapes)? - bare_spread);
            loads.push((rules, shapes, load));
        }
        print!("{rules:>9}          ");
        for cell in cells.concat() {
            print!("{:>10}", cell.map_or("-".to_string(), |ns| format!("{ns:.0} ns")));
        }
        println!();
    }

    println!(
        "\n{:>9} {:>7} {:>9} {:>9} {:>9} {:>9} {:>9} {:>13}",
        "rules", "shapes", "read", "compile", "load", "all", "CPU time", "bytes a rule"
    );
    for (rules, shapes, load) in loads.iter().filter(|(rules, ..)| *rules >= 1_000) {
        row(*rules, &format!("{shapes}"), load);
    }
    let load = load(&program, &list(1_000_000))?;
    row(1_000_000, "list", &load);
    println!("\n'list' is one rule with a list of a million prefixes.");
    Ok(())
}

fn row(rules: usize, shapes: &str, load: &Load) {
    let all = load.read + load.compile + load.install;
    println!(
        "{rules:>9} {shapes:>7} {:>7.2} s {:>7.2} s {:>7.2} s {all:>7.2} s {:>7.2} s {:>13}",
        load.read,
        load.compile,
        load.install,
        load.cpu,
        load.bytes / rules
    );
}

struct Load {
    read: f64,
    compile: f64,
    install: f64,
    /// Of all threads, user and system: what the rest would be on a machine with nothing else to do.
    cpu: f64,
    /// Of kernel memory, as the kernel counts it for each map.
    bytes: usize,
}

fn load(program: &Program, text: &str) -> Result<Load> {
    let cpu_before = cpu()?;
    let start = Instant::now();
    let policy = read_text("bench", text, &Options::default())?.policy;
    let read = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let hits: Vec<u32> = (1..=policy.rules.len() as u32).collect();
    let compiled: Compiled = compile(&policy, Naming::none(), &hits)?;
    let compiled_in = start.elapsed().as_secs_f64();
    let start = Instant::now();
    program.maps.install(&compiled, None)?;
    let install = start.elapsed().as_secs_f64();
    let cpu = cpu()? - cpu_before;
    Ok(Load { read, compile: compiled_in, install, cpu, bytes: program.maps.policy_bytes()? })
}

fn cpu() -> Result<f64> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_PROCESS_CPUTIME_ID)?;
    Ok(std::time::Duration::from(time).as_secs_f64())
}

/// Rules that take turns in their shapes: prefix lengths of IPv4 and IPv6, with and without a port.
fn text(rules: usize, shapes: usize) -> String {
    let mut text = String::from("default = { action = \"skip\" }\n");
    for number in 0..rules {
        let (dst, port) = target(number, number % shapes, shapes);
        let _ = write!(text, "\n[[rule]]\nname = \"rule-{number}\"\ndst = \"{dst}\"\n");
        if let Some(port) = port {
            let _ = writeln!(text, "port = {port}");
        }
        text.push_str("action = \"skip\"\n");
    }
    text
}

/// Prefix and port of a rule of a shape. Rules of all shapes are apart, so that each is decided by itself.
fn target(number: usize, shape: usize, shapes: usize) -> (String, Option<u16>) {
    let n = number / shapes;
    let port = (shape % 4 >= 2).then_some(443 + shape as u16);
    let dst = if shape.is_multiple_of(2) {
        let bits = 32 - shape / 4;
        let addr = ((shape as u32 / 2 + 1) << 27) | (n as u32) << (32 - bits);
        format!("{}/{bits}", std::net::Ipv4Addr::from(addr))
    } else {
        let bits = 128 - 16 * (shape / 4);
        let addr = 0x2001_u128 << 112 | (shape as u128) << 100 | (n as u128) << (128 - bits);
        format!("{}/{bits}", std::net::Ipv6Addr::from(addr))
    };
    (dst, port)
}

fn list(prefixes: usize) -> String {
    let items: Vec<String> = (0..prefixes).map(|n| format!("\"{}\"", target(n, n % 16, 16).0)).collect();
    format!("[[rule]]\nname = \"list\"\ndst = [\n{}\n]\naction = \"skip\"\n", items.join(",\n"))
}

/// A SYN that the rule matches.
fn frame(number: usize, shape: usize, shapes: usize) -> Vec<u8> {
    let (dst, port) = target(number, shape, shapes);
    let addr: std::net::IpAddr = dst.split('/').next().unwrap_or_default().parse().expect("an address");
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    match addr {
        std::net::IpAddr::V4(addr) => {
            frame.extend([8, 0, 0x45, 0, 0, 40, 0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1]);
            frame.extend(addr.octets());
        }
        std::net::IpAddr::V6(addr) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0, 0, 20, 6, 64]);
            frame.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
            frame.extend(addr.octets());
        }
    }
    frame.extend(40_000u16.to_be_bytes());
    frame.extend(port.unwrap_or(80).to_be_bytes());
    frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 5 << 4, 2, 0xff, 0xff, 0, 0, 0, 0]);
    frame
}

/// The same with the ACK flag, which the classifier is not interested in.
fn no_syn() -> Vec<u8> {
    let mut frame = frame(0, 0, 1);
    let flags = frame.len() - 7;
    frame[flags] = 0x10;
    frame
}

/// Nanoseconds of the quickest round.
fn hot(program: &Program, frame: &[u8]) -> Result<f64> {
    let mut best = f64::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        run(program, frame, REPEAT)?;
        best = best.min(start.elapsed().as_secs_f64() * 1e9 / f64::from(REPEAT));
    }
    Ok(best)
}

/// Mean nanoseconds of single runs, as the kernel counts them; the best of some rounds.
fn spread(program: &Program, rules: usize, shapes: usize) -> Result<f64> {
    // SAFETY: the argument is one of the kernel's constants; what comes back is a descriptor or an error.
    let stats = unsafe { libbpf_sys::bpf_enable_stats(libbpf_sys::BPF_STATS_RUN_TIME) };
    if stats < 0 {
        bail!("asking the kernel to time programs: error {stats}");
    }
    // A prime step goes everywhere, and to no two neighbours.
    let step = 611_953;
    let frames: Vec<Vec<u8>> = (0..SPREAD)
        .map(|at| at * step % rules)
        .map(|number| frame(number, number % shapes, shapes))
        .collect();
    let mut best = f64::MAX;
    for _ in 0..5 {
        let before = run_time(program)?;
        for frame in &frames {
            run(program, frame, 1)?;
        }
        let after = run_time(program)?;
        best = best.min((after - before) as f64 / SPREAD as f64);
    }
    nix::unistd::close(stats).context("closing the statistics")?;
    Ok(best)
}

fn run_time(program: &Program) -> Result<u64> {
    let mut info = libbpf_sys::bpf_prog_info::default();
    let mut len = size_of::<libbpf_sys::bpf_prog_info>() as u32;
    // SAFETY: `info` is a whole structure of the length that is given, and outlives the call.
    let error = unsafe {
        libbpf_sys::bpf_obj_get_info_by_fd(program.as_fd().as_raw_fd(), (&raw mut info).cast(), &mut len)
    };
    if error != 0 {
        bail!("asking the kernel about the program: error {error}");
    }
    Ok(info.run_time_ns)
}

fn run(program: &Program, frame: &[u8], repeat: i32) -> Result<()> {
    let mut opts = bpf_test_run_opts {
        sz: size_of::<bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        repeat,
        ..Default::default()
    };
    // SAFETY: the buffer outlives the call, and its size stands beside it.
    let error = unsafe { libbpf_sys::bpf_prog_test_run_opts(program.as_fd().as_raw_fd(), &mut opts) };
    if error != 0 || opts.retval != u32::MAX {
        bail!("BPF_PROG_TEST_RUN: error {error}, the program returned {:#x}", opts.retval);
    }
    Ok(())
}
