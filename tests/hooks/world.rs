//! Two hosts on one cable: the client, on whose interface `c0` things are attached, and the server.

use std::io::ErrorKind;
use std::mem::size_of;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::process::Output;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::{Lab, PATIENCE, expect_count, wait_until};
use crate::look::counter;

/// Include/uapi/linux/tcp.h.
const TCP_SAVE_SYN: libc::c_int = 27;
const TCP_SAVED_SYN: libc::c_int = 28;

/// The server's address, and a port on which nobody listens.
const NOBODY: &str = "10.77.0.2:9";

pub struct World {
    pub lab: Lab,
    /// The client's namespace.
    pub ns: String,
    pub server_ns: String,
}

impl World {
    pub fn new() -> Result<World> {
        let mut lab = Lab::new()?;
        let ns = lab.netns("client")?;
        let server_ns = lab.netns("server")?;
        lab.veth((&ns, "c0"), (&server_ns, "s0"), true)?;
        lab.addr(&ns, "c0", "10.77.0.1/24")?;
        lab.addr(&server_ns, "s0", "10.77.0.2/24")?;
        Ok(World { lab, ns, server_ns })
    }

    /// A second cable between the two, `c1` to `s1`.
    pub fn second_cable(&self) -> Result<()> {
        self.lab.veth((&self.ns, "c1"), (&self.server_ns, "s1"), true)?;
        self.lab.addr(&self.ns, "c1", "10.78.0.1/24")?;
        self.lab.addr(&self.server_ns, "s1", "10.78.0.2/24")
    }

    /// Runs netoken on the client; it has to succeed.
    pub fn ok(&self, args: &str) -> Result<String> {
        self.lab.ok(&self.args(args))
    }

    /// Runs netoken on the client.
    pub fn run(&self, args: &str) -> Result<Output> {
        self.lab.run(&self.args(args))
    }

    /// Runs netoken on the client; it has to fail. Returns what it said.
    pub fn fails(&self, args: &str) -> Result<String> {
        let output = self.run(args)?;
        let said = String::from_utf8(output.stderr)?;
        ensure!(output.status.code() == Some(1), "netoken {args}: {} with {said}", output.status);
        ensure!(!said.contains("panicked"), "netoken {args}: {said}");
        Ok(said)
    }

    /// Those arguments, on the client.
    pub fn args(&self, args: &str) -> String {
        format!("--netns {} {args}", self.ns)
    }

    /// Sends that many SYNs, to a port where nobody listens.
    pub fn syns(&self, count: usize) -> Result<()> {
        self.syns_to(NOBODY, count)
    }

    /// Sends that many SYNs to where nobody listens.
    pub fn syns_to(&self, addr: &str, count: usize) -> Result<()> {
        let addr: SocketAddr = addr.parse()?;
        self.lab.within(&self.ns, || {
            for _ in 0..count {
                match TcpStream::connect_timeout(&addr, PATIENCE) {
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
                    other => bail!("connecting to {addr}, where nobody listens: {other:?}"),
                }
            }
            Ok(())
        })
    }

    /// Fails unless an instance has counted so many SYNs of the client.
    pub fn expect_counter(&self, instance: &str, name: &str, wanted: u64, what: &str) -> Result<()> {
        expect_count(&self.ns, counter(&self.lab, &self.ns, instance, name)?, wanted, what)
    }

    /// A listener on the server that keeps every SYN.
    pub fn listen(&self, addr: &str) -> Result<TcpListener> {
        self.lab.within(&self.server_ns, || {
            let listener = TcpListener::bind(addr)?;
            let on: libc::c_int = 1;
            // SAFETY: the pointer and the length describe `on`.
            let result = unsafe {
                libc::setsockopt(
                    listener.as_raw_fd(),
                    libc::IPPROTO_TCP,
                    TCP_SAVE_SYN,
                    (&raw const on).cast(),
                    size_of::<libc::c_int>() as libc::socklen_t,
                )
            };
            ensure!(result == 0, "TCP_SAVE_SYN: {}", std::io::Error::last_os_error());
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
    }

    /// Connects once and returns the SYN that the server got, from its IP header on.
    pub fn one_syn(&self) -> Result<Vec<u8>> {
        let listener = self.listen("10.77.0.2:0")?;
        let addr = listener.local_addr()?;
        let _client = self.lab.within(&self.ns, || Ok(TcpStream::connect_timeout(&addr, PATIENCE)?))?;
        let server = accept(&listener)?;
        saved_syn(&server)
    }

    /// Connects once; the SYN has to bear that token.
    pub fn expect_token(&self, expected: &str, what: &str) -> Result<()> {
        let syn = self.one_syn()?;
        let found = token(&syn);
        ensure!(
            found.as_deref() == Some(expected),
            "{what}: {expected} expected, found {found:?} in {syn:02x?}"
        );
        Ok(())
    }
}

/// Accepts one connection, within bounds.
pub fn accept(listener: &TcpListener) -> Result<TcpStream> {
    wait_until("a connection to accept", || match listener.accept() {
        Ok((stream, _)) => Ok(Some(stream)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error).context("accepting"),
    })
}

/// The SYN that opened a connection, as the server's kernel kept it.
pub fn saved_syn(stream: &TcpStream) -> Result<Vec<u8>> {
    let mut syn = vec![0u8; 256];
    let mut len = syn.len() as libc::socklen_t;
    // SAFETY: the pointer and the length describe `syn`.
    let result = unsafe {
        libc::getsockopt(
            stream.as_raw_fd(),
            libc::IPPROTO_TCP,
            TCP_SAVED_SYN,
            syn.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    ensure!(result == 0, "TCP_SAVED_SYN: {}", std::io::Error::last_os_error());
    syn.truncate(len as usize);
    Ok(syn)
}

/// The token in a SYN, as hexadecimal digits, if there is one.
pub fn token(syn: &[u8]) -> Option<String> {
    let at = syn.windows(4).position(|bytes| bytes == [253, 12, 0x4e, 0x54])?;
    let token = syn.get(at + 4..at + 12)?;
    Some(token.iter().map(|byte| format!("{byte:02x}")).collect())
}
