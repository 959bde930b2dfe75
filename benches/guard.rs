//! What the guard adds at XDP to the cost of a packet, over a program that only drops, in one run.
//!
//! `cargo bench --bench guard`, as root; `-- accepted` measures only what has that in its name. Rounds of both
//! alternate, and the quickest round of each counts: noise only ever adds.

#[path = "support/lists.rs"]
mod lists;

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use libbpf_cargo::SkeletonBuilder;
use libbpf_rs::{Object, ObjectBuilder};
use netoken::clock;
use netoken::guard::counters::GuardCounters;
use netoken::guard::program::{GuardProgram, Kind, Settings};
use netoken::guard::rules::Rules;
use netoken::guard::types::Verdict;
use netoken::keys::{Key, Secret};
use netoken::token::keyed::{Bind, Flow, Slots, Stamp, make};

const REPEAT: i32 = 20_000;
const ROUNDS: usize = 40;
const SINGLE_ROUNDS: usize = 10_000;
const SPREAD_RUNS: usize = 100_000;
const KEYED_RUNS: usize = 20_000;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const SECRET: [u8; 16] = [7; 16];
const MILLION: usize = 1_000_000;

const RULES: &str = "[[rule]]\nname = 'origin'\ndst = ['192.0.2.2', '2001:db8::2']\nport = 443\nmode = 'drop'\nkeys = \
                     'edge'\nbinds = ['flow', 'server', 'isn']\n";
/// The MAC is computed once, for the one mode that is accepted.
const ONE_MODE: &str = "[[rule]]\nname = 'origin'\ndst = ['192.0.2.2', '2001:db8::2']\nport = 443\nmode = 'drop'\nkeys \
                        = 'edge'\n";

