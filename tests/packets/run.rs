//! Runs the classifier on one frame with BPF_PROG_TEST_RUN, and tells what it did: the return value, the
//! bytes, and which counter moved. What it should have done is in [`crate::oracle`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context, Result, bail, ensure};
use libbpf_sys::{bpf_prog_test_run_opts, bpf_test_run_opts};
use netoken::counters::{Counters, VERDICTS};
use netoken::policy::Policy;
use netoken::program::{LinkHeader, Program, Settings};
use netoken::token::Token;
use netoken::types::Verdict;

use crate::oracle::{self, Path};
use crate::packet::TOKEN;
use crate::support::Hex;

/// TC_ACT_UNSPEC: the packet goes on as if no filter were there.
const PASS: u32 = u32::MAX;
/// TC_ACT_SHOT
const DROP: u32 = 2;

/// `struct __sk_buff` of `linux/bpf.h` in words, and the words that a test sets.
const CTX_WORDS: usize = 48;
const CTX_MARK: usize = 2;
const CTX_IFINDEX: usize = 10;
const CTX_DATA_END: usize = 20;
const CTX_GSO_SEGS: usize = 41;
const CTX_GSO_SIZE: usize = 44;

/// How the kernel is asked to run a frame.
#[derive(Clone, Copy, Debug, Default)]
pub struct How {
    pub gso_size: u32,
    /// Bytes in the linear part of the skb, the rest goes into fragments; 0 is all that fit.
    pub linear: u32,
    /// 0 is the loopback device.
    pub ifindex: u32,
    /// The skb comes with the sum of all its bytes; the kernel checks afterwards that it is still right.
    pub checksum_complete: bool,
    pub mark: u32,
}

/// What the classifier did with one frame.
#[derive(Debug)]
pub struct Outcome {
    pub dropped: bool,
    /// The counter that moved, if one did.
    pub verdict: Option<Verdict>,
    pub frame: Vec<u8>,
}

/// Classifiers for one test after the other: to load one takes longer than most tests do.
static LOADED: Mutex<Vec<(Settings, Arc<Program>)>> = Mutex::new(Vec::new());

/// A loaded classifier.
pub struct Bench {
    pub program: Arc<Program>,
    began: Counters,
    before: Counters,
    pub path: Path,
    /// The policy says that a SYN that cannot be stamped is dropped.
    pub drops_when_full: bool,
}

impl Bench {
    /// Stamps every SYN.
    pub fn new(link_header: LinkHeader) -> Result<Bench> {
        Bench::stamping(Settings { link_header, ..Settings::default() })
    }

    /// The same, with other settings.
    pub fn stamping(settings: Settings) -> Result<Bench> {
        let bench = Bench::shared(settings)?;
        bench.program.maps.set_policy(&Policy::stamp_all(Token(TOKEN)))?;
        Ok(bench)
    }

    /// Stamps every SYN, and drops those that cannot be.
    pub fn strict(settings: Settings) -> Result<Bench> {
        let mut bench = Bench::shared(settings)?;
        bench.set_policy(&format!(
            "default = {{ action = 'stamp', token = '{}', when_full = 'drop' }}",
            Token(TOKEN)
        ))?;
        bench.drops_when_full = true;
        Ok(bench)
    }

    /// Does what this policy says.
    pub fn under(policy: &str) -> Result<Bench> {
        let bench = Bench::shared(Settings::default())?;
        bench.set_policy(policy)?;
        Ok(bench)
    }

    /// Was never used, has no policy yet, and is for one test alone: for those that change more of it than the policy.
    pub fn load(settings: Settings) -> Result<Bench> {
        Bench::with(Arc::new(Program::load(settings, None)?), settings.link_header)
    }

    /// One that nobody uses now.
    fn shared(settings: Settings) -> Result<Bench> {
        let loaded = || LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        let is_free =
            |(its, program): &&(Settings, Arc<Program>)| *its == settings && Arc::strong_count(program) == 1;
        let free = loaded().iter().find(is_free).map(|(_, program)| program.clone());
        if let Some(program) = free {
            return Bench::with(program, settings.link_header);
        }
        let bench = Bench::load(settings)?;
        loaded().push((settings, bench.program.clone()));
        Ok(bench)
    }

    fn with(program: Arc<Program>, link_header: LinkHeader) -> Result<Bench> {
        let began = Counters::read(&program.maps)?;
        let link_len = if link_header == LinkHeader::Ethernet { 14 } else { 0 };
        let path = Path { link_len, mtu: 65536, gso: false };
        Ok(Bench { program, before: began.clone(), began, path, drops_when_full: false })
    }

    pub fn set_policy(&self, toml: &str) -> Result<()> {
        self.program.maps.set_policy(&Policy::from_toml(toml)?)
    }

    /// SYNs that this test has had counted so far.
    pub fn counted(&self) -> Result<u64> {
        Ok(Counters::read(&self.program.maps)?.total() - self.began.total())
    }

    /// Runs a frame; at most one counter moved, by one.
    pub fn run(&mut self, frame: &[u8], how: How) -> Result<Outcome> {
        let (action, out) = test_run(self.program.as_fd(), frame, how)?;
        let dropped = match action {
            PASS => false,
            DROP => true,
            other => bail!("the classifier returned {}\n  in {}", other as i32, Hex(frame)),
        };
        let now = Counters::read(&self.program.maps)?;
        let verdict = one_moved(&self.before, &now).with_context(|| format!("in {}", Hex(frame)))?;
        let drops = now.dropped() - self.before.dropped();
        self.before = now;
        ensure!(
            drops == u64::from(dropped),
            "dropped is {dropped}, but its counter moved by {drops}\n  in {}",
            Hex(frame)
        );
        Ok(Outcome { dropped, verdict, frame: out })
    }

