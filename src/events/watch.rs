//! Notices when an interface that we are attached to is renamed or disappears, when somebody removes our filter, or
//! destroys the instance. The kernel's notices only say that it is time to look; what is there then is what counts.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::Result;
use serde::Serialize;

use super::notices::{Notices, Of};
use crate::hooks::egress::{Egress, Hook};
use crate::hooks::netlink::Link;
use crate::hooks::tcx;
use crate::state::{EventsOf, Identity, Instance, State, instance_flag};

/// How often to look at tcx, of which the kernel gives no notice.
const UNNOTICED: Duration = Duration::from_secs(1);

/// What happened to an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Change {
    /// It has another name now.
    Renamed {
        /// That name.
        new_name: String,
    },
    /// It is not in this network namespace any more, nor in another one that can be found.
    Gone {
        /// Our program was at tcx: if the interface was moved, so was the program.
        #[serde(skip)]
        was_at_tcx: bool,
    },
    /// It is in another network namespace, and so is our program, which was at tcx.
    Moved {
        /// Its name there.
        new_name: String,
        /// How `--netns` can be told that namespace.
        netns: String,
        /// The flag that leads to our instance, with a space in front.
        #[serde(skip)]
        instance_flag: String,
    },
    /// It is there, but our filter is not.
    Detached,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Renamed { new_name } => write!(f, "renamed to {new_name}"),
            Change::Gone { was_at_tcx: false } => {
                f.write_str("removed, or moved to another network namespace, and our filter is gone with it")
            }
            Change::Gone { was_at_tcx: true } => f.write_str(
                "removed, or moved to a network namespace that cannot be found, where our program goes on stamping",
            ),
            Change::Moved { new_name, netns, instance_flag } => write!(
                f,
                "moved to network namespace {netns}, where our program goes on stamping; to end that: netoken --netns {netns} \
                 --iface {new_name}{instance_flag} --destroy"
            ),
            Change::Detached => f.write_str("our filter was removed"),
        }
    }
}

/// An interface that is watched.
#[derive(Clone, Debug)]
pub struct Watched {
    /// As it was at the last look.
    pub link: Link,
    /// Id of our program, if it is at tcx.
    pub at_tcx: Option<u32>,
}

/// What a watch knows at its end, for who removes what is ours.
#[derive(Debug)]
pub struct Left {
    /// The interfaces that were still attached to at the last look.
    pub links: Vec<Watched>,
    /// Ids of our programs that have gone elsewhere with their interfaces.
    pub moved: Vec<u32>,
    identity: Option<Identity>,
}

impl Left {
    /// Whether this is another instance of the same name: then nothing that is attached is ours.
    pub fn is_replaced_by(&self, instance: &Instance) -> bool {
        // Without pins, which somebody may have lost, it is the same.
        let now = instance.identity(EventsOf::Stamp);
        now.is_some() && now != self.identity
    }
}

/// Interfaces of one network namespace that are watched.
pub struct Watch<'a> {
    notices: Notices,
    state: &'a State,
    instance: &'a Instance,
    identity: Option<Identity>,
    links: Vec<Watched>,
    moved: Vec<u32>,
    /// When to look without a notice; never, if nothing is at tcx.
    next_look: Option<Instant>,
}

impl<'a> Watch<'a> {
    /// Begins to watch, in the namespace of the calling thread. The caller holds the lock of the state, so that the
    /// instance is the one that was attached.
    ///
    /// # Errors
    /// The kernel refused a netlink socket, or to list what is there.
    pub fn start(state: &'a State, instance: &'a Instance, links: Vec<Link>) -> Result<Watch<'a>> {
        let notices = Notices::open(&[Of::Links, Of::Filters])?;
        let mut hooks = Egress::open(state)?;
        let links = links.into_iter().map(|link| {
            let stamp = hooks.stamp_of(&link, &instance.name)?;
            Ok(Watched { link, at_tcx: at_tcx(stamp) })
        });
        Ok(Watch {
            notices,
            state,
            instance,
            identity: instance.identity(EventsOf::Stamp),
            links: links.collect::<Result<_>>()?,
            moved: Vec::new(),
            next_look: Some(Instant::now()),
        })
    }

    /// What has changed since the last look. An interface that is gone or detached is not watched any more.
    ///
    /// # Errors
    /// The kernel refused to list what is there.
    pub fn changes(&mut self) -> Result<Vec<(String, Change)>> {
        let is_time = self.next_look.is_some_and(|next| Instant::now() >= next) || self.is_destroyed();
        if !self.notices.any()? && !is_time {
            return Ok(Vec::new());
        }
        let mut hooks = Egress::open(self.state)?;
        let present = hooks.links()?;
        let mut changes = Vec::new();
        let mut kept = Vec::new();
        for Watched { link, at_tcx: program } in self.links.clone() {
            let Some(now) = present.iter().find(|now| now.index == link.index) else {
                self.moved.extend(program);
                changes.push((link.name, self.where_to(program)));
                continue;
            };
            if now.name != link.name {
                changes.push((link.name, Change::Renamed { new_name: now.name.clone() }));
            }
            match hooks.stamp_of(now, &self.instance.name)? {
                Some(stamp) => kept.push(Watched { link: now.clone(), at_tcx: at_tcx(Some(stamp)) }),
                None => changes.push((now.name.clone(), Change::Detached)),
            }
        }
        let has_tcx = kept.iter().any(|watched| watched.at_tcx.is_some());
        self.links = kept;
        self.next_look = has_tcx.then(|| Instant::now() + UNNOTICED);
        Ok(changes)
    }

    /// What became of an interface that is not here any more, which had that program at tcx.
    fn where_to(&self, program: Option<u32>) -> Change {
        match program.and_then(tcx::whereabouts) {
            Some((netns, link)) => Change::Moved {
                new_name: link.name,
                netns: netns.called(),
                instance_flag: instance_flag(&self.instance.name),
            },
            None => Change::Gone { was_at_tcx: program.is_some() },
        }
    }

    /// Whether any interface is still attached to.
    pub fn has_links(&self) -> bool {
        !self.links.is_empty()
    }

    /// Whether the instance was destroyed, which may have been attached again since: of that nothing comes to us.
    pub fn is_destroyed(&self) -> bool {
        self.instance.identity(EventsOf::Stamp) != self.identity
    }

    /// Which instance it is.
    pub fn identity(&self) -> Option<Identity> {
        self.identity
    }

    /// Ends it.
    pub fn end(self) -> Left {
        Left { links: self.links, moved: self.moved, identity: self.identity }
    }
}

fn at_tcx(stamp: Option<(Hook, u32)>) -> Option<u32> {
    stamp.filter(|(hook, _)| *hook == Hook::Tcx).map(|(_, program)| program)
}
