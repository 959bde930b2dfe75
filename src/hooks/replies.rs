//! Reads what rtnetlink answers. Interfaces, qdiscs and filters of others may bear names that are no UTF-8, and attributes
//! that nobody here knows: of every message only what is needed is read, so that none of the rest can be wrong.

use std::io;

use anyhow::{Context, Result};
use netlink_packet_core::{
    Emitable, NLA_HEADER_SIZE, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR, NetlinkBuffer, NlasIterator,
};
use netlink_packet_route::link::{LinkFlags, LinkHeader};
use netlink_packet_route::tc::TcHeader;

use super::netlink::{Filter, Link, XdpPrograms};
use crate::note::printable;

/// Of include/uapi/linux/if_link.h.
const IFLA_INFO_KIND: u16 = 1;
const IFLA_XDP_DRV_PROG_ID: u16 = 5;
const IFLA_XDP_SKB_PROG_ID: u16 = 6;
const IFLA_XDP_HW_PROG_ID: u16 = 7;
/// Of include/uapi/linux/rtnetlink.h.
const TCA_CHAIN: u16 = 11;
/// Of include/uapi/linux/pkt_cls.h.
const TCA_BPF_ID: u16 = 11;

/// The messages of one datagram.
///
/// # Errors
/// They are not well formed.
pub(super) fn messages(mut bytes: &[u8]) -> Result<Vec<NetlinkBuffer<&[u8]>>> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let message = NetlinkBuffer::new_checked(bytes).context("reading a netlink message")?;
        // At least that of its header.
        let len = (message.length() as usize).next_multiple_of(4);
        bytes = bytes.get(len..).unwrap_or_default();
        found.push(message);
    }
    Ok(found)
}

/// The error number in a message that answers a request or ends a dump; none if it worked.
pub(super) fn error_number(message: &NetlinkBuffer<&[u8]>) -> Option<i32> {
    let code = i32::from_ne_bytes(*message.payload().first_chunk()?);
    (code < 0).then_some(-code)
}

/// All that an answer says in messages of one kind, be it a dump or one that was asked to end with an acknowledgement;
/// nothing if the kernel says that what it lists has changed meanwhile, and so may have been passed over in part.
///
/// # Errors
/// The kernel answered with an error, or nothing can be received.
pub(super) fn answer<T>(
    sequence: u32,
    kind: u16,
    read: impl Fn(&[u8]) -> Option<T>,
    mut receive: impl FnMut() -> Result<Vec<u8>>,
) -> Result<Option<Vec<T>>> {
    let (mut found, mut is_whole) = (Vec::new(), true);
    loop {
        let received = receive()?;
        for message in messages(&received)?.iter().filter(|message| message.sequence_number() == sequence) {
            is_whole &= message.flags() & NLM_F_DUMP_INTR == 0;
            match (message.message_type(), error_number(message)) {
                // A dump that failed on the way ends like one that is whole, but for this number.
                (NLMSG_DONE | NLMSG_ERROR, Some(error)) => {
                    return Err(io::Error::from_raw_os_error(error).into());
                }
                (NLMSG_DONE | NLMSG_ERROR, None) => return Ok(is_whole.then_some(found)),
                (of, _) if of == kind => found.extend(read(message.payload())),
                _ => {}
            }
        }
    }
}

/// What a message about an interface says of it.
pub(super) fn link(payload: &[u8]) -> Option<Link> {
    let header = LinkHeader::parse(payload).ok()?;
    let (mut name, mut mtu_bytes, mut kind_of_link, mut alternative_names) = (None, None, None, Vec::new());
    for (kind, value) in attributes(payload.get(header.buffer_len()..)?) {
        match kind {
            libc::IFLA_IFNAME => name = Some(text(value)),
            libc::IFLA_MTU => mtu_bytes = number(value),
            libc::IFLA_LINKINFO => kind_of_link = attribute(value, IFLA_INFO_KIND).map(text),
            libc::IFLA_PROP_LIST => {
                let names = attributes(value).filter(|(kind, _)| *kind == libc::IFLA_ALT_IFNAME);
                alternative_names.extend(names.map(|(_, name)| text(name)));
            }
            _ => {}
        }
    }
    Some(Link {
        index: header.index,
        name: name?,
        alternative_names,
        mtu_bytes: mtu_bytes.unwrap_or(0xffff),
        layer: header.link_layer_type,
        kind: kind_of_link.unwrap_or_default(),
        is_up: header.flags.contains(LinkFlags::Up),
    })
}

