//! The clsact hook: attach, find, detach, destroy. A filter is ours if its program bears our name and uses the
//! maps of the instance in question; everything else on the qdisc is somebody else's and stays as it is.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::query::{ProgInfoIter, ProgInfoQueryOptions, ProgramInfo};
use libbpf_rs::{MapCore, MapHandle, TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook};
use nix::errno::Errno;
use serde::Serialize;

use super::netlink::{Filter, Link, Netlink, Side};
use crate::guard::program as guard;
use crate::netns::Netns;
use crate::program::{PROGRAM_NAME, PROGRAM_NAME_L3, config_among, messages};
use crate::state::{Lock, State};
use crate::types::Config;

/// The number of the empty egress chain that we put on a clsact qdisc that we make, and by which it is known to
/// be ours: it ends with the qdisc, and nobody else has a reason to make it. "NT" as in the option's ExID.
const OUR_CHAIN: u32 = 0x4e54;

/// Where the filter is to stand; what is not said is kept, or chosen by the kernel.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// 1 to 65535; lower runs first.
    pub priority: Option<u16>,
    /// Any number but 0.
    pub handle: Option<u32>,
}

/// A program of ours that is loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
    /// Where programs of its name are attached.
    pub role: Role,
    /// Time since boot at which it was loaded.
    pub loaded_at: Duration,
    /// The instance whose maps it uses; none if its pins are gone.
    pub instance: Option<String>,
    /// Ids of its maps.
    map_ids: Vec<u32>,
}

impl Loaded {
    /// What it was told; nothing if another version of netoken has loaded it.
    pub fn config(&self) -> Option<Config> {
        config_among(&self.map_ids)
    }
}

/// A filter of ours.
#[derive(Clone, Debug)]
pub struct Attached {
    /// Where it stands.
    pub filter: Filter,
    /// Id of its program.
    pub program: u32,
    /// What is known of its program.
    pub loaded: Loaded,
    /// Foreign filters that see a packet first and may end its way.
    pub before: usize,
}

/// What a program of ours is for. Each is attached at a place of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The classifier, on clsact egress.
    Stamp,
    /// The guard, on clsact ingress.
    Guard,
    /// The guard, at XDP.
    GuardXdp,
}

impl Role {
    /// By the name of a program and those of its maps; the name alone anybody can have.
    fn of(name: &OsStr) -> Option<(Role, &'static [&'static str])> {
        const STAMP: &[&str] = &["policies", "counters", "events", "live", "scratches"];
        const GUARD: &[&str] =
            &["guard_rules", "guard_exempt", "guard_blocked", "guard_counters", "guard_live"];
        match name.to_str()? {
            PROGRAM_NAME | PROGRAM_NAME_L3 => Some((Role::Stamp, STAMP)),
            guard::PROGRAM_NAME | guard::PROGRAM_NAME_L3 => Some((Role::Guard, GUARD)),
            guard::PROGRAM_NAME_XDP => Some((Role::GuardXdp, GUARD)),
            _ => None,
        }
    }
}

/// What became of the clsact qdisc.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "qdisc", content = "qdisc_filters", rename_all = "snake_case")]
pub enum Qdisc {
    /// There was none.
    Absent,
    /// It was ours and nobody else used it: removed.
    Removed,
    /// Somebody else made it: kept.
    Foreign,
    /// It was ours, but there are other filters on it: kept. How many.
    InUse(usize),
    /// It was ours, but somebody made a chain on it: kept.
    HasChains,
}

/// Every program of ours that is loaded, in whatever network namespace, by program id.
///
/// # Errors
/// An instance's pins cannot be read, or the kernel refused to list its programs.
pub fn loaded_programs(state: &State) -> Result<HashMap<u32, Loaded>> {
    let mut owners = HashMap::new();
    for instance in state.instances() {
        // The stamp has the one, the guard the other. An attach that was killed leaves an instance without all of
        // its maps; the next one completes it.
        for map in ["counters", "guard_counters"] {
            if let Ok(counters) = MapHandle::from_pinned_path(instance.pins.join(map)) {
                let id = counters.info().context("asking for a map's id")?.info.id;
                owners.insert(id, instance.name.clone());
            }
        }
    }
    Ok(every_program()?
        .into_iter()
        .filter_map(|program| {
            let (role, maps) = Role::of(&program.name)?;
            let instance = program.map_ids.iter().find_map(|id| owners.get(id).cloned());
            // One whose pins are gone is ours if it has our maps.
            let ours = instance.is_some() || has_maps(&program.map_ids, maps);
            let (loaded_at, map_ids) = (program.load_time, program.map_ids);
            ours.then_some((program.id, Loaded { role, loaded_at, instance, map_ids }))
        })
        .collect())
}

