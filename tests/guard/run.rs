//! Runs the guard on one frame with BPF_PROG_TEST_RUN, and tells what it did: the return value, the bytes, and which
//! counter moved. What it should have done is in [`crate::oracle`].

use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use libbpf_sys::{bpf_prog_test_run_opts, bpf_test_run_opts};
use netoken::clock::{self, Source};
use netoken::guard::counters::{GuardCounters, VERDICTS, verdict_name};
use netoken::guard::program::{GuardMaps, GuardProgram, Kind, Settings};
use netoken::guard::rules::Rules;
use netoken::guard::types::Verdict;
use netoken::keys::{Key, Secret, rotate};
use netoken::token::Token;
use netoken::token::keyed::{Bind, Flow, Stamp, make};

use crate::packet::Packet;
use crate::support::Hex;

/// The slot that every case plays in. Slots of an hour: no case lasts so long.
pub const SLOT: u32 = 1000;
pub const SLOT_S: u32 = 3600;

/// What the guard did with one frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    pub dropped: bool,
    /// The counter that moved, if one did.
    pub verdict: Option<Verdict>,
    pub frame: Vec<u8>,
    pub mark: u32,
}

/// A loaded guard.
pub struct Bench {
    pub kind: Kind,
    pub program: GuardProgram,
    before: GuardCounters,
}

/// Keys 1 (ring edge), 2 (edge, retired) and 3 (ring other).
pub fn keys() -> Result<Vec<Key>> {
    let key = |ring: &str, id: u8| {
        Key::new(ring.parse()?, id, Secret::from_bytes(&[id.wrapping_mul(37); 16]), SystemTime::UNIX_EPOCH)
    };
    let mut keys = vec![key("edge", 1)?, key("edge", 2)?, key("other", 3)?];
    rotate::sign(&mut keys, "edge".parse()?)?;
    keys[1].retire();
    Ok(keys)
}

/// A token as a peer would make it. The retired key's secret is gone, so that any will do.
pub fn keyed(packet: &Packet, key_id: u8, tag: u16, bind: Bind, slot: u32) -> Result<Token> {
    let secret = Secret::from_bytes(&[key_id.wrapping_mul(37); 16]);
    Ok(make(&secret, Stamp { tag, key_id, bind, slot }, &flow(packet)?))
}

fn flow(packet: &Packet) -> Result<Flow> {
    Flow::new((packet.src, packet.sport).into(), (packet.dst, packet.dport).into(), packet.isn)
}

/// Makes it the middle of slot [`SLOT`], which is that long.
pub fn set_clock(maps: &GuardMaps, slot_s: u32) -> Result<()> {
    set_clock_to(maps, slot_s, SLOT)
}

/// Makes it the middle of a slot, of which one before and one behind are accepted as well.
pub fn set_clock_to(maps: &GuardMaps, slot_s: u32, slot: u32) -> Result<()> {
    let mut now = netoken::types::Clock { slot_ns: u64::from(slot_s) * 1_000_000_000, ..Default::default() };
    let wanted = Duration::from_millis((u64::from(slot) * 1000 + 500) * u64::from(slot_s));
    let offset = |source| {
        Ok::<_, anyhow::Error>(
            wanted.as_nanos() as i64 - clock::as_seen(&Default::default(), source)?.as_nanos() as i64,
        )
    };
    (now.tai_offset_ns, now.boot_offset_ns) = (offset(Source::Tai)?, offset(Source::Boottime)?);
    (now.slots_behind, now.slots_ahead) = (1, 1);
    clock::write(&maps.clock, &now)
}

impl Bench {
    /// With keys and a clock, and these rules.
    pub fn new(kind: Kind, rules: &str) -> Result<Bench> {
        Bench::with(Settings { kind, ..Settings::default() }, rules)
    }

    pub fn with(settings: Settings, rules: &str) -> Result<Bench> {
        let (kind, program) = (settings.kind, GuardProgram::load(settings, None)?);
        program.maps.keys.load(&keys()?)?;
        set_clock(&program.maps, SLOT_S)?;
        let before = GuardCounters::read(&program.maps)?;
        let bench = Bench { kind, program, before };
        if !rules.is_empty() {
            bench.set_rules(rules)?;
        }
        Ok(bench)
    }