    /// Runs a frame and lets the oracle judge; returns the verdict, if it was a SYN.
    pub fn judge(&mut self, what: &str, frame: &[u8]) -> Result<Option<Verdict>> {
        self.judge_how(what, frame, How::default())
    }

    /// The same, with an skb in another state.
    pub fn judge_how(&mut self, what: &str, frame: &[u8], how: How) -> Result<Option<Verdict>> {
        let outcome = self.run(frame, how).with_context(|| what.to_string())?;
        let path = Path { gso: how.gso_size != 0, ..self.path };
        let expected = oracle::judge(frame, &path);
        oracle::check(frame, &expected, &outcome, self.drops_when_full).with_context(|| {
            format!(
                "{what}\n  expected {}\n  got      {} {}\n  in  {}\n  out {}",
                expected.describe(),
                name(outcome.verdict),
                if outcome.dropped { "dropped" } else { "passed" },
                Hex(frame),
                Hex(&outcome.frame)
            )
        })?;
        Ok(outcome.verdict)
    }

    /// Runs a frame that must get this verdict; the oracle checks it as well.
    pub fn expect(&mut self, what: &str, frame: &[u8], verdict: Verdict) -> Result<()> {
        self.expect_how(what, frame, verdict, How::default())
    }

    /// The same, with an skb in another state.
    pub fn expect_how(&mut self, what: &str, frame: &[u8], verdict: Verdict, how: How) -> Result<()> {
        let got = self.judge_how(what, frame, how)?;
        ensure!(
            got == Some(verdict),
            "{what}: expected {}, got {}\n  in {}",
            name(Some(verdict)),
            name(got),
            Hex(frame)
        );
        Ok(())
    }

    /// Runs a frame that must get this verdict and come out as it came; the policy is the test's own.
    pub fn expect_untouched(
        &mut self,
        what: &str,
        frame: &[u8],
        verdict: Verdict,
        dropped: bool,
    ) -> Result<()> {
        self.expect_untouched_how(what, frame, verdict, dropped, How::default())
    }

    /// The same, with an skb in another state.
    pub fn expect_untouched_how(
        &mut self,
        what: &str,
        frame: &[u8],
        verdict: Verdict,
        dropped: bool,
        how: How,
    ) -> Result<()> {
        let outcome = self.run(frame, how).with_context(|| what.to_string())?;
        ensure!(
            outcome.verdict == Some(verdict) && outcome.dropped == dropped && outcome.frame == frame,
            "{what}: expected {} {dropped}, got {} {}\n  in  {}\n  out {}",
            name(Some(verdict)),
            name(outcome.verdict),
            outcome.dropped,
            Hex(frame),
            Hex(&outcome.frame)
        );
        Ok(())
    }
}

/// The name of a verdict, for people.
pub fn name(verdict: Option<Verdict>) -> &'static str {
    verdict.map_or("not a SYN", |verdict| netoken::counters::verdict_name(verdict.0))
}

fn one_moved(before: &Counters, now: &Counters) -> Result<Option<Verdict>> {
    let moved: Vec<(Verdict, u64)> = VERDICTS
        .iter()
        .map(|(number, _)| Verdict(*number))
        .map(|verdict| (verdict, now.of(verdict).wrapping_sub(before.of(verdict))))
        .filter(|(_, by)| *by != 0)
        .collect();
    match moved[..] {
        [] => Ok(None),
        [(verdict, 1)] => Ok(Some(verdict)),
        _ => bail!("more than one verdict for one packet: {moved:?}"),
    }
}

/// Runs a program on a frame; returns what it returned, and the frame that came out.
pub fn test_run(program: BorrowedFd<'_>, frame: &[u8], how: How) -> Result<(u32, Vec<u8>)> {
    let mut ctx = [0u32; CTX_WORDS];
    ctx[CTX_MARK] = how.mark;
    ctx[CTX_IFINDEX] = how.ifindex;
    ctx[CTX_DATA_END] = how.linear;
    ctx[CTX_GSO_SIZE] = how.gso_size;
    ctx[CTX_GSO_SEGS] = u32::from(how.gso_size != 0) * 2;

    let mut out = vec![0u8; frame.len() + 64];
    let mut opts = bpf_test_run_opts {
        sz: size_of::<bpf_test_run_opts>() as libbpf_sys::size_t,
        data_in: frame.as_ptr().cast(),
        data_size_in: frame.len() as u32,
        data_out: out.as_mut_ptr().cast(),
        data_size_out: out.len() as u32,
        ctx_in: ctx.as_ptr().cast(),
        ctx_size_in: size_of_val(&ctx) as u32,
        repeat: 1,
        flags: if how.checksum_complete { libbpf_sys::BPF_F_TEST_SKB_CHECKSUM_COMPLETE } else { 0 },
        ..Default::default()
    };
    // SAFETY: `opts` is a whole structure whose size says so; the three buffers outlive the call, and their
    // sizes stand beside them. The kernel reads two of them and writes at most `data_size_out` bytes of `out`.
    let result = unsafe { bpf_prog_test_run_opts(program.as_raw_fd(), &mut opts) };
    if result != 0 {
        return Err(std::io::Error::from_raw_os_error(-result)).with_context(|| {
            format!("running {} bytes in the kernel with {how:?}\n  in {}", frame.len(), Hex(frame))
        });
    }
    out.truncate(opts.data_size_out as usize);
    Ok((opts.retval, out))
}
