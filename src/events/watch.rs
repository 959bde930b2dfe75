//! Notices when an interface that we are attached to is renamed or disappears, when somebody removes our filter, or
//! destroys the instance. The kernel's notices only say that it is time to look; what is there then is what counts.

use std::fmt;
use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};
use serde::Serialize;

use crate::hooks::egress::{Egress, Hook};
use crate::hooks::netlink::Link;
use crate::state::{EventsOf, Identity, Instance, State};

/// Multicast groups of include/uapi/linux/rtnetlink.h.
const RTNLGRP_LINK: u32 = 1;
const RTNLGRP_TC: u32 = 4;

/// How often to look at tcx, of which the kernel gives no notice.
const UNNOTICED: Duration = Duration::from_secs(1);

/// What happened to an interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", content = "new_name", rename_all = "snake_case")]
pub enum Change {
    /// It has another name now.
    Renamed(String),
    /// It is not in this network namespace any more.
    Gone,
    /// It is there, but our filter is not.
    Detached,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Renamed(name) => write!(f, "renamed to {name}"),
            Change::Gone => {
                f.write_str("removed, or moved to another network namespace, and our filter is gone with it")
            }
            Change::Detached => f.write_str("our filter was removed"),
        }
    }
}

/// What a watch knows at its end, for who removes what is ours.
#[derive(Debug)]
pub struct Left {
    /// The interfaces that were still attached to at the last look.
    pub links: Vec<Link>,
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
    notices: Socket,
    state: &'a State,
    instance: &'a Instance,
    identity: Option<Identity>,
    links: Vec<Link>,
    /// When to look without a notice; never, if nothing is at tcx.
    next_look: Option<Instant>,
}

impl<'a> Watch<'a> {
    /// Begins to watch, in the namespace of the calling thread. The caller holds the lock of the state, so that the
    /// instance is the one that was attached.
    ///
    /// # Errors
    /// The kernel refused a netlink socket.
    pub fn start(state: &'a State, instance: &'a Instance, links: Vec<Link>) -> Result<Watch<'a>> {
        let mut notices = Socket::new(NETLINK_ROUTE).context("opening a netlink socket for notices")?;
        notices.bind(&SocketAddr::new(0, 0)).context("binding a netlink socket for notices")?;
        for group in [RTNLGRP_LINK, RTNLGRP_TC] {
            notices.add_membership(group).context("asking for notices of interfaces and filters")?;
        }
        notices.set_non_blocking(true).context("preparing a netlink socket for notices")?;
        let identity = instance.identity(EventsOf::Stamp);
        Ok(Watch { notices, state, instance, identity, links, next_look: Some(Instant::now()) })
    }

    /// What has changed since the last look. An interface that is gone or detached is not watched any more.
    ///
    /// # Errors
    /// The kernel refused to list what is there.
    pub fn changes(&mut self) -> Result<Vec<(String, Change)>> {
        let is_time = self.next_look.is_some_and(|next| Instant::now() >= next) || self.is_destroyed();
        if !self.has_notices()? && !is_time {
            return Ok(Vec::new());
        }
        let mut hooks = Egress::open(self.state)?;
        let present = hooks.links()?;
        let mut changes = Vec::new();
        let (mut kept, mut has_tcx) = (Vec::new(), false);
        for link in self.links.clone() {
            let Some(now) = present.iter().find(|now| now.index == link.index) else {
                changes.push((link.name, Change::Gone));
                continue;
            };
            if now.name != link.name {
                changes.push((link.name.clone(), Change::Renamed(now.name.clone())));
            }
            match hooks.hook_of(now, &self.instance.name)? {
                Some(hook) => {
                    has_tcx |= hook == Hook::Tcx;
                    kept.push(now.clone());
                }
                None => changes.push((now.name.clone(), Change::Detached)),
            }
        }
        self.links = kept;
        self.next_look = has_tcx.then(|| Instant::now() + UNNOTICED);
        Ok(changes)
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
        Left { links: self.links, identity: self.identity }
    }

    /// Takes all notices off the socket; a lost one (ENOBUFS) is as good as any.
    fn has_notices(&self) -> Result<bool> {
        let mut any = false;
        let mut buffer = Vec::with_capacity(32 << 10);
        loop {
            buffer.clear();
            match self.notices.recv(&mut buffer, 0) {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(error).with_context(|| {
                        format!("reading notices from descriptor {}", self.notices.as_raw_fd())
                    });
                }
            }
        }
    }
}
