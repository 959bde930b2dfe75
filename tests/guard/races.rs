//! One token on two CPUs at the same moment.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, ensure};
use libbpf_rs::query::{ProgInfoIter, ProgInfoQueryOptions};
use libbpf_rs::{MapCore, MapFlags, MapHandle};
use netoken::guard::program::Kind;
use netoken::guard::types::Verdict;
use netoken::token::keyed::Bind;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

use crate::packet::{LINUX, Packet, syn};
use crate::run::{Bench, SLOT, keyed, name};
use crate::support::share_of;
use crate::table::with;

const RULE: &str = "[[rule]]\nname = 'a'\ndst = ['0.0.0.0/0', '::/0']\nmode = 'drop'\nkeys = 'edge'\n";
pub const CPUS: usize = 2;
const ROUNDS: usize = 40_000;
/// At most so many SYNs in a million may be refused because another CPU had the bucket.
const BUSY_MAX: usize = 1000;

/// The first CPUs on which this process may run.
pub fn cpus() -> Result<Vec<usize>> {
    let allowed = sched_getaffinity(Pid::from_raw(0)).context("reading the CPUs")?;
    Ok((0..CpuSet::count()).filter(|cpu| allowed.is_set(*cpu) == Ok(true)).take(CPUS).collect())
}

pub fn stay_on(cpu: usize) -> Result<()> {
    let mut one = CpuSet::new();
    one.set(cpu).context("choosing a CPU")?;
    sched_setaffinity(Pid::from_raw(0), &one).context("staying on one CPU")
}

/// Waits until all have come here for the `round`th time. They leave it within a few nanoseconds of each other, which
/// nothing that sleeps would do; who has to wait long lets others run.
fn meet(arrived: &AtomicUsize, round: usize) {
    arrived.fetch_add(1, Ordering::AcqRel);
    let mut turns = 0u32;
    while arrived.load(Ordering::Acquire) < round * CPUS {
        turns += 1;
        if turns.is_multiple_of(10_000) { thread::yield_now() } else { std::hint::spin_loop() }
    }
}