/// What a message about an interface says of its XDP hook.
pub(super) fn xdp(payload: &[u8]) -> Option<XdpPrograms> {
    let header = LinkHeader::parse(payload).ok()?;
    let found = attribute(payload.get(header.buffer_len()..)?, libc::IFLA_XDP).unwrap_or_default();
    let id = |kind| attribute(found, kind).and_then(number).unwrap_or_default();
    Some(XdpPrograms {
        native: id(IFLA_XDP_DRV_PROG_ID),
        generic: id(IFLA_XDP_SKB_PROG_ID),
        hardware: id(IFLA_XDP_HW_PROG_ID),
    })
}

/// What a message about a filter says of it.
pub(super) fn filter(payload: &[u8]) -> Option<Filter> {
    let header = TcHeader::parse(payload).ok()?;
    let found = payload.get(header.buffer_len()..)?;
    let kind = attribute(found, libc::TCA_KIND).map(text).unwrap_or_default();
    // The same number is something else in other kinds.
    let options = attribute(found, libc::TCA_OPTIONS).filter(|_| kind == "bpf");
    Some(Filter {
        chain: attribute(found, TCA_CHAIN).and_then(number).unwrap_or_default(),
        // tcm_info holds the priority above the protocol, TC_H_MAKE of the kernel.
        priority: (header.info >> 16) as u16,
        handle: header.handle.into(),
        program: options.and_then(|options| attribute(options, TCA_BPF_ID)).and_then(number),
        kind,
    })
}

/// The number in a message about a chain.
pub(super) fn chain(payload: &[u8]) -> Option<u32> {
    let header = TcHeader::parse(payload).ok()?;
    attribute(payload.get(header.buffer_len()..)?, TCA_CHAIN).and_then(number)
}

/// The attributes of a message, or those within one; up to one whose length is wrong, if there is such.
fn attributes(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    NlasIterator::new(bytes).map_while(Result::ok).map(|found| {
        let (kind, len) = (found.kind(), usize::from(found.length()));
        (kind, &found.into_inner()[NLA_HEADER_SIZE..len])
    })
}

fn attribute(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(kind, value)| (kind == wanted).then_some(value))
}

/// The kernel takes nearly any byte in a name.
fn text(value: &[u8]) -> String {
    let end = value.iter().position(|byte| *byte == 0).unwrap_or(value.len());
    printable(&String::from_utf8_lossy(&value[..end]))
}

