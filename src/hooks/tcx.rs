//! tcx (Linux 6.6): a list of programs on either side of an interface, in front of the clsact qdisc and all its filters.
//! What one of them passes on, drops or redirects does not get to those behind it; what it leaves open does. `tc filter
//! show` does not list them.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_sys::{
    BPF_F_AFTER, BPF_F_BEFORE, BPF_F_ID, BPF_F_REPLACE, BPF_TCX_EGRESS, BPF_TCX_INGRESS,
    bpf_prog_attach_opts, bpf_prog_attach_opts__bindgen_ty_1, bpf_prog_query_opts,
    bpf_prog_query_opts__bindgen_ty_1,
};

use super::loaded::{Loaded, Programs, Role, keep};
use super::netlink::{Link, Netlink, Side};
use crate::kernel::Kernel;
use crate::netns::Netns;
use crate::state::Lock;

/// bpf_mprog_max() of include/linux/bpf_mprog.h.
const PROGRAMS_MAX: usize = 63;

/// A stamp of ours.
#[derive(Clone, Debug)]
pub struct AttachedTcx {
    /// Id of its program.
    pub program: u32,
    /// What is known of its program.
    pub loaded: Loaded,
    /// Programs of others that see a packet first and may end its way.
    pub before: usize,
    /// Whatever runs directly before it, by its id.
    behind: Option<u32>,
}

/// A stamp of ours that was taken away and can be put back where it was.
#[derive(Debug)]
pub struct TakenTcx {
    program: OwnedFd,
    behind: Option<u32>,
}

/// An attach that has happened and can be taken back.
#[derive(Debug)]
pub struct TcxAttachment {
    /// In whose place it is.
    previous: Option<OwnedFd>,
    /// What else of ours was there.
    others: Vec<TakenTcx>,
    /// Programs of others that see a packet first and may end its way.
    pub before: usize,
}

impl TcxAttachment {
    /// It took the place of one of ours.
    pub fn replaced(&self) -> bool {
        self.previous.is_some()
    }
}

/// Ids of the programs on one side of an interface in the network namespace of the calling thread, in the order in which
/// they run. None on a kernel without tcx.
///
/// # Errors
/// The kernel refused to say.
pub fn ids(ifindex: u32, side: Side) -> Result<Vec<u32>> {
    let place = match side {
        Side::Ingress => BPF_TCX_INGRESS,
        Side::Egress => BPF_TCX_EGRESS,
    };
    let mut ids = vec![0u32; PROGRAMS_MAX];
    let mut opts = bpf_prog_query_opts {
        sz: size_of::<bpf_prog_query_opts>() as libbpf_sys::size_t,
        prog_ids: ids.as_mut_ptr(),
        __bindgen_anon_1: bpf_prog_query_opts__bindgen_ty_1 { count: PROGRAMS_MAX as u32 },
        ..Default::default()
    };
    // SAFETY: `opts` is a whole structure whose size says so, and has room for as many ids as it says.
    let result = unsafe { libbpf_sys::bpf_prog_query_opts(ifindex.cast_signed(), place, &mut opts) };
    match -result {
        0 => {
            // SAFETY: both fields of the union are the same number.
            ids.truncate(unsafe { opts.__bindgen_anon_1.count } as usize);
            Ok(ids)
        }
        // Nobody knows the place before 6.6; what has just gone has no programs.
        libc::EINVAL | libc::ENODEV => Ok(Vec::new()),
        libc::EPERM => bail!(
            "asking for the tcx programs of interface {ifindex}: permission denied; it needs CAP_NET_ADMIN and CAP_SYS_ADMIN \
             outside of any user namespace (try sudo)"
        ),
        error => Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("asking for the tcx programs of interface {ifindex}")),
    }
}

/// Our stamps on the way out of an interface, in the order in which they run.
///
/// # Errors
/// The kernel refused to say.
pub fn attached_tcx(ifindex: u32, programs: &Programs) -> Result<Vec<AttachedTcx>> {
    let (mut found, mut before, mut behind) = (Vec::new(), 0, None);
    for program in ids(ifindex, Side::Egress)? {
        match programs.get(program).filter(|loaded| loaded.role == Role::Stamp) {
            Some(loaded) => found.push(AttachedTcx { program, loaded: loaded.clone(), before, behind }),
            None => before += 1,
        }
        behind = Some(program);
    }
    Ok(found)
}

/// Where a program is on the way out, in whatever network namespace can be found: it moves there with its interface.
pub fn whereabouts(program: u32) -> Option<(Netns, Link)> {
    Netns::everywhere().into_iter().find_map(|netns| {
        // One that is gone a moment later holds nothing of ours any more.
        let link = netns.run(|| link_with(program)).ok().flatten()?;
        Some((netns, link))
    })
}

/// The same in this network namespace.
fn link_with(program: u32) -> Result<Option<Link>> {
    for link in Netlink::connect()?.links()? {
        if ids(link.index, Side::Egress)?.contains(&program) {
            return Ok(Some(link));
        }
    }
    Ok(None)
}

/// How many programs of others are on one side.
///
/// # Errors
/// The kernel refused to say.
pub fn foreign(ifindex: u32, side: Side, programs: &Programs) -> Result<usize> {
    Ok(ids(ifindex, side)?.iter().filter(|id| programs.get(**id).is_none()).count())
}

/// What a person is told of programs of others; nothing if there are none. `remedy` is what puts ours in front.
pub fn remark(count: usize, risk: &str, remedy: &str) -> Option<String> {
    let run = match count {
        0 => return None,
        1 => "a tcx program runs".to_string(),
        count => format!("{count} tcx programs run"),
    };
    Some(format!(
        "{run} {risk}; bpftool net shows what is there if it knows tcx (from 7.3 on), and {remedy} puts ours in front"
    ))
}

