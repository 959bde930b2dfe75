//! Speaks rtnetlink: which interfaces, qdiscs and filters there are, and making a clsact qdisc that can be told
//! from somebody else's.

use std::io;

use anyhow::{Context, Result, anyhow, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NLMSG_ERROR, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkExtentMask, LinkLayerType, LinkMessage};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

use super::replies::{self, answer, error_number, messages};

/// Of include/uapi/linux/rtnetlink.h.
const RTM_NEWCHAIN: u16 = 100;

/// How often to begin again if what is listed changes meanwhile.
const TRIES: usize = 20;

/// An interface, as far as attaching to it is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Identifies it within its network namespace.
    pub index: u32,
    /// Its name now.
    pub name: String,
    /// What it is also called: `ip link property add dev eth0 altname uplink`.
    pub alternative_names: Vec<String>,
    /// Its MTU in bytes.
    pub mtu_bytes: u32,
    /// Its ARPHRD type.
    pub layer: LinkLayerType,
    /// What `ip link add … type` calls it: `veth`, `vrf`; empty for hardware and the like.
    pub kind: String,
    /// It may send: IFF_UP, which an administrator sets.
    pub is_up: bool,
}

/// Which side of clsact a filter is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What comes in.
    Ingress,
    /// What goes out.
    Egress,
}

impl Side {
    /// As the parent of filters and chains: TC_H_MIN_INGRESS or TC_H_MIN_EGRESS of clsact.
    fn parent(self) -> TcHandle {
        let minor = match self {
            Side::Ingress => TcHandle::MIN_INGRESS,
            Side::Egress => TcHandle::MIN_EGRESS,
        };
        TcHandle { major: TcHandle::CLSACT.major, minor }
    }
}

/// A filter on a clsact qdisc, of whatever kind and owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// The list it is in. Packets come to chain 0, and to another one only where a filter sends them there.
    pub chain: u32,
    /// Its place in the chain: lower runs first.
    pub priority: u16,
    /// Its name within the priority.
    pub handle: u32,
    /// `bpf`, `u32`, `flower` and so on.
    pub kind: String,
    /// The program of a `bpf` filter.
    pub program: Option<u32>,
}

/// Ids of the programs at an interface's XDP hook, 0 where there is none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct XdpPrograms {
    /// The driver runs it.
    pub native: u32,
    /// The kernel runs it, behind the driver.
    pub generic: u32,
    /// The hardware runs it.
    pub hardware: u32,
}

