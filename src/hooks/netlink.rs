//! Asks the kernel over rtnetlink which interfaces, qdiscs and filters there are. Changes nothing.

use anyhow::{Context, Result, bail};
use netlink_packet_core::{NLM_F_DUMP, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage, NetlinkPayload};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkLayerType, LinkMessage};
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
    /// Its ARPHRD type.
    pub layer: LinkLayerType,
}

/// Which side of clsact a filter is on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What comes in.
    Ingress,
    /// What goes out.
    Egress,
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
        let minor = match side {
            Side::Ingress => TcHandle::MIN_INGRESS,
            Side::Egress => TcHandle::MIN_EGRESS,
        };
        let mut request = TcMessage::default();
        request.header.index = i32::try_from(ifindex).context("an interface index is positive")?;
        request.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor };
        let replies = self
            .dump(RouteNetlinkMessage::GetTrafficFilter(request))
            .with_context(|| format!("listing the {side:?} filters of interface {ifindex}"))?;
        let filters = replies.into_iter().filter_map(|reply| match reply {
            RouteNetlinkMessage::NewTrafficFilter(message) => Some(filter(&message)),
            _ => None,
        });
        // The kernel lists a priority once by itself, with handle 0, and then each filter in it.
        Ok(filters.filter(|filter| filter.handle != 0).collect())
    }

    fn dump(&mut self, request: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>> {
        self.sequence += 1;
        let mut header = NetlinkHeader::default();
        header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        header.sequence_number = self.sequence;
        let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
        message.finalize();
        let mut bytes = vec![0; message.buffer_len()];
        message.serialize(&mut bytes);
        self.socket.send(&bytes, 0).context("sending a netlink request")?;

        let mut replies = Vec::new();
        loop {
            let (received, _) = self.socket.recv_from_full().context("receiving a netlink reply")?;
            for reply in messages(&received)? {
                match reply.payload {
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
    Some(Link { index: message.header.index, name, layer: message.header.link_layer_type })
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