    pub fn set_rules(&self, rules: &str) -> Result<()> {
        self.program.maps.set_rules(&Rules::from_toml(rules, Path::new("."))?)
    }

    /// Runs a frame; at most one counter moved, by one.
    pub fn run(&mut self, frame: &[u8]) -> Result<Outcome> {
        let (dropped, out, mark) = self.run_uncounted(frame)?;
        let now = GuardCounters::read(&self.program.maps)?;
        let moved: Vec<Verdict> = VERDICTS
            .iter()
            .map(|(number, _)| Verdict(*number))
            .filter(|verdict| now.of(*verdict) != self.before.of(*verdict))
            .collect();
        ensure!(
            now.total() - self.before.total() == moved.len() as u64 && moved.len() <= 1,
            "{moved:?} moved"
        );
        ensure!(
            now.dropped() - self.before.dropped() == u64::from(dropped),
            "{dropped} is not what was counted"
        );
        self.before = now;
        Ok(Outcome { dropped, verdict: moved.first().copied(), frame: out, mark })
    }

    /// Whether the frame was dropped, its bytes, and the mark of its skb, which began as 0xf0.
    pub fn run_uncounted(&self, frame: &[u8]) -> Result<(bool, Vec<u8>, u32)> {
        /// The word of `struct __sk_buff` that holds the mark.
        const CTX_MARK: usize = 2;
        let mut ctx = [0u32; 48];
        ctx[CTX_MARK] = 0xf0;
        let mut out = vec![0u8; frame.len() + 64];
        let mut opts = bpf_test_run_opts {
            sz: size_of::<bpf_test_run_opts>() as libbpf_sys::size_t,
            data_in: frame.as_ptr().cast(),
            data_size_in: frame.len() as u32,
            data_out: out.as_mut_ptr().cast(),
            data_size_out: out.len() as u32,
            repeat: 1,
            ..Default::default()
        };
        if self.kind != Kind::Xdp {
            opts.ctx_in = ctx.as_ptr().cast();
            opts.ctx_size_in = size_of_val(&ctx) as u32;
            opts.ctx_out = ctx.as_mut_ptr().cast();
            opts.ctx_size_out = size_of_val(&ctx) as u32;
        }
        // SAFETY: `opts` is a whole structure whose size says so; the buffers outlive the call, and their sizes stand
        // beside them.
        let result = unsafe { bpf_prog_test_run_opts(self.program.as_fd().as_raw_fd(), &mut opts) };
        if result != 0 {
            return Err(std::io::Error::from_raw_os_error(-result))
                .with_context(|| format!("running {:?} in the kernel\n  in {}", self.kind, Hex(frame)));
        }
        out.truncate(opts.data_size_out as usize);
        let dropped = match (self.kind, opts.retval) {
            (Kind::Xdp, 2) | (Kind::Tc | Kind::TcLayer3, u32::MAX) => false,
            (Kind::Xdp, 1) | (Kind::Tc | Kind::TcLayer3, 2) => true,
            (kind, other) => bail!("{kind:?} returned {}\n  in {}", other as i32, Hex(frame)),
        };
        Ok((dropped, out, ctx[CTX_MARK]))
    }

    pub fn counters(&self) -> Result<GuardCounters> {
        GuardCounters::read(&self.program.maps)
    }
}

/// The name of a verdict, for people.
pub fn name(verdict: Option<Verdict>) -> &'static str {
    verdict.map_or("not a SYN", |verdict| verdict_name(verdict.0))
}

/// Does something that has to be done in less than that time. Nothing if it took longer: then it shows nothing.
pub fn within<T>(limit: Duration, act: impl FnOnce() -> Result<T>) -> Result<Option<T>> {
    let began = Instant::now();
    let done = act();
    if began.elapsed() < limit { done.map(Some) } else { Ok(None) }
}

/// Tries until the machine did not stand still meanwhile.
pub fn in_time(mut attempt: impl FnMut() -> Result<Option<()>>) -> Result<()> {
    for _ in 0..10 {
        if attempt()?.is_some() {
            return Ok(());
        }
    }
    bail!("this machine is too slow for what has to be done in time")
}
