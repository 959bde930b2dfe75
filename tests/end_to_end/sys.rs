//! The few system calls that neither std nor socket2 has. All unsafe code of these tests is here.

use std::ffi::CStr;
use std::fs::{File, OpenOptions};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use anyhow::{Context, Result, ensure};
use libbpf_rs::{TC_EGRESS, TC_INGRESS, TcAttachPoint, TcHook};
use socket2::{MaybeUninitSlice, MsgHdrMut, SockAddr, Socket};

/// Does something again that a signal ended. The kernel goes on by itself only where there is no timeout, and the signal may
/// be one that nobody handles: the SIGCHLD of a child that another thread has started.
pub fn uninterrupted<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// Sets a socket option that is a plain run of bytes.
pub fn set_option(socket: &impl AsRawFd, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    // SAFETY: the kernel reads `value.len()` bytes from `value` and keeps no pointer to them.
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            value.len() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads a socket option of at most `max` bytes.
pub fn get_option(socket: &impl AsRawFd, level: i32, name: i32, max: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0u8; max];
    let mut len = max as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes, which is the size of `value`, and says how many.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    value.truncate(len as usize);
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Binds an AF_PACKET socket to one interface and all protocols.
pub fn bind_packet(socket: &Socket, interface: &str) -> Result<()> {
    let ifindex = nix::net::if_::if_nametoindex(interface).with_context(|| interface.to_string())?;
    // SAFETY: the storage is larger than any kind of address, zero is a value of every field, and the length
    // is that of the kind that was written.
    let (_, addr) = unsafe {
        SockAddr::try_init(|storage, len| {
            let addr = storage.cast::<libc::sockaddr_ll>();
            (*addr).sll_family = libc::AF_PACKET as u16;
            (*addr).sll_protocol = (libc::ETH_P_ALL as u16).to_be();
            (*addr).sll_ifindex = ifindex as i32;
            *len = size_of::<libc::sockaddr_ll>() as libc::socklen_t;
            Ok(())
        })?
    };
    socket.bind(&addr).with_context(|| format!("binding a packet socket to {interface}"))
}

/// Type and control information of the VLAN tag that the device keeps beside a frame.
pub type Tag = (u16, u16);

/// Receives a frame from an AF_PACKET socket with PACKET_AUXDATA.
pub fn receive_frame(socket: &Socket) -> io::Result<(Vec<u8>, Option<Tag>)> {
    uninterrupted(|| receive_frame_once(socket))
}

fn receive_frame_once(socket: &Socket) -> io::Result<(Vec<u8>, Option<Tag>)> {
    let mut frame = vec![MaybeUninit::uninit(); 1 << 16];
    let mut control = [MaybeUninit::uninit(); 256];
    let (frame_len, control_len) = {
        let mut buffers = [MaybeUninitSlice::new(&mut frame)];
        let mut message = MsgHdrMut::new().with_buffers(&mut buffers).with_control(&mut control);
        let len = socket.recvmsg(&mut message, 0)?;
        (len, message.control_len())
    };
    // SAFETY: the kernel has written this much of both.
    let written =
        |bytes: &[MaybeUninit<u8>]| bytes.iter().map(|b| unsafe { b.assume_init() }).collect::<Vec<_>>();
    Ok((written(&frame[..frame_len]), tag_of(&written(&control[..control_len]))))
}

/// Finds the tag in control data: a `struct cmsghdr` with a `struct tpacket_auxdata` behind it, the only kind
/// of message that was asked for.
fn tag_of(control: &[u8]) -> Option<Tag> {
    const HEADER: usize = size_of::<libc::cmsghdr>();
    let u16_at = |at: usize| Some(u16::from_ne_bytes(control.get(at..at + 2)?.try_into().ok()?));
    let status = u32::from_ne_bytes(control.get(HEADER..HEADER + 4)?.try_into().ok()?);
    if status & libc::TP_STATUS_VLAN_VALID == 0 {
        return None;
    }
    Some((u16_at(HEADER + 18)?, u16_at(HEADER + 16)?))
}

/// Makes a tun device, without packet information, in the network namespace of the calling thread. It lives as
/// long as the file.
pub fn open_tun(name: &str) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).open("/dev/net/tun").context("/dev/net/tun")?;
    // `struct ifreq`: the name, then the flags, in the size that the kernel copies.
    let mut request = [0u8; 40];
    request[..name.len()].copy_from_slice(name.as_bytes());
    let flags = (libc::IFF_TUN | libc::IFF_NO_PI) as u16;
    request[libc::IFNAMSIZ..libc::IFNAMSIZ + 2].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: the kernel reads and writes `struct ifreq`, which is 40 bytes, and keeps no pointer to it.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF, request.as_mut_ptr()) };
    if result < 0 {
        return Err(io::Error::last_os_error()).with_context(|| format!("making the tun device {name}"));
    }
    Ok(file)
}

/// Changes the type of a tun device that is down, one of ARPHRD_.
pub fn set_link_type(device: &File, link_type: u16) -> Result<()> {
    // SAFETY: the argument is a number, and the kernel keeps nothing.
    let result = unsafe { libc::ioctl(device.as_raw_fd(), libc::TUNSETLINK, libc::c_int::from(link_type)) };
    if result < 0 {
        return Err(io::Error::last_os_error()).context("changing the type of a tun device");
    }
    Ok(())
}

/// An instruction: opcode, registers and immediate value, as instruction-set.rst of the kernel has them.
type Instruction = (u8, u8, i32);