/// The name of a loaded program; empty if it has none, or has just gone.
pub(super) fn program_name(id: u32) -> Result<String> {
    let programs = every_program()?.into_iter();
    let name = programs.filter(|program| program.id == id).map(|program| program.name).next();
    Ok(name.unwrap_or_default().to_string_lossy().into_owned())
}

/// How often to begin again if programs are loaded while they are listed.
const TRIES: usize = 20;

/// Every program that is loaded. The iterator ends without a word where the kernel refuses, and a list that is
/// too short would make our own filters look like somebody else's; so its end is held against the kernel's.
fn every_program() -> Result<Vec<ProgramInfo>> {
    let doing = "listing the loaded BPF programs";
    for _ in 0..TRIES {
        let options = ProgInfoQueryOptions::default().include_map_ids(true);
        let programs: Vec<ProgramInfo> = ProgInfoIter::with_query_opts(options).collect();
        match program_after(programs.last().map_or(0, |program| program.id)) {
            Ok(None) => return Ok(programs),
            // It has come meanwhile, or it is the one at which the list broke off.
            Ok(Some(id)) => match libbpf_rs::Program::fd_from_id(id) {
                Err(error) if error.kind() != libbpf_rs::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("{doing}: looking at program {id}"));
                }
                _ => {}
            },
            Err(Errno::EPERM) => {
                bail!(
                    "{doing}: permission denied; it needs CAP_SYS_ADMIN outside of any user namespace (try sudo)"
                )
            }
            Err(errno) => return Err(errno).context(doing),
        }
    }
    bail!("{doing}: others are loaded faster than they can be listed; try again")
}

/// The id of the next program after that one; nothing if it is the last.
fn program_after(id: u32) -> Result<Option<u32>, Errno> {
    let mut next = 0;
    // SAFETY: the pointer is valid for the call, which writes one u32 to it.
    let result = unsafe { libbpf_sys::bpf_prog_get_next_id(id, &mut next) };
    // libbpf returns the error itself, negative.
    match Errno::from_raw(-result) {
        _ if result == 0 => Ok(Some(next)),
        Errno::ENOENT => Ok(None),
        errno => Err(errno),
    }
}

fn has_maps(ids: &[u32], names: &[&str]) -> bool {
    let maps: Vec<_> = ids.iter().filter_map(|id| MapHandle::from_map_id(*id).ok()).collect();
    // The kernel cuts names off behind 15 characters.
    names.iter().all(|name| maps.iter().any(|map| map.name() == &name[..name.len().min(15)]))
}

/// Our filters on one side of an interface, in the order in which they run.
///
/// # Errors
/// The kernel refused to list them.
pub fn attached(
    netlink: &mut Netlink,
    ifindex: u32,
    side: Side,
    programs: &HashMap<u32, Loaded>,
) -> Result<Vec<Attached>> {
    if !netlink.clsacts()?.contains(&ifindex) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut before = 0;
    for filter in netlink.filters(ifindex, side)? {
        let ours = filter.program.and_then(|id| Some((id, programs.get(&id)?)));
        match ours.filter(|(_, loaded)| loaded.role == side.role()) {
            Some((program, loaded)) => {
                found.push(Attached { filter, program, loaded: loaded.clone(), before });
            }
            None => before += 1,
        }
    }
    Ok(found)
}

impl Side {
    /// What of ours is attached there.
    fn role(self) -> Role {
        match self {
            Side::Ingress => Role::Guard,
            Side::Egress => Role::Stamp,
        }
    }

    fn point(self) -> TcAttachPoint {
        match self {
            Side::Ingress => TC_INGRESS,
            Side::Egress => TC_EGRESS,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Side::Ingress => "ingress",
            Side::Egress => "egress",
        }
    }
}

