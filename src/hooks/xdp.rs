//! The XDP hook: attach, find, detach. An interface has one place for it, so that whoever is there is either ours or
//! stays, unless a person says otherwise.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_sys::{
    XDP_FLAGS_DRV_MODE, XDP_FLAGS_REPLACE, XDP_FLAGS_SKB_MODE, XDP_FLAGS_UPDATE_IF_NOEXIST,
    bpf_xdp_attach_opts,
};
use serde::Serialize;

use super::loaded::{Loaded, Programs, Role, keep, loaded_programs, program_name};
use super::netlink::{Link, Netlink, XdpPrograms};
use crate::netns::tool;
use crate::object::messages;
use crate::state::{Lock, State};

/// Who runs the program.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// The driver, before there is an skb.
    Native,
    /// The kernel, behind the driver: works everywhere, and costs more.
    Generic,
}

impl Mode {
    fn flag(self) -> u32 {
        match self {
            Mode::Native => XDP_FLAGS_DRV_MODE,
            Mode::Generic => XDP_FLAGS_SKB_MODE,
        }
    }
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Mode::Native => "native",
            Mode::Generic => "generic",
        })
    }
}

/// Our program on an interface.
#[derive(Clone, Debug)]
pub struct AttachedXdp {
    /// Who runs it.
    pub mode: Mode,
    /// Its id.
    pub program: u32,
    /// What is known of it.
    pub loaded: Loaded,
}

/// An attach that has happened and can be taken back.
#[derive(Debug)]
pub struct XdpAttachment {
    /// Who runs the program.
    pub mode: Mode,
    /// Why the driver does not, if it does not.
    pub why_generic: Option<String>,
    /// What is somebody else's and was there before.
    pub pushed_out: Option<Foreign>,
    /// What was there before, ours or not.
    previous: Option<OwnedFd>,
}

/// Somebody else's program.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Foreign {
    /// Its id, which ends with it.
    pub program: u32,
    /// Its name; empty if nobody gave it one.
    pub name: String,
}

impl fmt::Display for Foreign {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let name = if self.name.is_empty() { "without a name" } else { &self.name };
        write!(f, "{name} (id {})", self.program)
    }
}

/// What an attach may do if the hook is not free, or the driver cannot.
#[derive(Clone, Copy, Debug, Default)]
pub struct Allowed {
    /// The kernel may run the program instead of the driver.
    pub generic: bool,
    /// Somebody else's program may be pushed out.
    pub force: bool,
}

impl XdpAttachment {
    /// It took the place of one of ours.
    pub fn replaced(&self) -> bool {
        self.previous.is_some() && self.pushed_out.is_none()
    }
}

fn present(ifindex: u32) -> Result<XdpPrograms> {
    Netlink::connect()?.xdp_programs(ifindex)
}

/// Our program on an interface, if it is there.
///
/// # Errors
/// The kernel refused to say.
pub fn attached_xdp(ifindex: u32, programs: &Programs) -> Result<Option<AttachedXdp>> {
    let there = present(ifindex)?;
    let ours = |(mode, id): (Mode, u32)| {
        let loaded = programs.get(id).filter(|loaded| loaded.role == Role::GuardXdp)?;
        Some(AttachedXdp { mode, program: id, loaded: loaded.clone() })
    };
    Ok([(Mode::Native, there.native), (Mode::Generic, there.generic)].into_iter().find_map(ours))
}

/// Our programs in the network namespace of the calling thread, with the indices of their interfaces.
///
/// # Errors
/// The kernel refused to say.
pub fn at_xdp(programs: &Programs) -> Result<Vec<(u32, AttachedXdp)>> {
    let mut found = Vec::new();
    for link in Netlink::connect()?.links()? {
        found.extend(attached_xdp(link.index, programs)?.map(|ours| (link.index, ours)));
    }
    Ok(found)
}

/// Changes what is there, if that is still `old`: the kernel compares, so that nobody else's program is pushed out
/// even if it came a moment ago.
fn change(
    ifindex: u32,
    program: Option<BorrowedFd<'_>>,
    old: Option<BorrowedFd<'_>>,
    mode: Mode,
) -> Result<()> {
    let flags = mode.flag() | if old.is_some() { XDP_FLAGS_REPLACE } else { XDP_FLAGS_UPDATE_IF_NOEXIST };
    let opts = bpf_xdp_attach_opts {
        sz: size_of::<bpf_xdp_attach_opts>() as libbpf_sys::size_t,
        old_prog_fd: old.map_or(0, |fd| fd.as_raw_fd()),
        ..Default::default()
    };
    let fd = program.map_or(-1, |fd| fd.as_raw_fd());
    // SAFETY: `opts` is a whole structure whose size says so, and outlives the call.
    let (result, said) =
        messages(|| unsafe { libbpf_sys::bpf_xdp_attach(ifindex.cast_signed(), fd, flags, &opts) });
    if result == 0 {
        return Ok(());
    }
    let reason = said.lines().find_map(|line| line.split_once("Kernel error message: "));
    let error = std::io::Error::from_raw_os_error(-result);
    match reason {
        Some((_, reason)) => Err(anyhow!(error).context(reason.trim().to_string())),
        None => Err(error.into()),
    }
}

