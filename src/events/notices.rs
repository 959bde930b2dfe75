//! The kernel's notices that something has changed in a network namespace. They only say that it is time to look.

use std::io;
use std::os::fd::AsRawFd;

use anyhow::{Context, Result};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

/// What there are notices of: the multicast groups of include/uapi/linux/rtnetlink.h.
#[derive(Clone, Copy, Debug)]
pub(super) enum Of {
    Links = 1,
    Filters = 4,
}

/// Notices of the network namespace in which this was made, which is kept for as long.
#[derive(Debug)]
pub(super) struct Notices(Socket);

impl Notices {
    pub fn open(of: &[Of]) -> Result<Notices> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("opening a netlink socket for notices")?;
        socket.bind(&SocketAddr::new(0, 0)).context("binding a netlink socket for notices")?;
        for group in of {
            let asked = socket.add_membership(*group as u32);
            asked.context("asking for notices of interfaces and filters")?;
        }
        socket.set_non_blocking(true).context("preparing a netlink socket for notices")?;
        Ok(Notices(socket))
    }

    /// Takes all of them off the socket; a lost one (ENOBUFS) is as good as any.
    pub fn any(&self) -> Result<bool> {
        let mut any = false;
        let mut buffer = Vec::with_capacity(32 << 10);
        loop {
            buffer.clear();
            match self.0.recv(&mut buffer, 0) {
                Ok(_) => any = true,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(any),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => any = true,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    return Err(error)
                        .with_context(|| format!("reading notices from descriptor {}", self.0.as_raw_fd()));
                }
            }
        }
    }
}