fn number(value: &[u8]) -> Option<u32> {
    Some(u32::from_ne_bytes(*value.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use netlink_packet_route::tc::TcHandle;

    use super::*;

    const TCA_BPF_NAME: u16 = 7;

    fn attribute_of(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = [(value.len() as u16 + 4).to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    fn emitted(header: &impl Emitable) -> Vec<u8> {
        let mut bytes = vec![0; header.buffer_len()];
        header.emit(&mut bytes);
        bytes
    }

    fn message(kind: u16, flags: u16, sequence: u32, payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32 + 16).to_ne_bytes().to_vec();
        bytes.extend([kind.to_ne_bytes(), flags.to_ne_bytes()].concat());
        bytes.extend([sequence.to_ne_bytes(), [0; 4]].concat());
        bytes.extend(payload);
        bytes
    }

    #[test]
    fn names_that_are_no_text_are_read_as_far_as_they_are() {
        let header = LinkHeader { index: 7, flags: LinkFlags::Up, ..LinkHeader::default() };
        let names = [&b"other"[..], b"Z\xfcrich\0"].map(|name| attribute_of(libc::IFLA_ALT_IFNAME, name));
        let payload = [
            emitted(&header),
            attribute_of(libc::IFLA_IFNAME, b"c\xfc1\0"),
            attribute_of(libc::IFLA_IFALIAS, b"Z\xfcrich"),
            attribute_of(libc::IFLA_MTU, &1400u32.to_ne_bytes()),
            attribute_of(libc::IFLA_LINKINFO, &attribute_of(IFLA_INFO_KIND, b"veth\0")),
            // Too short for what it is, and of no concern.
            attribute_of(libc::IFLA_STATS64, &[1]),
            attribute_of(libc::IFLA_PROP_LIST | 0x8000, &names.concat()),
        ];
        let found = link(&payload.concat()).unwrap();
        assert_eq!((found.index, found.name.as_str(), found.mtu_bytes), (7, "c\u{fffd}1", 1400));
        assert_eq!(found.alternative_names, ["other", "Z\u{fffd}rich"]);
        assert!(found.is_up && found.kind == "veth");
    }

    #[test]
    fn programs_at_xdp_are_read_each_by_who_runs_it() {
        let id = |kind, id: u32| attribute_of(kind, &id.to_ne_bytes());
        let of = |at: &[u8]| {
            xdp(&[emitted(&LinkHeader::default()), attribute_of(libc::IFLA_XDP, at)].concat()).unwrap()
        };
        // Behind what says that there are several.
        let several =
            [attribute_of(2, &[4]), id(IFLA_XDP_HW_PROG_ID, 9), id(IFLA_XDP_SKB_PROG_ID, 8)].concat();
        assert_eq!(of(&several), XdpPrograms { native: 0, generic: 8, hardware: 9 });
        assert_eq!(of(&id(IFLA_XDP_DRV_PROG_ID, 7)), XdpPrograms { native: 7, generic: 0, hardware: 0 });
        assert_eq!(of(&attribute_of(2, &[0])), XdpPrograms::default());
    }

    #[test]
    fn a_filter_is_read_whatever_its_name() {
        let handle = TcHandle { major: 0, minor: 5 };
        let header = TcHeader { info: 20 << 16 | 3, handle, ..TcHeader::default() };
        let options =
            [attribute_of(TCA_BPF_NAME, b"Z\xfcrich\0"), attribute_of(TCA_BPF_ID, &99u32.to_ne_bytes())]
                .concat();
        let of_kind = |kind: &[u8]| {
            let attributes = [
                attribute_of(libc::TCA_KIND, kind),
                attribute_of(TCA_CHAIN, &7u32.to_ne_bytes()),
                attribute_of(libc::TCA_OPTIONS, &options),
            ];
            filter(&[emitted(&header), attributes.concat()].concat()).unwrap()
        };
        let found = of_kind(b"bpf\0");
        assert_eq!((found.chain, found.priority, found.handle, found.program), (7, 20, 5, Some(99)));
        assert_eq!(of_kind(b"flower\0").program, None);
    }

    #[test]
    fn any_cut_of_a_message_is_read_without_a_panic() {
        let payload = [
            emitted(&LinkHeader::default()),
            attribute_of(libc::IFLA_IFNAME, b"c0\0"),
            attribute_of(libc::IFLA_PROP_LIST, &attribute_of(libc::IFLA_ALT_IFNAME, b"uplink\0")),
            attribute_of(libc::IFLA_XDP, &attribute_of(IFLA_XDP_DRV_PROG_ID, &99u32.to_ne_bytes())),
        ]
        .concat();
        for len in 0..payload.len() {
            link(&payload[..len]);
            xdp(&payload[..len]);
            filter(&payload[..len]);
            chain(&payload[..len]);
            messages(&payload[..len]).ok();
        }
        // A length below that of its own header.
        assert_eq!(attributes(&[1, 0, 3, 0, 0, 0, 0, 0]).count(), 0);
    }

    fn dump_of(datagrams: &[Vec<u8>]) -> Result<Option<Vec<u32>>> {
        let mut left = VecDeque::from(datagrams.to_vec());
        answer(2, libc::RTM_NEWLINK, number, || left.pop_front().context("nothing more"))
    }

    #[test]
    fn a_dump_that_was_interrupted_is_no_answer() {
        let entry = |flags, number: u32| message(libc::RTM_NEWLINK, flags, 2, &number.to_ne_bytes());
        let done = |flags, code: i32| message(NLMSG_DONE, flags, 2, &code.to_ne_bytes());
        let late = message(NLMSG_DONE, 0, 1, &[0; 4]);

        let whole = [late, [entry(0, 1), entry(0, 2)].concat(), entry(0, 3), done(0, 0)];
        assert_eq!(dump_of(&whole).unwrap(), Some(vec![1, 2, 3]));
        // What is left of it is no part of the next one.
        let flag = NLM_F_DUMP_INTR;
        assert_eq!(dump_of(&[entry(0, 1), entry(flag, 3), done(0, 0)]).unwrap(), None);
        assert_eq!(dump_of(&[entry(0, 1), done(flag, 0)]).unwrap(), None);
        let error = dump_of(&[entry(0, 1), done(0, -libc::ENODEV)]).unwrap_err();
        assert_eq!(error.downcast::<io::Error>().unwrap().raw_os_error(), Some(libc::ENODEV));
        // As one ends that is no dump.
        let acknowledged = [entry(0, 1), message(NLMSG_ERROR, 0, 2, &[0; 4])];
        assert_eq!(dump_of(&acknowledged).unwrap(), Some(vec![1]));
    }
}