/// The interfaces of one network namespace and how to change what is attached to one side of them.
pub struct Hooks<'a> {
    state: &'a State,
    side: Side,
    netns: Netns,
    netlink: Netlink,
}

/// An attach that has happened and can be taken back.
#[derive(Debug)]
pub struct Attachment {
    /// Where the filter stands now.
    pub filter: Filter,
    /// What of ours was there before, and still can be put back.
    previous: Vec<(Filter, OwnedFd)>,
    /// What the program was told that was there before.
    pub previous_config: Option<Config>,
    /// We made the clsact qdisc for it.
    pub made_qdisc: bool,
}

impl<'a> Hooks<'a> {
    /// The egress side, in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn open(state: &'a State) -> Result<Self> {
        Hooks::open_side(state, Side::Egress)
    }

    /// One side, in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn open_side(state: &'a State, side: Side) -> Result<Self> {
        Ok(Hooks { state, side, netns: Netns::current()?, netlink: Netlink::connect()? })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// The kernel refused to list them.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        self.netlink.links()
    }

    /// Our filters of one instance on an interface, and those whose instance is gone.
    ///
    /// # Errors
    /// The kernel refused to list them.
    pub fn attached(&mut self, link: &Link, instance: &str) -> Result<Vec<Attached>> {
        let programs = loaded_programs(self.state)?;
        let mut found = attached(&mut self.netlink, link.index, self.side, &programs)?;
        found.retain(|ours| ours.loaded.instance.as_deref().is_none_or(|name| name == instance));
        Ok(found)
    }

    /// Attaches `program`, in the place of ours if that is there already. Afterwards exactly one filter of ours
    /// of this instance is there.
    ///
    /// # Errors
    /// The kernel refused; then everything is as it was.
    pub fn attach(
        &mut self,
        lock: &Lock,
        link: &Link,
        instance: &str,
        program: BorrowedFd<'_>,
        place: Place,
    ) -> Result<Attachment> {
        let front = if place.priority.is_none() { self.front(link)? } else { None };
        let made_qdisc = self.make_clsact(link)?;
        let attached = self.attach_filter(link, instance, program, place, front);
        if attached.is_err() && made_qdisc {
            // Unless somebody uses it already.
            self.destroy_clsact(lock, link).ok();
        }
        Ok(Attachment { made_qdisc, ..attached? })
    }

    /// The same on a clsact qdisc that is there.
    fn attach_filter(
        &mut self,
        link: &Link,
        instance: &str,
        program: BorrowedFd<'_>,
        place: Place,
        front: Option<u16>,
    ) -> Result<Attachment> {
        let ours = self.attached(link, instance)?;
        let previous = hold_programs(&ours)?;
        let previous_config = ours.first().and_then(|ours| ours.loaded.config());
        let in_place = ours.iter().find(|ours| {
            place.priority.is_none_or(|priority| priority == ours.filter.priority)
                && place.handle.is_none_or(|handle| handle == ours.filter.handle)
        });

        let mut hook = TcHook::new(program);
        hook.ifindex(link.index.cast_signed()).attach_point(self.side.point());
        match in_place {
            Some(ours) => {
                let Filter { priority, handle, .. } = ours.filter;
                hook.priority(priority.into()).handle(handle).replace(true);
            }
            None => {
                let priority = place.priority.or(ours.first().map(|ours| ours.filter.priority)).or(front);
                hook.priority(priority.unwrap_or(0).into()).handle(place.handle.unwrap_or(0));
            }
        }
        let (attached, said) = messages(|| hook.attach());
        let hook = attached.map_err(|error| self.explain_attach(link, place, error.into(), &said))?;

        let filter = Filter {
            priority: hook.get_priority() as u16,
            handle: hook.get_handle(),
            kind: "bpf".to_string(),
            program: None,
        };
        // The new one works; the ones that it did not take the place of go.
        let same = |other: &Filter| (other.priority, other.handle) == (filter.priority, filter.handle);
        for old in ours.iter().filter(|old| !same(&old.filter)) {
            self.remove_filter(link, &old.filter)?;
        }
        Ok(Attachment { filter, previous, previous_config, made_qdisc: false })
    }

    /// The priority in front of every filter that is there; none if there are none, which lets the kernel choose. Its
    /// own choice is in front of those that it placed itself, but behind those with a priority below 32768.
    fn front(&mut self, link: &Link) -> Result<Option<u16>> {
        if !self.netlink.clsacts()?.contains(&link.index) {
            return Ok(None);
        }
        let filters = self.netlink.filters(link.index, self.side)?;
        let Some(first) = filters.iter().map(|filter| filter.priority).min() else { return Ok(None) };
        match (first, self.side) {
            (2.., _) => Ok(Some(first - 1)),
            // A stamp that is not reached is a packet without a token; a guard that is not reached is none.
            (_, Side::Egress) => Ok(None),
            (_, Side::Ingress) if self.has_ours(link)? => Ok(None),
            (_, Side::Ingress) => bail!(
                "attaching the guard to {} ingress: a filter of priority 1 is there, in front of which there is no place, \
                 and it may let packets pass the guard by; give it another priority, or use --hook xdp, or say where the \
                 guard is to stand with --priority",
                link.name
            ),
        }
    }

    fn has_ours(&mut self, link: &Link) -> Result<bool> {
        let programs = loaded_programs(self.state)?;
        Ok(!attached(&mut self.netlink, link.index, self.side, &programs)?.is_empty())
    }

    /// Puts back what was there before an attach: filters of ours in their places, or none, and no qdisc of ours.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn undo(&mut self, lock: &Lock, link: &Link, instance: &str, attachment: &Attachment) -> Result<()> {
        for (filter, program) in &attachment.previous {
            let mut hook = TcHook::new(program.as_fd());
            hook.ifindex(link.index.cast_signed())
                .attach_point(self.side.point())
                .priority(filter.priority.into())
                .handle(filter.handle)
                .replace(true);
            let (attached, said) = messages(|| hook.attach());
            attached
                .with_context(|| format!("putting back our filter on {}{}", link.name, kernel_said(&said)))?;
        }
        let place = |filter: &Filter| (filter.priority, filter.handle);
        for ours in self.attached(link, instance)? {
            if !attachment.previous.iter().any(|(filter, _)| place(filter) == place(&ours.filter)) {
                self.remove_filter(link, &ours.filter)?;
            }
        }
        if attachment.made_qdisc {
            self.destroy_clsact(lock, link)?;
        }
        Ok(())
    }

    /// Removes our filters of this instance. Returns how many there were.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn detach(&mut self, _lock: &Lock, link: &Link, instance: &str) -> Result<usize> {
        let ours = self.attached(link, instance)?;
        ours.iter().try_for_each(|ours| self.remove_filter(link, &ours.filter))?;
        Ok(ours.len())
    }

    /// Removes the clsact qdisc if we made it and nobody else uses it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn destroy_clsact(&mut self, _lock: &Lock, link: &Link) -> Result<Qdisc> {
        if !self.netlink.clsacts()?.contains(&link.index) {
            return Ok(Qdisc::Absent);
        }
        let mut chains = self.netlink.chains(link.index, Side::Egress)?;
        if !chains.contains(&OUR_CHAIN) {
            return Ok(Qdisc::Foreign);
        }
        let used = self.netlink.filters(link.index, Side::Ingress)?.len()
            + self.netlink.filters(link.index, Side::Egress)?.len();
        if used > 0 {
            return Ok(Qdisc::InUse(used));
        }
        chains.extend(self.netlink.chains(link.index, Side::Ingress)?);
        // Chain 0 comes with the first filter; any other somebody made, to fill it.
        if chains.iter().any(|chain| ![0, OUR_CHAIN].contains(chain)) {
            return Ok(Qdisc::HasChains);
        }
        self.remove_clsact(link)?;
        Ok(Qdisc::Removed)
    }

    fn make_clsact(&mut self, link: &Link) -> Result<bool> {
        if self.netlink.clsacts()?.contains(&link.index) {
            return Ok(false);
        }
        let doing = format!("making a clsact qdisc on {}", link.name);
        match self.netlink.add_clsact(link.index, OUR_CHAIN) {
            Ok(()) => Ok(true),
            // Somebody was faster, or there is the older kind of qdisc, which has no egress.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                if self.netlink.clsacts()?.contains(&link.index) {
                    return Ok(false);
                }
                bail!(
                    "{doing}: it has an ingress qdisc, which has no egress side and excludes clsact; clsact does \
                     all that it does, so replace it: tc qdisc del dev {0} ingress; tc qdisc add dev {0} clsact",
                    link.name
                )
            }
            Err(error) => Err(error).with_context(|| {
                format!(
                    "{doing}; it needs CAP_NET_ADMIN (try sudo) and the kernel module sch_ingress \
                     (CONFIG_NET_SCH_INGRESS)"
                )
            }),
        }
    }

    fn remove_clsact(&mut self, link: &Link) -> Result<()> {
        let mut hook = TcHook::new(self.netns.as_fd());
        hook.ifindex(link.index.cast_signed()).attach_point(TC_INGRESS | TC_EGRESS);
        let (removed, said) = messages(|| hook.destroy());
        removed.with_context(|| format!("removing the clsact qdisc of {}{}", link.name, kernel_said(&said)))
    }

    fn remove_filter(&mut self, link: &Link, filter: &Filter) -> Result<()> {
        let mut hook = TcHook::new(self.netns.as_fd());
        hook.ifindex(link.index.cast_signed())
            .attach_point(self.side.point())
            .priority(filter.priority.into())
            .handle(filter.handle);
        let (removed, said) = messages(|| hook.detach());
        removed.with_context(|| {
            format!(
                "removing our filter (priority {}, handle {:#x}) from {}{}",
                filter.priority,
                filter.handle,
                link.name,
                kernel_said(&said)
            )
        })
    }

    fn explain_attach(
        &mut self,
        link: &Link,
        place: Place,
        error: anyhow::Error,
        said: &str,
    ) -> anyhow::Error {
        let name = match self.side {
            Side::Ingress => guard::PROGRAM_NAME,
            Side::Egress => PROGRAM_NAME,
        };
        let what = format!("attaching {name} to {} {}", link.name, self.side.name());
        let filters = self.netlink.filters(link.index, self.side).unwrap_or_default();
        let taken = filters.iter().find(|filter| {
            Some(filter.priority) == place.priority
                && (filter.kind != "bpf" || place.handle.is_none_or(|handle| handle == filter.handle))
        });
        match taken {
            Some(filter) => anyhow!(
                "{what}: a '{}' filter (priority {}, handle {:#x}) has that place; choose another --priority{}",
                filter.kind,
                filter.priority,
                filter.handle,
                if filter.kind == "bpf" { " or --handle" } else { "" }
            ),
            None => error.context(format!(
                "{what}{}; it needs CAP_NET_ADMIN (try sudo) and the kernel module cls_bpf (CONFIG_NET_CLS_BPF)",
                kernel_said(said)
            )),
        }
    }
}