fn main() -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        println!("SKIPPED: it needs root");
        return Ok(());
    }
    let dir = tempfile::tempdir().context("making a directory for the bench program")?;
    let base = load_base(dir.path())?;
    let base = base.progs().next().context("no bench program")?.as_fd().as_raw_fd();

    let plain = load(ONE_MODE)?;
    let all_modes = load(RULES)?;
    let one = load(&format!("blocked = ['198.51.100.7']\n{ONE_MODE}"))?;
    let auto_block = |refused| {
        format!("auto_block = {{ refused = {refused}, within = '1h', block_for = '1h' }}\n{ONE_MODE}")
    };
    let counted = load(&auto_block(u32::MAX))?;
    let auto_blocked = load(&auto_block(1))?;
    let alerting = load(&format!("alerts = {{ within = '1h', low = {} }}\n{ONE_MODE}", i64::MAX))?;
    let forgetful = load(ONE_MODE)?;
    forget_at_once(&forgetful)?;
    let list = dir.path().join("blocked");
    std::fs::write(&list, (0..MILLION).map(|at| format!("{}\n", lists::host(at))).collect::<String>())?;
    let million = load(&format!("blocked_file = '{}'\n{ONE_MODE}", list.display()))?;
    std::fs::write(&list, lists::mixed(MILLION))?;
    let mixed = load(&format!("blocked_file = '{}'\n{ONE_MODE}", list.display()))?;
    std::fs::write(&list, lists::clustered(MILLION))?;
    let clustered = load(&format!("blocked_file = '{}'\n{ONE_MODE}", list.display()))?;

    println!("{:<42} {:>9} {:>9} {:>9}", "", "drop only", "guard", "added");
    for (name, frame, program, action) in [
        ("data segment, IPv4", frame(4, 0x10, 443, false, Bind::Server)?, &plain, XDP_PASS),
        ("data segment, IPv6", frame(6, 0x10, 443, false, Bind::Server)?, &plain, XDP_PASS),
        ("SYN, unprotected", frame(4, 0x02, 80, false, Bind::Server)?, &plain, XDP_PASS),
        ("SYN without token, refused, IPv4", frame(4, 0x02, 443, false, Bind::Server)?, &plain, XDP_DROP),
        ("SYN without token, refused, IPv6", frame(6, 0x02, 443, false, Bind::Server)?, &plain, XDP_DROP),
        ("SYN keyed by server, accepted, IPv4", frame(4, 0x02, 443, true, Bind::Server)?, &plain, XDP_PASS),
        ("SYN keyed by server, accepted, IPv6", frame(6, 0x02, 443, true, Bind::Server)?, &plain, XDP_PASS),
        (
            "SYN keyed by server, not seen yet, IPv4",
            frame_of(1, 4, 0x02, 443, Some((Bind::Server, 0)))?,
            &forgetful,
            XDP_PASS,
        ),
        (
            "SYN keyed by server, not seen yet, IPv6",
            frame_of(1, 6, 0x02, 443, Some((Bind::Server, 0)))?,
            &forgetful,
            XDP_PASS,
        ),
        (
            "SYN keyed by flow, of three modes, IPv4",
            frame(4, 0x02, 443, true, Bind::Flow)?,
            &all_modes,
            XDP_PASS,
        ),
        (
            "SYN, options as no stack sends, refused",
            odd(frame(4, 0x02, 443, false, Bind::Server)?),
            &plain,
            XDP_DROP,
        ),
        ("SYN, one source blocked, not it", frame(4, 0x02, 443, false, Bind::Server)?, &one, XDP_DROP),
        (
            "SYN, one source blocked, it is",
            from(frame(4, 0x02, 443, false, Bind::Server)?, &[198, 51, 100, 7]),
            &one,
            XDP_DROP,
        ),
        ("SYN, a million blocked, not it", frame(4, 0x02, 443, false, Bind::Server)?, &million, XDP_DROP),
        (
            "SYN, a million blocked, it is",
            from(frame(4, 0x02, 443, false, Bind::Server)?, &lists::host(MILLION / 3).octets()),
            &million,
            XDP_DROP,
        ),
        (
            "SYN, a million of mixed lengths, not it",
            frame(4, 0x02, 443, false, Bind::Server)?,
            &mixed,
            XDP_DROP,
        ),
        (
            "SYN, a million in one IPv6 /64, it is",
            from(frame(6, 0x02, 443, false, Bind::Server)?, &lists::in_cluster(MILLION / 3).octets()),
            &clustered,
            XDP_DROP,
        ),
        (
            "SYN, refused, its source is counted",
            frame(4, 0x02, 443, false, Bind::Server)?,
            &counted,
            XDP_DROP,
        ),
        (
            "SYN, its source is blocked automatically",
            frame(4, 0x02, 443, false, Bind::Server)?,
            &auto_blocked,
            XDP_DROP,
        ),
        (
            "SYN keyed, its source is blocked so",
            frame(4, 0x02, 443, true, Bind::Server)?,
            &auto_blocked,
            XDP_PASS,
        ),
        ("SYN, refused, with alerts", frame(4, 0x02, 443, false, Bind::Server)?, &alerting, XDP_DROP),
    ] {
        compare(name, &frame, base, (program, action), (REPEAT, ROUNDS))?;
    }
    // The second run would not find the token any more.
    println!("one run at a time, of which the quickest counts");
    let scrub = load(&format!("{ONE_MODE}scrub = true\n"))?;
    let edge = load("[[rule]]\nname = 'edge'\ndst = ['192.0.2.2', '2001:db8::2']\nmode = 'scrub'\n")?;
    for (name, family, program) in [
        ("SYN keyed by server, accepted, IPv4", 4, &plain),
        ("SYN keyed by server, scrubbed, IPv4", 4, &scrub),
        ("SYN keyed by server, scrubbed, IPv6", 6, &scrub),
        ("SYN in mode scrub, IPv4", 4, &edge),
    ] {
        let frame = frame(family, 0x02, 443, true, Bind::Server)?;
        compare(name, &frame, base, (program, XDP_PASS), (1, SINGLE_ROUNDS))?;
    }
    println!("one run at a time, each from another source: the median, and behind it what the quickest adds");
    for (name, family, program) in [
        ("SYN without token, refused, IPv4", 4, &plain),
        ("SYN, one source blocked, IPv4", 4, &one),
        ("SYN, a million blocked, IPv4", 4, &million),
        ("SYN, a million of mixed lengths, IPv4", 4, &mixed),
        ("SYN, a million in one /64, IPv6", 6, &clustered),
    ] {
        let plain_frame = frame(family, 0x02, 443, false, Bind::Server)?;
        let frame_at = |at| match family {
            4 => Ok(from(plain_frame.clone(), &lists::host(MILLION + at).octets())),
            _ => Ok(from(plain_frame.clone(), &lists::in_cluster(MILLION + at).octets())),
        };
        compare_spread(name, &frame_at, base, (program, XDP_DROP), SPREAD_RUNS)?;
    }
    println!("the same, each with a token that was never seen before");
    for (name, family, bind, program) in [
        ("SYN keyed by server, each another, IPv4", 4, Bind::Server, &plain),
        ("SYN keyed by server, each another, IPv6", 6, Bind::Server, &plain),
        ("SYN keyed by isn, each another, IPv4", 4, Bind::Isn, &all_modes),
    ] {
        let frame_at = |at| frame_of(at as u32, family, 0x02, 443, Some((bind, slot_now()?)));
        compare_spread(name, &frame_at, base, (program, XDP_PASS), KEYED_RUNS)?;
    }
    Ok(())
}

