//! The clsact hook: attach, find, detach, destroy. A filter is ours if its program bears our name and uses the
//! maps of the instance in question; everything else on the qdisc is somebody else's and stays as it is.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result, anyhow, bail};
use libbpf_rs::{TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook};

use super::loaded::{Loaded, Programs, Role, keep, loaded_programs, look_with};
use super::netlink::{Filter, Link, Netlink, Side};
use super::qdisc::Qdisc;
use super::tcx;
use crate::guard::program as guard;
use crate::netns::{Netns, tool};
use crate::object::messages;
use crate::program::PROGRAM_NAME;
use crate::state::{Lock, State};

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

impl Place {
    /// Something was said.
    pub fn is_chosen(self) -> bool {
        self.priority.is_some() || self.handle.is_some()
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
    /// Programs at tcx, which see it before any filter.
    pub tcx_before: usize,
}

/// Our filters on one side of an interface, in the order in which they run.
///
/// # Errors
/// The kernel refused to list them.
pub fn attached(
    netlink: &mut Netlink,
    ifindex: u32,
    side: Side,
    programs: &Programs,
) -> Result<Vec<Attached>> {
    let filters = first_chain(netlink, ifindex, side)?;
    // Most interfaces have none, and no qdisc for them.
    if filters.is_empty() {
        return Ok(Vec::new());
    }
    let mut found = Vec::new();
    let (mut before, tcx_before) = (0, tcx::foreign(ifindex, side, programs)?);
    for filter in filters {
        let ours = filter.program.and_then(|id| Some((id, programs.get(id)?)));
        match ours.filter(|(_, loaded)| loaded.role == side.role()) {
            Some((program, loaded)) => {
                found.push(Attached { filter, program, loaded: loaded.clone(), before, tcx_before });
            }
            None => before += 1,
        }
    }
    Ok(found)
}

/// The filters that every packet comes to, and among which ours are; those of other chains take no place from them.
fn first_chain(netlink: &mut Netlink, ifindex: u32, side: Side) -> Result<Vec<Filter>> {
    let mut filters = netlink.filters(ifindex, side)?;
    filters.retain(|filter| filter.chain == 0);
    Ok(filters)
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
    /// We made the clsact qdisc for it.
    pub made_qdisc: bool,
    /// Foreign filters that see a packet first and may end its way.
    pub before: usize,
    /// Programs at tcx, which see a packet before any filter and may end its way.
    pub tcx_before: usize,
}

/// What was removed and can be put back: places and programs.
pub type Taken = Vec<(Filter, OwnedFd)>;

impl<'a> Hooks<'a> {
    /// One side, in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn open(state: &'a State, side: Side) -> Result<Self> {
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
        // Most interfaces have nothing there, and to list all programs is what takes time.
        if self.netlink.filters(link.index, self.side)?.is_empty() {
            return Ok(Vec::new());
        }
        look_with(self.state, |programs| self.of_instance(link, instance, programs))
    }

    fn of_instance(&mut self, link: &Link, instance: &str, programs: &Programs) -> Result<Vec<Attached>> {
        let mut found = attached(&mut self.netlink, link.index, self.side, programs)?;
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
        let front = if place.priority.is_none() { self.front(link, instance)? } else { None };
        let made_qdisc = self.make_clsact(link)?;
        let attached = self.attach_filter(lock, link, instance, program, place, front);
        if attached.is_err() && made_qdisc {
            // Unless somebody uses it already.
            self.destroy_clsact(lock, link).ok();
        }
        Ok(Attachment { made_qdisc, ..attached? })
    }