/// Runs the frames of each CPU, one by one and at the same moment on all. Says which passed.
fn run_at_once(bench: &Bench, frames: &[Vec<Vec<u8>>]) -> Result<Vec<Vec<bool>>> {
    let arrived = AtomicUsize::new(0);
    let run = |cpu: usize, frames: &[Vec<u8>]| {
        // Who fails still comes to the meetings, or the others would wait for ever.
        let stays = stay_on(cpu);
        let run = |(round, frame): (usize, &Vec<u8>)| {
            meet(&arrived, round + 1);
            bench.run_uncounted(frame).map(|(dropped, _, _)| !dropped)
        };
        let passed: Vec<Result<bool>> = frames.iter().enumerate().map(run).collect();
        stays.and_then(|()| passed.into_iter().collect())
    };
    let cpus = cpus()?;
    thread::scope(|scope| {
        let threads: Vec<_> =
            cpus.iter().zip(frames).map(|(cpu, frames)| scope.spawn(|| run(*cpu, frames))).collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

/// In every second round both CPUs get the same SYN, else the same token from another port each.
pub fn two_cpus_never_accept_one_token_for_two_flows() -> Result<()> {
    let rounds = share_of(ROUNDS)?;
    let mut frames = vec![Vec::new(); CPUS];
    for round in 0..rounds {
        let packet = Packet { isn: round as u32, ..syn() };
        let first = with(&packet, LINUX, &[keyed(&packet, 1, 17, Bind::Server, SLOT)?.0]);
        for (cpu, frames) in frames.iter_mut().enumerate() {
            let sport = first.sport + if round % 2 == 0 { 0 } else { cpu as u16 };
            frames.push(Packet { sport, ..first.clone() }.build());
        }
    }
    let bench = Bench::new(Kind::Tc, RULE)?;
    let passed = run_at_once(&bench, &frames)?;

    let (mut refused, mut replayed) = (0, 0);
    for round in 0..rounds {
        let accepted = passed.iter().filter(|passed| passed[round]).count();
        let right = if round % 2 == 0 { CPUS } else { 1 };
        refused += right.saturating_sub(accepted);
        replayed += accepted.saturating_sub(right);
    }
    ensure!(replayed == 0, "{replayed} of {rounds} tokens were accepted for two flows");
    let counters = bench.counters()?;
    let busy = counters.of(Verdict::GUARD_SEEN_FULL) as usize;
    println!("{refused} of {rounds} tokens were refused, {busy} SYNs because of another CPU");
    ensure!(refused <= busy, "{refused} were refused, but only {busy} for that: {}", counters.line());
    ensure!(busy * 1_000_000 <= BUSY_MAX * rounds * CPUS, "{busy} of {} SYNs found no way", rounds * CPUS);
    Ok(())
}

fn map_of(bench: &Bench, name: &str) -> Result<MapHandle> {
    let of_fd = format!("/proc/self/fdinfo/{}", bench.program.as_fd().as_raw_fd());
    let text = std::fs::read_to_string(&of_fd).with_context(|| of_fd.clone())?;
    let id = text.lines().find_map(|line| line.strip_prefix("prog_id:")).context("no id of the program")?;
    let id: u32 = id.trim().parse()?;
    let mut programs = ProgInfoIter::with_query_opts(ProgInfoQueryOptions::default().include_map_ids(true));
    let program = programs.find(|program| program.id == id).context("the program is not listed")?;
    let mut maps = program.map_ids.iter().filter_map(|id| MapHandle::from_map_id(*id).ok());
    maps.find(|map| map.name() == name).with_context(|| format!("the program has no map '{name}'"))
}

/// Whether a bucket is locked by counting, as guard_bucket.h says, and not by bpf_spin_lock(), which nobody can hold from
/// outside.
pub fn is_lock_a_count() -> bool {
    let is_portable = option_env!("BPF_CFLAGS").is_some_and(|flags| flags.contains("BUCKET_LOCK_PORTABLE"));
    cfg!(target_arch = "x86_64") && !is_portable
}

/// What user space writes into the lock of a bucket is there a CPU that has it for ever. Who has to write is refused in
/// the end, and takes back what he had added. Who only has to look does not ask for the lock.
pub fn a_bucket_that_is_never_free_takes_no_new_token() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let mut bench = Bench::new(kind, RULE)?;
        let tokens = map_of(&bench, "guard_accepted")?;
        let token = keyed(&syn(), 1, 17, Bind::Server, SLOT)?;
        let first = with(&syn(), LINUX, &[token.0]);
        let copy = Packet { sport: first.sport + 1, ..first.clone() };
        // The first two bytes of the MAC.
        let at = u32::from(u16::from_le_bytes([token.0[3], token.0[4]])).to_ne_bytes();
        let bucket = || tokens.lookup(&at, MapFlags::ANY)?.context("no such bucket");
        let hold = |count: u32| -> Result<()> {
            let mut bytes = bucket()?;
            bytes[..4].copy_from_slice(&count.to_ne_bytes());
            Ok(tokens.update(&at, &bytes, MapFlags::ANY)?)
        };
        for (count, packet, verdict) in [
            (1, &first, "seen_full"),
            (7, &first, "seen_full"),
            (0, &first, "valid"),
            (1, &first, "valid"),
            (1, &copy, "replayed"),
            (0, &copy, "replayed"),
        ] {
            hold(count)?;
            let found = name(bench.run(&packet.build())?.verdict);
            ensure!(found == verdict, "{kind:?}, held {count} times: {verdict} expected, got {found}");
            ensure!(bucket()?[..4] == count.to_ne_bytes(), "{kind:?}: {count} is not there any more");
        }
    }
    Ok(())
}