/// Attaches `program`, natively if the driver can, in the place of ours if that is there already. Where the driver
/// cannot, or somebody else's program is there, `allowed` says what will do.
///
/// # Errors
/// Somebody else's program is there and stays, or the kernel refused; then everything is as it was.
pub fn attach_xdp(
    state: &State,
    _lock: &Lock,
    link: &Link,
    instance: &str,
    program: BorrowedFd<'_>,
    allowed: Allowed,
) -> Result<XdpAttachment> {
    let what = format!("attaching to {} at XDP", link.name);
    let there = present(link.index)?;
    let ours = attached_xdp(link.index, &loaded_programs(state)?)?;
    if let Some(other) =
        ours.as_ref().and_then(|ours| ours.loaded.instance.as_deref()).filter(|i| *i != instance)
    {
        bail!(
            "{what}: instance '{other}' of netoken is there, and an interface has one XDP program; use --hook tc"
        );
    }
    let foreign = if ours.is_none() { foreign(there)? } else { None };
    if let Some((mode, foreign)) = &foreign
        && !(allowed.force && mode.is_some())
    {
        let (remedy, flag) = match mode {
            Some(Mode::Native) => ("push it out with --force, or remove it first", "xdpdrv"),
            Some(Mode::Generic) => ("push it out with --force, or remove it first", "xdpgeneric"),
            None => ("the hardware runs it: remove it first", "xdpoffload"),
        };
        bail!(
            "{what}: somebody else's program {foreign} is there, and an interface has one XDP program; use --hook tc, or \
             {remedy}: {} link set dev {} {flag} off",
            tool("ip"),
            link.name
        );
    }
    let running = ours.map(|ours| (ours.mode, ours.program));
    let running = running.or(foreign.as_ref().and_then(|(mode, foreign)| Some(((*mode)?, foreign.program))));
    if let Some((mode, id)) = running {
        let old = libbpf_rs::Program::fd_from_id(id).context("keeping the running program")?;
        // In the same mode: both at once is not possible, and in between there would be none.
        change(link.index, Some(program), Some(old.as_fd()), mode).with_context(|| match &foreign {
            None => what,
            Some((_, foreign)) => format!(
                "{what}, in the place of {foreign}; if a BPF link holds that, end the process that holds the link"
            ),
        })?;
        let pushed_out = foreign.map(|(_, foreign)| foreign);
        return Ok(XdpAttachment { mode, why_generic: None, pushed_out, previous: Some(old) });
    }
    let attached = |mode, why_generic| XdpAttachment { mode, why_generic, pushed_out: None, previous: None };
    let Err(refused) = change(link.index, Some(program), None, Mode::Native) else {
        return Ok(attached(Mode::Native, None));
    };
    if !allowed.generic {
        return Err(refused.context(format!("{what} natively")));
    }
    change(link.index, Some(program), None, Mode::Generic)
        .with_context(|| format!("{what} (natively the driver refused: {refused:#})"))?;
    Ok(attached(Mode::Generic, Some(format!("{refused:#}"))))
}

/// The program that is there, and who runs it; nobody that we can ask if the hardware does.
fn foreign(there: XdpPrograms) -> Result<Option<(Option<Mode>, Foreign)>> {
    let places =
        [(Some(Mode::Native), there.native), (Some(Mode::Generic), there.generic), (None, there.hardware)];
    let Some((mode, program)) = places.into_iter().find(|(_, id)| *id != 0) else { return Ok(None) };
    Ok(Some((mode, Foreign { program, name: program_name(program)? })))
}

/// Puts back what was there before an attach.
///
/// # Errors
/// The kernel refused.
pub fn undo_xdp(
    _lock: &Lock,
    link: &Link,
    program: BorrowedFd<'_>,
    attachment: &XdpAttachment,
) -> Result<()> {
    let before = attachment.previous.as_ref().map(|fd| fd.as_fd());
    change(link.index, before, Some(program), attachment.mode)
        .with_context(|| format!("putting back what was at XDP of {}", link.name))
}

/// Removes our program of this instance, or of one that is gone, and returns it, so that it can be put back; nothing if
/// it was not there.
///
/// # Errors
/// The kernel refused.
pub fn take_xdp(state: &State, _lock: &Lock, link: &Link, instance: &str) -> Result<Option<(Mode, OwnedFd)>> {
    // To list all programs is what takes time, and most interfaces have none.
    if present(link.index)? == XdpPrograms::default() {
        return Ok(None);
    }
    let ours = attached_xdp(link.index, &loaded_programs(state)?)?
        .filter(|ours| ours.loaded.instance.as_deref().is_none_or(|name| name == instance));
    let Some(ours) = ours else { return Ok(None) };
    let Some(old) = keep(ours.program)? else { return Ok(None) };
    if let Err(error) = change(link.index, None, Some(old.as_fd()), ours.mode) {
        // What has just gone, alone or with the interface, is removed.
        let there = present(link.index)?;
        if [there.native, there.generic].contains(&ours.program) {
            return Err(error.context(format!("removing our XDP program from {}", link.name)));
        }
    }
    Ok(Some((ours.mode, old)))
}

/// Puts back what was removed.
///
/// # Errors
/// The kernel refused.
pub fn put_back_xdp(link: &Link, mode: Mode, program: BorrowedFd<'_>) -> Result<()> {
    change(link.index, Some(program), None, mode)
        .with_context(|| format!("putting back our XDP program on {}", link.name))
}