    /// The same on a clsact qdisc that is there.
    fn attach_filter(
        &mut self,
        lock: &Lock,
        link: &Link,
        instance: &str,
        program: BorrowedFd<'_>,
        place: Place,
        front: Option<u16>,
    ) -> Result<Attachment> {
        let programs = loaded_programs(self.state)?;
        let tcx_before = tcx::foreign(link.index, self.side, &programs)?;
        let ours = self.of_instance(link, instance, &programs)?;
        let previous = hold_programs(&ours)?;
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
            chain: 0,
            priority: hook.get_priority() as u16,
            handle: hook.get_handle(),
            kind: "bpf".to_string(),
            program: None,
        };
        let new = (filter.priority, filter.handle);
        // What cannot be listed now is for a query to tell: it is attached.
        let filters = first_chain(&mut self.netlink, link.index, self.side).unwrap_or_default();
        let is_foreign = |filter: &&Filter| filter.program.and_then(|id| programs.get(id)).is_none();
        let in_front = filters.iter().take_while(|filter| (filter.priority, filter.handle) != new);
        let before = in_front.filter(is_foreign).count();
        let attachment = Attachment { filter, previous, made_qdisc: false, before, tcx_before };
        // The new one works; the ones that it did not take the place of go.
        let mut old = ours.iter().map(|ours| &ours.filter).filter(|old| (old.priority, old.handle) != new);
        if let Err(error) = old.try_for_each(|old| self.remove_filter(link, old)) {
            self.undo(lock, link, instance, &attachment)?;
            return Err(error);
        }
        Ok(attachment)
    }

    /// The priority in front of every filter that is there; none if there are none, which lets the kernel choose. Its
    /// own choice is in front of those that it placed itself, but behind those with a priority below 32768.
    fn front(&mut self, link: &Link, instance: &str) -> Result<Option<u16>> {
        if !self.netlink.has_clsact(link.index)? {
            return Ok(None);
        }
        let filters = first_chain(&mut self.netlink, link.index, self.side)?;
        let Some(first) = filters.iter().map(|filter| filter.priority).min() else { return Ok(None) };
        match (first, self.side) {
            (2.., _) => Ok(Some(first - 1)),
            // A stamp that is not reached is a packet without a token; a guard that is not reached is none.
            (_, Side::Egress) => Ok(None),
            // It keeps its place, wherever that is.
            (_, Side::Ingress) if !self.attached(link, instance)?.is_empty() => Ok(None),
            (_, Side::Ingress) => bail!(
                "attaching the guard to {} ingress: a filter of priority 1 is there, in front of which there is no place, \
                 and it may let packets pass the guard by; give it another priority, or use --hook xdp, or say where the \
                 guard is to stand with --priority",
                link.name
            ),
        }
    }

    /// Puts back what was there before an attach: filters of ours in their places, or none, and no qdisc of ours.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn undo(&mut self, lock: &Lock, link: &Link, instance: &str, attachment: &Attachment) -> Result<()> {
        self.put(link, &attachment.previous)?;
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

    /// Puts filters of ours into their places, whatever of ours is there.
    fn put(&mut self, link: &Link, filters: &[(Filter, OwnedFd)]) -> Result<()> {
        let there = self.netlink.filters(link.index, self.side)?;
        // One that never left may be one that the kernel does not let us replace.
        for (filter, program) in filters.iter().filter(|(filter, _)| !there.contains(filter)) {
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
        Ok(())
    }

    /// Removes our filters of this instance for something that is in their place, and with them the clsact qdisc if we
    /// made it and nobody else uses it.
    ///
    /// # Errors
    /// The kernel refused; then those that were removed are back.
    pub fn take(&mut self, lock: &Lock, link: &Link, instance: &str) -> Result<Taken> {
        let ours = self.attached(link, instance)?;
        if ours.is_empty() {
            return Ok(Taken::new());
        }
        let taken = hold_programs(&ours)?;
        let removed = self.detach(lock, link, instance).and_then(|_| self.destroy_clsact(lock, link));
        match removed {
            Ok(_) => Ok(taken),
            Err(error) => {
                self.put_back(link, &taken)?;
                Err(error)
            }
        }
    }

    /// Puts back what was removed.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn put_back(&mut self, link: &Link, taken: &Taken) -> Result<()> {
        if !taken.is_empty() {
            self.make_clsact(link)?;
        }
        self.put(link, taken)
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
        if !self.netlink.has_clsact(link.index)? {
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
        if self.netlink.has_clsact(link.index)? {
            return Ok(false);
        }
        let doing = format!("making a clsact qdisc on {}", link.name);
        match self.netlink.add_clsact(link.index, OUR_CHAIN) {
            Ok(()) => Ok(true),
            // Somebody was faster, or there is the older kind of qdisc, which has no egress.
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                if self.netlink.has_clsact(link.index)? {
                    return Ok(false);
                }
                bail!(
                    "{doing}: it has an ingress qdisc, which has no egress side and excludes clsact; clsact does \
                     all that it does, so replace it, and add again the filters on it, which go with it: \
                     {1} qdisc del dev {0} ingress; {1} qdisc add dev {0} clsact",
                    link.name,
                    tool("tc")
                )
            }
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => {
                bail!("{doing}: the interface has just gone")
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
        let Err(error) = removed else { return Ok(()) };
        // As with a filter.
        if self.netlink.has_clsact(link.index).is_ok_and(|has| !has) {
            return Ok(());
        }
        let what = format!("removing the clsact qdisc of {}{}", link.name, kernel_said(&said));
        Err(error).context(what)
    }

    /// One that was listed a moment ago.
    fn remove_filter(&mut self, link: &Link, filter: &Filter) -> Result<()> {
        let mut hook = TcHook::new(self.netns.as_fd());
        hook.ifindex(link.index.cast_signed())
            .attach_point(self.side.point())
            .priority(filter.priority.into())
            .handle(filter.handle);
        let (removed, said) = messages(|| hook.detach());
        let Err(error) = removed else { return Ok(()) };
        // What has just gone, alone or with the qdisc or the interface, is removed. The kernel has a number for each, and
        // uses them for other reasons too; so what counts is what is there.
        if self.netlink.filters(link.index, self.side).is_ok_and(|there| !there.contains(filter)) {
            return Ok(());
        }
        Err(error).with_context(|| {
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
        let filters = first_chain(&mut self.netlink, link.index, self.side).unwrap_or_default();
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

/// Keeps the programs of filters loaded; of those that are still there.
fn hold_programs(filters: &[Attached]) -> Result<Vec<(Filter, OwnedFd)>> {
    let hold = |ours: &Attached| Ok(keep(ours.program)?.map(|program| (ours.filter.clone(), program)));
    filters.iter().filter_map(|ours| hold(ours).transpose()).collect()
}

/// The kernel's own explanation, which libbpf prints, if there was one.
fn kernel_said(log: &str) -> String {
    let reason = log.lines().find_map(|line| line.split_once("Kernel error message: "));
    reason.map_or(String::new(), |(_, reason)| format!(" ({})", reason.trim()))
}
