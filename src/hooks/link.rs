//! Interfaces: finding one by its name, and how long the header is that its device puts in front of IP.

use anyhow::{Result, bail};
use netlink_packet_route::link::LinkLayerType;

use super::netlink::Link;
use crate::kernel::Kernel;
use crate::note::printable;
use crate::program::LinkHeader;

/// So many letters of which one may be wrong, missing, too many or exchanged with its neighbour in a name that is offered
/// as what was meant. By likeness in per cent, short names would be near to nearly all others.
const LETTERS_A_SLIP: usize = 3;

/// Finds an interface by its name, or an alternative one, among those of a network namespace.
///
/// # Errors
/// There is none; the message offers near names.
pub fn find_link<'a>(links: &'a [Link], name: &str, netns: &str) -> Result<&'a Link> {
    // As those are that were read.
    let name = printable(name);
    let name = name.as_str();
    // Not by if_nametoindex: an alternative name may have up to 127 characters, of which it takes no more than 15.
    let is_called =
        |link: &&Link| link.name == name || link.alternative_names.iter().any(|other| other == name);
    if let Some(link) = links.iter().find(is_called) {
        return Ok(link);
    }
    let slips_max = (name.chars().count() / LETTERS_A_SLIP).max(1);
    let mut near: Vec<(usize, &str)> = links
        .iter()
        .map(|link| (strsim::damerau_levenshtein(name, &link.name), link.name.as_str()))
        .filter(|(slips, _)| *slips <= slips_max)
        .collect();
    near.sort_by_key(|(slips, _)| *slips);
    let names = |list: Vec<&str>| list.join(", ");
    let hint = if near.is_empty() {
        format!("there are: {}", names(links.iter().map(|link| link.name.as_str()).take(10).collect()))
    } else {
        format!("did you mean {}?", names(near.iter().map(|(_, name)| *name).take(3).collect()))
    };
    let place = if netns.is_empty() { String::new() } else { format!(" in network namespace '{netns}'") };
    bail!("looking for interface '{name}'{place}: no such interface; {hint}")
}

/// What stands in front of the network header in what the device's egress hook sees.
///
/// # Errors
/// Devices of this type have a header that the classifier cannot skip, or hooks that packets do not pass.
pub fn link_header(link: &Link) -> Result<LinkHeader> {
    match link.layer {
        // On the way out, vrf_ip_out() of the kernel looks for a qdisc that queues, and else hands the packet to the port; on
        // the way in, vrf_ip_rcv() gets it behind the hooks of the port.
        LinkLayerType::Ether if link.kind == "vrf" => bail!(
            "attaching to {}: it is a VRF, whose packets pass the hooks of its ports, and not its own; attach to its ports",
            link.name
        ),
        LinkLayerType::Ether | LinkLayerType::Loopback => Ok(LinkHeader::Ethernet),
        // No header of their own, or one that the driver adds behind the hook.
        LinkLayerType::Ppp if link.kind == "ppp" => Ok(LinkHeader::None),
        LinkLayerType::None
        | LinkLayerType::Rawip
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit => Ok(LinkHeader::None),
        // Also PPP over synchronous HDLC, whose packets begin with a header of 4 bytes.
        other => bail!(
            "attaching to {}: it is a device of type {other:?}, whose link header netoken does not know; attach to \
             the Ethernet, loopback, tun, WireGuard, PPP or IP tunnel device above or below it",
            link.name
        ),
    }
}

/// The same for the ingress hook. There some tunnels leave in front of the inner packet what they came in, and how long that
/// is differs from packet to packet.
///
/// # Errors
/// As of [`link_header`], or it is such a tunnel.
pub fn guarded_header(link: &Link) -> Result<LinkHeader> {
    let header = link_header(link)?;
    // xfrm4_remove_tunnel_encap() of the kernel puts the outer link header in front again.
    let always = ["xfrm", "vti", "vti6"].contains(&link.kind.as_str());
    // Since "reset MAC header consistently" the outer headers are gone.
    let is_old = Kernel::probe().version() < Some((5, 14));
    let until_then = ["ipip", "sit", "ip6tnl"].contains(&link.kind.as_str());
    if always || (is_old && until_then) {
        let until_then = if always { "" } else { " before Linux 5.14" };
        bail!(
            "attaching the guard to {}: what comes in there has parts of the outer packet in front{until_then}, and would \
             not be recognized; the guard can be on the next host, where it arrives by itself",
            link.name
        );
    }
    Ok(header)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, layer: LinkLayerType) -> Link {
        let alternative_names = Vec::new();
        let kind = String::new();
        Link { index: 1, name: name.into(), alternative_names, mtu_bytes: 1500, layer, kind, is_up: true }
    }

    #[test]
    fn a_wrong_name_gets_near_ones() {
        let links = [
            link("lo", LinkLayerType::Loopback),
            link("eth0", LinkLayerType::Ether),
            link("wlan0", LinkLayerType::Ether),
        ];
        assert_eq!(find_link(&links, "eth0", "").unwrap().name, "eth0");
        let message = find_link(&links, "eht0", "blue").unwrap_err().to_string();
        assert!(message.contains("did you mean eth0") && message.contains("'blue'"), "{message}");
        let message = find_link(&links, "xyz", "").unwrap_err().to_string();
        assert!(message.contains("there are: lo, eth0, wlan0"), "{message}");
    }

    #[test]
    fn only_a_slip_is_taken_for_another_name() {
        for (typed, there, is_near) in [
            ("eht0", "eth0", true),
            ("eth", "eth0", true),
            ("eth00", "eth0", true),
            ("wlp3s1", "wlp3s0", true),
            ("wlp4s1", "wlp3s0", true),
            ("eth0", "enp3s0", false),
            ("eth0", "veth7a3b", false),
            ("wlan0", "lan", false),
            ("veth12ab", "veth34cd", false),
        ] {
            let message = find_link(&[link(there, LinkLayerType::Ether)], typed, "").unwrap_err().to_string();
            let hint = if is_near { "did you mean" } else { "there are" };
            assert!(message.contains(hint), "{typed} for {there}: {message}");
        }
    }

    #[test]
    fn link_headers_are_known_or_refused() {
        assert_eq!(link_header(&link("eth0", LinkLayerType::Ether)).unwrap(), LinkHeader::Ethernet);
        assert_eq!(link_header(&link("wg0", LinkLayerType::None)).unwrap(), LinkHeader::None);
        assert!(link_header(&link("ib0", LinkLayerType::Infiniband)).is_err());
        let of_kind = |kind: &str, layer| link_header(&Link { kind: kind.into(), ..link("any0", layer) });
        assert_eq!(of_kind("ppp", LinkLayerType::Ppp).unwrap(), LinkHeader::None);
        assert!(of_kind("", LinkLayerType::Ppp).unwrap_err().to_string().contains("type Ppp"));
        assert_eq!(of_kind("veth", LinkLayerType::Ether).unwrap(), LinkHeader::Ethernet);
        // What leaves by them is as it is to be.
        for (kind, layer) in
            [("xfrm", LinkLayerType::None), ("vti", LinkLayerType::Tunnel), ("vti6", LinkLayerType::Tunnel6)]
        {
            assert_eq!(of_kind(kind, layer).unwrap(), LinkHeader::None);
            let refused = guarded_header(&Link { kind: kind.to_string(), ..link("t0", layer) }).unwrap_err();
            assert!(refused.to_string().contains("parts of the outer packet in front, and"), "{refused}");
        }
        assert!(of_kind("vrf", LinkLayerType::Ether).unwrap_err().to_string().contains("ports"));
    }
}
