//! What the classifier adds to the cost of a packet, over a classifier that does nothing, in one run.
//!
//! `cargo bench --bench packets`, as root. Rounds of both alternate, and the quickest round of each counts: noise
//! only ever adds. Where the packet is changed, both are entered through a program that first gives it back its old
//! bytes; what it costs to shrink a stamped packet again is measured too and taken off.
//!
//! Where the kernel puts a program in memory is up to chance (`bpf_jit_binary_pack_alloc`), and is worth half a
//! nanosecond. So what passes in less than one is measured with both loaded many times over, and the mean counts.

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::ptr;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::{MapCore, MapFlags, Object, ObjectBuilder};
use netoken::keys::{Key, Secret, rotate};
use netoken::policy::Policy;
use netoken::program::{Program, Settings};
use netoken::token::Token;
use netoken::types::Fault;

const REPEAT: i32 = 200_000;
const ROUNDS: usize = 25;
/// Of what other packets than a SYN pass.
const LOADS: usize = 24;
/// Of each of those, since there are so many.
const ROUNDS_OF_LOADS: usize = 8;

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: it needs root");
        return Ok(());
    }
    let dir = tempfile::tempdir().context("making a directory for the bench program")?;
    let policy = Policy::stamp_all(Token::DEFAULT);
    let loads = (0..LOADS).map(|_| load(0, &policy)).collect::<Result<Vec<_>>>()?;
    let (many, stamp) = (&loads[..], &loads[..1]);
    let skip = [load(0, &Policy::from_toml("default = { action = 'skip' }")?)?];
    let keyed = |bind| {
        load_keyed(&format!(
            "default = {{ action = 'stamp', token = {{ tag = 17, key = 'edge', bind = '{bind}' }} }}"
        ))
    };
    let (flow, server, isn) = ([keyed("flow")?], [keyed("server")?], [keyed("isn")?]);
    let refuse = [load(Fault::FAULT_GROW.0, &policy)?];

    // An argument names the rows to measure; cargo passes --bench.
    let wanted = std::env::args().skip(1).find(|argument| !argument.starts_with('-')).unwrap_or_default();
    println!("{:<36} {:>9} {:>9} {:>9}", "", "empty", "netoken", "added");
    for (name, frame, program, growth) in [
        ("data segment, IPv4", tcp(4, 0x10, 12, 100), many, 0),
        ("ACK alone, IPv4", tcp(4, 0x10, 12, 0), many, 0),
        ("data segment, IPv6", tcp(6, 0x10, 12, 100), many, 0),
        ("UDP, IPv4", udp(), many, 0),
        ("SYN, skipped by policy", tcp(4, 0x02, 20, 0), &skip[..], 0),
        ("SYN, all but changing the packet", tcp(4, 0x02, 20, 0), &refuse[..], 0),
        ("SYN, stamped, IPv4", tcp(4, 0x02, 20, 0), stamp, 12),
        ("SYN, stamped, IPv6", tcp(6, 0x02, 20, 0), stamp, 12),
        // A list that no stack sends in a SYN.
        ("SYN, stamped, options walked", tcp(4, 0x02, 12, 0), stamp, 12),
        ("SYN, stamped, 100 bytes of payload", tcp(4, 0x02, 20, 100), stamp, 12),
        ("SYN, keyed by flow, IPv4", tcp(4, 0x02, 20, 0), &flow[..], 12),
        ("SYN, keyed by flow, IPv6", tcp(6, 0x02, 20, 0), &flow[..], 12),
        ("SYN, keyed by server, IPv4", tcp(4, 0x02, 20, 0), &server[..], 12),
        ("SYN, keyed by server, IPv6", tcp(6, 0x02, 20, 0), &server[..], 12),
        ("SYN, keyed by isn, IPv4", tcp(4, 0x02, 20, 0), &isn[..], 12),
    ] {
        if !name.contains(&wanted) {
            continue;
        }
        let cost = measure(dir.path(), &frame, program, growth)?;
        let (empty, ours) = (cost.empty, cost.ours);
        println!("{name:<36} {empty:>6.1} ns {ours:>6.1} ns {:>6.1} ns", ours - empty);
        if growth > 0 {
            println!("  of which bpf_skb_change_tail() {:>36.1} ns", cost.grow);
        }
    }
    Ok(())
}

fn load(faults: u32, policy: &Policy) -> Result<Program> {
    let program = Program::load(Settings { faults, ..Settings::default() }, None)?;
    program.maps.set_policy(policy)?;
    Ok(program)
}

/// Stamps keyed tokens, with one key that signs.
fn load_keyed(policy: &str) -> Result<Program> {
    let ring = "edge".parse()?;
    let mut keys = vec![Key::new(ring, 3, Secret::random()?, SystemTime::now())?];
    rotate::sign(&mut keys, ring)?;
    let program = load(0, &Policy::from_toml(policy)?)?;
    program.maps.keys.load(&keys)?;
    Ok(program)
}

/// Nanoseconds for one packet.
struct Cost {
    empty: f64,
    ours: f64,
    grow: f64,
}