fn load(kind: libbpf_sys::bpf_prog_type, name: &CStr, code: &[Instruction]) -> Result<OwnedFd> {
    let bytes: Vec<u8> = code
        .iter()
        .flat_map(|(opcode, registers, value)| {
            let [a, b, c, d] = value.to_ne_bytes();
            [*opcode, *registers, 0, 0, a, b, c, d]
        })
        .collect();
    // SAFETY: the strings end with a zero, `bytes` holds as many instructions of 8 bytes as is said, and libbpf
    // takes a null pointer for no options. The descriptor is new and nobody else's.
    unsafe {
        let fd = libbpf_sys::bpf_prog_load(
            kind,
            name.as_ptr(),
            c"GPL".as_ptr(),
            bytes.as_ptr().cast(),
            code.len() as libbpf_sys::size_t,
            std::ptr::null_mut(),
        );
        ensure!(fd >= 0, "loading the program {name:?}: {}", io::Error::from_raw_os_error(-fd));
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Loads somebody else's XDP program, which lets everything pass, and is called `foreign_xdp`.
pub fn load_foreign_xdp() -> Result<OwnedFd> {
    const XDP_PASS: i32 = 2;
    load(libbpf_sys::BPF_PROG_TYPE_XDP, c"foreign_xdp", &[(0xb7, 0, XDP_PASS), (0x95, 0, 0)])
}

/// Puts an XDP program on an interface, with flags of `XDP_FLAGS_`.
pub fn attach_xdp(interface: &str, program: &OwnedFd, flags: u32) -> Result<()> {
    let ifindex = nix::net::if_::if_nametoindex(interface)?.cast_signed();
    // SAFETY: libbpf takes a null pointer for no options.
    let result = unsafe { libbpf_sys::bpf_xdp_attach(ifindex, program.as_raw_fd(), flags, std::ptr::null()) };
    ensure!(result == 0, "attaching to {interface}: {}", io::Error::from_raw_os_error(-result));
    Ok(())
}

/// The same by a link, which is there until it is closed.
pub fn link_xdp(interface: &str, program: &OwnedFd) -> Result<OwnedFd> {
    let ifindex = nix::net::if_::if_nametoindex(interface)?.cast_signed();
    // SAFETY: libbpf takes a null pointer for no options. The descriptor is new and nobody else's.
    unsafe {
        let fd =
            libbpf_sys::bpf_link_create(program.as_raw_fd(), ifindex, libbpf_sys::BPF_XDP, std::ptr::null());
        ensure!(fd >= 0, "linking to {interface}: {}", io::Error::from_raw_os_error(-fd));
        Ok(OwnedFd::from_raw_fd(fd))
    }
}

/// Puts a filter in front of all others at the egress of an interface that pushes these VLAN tags, type and
/// control information, and lets the next filter go on. The qdisc is made as well.
pub fn attach_vlan_push(interface: &str, tags: &[Tag]) -> Result<OwnedFd> {
    const VLAN_PUSH: i32 = libbpf_sys::BPF_FUNC_skb_vlan_push as i32;
    const TC_ACT_UNSPEC: i32 = -1;
    let ifindex = nix::net::if_::if_nametoindex(interface)?;
    let mov = |to: u8, value: i32| (0xb7, to, value);
    let mut code: Vec<Instruction> = vec![(0xbf, 0x16, 0)];
    for (kind, control) in tags {
        code.extend([(0xbf, 0x61, 0), mov(2, kind.to_be().into()), mov(3, (*control).into())]);
        code.push((0x85, 0, VLAN_PUSH));
    }
    code.extend([mov(0, TC_ACT_UNSPEC), (0x95, 0, 0)]);
    attach_filter(ifindex, TC_EGRESS, c"vlan_push", &code)
}

/// Puts a filter at the ingress of an interface that sends on what comes in, by bpf_redirect_peer() or, as what comes in by
/// the other one, by bpf_redirect(). The qdisc is made as well.
pub fn attach_redirect(interface: &str, to: &str, as_peer: bool) -> Result<OwnedFd> {
    let index = |name: &str| anyhow::Ok(nix::net::if_::if_nametoindex(name)?);
    let (function, flags) = match as_peer {
        true => (libbpf_sys::BPF_FUNC_redirect_peer, 0),
        false => (libbpf_sys::BPF_FUNC_redirect, libbpf_sys::BPF_F_INGRESS),
    };
    let code: [Instruction; 4] = [
        (0xb7, 1, index(to)?.cast_signed()),
        (0xb7, 2, flags as i32),
        (0x85, 0, function as i32),
        (0x95, 0, 0),
    ];
    attach_filter(index(interface)?, TC_INGRESS, c"redirect", &code)
}

fn attach_filter(ifindex: u32, side: TcAttachPoint, name: &CStr, code: &[Instruction]) -> Result<OwnedFd> {
    let fd = load(libbpf_sys::BPF_PROG_TYPE_SCHED_CLS, name, code)?;
    let mut hook = TcHook::new(fd.as_fd());
    hook.ifindex(ifindex.cast_signed()).attach_point(side).priority(1).handle(1);
    hook.create().context("making clsact")?;
    hook.attach().context("attaching the filter")?;
    Ok(fd)
}

/// Does something in a network namespace that nothing else is in and that is gone afterwards.
pub fn in_nowhere<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).context("a new network namespace")?;
            Ok(f())
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Does something on one CPU, the first that is allowed.
pub fn on_one_cpu<T: Send>(f: impl FnOnce() -> T + Send) -> Result<T> {
    use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
    use nix::unistd::Pid;
    let this = Pid::from_raw(0);
    std::thread::scope(|scope| {
        let work = scope.spawn(|| {
            let allowed = sched_getaffinity(this)?;
            let first = (0..CpuSet::count()).find(|cpu| allowed.is_set(*cpu).unwrap_or(false));
            let mut one = CpuSet::new();
            one.set(first.context("no CPU is allowed")?)?;
            sched_setaffinity(this, &one)?;
            Ok(f())
        });
        work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
