//! The way out of an interface, on which the stamp is at clsact or at tcx. Whoever asks for one gets it, and what is at
//! the other goes when the new one works: a SYN that meets both is stamped once.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use anyhow::{Context, Result};
use clap::ValueEnum;

use super::clsact::{self, Attachment, Hooks, Place, Taken};
use super::loaded::{Loaded, Programs, look_with};
use super::netlink::{Filter, Link, Netlink, Side};
use super::qdisc::Qdisc;
use super::tcx::{
    AttachedTcx, TakenTcx, TcxAttachment, attach_tcx, attached_tcx, ids, put_back_tcx, take_tcx, undo_tcx,
};
use crate::state::{Lock, State};

/// Where on the way out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Hook {
    /// A filter of the clsact qdisc, which `tc filter show` lists.
    Clsact,
    /// In front of all filters, from Linux 6.6 on.
    Tcx,
}

impl Hook {
    /// As a query shows it.
    pub fn name(self) -> &'static str {
        match self {
            Hook::Clsact => "clsact egress",
            Hook::Tcx => "tcx egress",
        }
    }

    /// What puts ours in front of the tcx programs of others.
    pub fn to_the_front(self) -> &'static str {
        match self {
            Hook::Clsact => "--hook tcx",
            // Attaching again keeps the place.
            Hook::Tcx => "--detach and another --attach --hook tcx",
        }
    }
}

/// A stamp of ours.
#[derive(Clone, Debug)]
pub struct Stamp {
    /// Where it is.
    pub hook: Hook,
    /// Its place among the filters; none at tcx.
    pub filter: Option<Filter>,
    /// Id of its program.
    pub program: u32,
    /// What is known of its program.
    pub loaded: Loaded,
    /// Foreign filters that see a packet first and may end its way.
    pub before: usize,
    /// The same at tcx.
    pub tcx_before: usize,
}

/// Our stamps on the way out of an interface, in the order in which they run.
///
/// # Errors
/// The kernel refused to list them.
pub fn stamps(netlink: &mut Netlink, ifindex: u32, programs: &Programs) -> Result<Vec<Stamp>> {
    let of_tcx = |ours: AttachedTcx| Stamp {
        hook: Hook::Tcx,
        filter: None,
        program: ours.program,
        loaded: ours.loaded,
        before: 0,
        tcx_before: ours.before,
    };
    let of_clsact = |ours: clsact::Attached| Stamp {
        hook: Hook::Clsact,
        filter: Some(ours.filter),
        program: ours.program,
        loaded: ours.loaded,
        before: ours.before,
        tcx_before: ours.tcx_before,
    };
    let tcx = attached_tcx(ifindex, programs)?.into_iter().map(of_tcx);
    let filters = clsact::attached(netlink, ifindex, Side::Egress, programs)?.into_iter().map(of_clsact);
    Ok(tcx.chain(filters).collect())
}

/// The interfaces of one network namespace, and how to change what stamps on their way out.
pub struct Egress<'a> {
    state: &'a State,
    clsact: Hooks<'a>,
}

/// What an attach did, so that it can be taken back.
#[derive(Debug)]
pub enum Done {
    /// A filter, and what was at tcx.
    Clsact(Attachment, Vec<TakenTcx>),
    /// At tcx, by this program, and what was at clsact.
    Tcx(OwnedFd, TcxAttachment, Taken),
}

impl Done {
    /// Where it is now.
    pub fn hook(&self) -> Hook {
        match self {
            Done::Clsact(..) => Hook::Clsact,
            Done::Tcx(..) => Hook::Tcx,
        }
    }

    /// Its place among the filters; none at tcx.
    pub fn filter(&self) -> Option<&Filter> {
        match self {
            Done::Clsact(attachment, _) => Some(&attachment.filter),
            Done::Tcx(..) => None,
        }
    }

    /// It took the place of one of ours.
    pub fn replaced(&self) -> bool {
        match self {
            Done::Clsact(attachment, _) => attachment.replaced(),
            Done::Tcx(_, attachment, _) => attachment.replaced(),
        }
    }

    /// One of ours was at the other hook, and is gone for this one.
    pub fn moved(&self) -> bool {
        match self {
            Done::Clsact(_, taken) => !taken.is_empty(),
            Done::Tcx(_, _, taken) => !taken.is_empty(),
        }
    }

    /// We made a clsact qdisc for it.
    pub fn made_qdisc(&self) -> bool {
        matches!(self, Done::Clsact(attachment, _) if attachment.made_qdisc)
    }

    /// Filters of others that see a packet first and may end its way.
    pub fn filters_before(&self) -> usize {
        match self {
            Done::Clsact(attachment, _) => attachment.before,
            Done::Tcx(..) => 0,
        }
    }

    /// Programs of others at tcx that see a packet first and may end its way.
    pub fn tcx_before(&self) -> usize {
        match self {
            Done::Clsact(attachment, _) => attachment.tcx_before,
            Done::Tcx(_, attachment, _) => attachment.before,
        }
    }
}