/// The means over `programs`, all of which do the same. `growth`: how many bytes they append, which is checked.
fn measure(dir: &Path, frame: &[u8], programs: &[Program], growth: usize) -> Result<Cost> {
    let mut benches = programs.iter().map(|_| load_restore(dir, frame)).collect::<Result<Vec<_>>>()?;
    let rounds = if programs.len() > 1 { ROUNDS_OF_LOADS } else { ROUNDS };
    let is_changed = growth > 0;
    let mut best = vec![[f64::MAX; 4]; programs.len()];
    for _ in 0..rounds {
        for ((bench, ours), best) in benches.iter_mut().zip(programs).zip(&mut best) {
            let own = |name| program_fd(bench, name);
            let ours = ours.as_fd().as_raw_fd();
            let targets =
                [(own("empty")?, 0), (ours, growth), (own("grow_once")?, 12), (own("grow_twice")?, 24)];
            let targets = if is_changed { &targets[..] } else { &targets[..2] };
            for (best, (fd, growth)) in best.iter_mut().zip(targets.iter().copied()) {
                let (ns, grown) = if is_changed {
                    aim(bench, fd)?;
                    run(program_fd(bench, "restore")?, frame)?
                } else {
                    run(fd, frame)?
                };
                if grown != growth {
                    bail!(
                        "the packet grew by {grown} bytes, not by {growth}: that is not what was to be measured"
                    );
                }
                *best = best.min(ns);
            }
        }
    }
    let [empty, ours, once, twice] =
        [0, 1, 2, 3].map(|which| best.iter().map(|of| of[which]).sum::<f64>() / programs.len() as f64);
    let grow = twice - once;
    let shrink = once - empty - grow;
    Ok(Cost { empty, ours: if is_changed { ours - shrink } else { ours }, grow })
}

fn load_restore(dir: &Path, frame: &[u8]) -> Result<Object> {
    let object = dir.join("restore.bpf.o");
    if !object.exists() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let types = root.join("vmlinux").join(std::env::consts::ARCH);
        SkeletonBuilder::new()
            .source(root.join("benches/restore.bpf.c"))
            .obj(&object)
            .clang_args(["-I", &types.to_string_lossy(), "-mcpu=v3", "-Wno-unused-parameter"])
            .build()
            .context("compiling benches/restore.bpf.c")?;
    }
    let mut open = ObjectBuilder::default().open_file(&object).context("opening the bench program")?;
    let mut settings = open
        .maps_mut()
        .find(|map| map.name().to_string_lossy().contains("rodata"))
        .context("the bench program has no settings")?;
    let data = settings.initial_value_mut().context("the bench program's settings are empty")?;
    data[..4].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
    data[4..4 + frame.len()].copy_from_slice(frame);
    open.load().context("loading the bench program")
}

fn program_fd(object: &Object, name: &str) -> Result<i32> {
    let program = object.progs().find(|program| program.name() == name);
    Ok(program.with_context(|| format!("no program {name}"))?.as_fd().as_raw_fd())
}

fn aim(object: &mut Object, fd: i32) -> Result<()> {
    let target = object.maps().find(|map| map.name() == "target").context("no map target")?;
    target.update(&0u32.to_ne_bytes(), &fd.to_ne_bytes(), MapFlags::ANY).context("choosing what to measure")
}

/// Nanoseconds for each run, and by how much the packet has grown.
fn run(fd: i32, frame: &[u8]) -> Result<(f64, usize)> {
    let mut out = vec![0u8; 4096];
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: out.len() as u32,
        repeat: REPEAT,
        ctx_in: ptr::null(),
        ..Default::default()
    };
    // Not `duration` of the options: that is whole nanoseconds.
    let start = Instant::now();
    // SAFETY: the buffers outlive the call, and their sizes are given.
    let error = unsafe { libbpf_sys::bpf_prog_test_run_opts(fd, &mut options) };
    let ns = start.elapsed().as_secs_f64() * 1e9 / f64::from(REPEAT);
    if error != 0 || options.retval != u32::MAX {
        bail!("BPF_PROG_TEST_RUN: error {error}, the program returned {:#x}", options.retval);
    }
    Ok((ns, options.data_size_out as usize - frame.len()))
}

/// A frame with right lengths. Checksums are left zero: the classifier mends them and never checks.
fn tcp(family: u8, flags: u8, options_len: usize, payload: usize) -> Vec<u8> {
    let mut segment = vec![0u8; 20 + options_len + payload];
    segment[..4].copy_from_slice(&[0x9c, 0x40, 0x01, 0xbb]);
    segment[12] = (((20 + options_len) / 4) << 4) as u8;
    segment[13] = flags;
    let options: &[u8] = match options_len {
        // MSS, SACK permitted, timestamps, NOP, window scale: what Linux sends.
        20 => &[2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7],
        _ => &[1, 1, 8, 10, 1, 2, 3, 4, 5, 6, 7, 8],
    };
    segment[20..20 + options_len].copy_from_slice(options);
    ip(family, 6, &segment)
}

fn udp() -> Vec<u8> {
    ip(4, 17, &[0u8; 108])
}

fn ip(family: u8, protocol: u8, segment: &[u8]) -> Vec<u8> {
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    if family == 4 {
        let len = (20 + segment.len()) as u16;
        frame.extend([8, 0, 0x45, 0]);
        frame.extend(len.to_be_bytes());
        frame.extend([0, 1, 0x40, 0, 64, protocol, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
    } else {
        frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
        frame.extend((segment.len() as u16).to_be_bytes());
        frame.extend([protocol, 64]);
        frame.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1]);
        frame.extend([0x20, 1, 0x0d, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]);
    }
    frame.extend(segment);
    frame
}