/// Attaches `program` in the place of the first of `ours`, or else in front of everybody's.
///
/// # Errors
/// The kernel refused; then everything is as it was.
pub fn attach_tcx(
    lock: &Lock,
    link: &Link,
    program: BorrowedFd<'_>,
    ours: &[AttachedTcx],
) -> Result<TcxAttachment> {
    let previous = ours.first().map_or(Ok(None), |first| keep(first.program))?;
    // Of one instance there is one; those whose instance is gone may be more. They go first, as one that cannot go is there
    // before anything has changed; the first stays until the new one is in its place.
    let others = take_tcx(lock, link, ours.get(1..).unwrap_or_default())?;
    let place = previous.as_ref().map_or(Put::First, |fd| Put::InPlaceOf(fd.as_fd()));
    if let Err(error) = put(link, program, place) {
        put_back_tcx(link, &others)?;
        return Err(explain(link, error));
    }
    Ok(TcxAttachment { previous, others, before: ours.first().map_or(0, |ours| ours.before) })
}

/// Puts back what was there before an attach.
///
/// # Errors
/// The kernel refused.
pub fn undo_tcx(lock: &Lock, link: &Link, program: BorrowedFd<'_>, attachment: &TcxAttachment) -> Result<()> {
    match &attachment.previous {
        Some(previous) => put(link, previous.as_fd(), Put::InPlaceOf(program))
            .with_context(|| format!("putting back our program at tcx of {}", link.name))?,
        None => remove(lock, link, program)?,
    }
    put_back_tcx(link, &attachment.others)
}

/// Removes ours, and returns them, so that they can be put back.
///
/// # Errors
/// The kernel refused; then those that were removed are back.
pub fn take_tcx(lock: &Lock, link: &Link, ours: &[AttachedTcx]) -> Result<Vec<TakenTcx>> {
    let mut held = Vec::new();
    for ours in ours {
        held.extend(keep(ours.program)?.map(|program| TakenTcx { program, behind: ours.behind }));
    }
    for (at, taken) in held.iter().enumerate() {
        if let Err(error) = remove(lock, link, taken.program.as_fd()) {
            put_back_tcx(link, &held[..at])?;
            return Err(error);
        }
    }
    Ok(held)
}

/// Puts ours back where they were, in their order; in front of everybody's where what was before them is gone.
///
/// # Errors
/// The kernel refused.
pub fn put_back_tcx(link: &Link, taken: &[TakenTcx]) -> Result<()> {
    taken.iter().try_for_each(|taken| {
        let program = taken.program.as_fd();
        let place = taken.behind.map_or(Put::First, Put::Behind);
        match put(link, program, place) {
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => put(link, program, Put::First),
            other => other,
        }
        .with_context(|| format!("putting back our program at tcx of {}", link.name))
    })
}

/// Where a program goes in the list.
#[derive(Clone, Copy)]
enum Put<'a> {
    /// In front of all.
    First,
    InPlaceOf(BorrowedFd<'a>),
    /// Directly behind the one of this id.
    Behind(u32),
}

fn put(link: &Link, program: BorrowedFd<'_>, place: Put<'_>) -> Result<(), io::Error> {
    let (flags, replace_fd, relative_id) = match place {
        Put::First => (BPF_F_BEFORE, 0, 0),
        Put::InPlaceOf(other) => (BPF_F_REPLACE, other.as_raw_fd(), 0),
        Put::Behind(id) => (BPF_F_AFTER | BPF_F_ID, 0, id),
    };
    let opts = bpf_prog_attach_opts {
        sz: size_of::<bpf_prog_attach_opts>() as libbpf_sys::size_t,
        flags,
        __bindgen_anon_1: bpf_prog_attach_opts__bindgen_ty_1 { replace_fd },
        relative_id,
        ..Default::default()
    };
    // SAFETY: `opts` is a whole structure whose size says so, and the descriptors are open.
    let result = unsafe {
        libbpf_sys::bpf_prog_attach_opts(program.as_raw_fd(), link.index.cast_signed(), BPF_TCX_EGRESS, &opts)
    };
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-result)) }
}

fn remove(_lock: &Lock, link: &Link, program: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the descriptor is open, and a null pointer is no options.
    let result = unsafe {
        libbpf_sys::bpf_prog_detach_opts(
            program.as_raw_fd(),
            link.index.cast_signed(),
            BPF_TCX_EGRESS,
            std::ptr::null(),
        )
    };
    match -result {
        // What has just gone, alone or with the interface, is removed.
        0 | libc::ENOENT | libc::ENODEV => Ok(()),
        error => Err(io::Error::from_raw_os_error(error))
            .with_context(|| format!("removing our program at tcx of {}", link.name)),
    }
}

fn explain(link: &Link, error: io::Error) -> anyhow::Error {
    let what = format!("attaching to {} egress at tcx", link.name);
    let kernel = Kernel::probe();
    match error.raw_os_error() {
        Some(libc::EINVAL) if kernel.version() < Some((6, 6)) => {
            anyhow!("{what}: tcx came with Linux 6.6, and this is {}; use --hook clsact", kernel.release)
        }
        Some(libc::ERANGE) => {
            anyhow!("{what}: {PROGRAMS_MAX} programs are there, and there is no room for more; use --hook clsact")
        }
        Some(libc::EPERM) => anyhow!(error).context(format!(
            "{what}; it needs CAP_NET_ADMIN (try sudo), and if it replaces one, that one must not be held by a BPF link"
        )),
        _ => anyhow!(error).context(what),
    }
}
