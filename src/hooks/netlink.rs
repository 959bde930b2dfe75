//! Speaks rtnetlink: which interfaces, qdiscs and filters there are, and making a clsact qdisc that can be told
//! from somebody else's.

use std::io;

use anyhow::{Context, Result, bail};
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkLayerType, LinkMessage, Prop};
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

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
    /// Its place: lower runs first.
    pub priority: u16,
    /// Its name within the priority.
    pub handle: u32,
    /// `bpf`, `u32`, `flower` and so on.
    pub kind: String,
    /// The program of a `bpf` filter.
    pub program: Option<u32>,
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
        let replies = self
            .dump(RouteNetlinkMessage::GetLink(LinkMessage::default()))
            .context("listing the interfaces")?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewLink(message) => link(&message),
                _ => None,
            })
            .collect())
    }

    /// The indexes of all interfaces that have a clsact qdisc.
    ///
    /// # Errors
    /// The kernel answered with an error.
    pub fn clsacts(&mut self) -> Result<Vec<u32>> {
        let replies = self
            .dump(RouteNetlinkMessage::GetQueueDiscipline(TcMessage::default()))
            .context("listing the qdiscs")?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewQueueDiscipline(message) if kind(&message) == "clsact" => {
                    u32::try_from(message.header.index).ok()
                }
                _ => None,
            })
            .collect())
    }

    /// The filters on one side of an interface's clsact qdisc, in the order in which they run.
    ///
    /// # Errors
    /// The kernel answered with an error; there is no clsact qdisc, for example.
    pub fn filters(&mut self, ifindex: u32, side: Side) -> Result<Vec<Filter>> {
        let request = tc_message(ifindex, side.parent());
        let replies = self
            .dump(RouteNetlinkMessage::GetTrafficFilter(request))
            .with_context(|| format!("listing the {side:?} filters of interface {ifindex}"))?;
        let filters = replies.into_iter().filter_map(|reply| match reply {
            RouteNetlinkMessage::NewTrafficFilter(message) => Some(filter(&message)),
            _ => None,
        });
        Ok(filters.filter(is_filter).collect())
    }

    /// Makes a clsact qdisc and, on it, an empty egress chain of that number. Both travel in one datagram, so that
    /// nothing can come between them.
    ///
    /// # Errors
    /// The kernel refused; EEXIST if there is a clsact or an ingress qdisc. Then no chain was made.
    pub fn add_clsact(&mut self, ifindex: u32, chain: u32) -> io::Result<()> {
        let mut qdisc = tc_message(ifindex, TcHandle::CLSACT);
        qdisc.header.handle = TcHandle { major: TcHandle::CLSACT.major, minor: 0 };
        qdisc.attributes.push(TcAttribute::Kind("clsact".to_string()));
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
        let request = tc_message(ifindex, side.parent());
        let replies = self
            .dump(RouteNetlinkMessage::GetTrafficChain(request))
            .with_context(|| format!("listing the {side:?} chains of interface {ifindex}"))?;
        let chain = |reply| match reply {
            RouteNetlinkMessage::NewTrafficChain(message) => {
                message.attributes.into_iter().find_map(|attribute| match attribute {
                    TcAttribute::Chain(number) => Some(number),
                    _ => None,
                })
            }
            _ => None,
        };
        Ok(replies.into_iter().filter_map(chain).collect())
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
                let at = reply.header.sequence_number.wrapping_sub(first) as usize;
                if let (NetlinkPayload::Error(error), Some(answer)) = (reply.payload, answers.get_mut(at)) {
                    *answer = Some(error.code.map(|code| -code.get()));
                }
            }
        }
        Ok(answers.into_iter().flatten().collect())
    }

    fn dump(&mut self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let bytes = serialize(request, NLM_F_REQUEST | NLM_F_DUMP, self.sequence);
        self.socket.send(&bytes, 0).context("sending a netlink request")?;

        let mut replies = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full().context("receiving a netlink reply")?;
            for reply in messages(&received)? {
                match reply.payload {
                    // A dump that failed on the way ends like one that is whole, but for this number.
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code).into());
                    }
                    NetlinkPayload::Done(_) => return Ok(replies),
                    NetlinkPayload::Error(error) if error.code.is_some() => {
                        return Err(error.to_io().into());
                    }
                    NetlinkPayload::InnerMessage(message) => replies.push(message),
                    _ => {}
                }
            }
        }
    }
}

fn tc_message(ifindex: u32, parent: TcHandle) -> TcMessage {
    let mut message = TcMessage::default();
    message.header.index = ifindex.cast_signed();
    message.header.parent = parent;
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

/// The messages of one datagram.
///
/// # Errors
/// They are not well formed.
pub fn messages(mut bytes: &[u8]) -> Result<Vec<NetlinkMessage<RouteNetlinkMessage>>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let message =
            NetlinkMessage::<RouteNetlinkMessage>::deserialize(bytes).context("reading a netlink message")?;
        let len = (message.header.length as usize).next_multiple_of(4);
        if len == 0 {
            bail!("a netlink message without a length");
        }
        bytes = bytes.get(len..).unwrap_or_default();
        found.push(message);
    }
    Ok(found)
}

/// What a message about an interface says of it.
pub fn link(message: &LinkMessage) -> Option<Link> {
    let name = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    })?;
    let mtu = message.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    let properties = message.attributes.iter().filter_map(|attribute| match attribute {
        LinkAttribute::PropList(properties) => Some(properties),
        _ => None,
    });
    let alternative_names = properties.flatten().filter_map(|property| match property {
        Prop::AltIfName(name) => Some(name.clone()),
        _ => None,
    });
    let layer = message.header.link_layer_type;
    let is_up = message.header.flags.contains(LinkFlags::Up);
    Some(Link {
        index: message.header.index,
        name,
        alternative_names: alternative_names.collect(),
        mtu_bytes: mtu.unwrap_or(0xffff),
        layer,
        is_up,
    })
}

fn kind(message: &TcMessage) -> &str {
    let kind = message.attributes.iter().find_map(|attribute| match attribute {
        TcAttribute::Kind(kind) => Some(kind.as_str()),
        _ => None,
    });
    kind.unwrap_or_default()
}

fn filter(message: &TcMessage) -> Filter {
    let options = message.attributes.iter().filter_map(|attribute| match attribute {
        TcAttribute::Options(options) => Some(options),
        _ => None,
    });
    let program = options.flatten().find_map(|option| match option {
        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => Some(*id),
        _ => None,
    });
    Filter {
        // tcm_info holds the priority above the protocol, TC_H_MAKE of the kernel.
        priority: (message.header.info >> 16) as u16,
        handle: message.header.handle.into(),
        kind: kind(message).to_string(),
        program,
    }
}
