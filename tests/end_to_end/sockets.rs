//! TCP as an application uses it: listeners that keep the SYN of each connection, and clients.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use libtest_mimic::Trial;
use nix::sys::pthread::{pthread_kill, pthread_self};
use nix::sys::signal::Signal;
use nix::unistd::gettid;
use socket2::{Domain, Protocol, SockAddr, Socket, Type};

use crate::lab::{Lab, PATIENCE, wait_until};
use crate::segment::Segment;
use crate::support::ensure_eq;
use crate::sys;
use crate::world::{Family, World};
use crate::{NET, case};

pub fn cases() -> Vec<Trial> {
    vec![case("a wait for a connection goes on after a signal", NET, a_wait_goes_on_after_a_signal)]
}

/// How long a connect may take that must fail because its SYN is dropped. The first retransmission comes later.
pub const DROPPED: Duration = Duration::from_millis(300);

/// A listening socket. Everything on it is bounded by [`PATIENCE`].
pub struct Listener {
    pub socket: Socket,
    pub addr: SocketAddr,
}

/// A connection at the server, and the headers of the SYN that opened it.
pub struct Accepted {
    pub stream: TcpStream,
    pub syn: Segment,
}

impl Listener {
    /// Listens in the server, on a port that the kernel chooses.
    pub fn open(world: &World, family: Family) -> Result<Listener> {
        Listener::open_with(&world.lab, &world.server, (world.server_addr(family), 0).into(), |_| Ok(()))
    }

    /// Listens at this address, with a socket prepared by `prepare`.
    pub fn open_with(
        lab: &Lab,
        ns: &str,
        addr: SocketAddr,
        prepare: impl FnOnce(&Socket) -> Result<()> + Send,
    ) -> Result<Listener> {
        let socket = lab.within(ns, || {
            let socket = Socket::new(Domain::for_address(addr), Type::STREAM, Some(Protocol::TCP))?;
            socket.set_reuse_address(true)?;
            socket.set_read_timeout(Some(PATIENCE))?;
            sys::set_option(&socket, libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, &1i32.to_ne_bytes())
                .context("TCP_SAVE_SYN")?;
            prepare(&socket)?;
            socket.bind(&addr.into()).with_context(|| format!("binding {addr}"))?;
            socket.listen(1024)?;
            Ok(socket)
        })?;
        let addr = socket.local_addr()?.as_socket().context("a socket without an address")?;
        Ok(Listener { socket, addr })
    }

    /// Takes the next connection.
    pub fn accept(&self) -> Result<Accepted> {
        let (socket, _) = sys::uninterrupted(|| self.socket.accept()).context("accepting a connection")?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let saved =
            sys::get_option(&socket, libc::IPPROTO_TCP, libc::TCP_SAVED_SYN, 512).context("TCP_SAVED_SYN")?;
        Ok(Accepted { syn: Segment::from_ip(&saved).context("the saved SYN")?, stream: socket.into() })
    }
}

/// Whether it is only that nothing came in time.
pub fn is_timeout(error: &anyhow::Error) -> bool {
    let kind = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
    matches!(kind, Some(std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut))
}

/// Connects from a namespace.
pub fn connect(lab: &Lab, ns: &str, to: SocketAddr, timeout: Duration) -> Result<TcpStream> {
    connect_with(lab, ns, to, timeout, |_| Ok(()))
}

/// Connects from a namespace, with a socket prepared by `prepare`.
pub fn connect_with(
    lab: &Lab,
    ns: &str,
    to: SocketAddr,
    timeout: Duration,
    prepare: impl FnOnce(&Socket) -> Result<()> + Send,
) -> Result<TcpStream> {
    lab.within(ns, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        prepare(&socket)?;
        socket
            .connect_timeout(&SockAddr::from(to), timeout)
            .with_context(|| format!("connecting to {to}"))?;
        socket.set_read_timeout(Some(PATIENCE))?;
        Ok(socket.into())
    })
}

/// Opens a connection from the client, sends data both ways, and returns the SYN that the server got.
pub fn exchange(world: &World, listener: &Listener) -> Result<Segment> {
    let mut client = connect(&world.lab, &world.client, listener.addr, PATIENCE)?;
    let mut server = listener.accept()?;
    ensure_eq!(server.syn.dst, listener.addr, "destination of the SYN");
    ensure_eq!(server.syn.src, server.stream.peer_addr()?, "source of the SYN");
    echo(&mut client, &mut server.stream)?;
    Ok(server.syn)
}

/// Sends data that fits the buffers there and back.
pub fn echo(client: &mut TcpStream, server: &mut TcpStream) -> Result<()> {
    let sent: Vec<u8> = (0..20_000u32).map(|at| (at * 7) as u8).collect();
    let mut got = vec![0; sent.len()];
    client.write_all(&sent)?;
    server.read_exact(&mut got).context("receiving at the server")?;
    ensure_eq!(got == sent, true, "what the server got is what was sent");
    server.write_all(&got)?;
    got.fill(0);
    client.read_exact(&mut got).context("receiving at the client")?;
    ensure_eq!(got == sent, true, "what came back is what was sent");
    Ok(())
}

/// The kernel ends a wait that has a timeout for any signal, also where the handler asks for it to go on.
fn a_wait_goes_on_after_a_signal() -> Result<()> {
    let world = World::new(true)?;
    let listener = Listener::open(&world, Family::V4)?;
    let heard = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGUSR1, Arc::clone(&heard))?;
    let (tell, told) = channel();
    thread::scope(|scope| {
        let waits = scope.spawn(|| {
            tell.send((pthread_self(), gettid()))?;
            listener.accept()
        });
        let (thread, id) = told.recv()?;
        wait_until("a thread that waits", || {
            let stat = std::fs::read_to_string(format!("/proc/self/task/{id}/stat"))?;
            Ok(stat.contains(") S ").then_some(()))
        })?;
        pthread_kill(thread, Signal::SIGUSR1)?;
        wait_until("the signal", || Ok(heard.load(Ordering::Relaxed).then_some(())))?;
        let _client = connect(&world.lab, &world.client, listener.addr, PATIENCE)?;
        waits.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)).map(drop)
    })
}

/// Fails unless the connect is not answered. The server's kernel has to agree: an answer may also be late.
pub fn expect_dropped(world: &World, to: SocketAddr) -> Result<()> {
    const OPENED: &str = "TcpPassiveOpens";
    let before = world.server_counter(OPENED)?;
    match connect(&world.lab, &world.client, to, DROPPED) {
        Ok(_) => anyhow::bail!("the connection to {to} was opened"),
        Err(error) => {
            let kind = error.root_cause().downcast_ref::<std::io::Error>().map(std::io::Error::kind);
            ensure_eq!(kind, Some(std::io::ErrorKind::TimedOut), "{error:#}");
            ensure_eq!(world.server_counter(OPENED)?, before, "connections opened at the server");
            Ok(())
        }
    }
}