impl Attachment {
    /// It took the place of one of ours.
    pub fn replaced(&self) -> bool {
        !self.previous.is_empty()
    }
}

/// Keeps the programs of filters loaded.
fn hold_programs(filters: &[Attached]) -> Result<Vec<(Filter, OwnedFd)>> {
    let hold = |ours: &Attached| {
        let fd = libbpf_rs::Program::fd_from_id(ours.program).context("keeping the running program")?;
        Ok((ours.filter.clone(), fd))
    };
    filters.iter().map(hold).collect()
}

/// The kernel's own explanation, which libbpf prints, if there was one.
fn kernel_said(log: &str) -> String {
    let reason = log.lines().find_map(|line| line.split_once("Kernel error message: "));
    reason.map_or(String::new(), |(_, reason)| format!(" ({})", reason.trim()))
}

/// How long the kernel may take to free a program whose filter is gone: it does so behind a grace period.
const LINGER: Duration = Duration::from_secs(5);

/// Removes an instance if no program uses it any more. True if nothing of it is left.
///
/// # Errors
/// A pin cannot be removed.
pub fn remove_unused(state: &State, _lock: &Lock, name: &str) -> Result<bool> {
    let instance = state.instance(name);
    if !instance.pins.exists() {
        return Ok(true);
    }
    let deadline = Instant::now() + LINGER;
    while loaded_programs(state)?.values().any(|program| program.instance.as_deref() == Some(name)) {
        if Instant::now() >= deadline {
            return Ok(false);
        }
        thread::sleep(Duration::from_millis(10));
    }
    instance.remove()?;
    Ok(true)
}
