//! The clsact hook: attach, find, detach, destroy. A filter is ours if its program bears our name and uses the
//! maps of the instance in question; everything else on the qdisc is somebody else's and stays as it is.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::query::{ProgInfoIter, ProgInfoQueryOptions, ProgramInfo};
use libbpf_rs::{MapCore, MapHandle, TC_EGRESS, TC_INGRESS, TcHook};
use nix::errno::Errno;
use serde::Serialize;

use super::netlink::{Filter, Link, Netlink, Side};
use crate::netns::Netns;
use crate::program::{PROGRAM_NAME, PROGRAM_NAME_L3, Program, config_among, messages};
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

/// A classifier of ours that is loaded.
#[derive(Clone, Debug)]
pub struct Loaded {
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

/// Every classifier of ours that is loaded, in whatever network namespace, by program id.
///
/// # Errors
/// An instance's pins cannot be read, or the kernel refused to list its programs.
pub fn loaded_programs(state: &State) -> Result<HashMap<u32, Loaded>> {
    let mut owners = HashMap::new();
    for instance in state.instances() {
        // An attach that was killed leaves an instance without all of its maps; the next one completes it.
        if let Ok(counters) = MapHandle::from_pinned_path(instance.pins.join("counters")) {
            owners.insert(counters.info().context("asking for a map's id")?.info.id, instance.name);
        }
    }
    Ok(every_program()?
        .into_iter()
        .filter(|program| program.name == PROGRAM_NAME || program.name == PROGRAM_NAME_L3)
        .filter_map(|program| {
            let instance = program.map_ids.iter().find_map(|id| owners.get(id).cloned());
            // One whose pins are gone is ours if it has our maps; the name alone anybody can have.
            let ours = instance.is_some() || has_our_maps(&program.map_ids);
            let (loaded_at, map_ids) = (program.load_time, program.map_ids);
            ours.then_some((program.id, Loaded { loaded_at, instance, map_ids }))
        })
        .collect())
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

fn has_our_maps(ids: &[u32]) -> bool {
    let names: Vec<_> = ids.iter().filter_map(|id| MapHandle::from_map_id(*id).ok()).collect();
    ["policies", "counters", "events", "live", "scratches"]
        .iter()
        .all(|name| names.iter().any(|map| map.name() == *name))
}

/// Our filters on an interface's egress, in the order in which they run.
///
/// # Errors
/// The kernel refused to list them.
pub fn attached(
    netlink: &mut Netlink,
    ifindex: u32,
    programs: &HashMap<u32, Loaded>,
) -> Result<Vec<Attached>> {
    if !netlink.clsacts()?.contains(&ifindex) {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let mut before = 0;
    for filter in netlink.filters(ifindex, Side::Egress)? {
        match filter.program.and_then(|id| Some((id, programs.get(&id)?))) {
            Some((program, loaded)) => {
                found.push(Attached { filter, program, loaded: loaded.clone(), before });
            }
            None => before += 1,
        }
    }
    Ok(found)
}

/// The interfaces of one network namespace and how to change what is attached to them.
pub struct Hooks<'a> {
    state: &'a State,
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
    /// For the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn open(state: &'a State) -> Result<Self> {
        Ok(Hooks { state, netns: Netns::current()?, netlink: Netlink::connect()? })
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
        let mut found = attached(&mut self.netlink, link.index, &programs)?;
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
        program: &Program,
        place: Place,
    ) -> Result<Attachment> {
        let made_qdisc = self.make_clsact(link)?;
        let attached = self.attach_filter(link, instance, program, place);
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
        program: &Program,
        place: Place,
    ) -> Result<Attachment> {
        let ours = self.attached(link, instance)?;
        let previous = hold_programs(&ours)?;
        let previous_config = ours.first().and_then(|ours| ours.loaded.config());
        let in_place = ours.iter().find(|ours| {
            place.priority.is_none_or(|priority| priority == ours.filter.priority)
                && place.handle.is_none_or(|handle| handle == ours.filter.handle)
        });

        let mut hook = TcHook::new(program.as_fd());
        hook.ifindex(link.index.cast_signed()).attach_point(TC_EGRESS);
        match in_place {
            Some(ours) => {
                let Filter { priority, handle, .. } = ours.filter;
                hook.priority(priority.into()).handle(handle).replace(true);
            }
            None => {
                let priority = place.priority.or(ours.first().map(|ours| ours.filter.priority));
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

    /// Puts back what was there before an attach: filters of ours in their places, or none, and no qdisc of ours.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn undo(&mut self, lock: &Lock, link: &Link, instance: &str, attachment: &Attachment) -> Result<()> {
        for (filter, program) in &attachment.previous {
            let mut hook = TcHook::new(program.as_fd());
            hook.ifindex(link.index.cast_signed())
                .attach_point(TC_EGRESS)
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
            .attach_point(TC_EGRESS)
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
        let what = format!("attaching {PROGRAM_NAME} to {} egress", link.name);
        let filters = self.netlink.filters(link.index, Side::Egress).unwrap_or_default();
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