/// A connection to rtnetlink in the network namespace in which it was made.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// Connects in the namespace of the calling thread.
    ///
    /// # Errors
    /// The kernel refused a socket.
    pub fn connect() -> Result<Netlink> {
        let mut socket = Socket::new(NETLINK_ROUTE).context("opening a netlink socket")?;
        socket.bind_auto().context("binding a netlink socket")?;
        socket.connect(&SocketAddr::new(0, 0)).context("connecting a netlink socket to the kernel")?;
        Ok(Netlink { socket, sequence: 0 })
    }

    /// All interfaces.
    ///
    /// # Errors
    /// The kernel answered with an error.
    pub fn links(&mut self) -> Result<Vec<Link>> {
        let request = RouteNetlinkMessage::GetLink(LinkMessage::default());
        self.dump(request, libc::RTM_NEWLINK, replies::link).context("listing the interfaces")
    }

    /// What is at an interface's XDP hook; nothing if the interface has just gone.
    ///
    /// # Errors
    /// The kernel answered with an error.
    pub fn xdp_programs(&mut self, ifindex: u32) -> Result<XdpPrograms> {
        // Not by bpf_xdp_query() of libbpf, which has the kernel list all interfaces to find one.
        let mut message = LinkMessage::default();
        message.header.index = ifindex;
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        match self.ask(RouteNetlinkMessage::GetLink(message), NLM_F_ACK, libc::RTM_NEWLINK, replies::xdp) {
            Ok(found) => Ok(found.and_then(|found| found.first().copied()).unwrap_or_default()),
            Err(error) if is_no_device(&error) => Ok(XdpPrograms::default()),
            Err(error) => Err(error.context(format!("asking for the XDP program of interface {ifindex}"))),
        }
    }

    /// Whether an interface has a clsact qdisc. It is asked for that one: in a list of all, which the kernel continues by
    /// position, one is passed over if another in front of it goes meanwhile.
    ///
    /// Where there is one, the kernel tells all who want notices of qdiscs. So this is for commands; a stream that looks by
    /// it would give itself notice.
    ///
    /// # Errors
    /// The kernel answered with an error.
    pub fn has_clsact(&mut self, ifindex: u32) -> Result<bool> {
        let doing = || format!("asking for the clsact qdisc of interface {ifindex}");
        let request = RouteNetlinkMessage::GetQueueDiscipline(clsact_message(ifindex));
        match self.change(vec![(request, 0)]).with_context(doing)?.as_slice() {
            [None] => Ok(true),
            // There is none, or one of another kind; or the interface has gone.
            [Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)] => Ok(false),
            [Some(error)] => Err(io::Error::from_raw_os_error(*error)).with_context(doing),
            _ => Err(anyhow!("the kernel did not answer").context(doing())),
        }
    }

    /// The filters on one side of an interface's clsact qdisc, in the order in which they run; none without a qdisc. Of an
    /// ingress qdisc, which has but one side, those of that side.
    ///
    /// # Errors
    /// The kernel answered with an error.
    pub fn filters(&mut self, ifindex: u32, side: Side) -> Result<Vec<Filter>> {
        let request = RouteNetlinkMessage::GetTrafficFilter(tc_message(ifindex, side.parent()));
        let mut filters = self
            .dump(request, libc::RTM_NEWTFILTER, replies::filter)
            .with_context(|| format!("listing the {side:?} filters of interface {ifindex}"))?;
        filters.retain(is_filter);
        Ok(filters)
    }

    /// Makes a clsact qdisc and, on it, an empty egress chain of that number. Both travel in one datagram, so that
    /// nothing can come between them.
    ///
    /// # Errors
    /// The kernel refused; EEXIST if there is a clsact or an ingress qdisc. Then no chain was made.
    pub fn add_clsact(&mut self, ifindex: u32, chain: u32) -> io::Result<()> {
        let qdisc = clsact_message(ifindex);
        let mark = chain_message(ifindex, chain);
        let make = NLM_F_CREATE | NLM_F_EXCL;
        let made = self.change(vec![
            (RouteNetlinkMessage::NewQueueDiscipline(qdisc), make),
            (RouteNetlinkMessage::NewTrafficChain(mark.clone()), make),
        ])?;
        match made.as_slice() {
            [None, None] => Ok(()),
            // The kernel goes on after an error: the chain would say that a foreign qdisc is ours.
            [Some(error), None] => {
                self.change(vec![(RouteNetlinkMessage::DelTrafficChain(mark), 0)])?;
                Err(io::Error::from_raw_os_error(*error))
            }
            [Some(error), _] | [_, Some(error)] => Err(io::Error::from_raw_os_error(*error)),
            _ => Err(io::Error::other("the kernel did not answer both requests")),
        }
    }

    /// The numbers of the chains on one side of an interface's clsact qdisc.
    ///
    /// # Errors
    /// The kernel answered with an error.
    pub fn chains(&mut self, ifindex: u32, side: Side) -> Result<Vec<u32>> {
        let request = RouteNetlinkMessage::GetTrafficChain(tc_message(ifindex, side.parent()));
        self.dump(request, RTM_NEWCHAIN, replies::chain)
            .with_context(|| format!("listing the {side:?} chains of interface {ifindex}"))
    }

    /// Sends requests in one datagram. Returns for each the error number with which it was refused, if it was.
    fn change(&mut self, requests: Vec<(RouteNetlinkMessage, u16)>) -> io::Result<Vec<Option<i32>>> {
        let first = self.sequence + 1;
        let mut bytes = Vec::new();
        for (request, flags) in requests {
            self.sequence += 1;
            bytes.extend(serialize(request, NLM_F_REQUEST | NLM_F_ACK | flags, self.sequence));
        }
        self.socket.send(&bytes, 0)?;
        let mut answers = vec![None; (self.sequence + 1 - first) as usize];
        while answers.iter().any(Option::is_none) {
            let (received, _) = self.socket.recv_from_full()?;
            for reply in messages(&received).map_err(io::Error::other)? {
                let at = reply.sequence_number().wrapping_sub(first) as usize;
                if let (NLMSG_ERROR, Some(answer)) = (reply.message_type(), answers.get_mut(at)) {
                    *answer = Some(error_number(&reply));
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    /// What the answers of one kind list.
    fn dump<T>(
        &mut self,
        request: RouteNetlinkMessage,
        kind: u16,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>> {
        for _ in 0..TRIES {
            if let Some(found) = self.ask(request.clone(), NLM_F_DUMP, kind, &read)? {
                return Ok(found);
            }
        }
        bail!("they change faster than they can be listed; try again")
    }

    /// What one answer says; nothing if that is not all, because it has changed meanwhile.
    fn ask<T>(
        &mut self,
        request: RouteNetlinkMessage,
        flags: u16,
        kind: u16,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        self.sequence += 1;
        let bytes = serialize(request, NLM_F_REQUEST | flags, self.sequence);
        self.socket.send(&bytes, 0).context("sending a netlink request")?;
        let receive = || Ok(self.socket.recv_from_full().context("receiving a netlink reply")?.0);
        answer(self.sequence, kind, read, receive)
    }
}

fn is_no_device(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) == Some(libc::ENODEV)
}

fn tc_message(ifindex: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = ifindex.cast_signed();
    message.header.parent = parent;
    message
}

fn clsact_message(ifindex: u32) -> TcMessage {
    let mut message = tc_message(ifindex, TcHandle::CLSACT);
    message.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
    message.attributes.push(TcAttribute::Kind("clsact".to_string()));
    message
}

fn chain_message(ifindex: u32, chain: u32) -> TcMessage {
    let mut message = tc_message(ifindex, Side::Egress.parent());
    message.attributes.push(TcAttribute::Chain(chain));
    message
}

fn serialize(request: RouteNetlinkMessage, flags: u16, sequence: u32) -> Vec<u8> {
    let mut header = NetlinkHeader::default();
    header.flags = flags;
    header.sequence_number = sequence;
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len().next_multiple_of(4)];
    message.serialize(&mut bytes);
    bytes
}

/// The kernel lists a priority once by itself, with handle 0, and u32 lists its hash tables, whose handles end in
/// twelve zero bits. Neither is a filter.
fn is_filter(entry: &Filter) -> bool {
    entry.handle != 0 && (entry.kind != "u32" || entry.handle & 0xfff != 0)
}