/// Whether a row was asked for: all are, if none is.
fn is_wanted(name: &str) -> bool {
    let mut parts = std::env::args().skip(1).filter(|arg| !arg.starts_with("--")).peekable();
    parts.peek().is_none() || parts.any(|part| name.contains(&part))
}

/// Prints what the guard adds to a program that only drops, if that is asked for.
fn compare(
    name: &str,
    frame: &[u8],
    base: i32,
    (program, action): (&GuardProgram, u32),
    (repeat, rounds): (i32, usize),
) -> Result<()> {
    if !is_wanted(name) {
        return Ok(());
    }
    let blocked = || Ok::<_, anyhow::Error>(GuardCounters::read(&program.maps)?.of(Verdict::GUARD_BLOCKED));
    let before = blocked()?;
    let (mut drops, mut ours) = (u32::MAX, u32::MAX);
    for _ in 0..rounds {
        drops = drops.min(run(base, frame, XDP_DROP, repeat)?);
        ours = ours.min(run(program.as_fd().as_raw_fd(), frame, action, repeat).context(name.to_string())?);
    }
    ensure!((blocked()? > before) == name.ends_with(", it is"), "{name}: that is not true of its source");
    println!("{name:<42} {drops:>6} ns {ours:>6} ns {:>6} ns", i64::from(ours) - i64::from(drops));
    Ok(())
}

/// The same with another frame in every run, one run at a time: so what each asks for is not in the caches. Prints the
/// median, and the quickest, which found it there.
fn compare_spread(
    name: &str,
    frame_at: &dyn Fn(usize) -> Result<Vec<u8>>,
    base: i32,
    (program, action): (&GuardProgram, u32),
    runs: usize,
) -> Result<()> {
    if !is_wanted(name) {
        return Ok(());
    }
    let sorted = |fd, action| -> Result<Vec<u32>> {
        let mut all = (0..runs).map(|at| run(fd, &frame_at(at)?, action, 1)).collect::<Result<Vec<u32>>>()?;
        all.sort_unstable();
        Ok(all)
    };
    let (drops, ours) = (sorted(base, XDP_DROP)?, sorted(program.as_fd().as_raw_fd(), action)?);
    let median = |all: &[u32]| i64::from(all[runs / 2]);
    println!(
        "{name:<42} {:>6} ns {:>6} ns {:>6} ns {:>6} ns",
        median(&drops),
        median(&ours),
        median(&ours) - median(&drops),
        i64::from(ours[0]) - i64::from(drops[0])
    );
    Ok(())
}

/// Other options of the same length: NOPs first.
fn odd(mut frame: Vec<u8>) -> Vec<u8> {
    frame[54..74].copy_from_slice(&[1, 1, 2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 1]);
    frame
}

/// With another source, of the family that it has.
fn from(mut frame: Vec<u8>, src: &[u8]) -> Vec<u8> {
    let at = if src.len() == 4 { 26 } else { 22 };
    frame[at..at + src.len()].copy_from_slice(src);
    frame
}

fn load(rules: &str) -> Result<GuardProgram> {
    let program = GuardProgram::load(Settings { kind: Kind::Xdp, ..Settings::default() }, None)?;
    program.maps.keys.load(&[Key::new(
        "edge".parse()?,
        3,
        Secret::from_bytes(&SECRET),
        SystemTime::now(),
    )?])?;
    clock::publish(&program.maps.clock, Some(slots()?))?;
    let rules = Rules::from_toml(rules, Path::new("/"))?;
    let start = Instant::now();
    program.maps.set_rules(&rules)?;
    if rules.blocked.len() > 1 {
        println!(
            "a list of {} sources is put into use in {:.2} s",
            rules.blocked.len(),
            start.elapsed().as_secs_f64()
        );
    }
    Ok(program)
}