impl<'a> Egress<'a> {
    /// In the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn open(state: &'a State) -> Result<Self> {
        Ok(Egress { state, clsact: Hooks::open(state, Side::Egress)? })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// The kernel refused to list them.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        self.clsact.links()
    }

    /// Where a stamp of an instance is on the way out, or one whose instance is gone, and the id of its program; none if
    /// there is none.
    ///
    /// # Errors
    /// The kernel refused to list them.
    pub fn stamp_of(&mut self, link: &Link, instance: &str) -> Result<Option<(Hook, u32)>> {
        if let Some(ours) = self.at_tcx(link, instance)?.first() {
            return Ok(Some((Hook::Tcx, ours.program)));
        }
        let filters = self.clsact.attached(link, instance)?;
        Ok(filters.first().map(|ours| (Hook::Clsact, ours.program)))
    }

    /// What is known of the programs that a new one of an instance takes the place of: its own, and those whose instance
    /// is gone.
    ///
    /// # Errors
    /// The kernel refused to list them.
    pub fn loaded(&mut self, link: &Link, instance: &str) -> Result<Vec<Loaded>> {
        let at_tcx = self.at_tcx(link, instance)?.into_iter().map(|ours| ours.loaded);
        let filters = self.clsact.attached(link, instance)?.into_iter().map(|ours| ours.loaded);
        Ok(at_tcx.chain(filters).collect())
    }

    fn at_tcx(&self, link: &Link, instance: &str) -> Result<Vec<AttachedTcx>> {
        // Most interfaces have nothing there, and to list all programs is what takes time.
        if ids(link.index, Side::Egress)?.is_empty() {
            return Ok(Vec::new());
        }
        let mut found = look_with(self.state, |programs| attached_tcx(link.index, programs))?;
        found.retain(|ours| ours.loaded.instance.as_deref().is_none_or(|name| name == instance));
        Ok(found)
    }

    /// Where a stamp of an instance goes: where it is, if nothing is `wanted`. A place is one at clsact.
    ///
    /// # Errors
    /// The kernel refused to list what is there.
    pub fn hook_for(&self, link: &Link, instance: &str, wanted: Option<Hook>, place: Place) -> Result<Hook> {
        if let Some(wanted) = wanted {
            return Ok(wanted);
        }
        let stays = !place.is_chosen() && !self.at_tcx(link, instance)?.is_empty();
        Ok(if stays { Hook::Tcx } else { Hook::Clsact })
    }

    /// Attaches `program`, in the place of ours if that is there already. Afterwards exactly one stamp of this instance is on
    /// the way out.
    ///
    /// # Errors
    /// The kernel refused; then everything is as it was.
    pub fn attach(
        &mut self,
        lock: &Lock,
        link: &Link,
        instance: &str,
        program: BorrowedFd<'_>,
        hook: Hook,
        place: Place,
    ) -> Result<Done> {
        let at_tcx = self.at_tcx(link, instance)?;
        match hook {
            Hook::Clsact => {
                let attachment = self.clsact.attach(lock, link, instance, program, place)?;
                match take_tcx(lock, link, &at_tcx) {
                    Ok(taken) => Ok(Done::Clsact(attachment, taken)),
                    Err(error) => {
                        self.clsact.undo(lock, link, instance, &attachment)?;
                        Err(error)
                    }
                }
            }
            Hook::Tcx => {
                let own = program.try_clone_to_owned().context("keeping the program open")?;
                let attachment = attach_tcx(lock, link, program, &at_tcx)?;
                match self.clsact.take(lock, link, instance) {
                    Ok(taken) => Ok(Done::Tcx(own, attachment, taken)),
                    Err(error) => {
                        undo_tcx(lock, link, program, &attachment)?;
                        Err(error)
                    }
                }
            }
        }
    }

    /// Puts back what was there before an attach; first that, so that there is no moment without a stamp.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn undo(&mut self, lock: &Lock, link: &Link, instance: &str, done: &Done) -> Result<()> {
        match done {
            Done::Clsact(attachment, taken) => {
                put_back_tcx(link, taken)?;
                self.clsact.undo(lock, link, instance, attachment)
            }
            Done::Tcx(program, attachment, taken) => {
                self.clsact.put_back(link, taken)?;
                undo_tcx(lock, link, program.as_fd(), attachment)
            }
        }
    }

    /// Removes our stamps of this instance. Returns how many there were.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn detach(&mut self, lock: &Lock, link: &Link, instance: &str) -> Result<usize> {
        let at_tcx = take_tcx(lock, link, &self.at_tcx(link, instance)?)?.len();
        Ok(at_tcx + self.clsact.detach(lock, link, instance)?)
    }

    /// Removes the clsact qdisc if we made it and nobody else uses it.
    ///
    /// # Errors
    /// The kernel refused.
    pub fn destroy_clsact(&mut self, lock: &Lock, link: &Link) -> Result<Qdisc> {
        self.clsact.destroy_clsact(lock, link)
    }
}
