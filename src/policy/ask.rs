//! Asks the kernel's own lookup which rule decides over a SYN that was never sent: a program beside the classifier
//! takes the facts from the packet that BPF_PROG_TEST_RUN gives it, and calls the same function.

use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;

use anyhow::{Context, Result, bail};
use libbpf_sys::bpf_test_run_opts;
use plain::Plain;

use crate::program::Program;
use crate::types::{Facts, Question, Rule};

// SAFETY: integers and arrays of them, without hidden padding, which types.h asserts.
unsafe impl Plain for Question {}

/// What is known of a SYN.
#[derive(Clone, Debug)]
pub struct Syn {
    /// Source address.
    pub src: IpAddr,
    /// Destination address, of the same family.
    pub dst: IpAddr,
    /// Source port.
    pub src_port: u16,
    /// Destination port.
    pub port: u16,
    /// Mark of the skb.
    pub mark: u32,
    /// Network namespace and index of the interface.
    pub interface: (u32, u32),
    /// Who sends it; nothing if it is forwarded.
    pub sender: Option<Sender>,
}

/// The socket that sends a SYN.
#[derive(Clone, Debug, Default)]
pub struct Sender {
    /// Its owner.
    pub uid: u32,
    /// Its cgroup and all above it: the root comes first. Empty if there is no cgroup2.
    pub cgroups: Vec<u64>,
}

/// What the kernel answers.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The rule or default that decides; nothing if none does.
    pub rule: Option<Rule>,
    /// Number of the policy's generation.
    pub generation: u64,
    /// How often a hash table was asked.
    pub shapes_looked_up: u32,
    /// CLOCK_MONOTONIC and jiffies of the same moment.
    pub now: (u64, u64),
}

/// The program that answers.
#[derive(Debug)]
pub struct Ask {
    /// It, and the maps that it looks into.
    pub program: Program,
}

impl Ask {
    /// Loads it over the maps of an instance, or over maps of its own.
    ///
    /// # Errors
    /// The kernel refused it.
    pub fn load(pins: Option<&Path>) -> Result<Ask> {
        Ok(Ask { program: Program::load_ask(pins)? })
    }

    /// Asks about one SYN.
    ///
    /// # Errors
    /// The addresses are not of one family, or the kernel refused to run the program.
    pub fn about(&self, syn: &Syn) -> Result<Answer> {
        let mut question = Question { facts: facts(syn)?, ..Default::default() };
        if let Some(sender) = &syn.sender {
            for (to, id) in question.cgroup_ids.iter_mut().zip(&sender.cgroups) {
                *to = *id;
            }
        }
        self.run(&mut question)?;
        Ok(Answer {
            rule: (question.found != 0).then_some(question.rule),
            generation: question.generation,
            shapes_looked_up: question.shapes_looked_up,
            now: (question.now_ns, question.now_jiffies),
        })
    }

    fn run(&self, question: &mut Question) -> Result<()> {
        // SAFETY: plain data without hidden padding.
        let bytes = unsafe { plain::as_bytes(question) };
        let mut out = [0u8; size_of::<Question>()];
        let mut opts = bpf_test_run_opts {
            sz: size_of::<bpf_test_run_opts>() as libbpf_sys::size_t,
            data_in: bytes.as_ptr().cast(),
            data_size_in: bytes.len() as u32,
            data_out: out.as_mut_ptr().cast(),
            data_size_out: out.len() as u32,
            repeat: 1,
            ..Default::default()
        };
        // SAFETY: `opts` is a whole structure whose size says so; both buffers outlive the call, and their sizes stand
        // beside them.
        let result =
            unsafe { libbpf_sys::bpf_prog_test_run_opts(self.program.as_fd().as_raw_fd(), &mut opts) };
        if result != 0 {
            return Err(std::io::Error::from_raw_os_error(-result)).context("asking the kernel about a SYN");
        }
        if opts.retval != u32::MAX || question.copy_from_bytes(&out).is_err() {
            bail!("asking the kernel about a SYN: it gave no answer ({})", opts.retval as i32);
        }
        Ok(())
    }
}

fn facts(syn: &Syn) -> Result<Facts> {
    let family = match (syn.src, syn.dst) {
        (IpAddr::V4(_), IpAddr::V4(_)) => 4,
        (IpAddr::V6(_), IpAddr::V6(_)) => 6,
        _ => bail!("{} and {} are not addresses of one family", syn.src, syn.dst),
    };
    let octets = |addr: IpAddr| match addr {
        IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
        IpAddr::V6(addr) => addr.octets(),
    };
    Ok(Facts {
        daddr: octets(syn.dst),
        saddr: octets(syn.src),
        dport_be: syn.port.to_be(),
        sport_be: syn.src_port.to_be(),
        mark: syn.mark,
        netns_ino: syn.interface.0,
        ifindex: syn.interface.1,
        uid: syn.sender.as_ref().map_or(0, |sender| sender.uid),
        has_sender: syn.sender.is_some().into(),
        family,
        ..Default::default()
    })
}