fn load_base(dir: &Path) -> Result<Object> {
    let object = dir.join("only_drops.bpf.o");
    SkeletonBuilder::new()
        .source(Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/only_drops.bpf.c"))
        .obj(&object)
        .build()
        .context("compiling benches/only_drops.bpf.c")?;
    ObjectBuilder::default().open_file(&object)?.load().context("loading the bench program")
}

/// Nanoseconds for each run.
fn run(fd: i32, frame: &[u8], action: u32, repeat: i32) -> Result<u32> {
    let mut options = libbpf_sys::bpf_test_run_opts {
        sz: size_of::<libbpf_sys::bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        repeat,
        ..Default::default()
    };
    // SAFETY: the buffer outlives the call, and its size is given.
    let error = unsafe { libbpf_sys::bpf_prog_test_run_opts(fd, &mut options) };
    if error != 0 || options.retval != action {
        bail!("BPF_PROG_TEST_RUN: error {error}, the program returned {}, not {action}", options.retval);
    }
    // Whole nanoseconds; but from outside one would see milliseconds more, in which the kernel prepares a run at XDP.
    Ok(options.duration)
}

/// Long ones: the tokens are made before the measuring.
fn slots() -> Result<Slots> {
    Slots::new(3600, 1, 1)
}

/// One ahead, so that it is still accepted when the measuring is over.
fn slot_now() -> Result<u32> {
    Ok(slots()?.at(clock::now()) + 1)
}

/// Makes slots so long that the end of what is remembered overflows, and so is long over: every token is one that was
/// never seen before, however often it comes. It is slot 0.
fn forget_at_once(program: &GuardProgram) -> Result<()> {
    let mut now = clock::published(&program.maps.clock)?;
    now.slot_ns = (u64::MAX - u64::from(u32::MAX)) / 3;
    clock::write(&program.maps.clock, &now)
}

/// A frame with right lengths, with the options that Linux sends and, if it is asked for, a token that is right now.
fn frame(family: u8, flags: u8, dport: u16, token: bool, bind: Bind) -> Result<Vec<u8>> {
    frame_of(0x0102_0304, family, flags, dport, if token { Some((bind, slot_now()?)) } else { None })
}

fn frame_of(isn: u32, family: u8, flags: u8, dport: u16, token: Option<(Bind, u32)>) -> Result<Vec<u8>> {
    let ends: [std::net::IpAddr; 2] = match family {
        4 => ["192.0.2.1".parse()?, "192.0.2.2".parse()?],
        _ => ["2001:db8::1".parse()?, "2001:db8::2".parse()?],
    };
    let mut options = vec![2, 4, 5, 180, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7];
    if let Some((bind, slot)) = token {
        let flow = Flow::new((ends[0], 40_000).into(), (ends[1], dport).into(), isn)?;
        options.extend([253, 12, 0x4e, 0x54]);
        options.extend(make(&Secret::from_bytes(&SECRET), Stamp { tag: 17, key_id: 3, bind, slot }, &flow).0);
    }
    let mut segment = 40_000u16.to_be_bytes().to_vec();
    segment.extend(dport.to_be_bytes());
    segment.extend(isn.to_be_bytes());
    segment.extend([0, 0, 0, 0, (((20 + options.len()) / 4) << 4) as u8, flags, 0xfa, 0xf0, 0, 0, 0, 0]);
    segment.extend(options);

    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
    let len = segment.len() as u16;
    match (ends[0], ends[1]) {
        (std::net::IpAddr::V4(src), std::net::IpAddr::V4(dst)) => {
            frame.extend([8, 0, 0x45, 0]);
            frame.extend((20 + len).to_be_bytes());
            frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        (std::net::IpAddr::V6(src), std::net::IpAddr::V6(dst)) => {
            frame.extend([0x86, 0xdd, 0x60, 0, 0, 0]);
            frame.extend(len.to_be_bytes());
            frame.extend([6, 64]);
            frame.extend(src.octets());
            frame.extend(dst.octets());
        }
        _ => bail!("both ends are of one family"),
    }
    frame.extend(segment);
    Ok(frame)
}
