//! Interfaces: finding one by its name, and how long the header is that its device puts in front of IP.

use anyhow::{Result, bail};
use netlink_packet_route::link::LinkLayerType;
use nix::net::if_::if_nametoindex;

use super::netlink::Link;
use crate::program::LinkHeader;

/// How much a name may differ from one that exists to be offered as what was meant.
const NEAR: f64 = 0.6;

/// Finds an interface by its name in the network namespace of the calling thread, where `links` were listed.
///
/// # Errors
/// There is none; the message offers near names.
pub fn find_link<'a>(links: &'a [Link], name: &str, netns: &str) -> Result<&'a Link> {
    // The kernel also knows alternative names, `ip link property add dev eth0 altname uplink`.
    let index = if_nametoindex(name).ok();
    if let Some(link) = links.iter().find(|link| link.name == name || Some(link.index) == index) {
        return Ok(link);
    }
    let mut near: Vec<(f64, &str)> =
        links.iter().map(|link| (strsim::jaro_winkler(name, &link.name), link.name.as_str())).collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    near.retain(|(likeness, _)| *likeness >= NEAR);
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
/// Devices of this type have a header that the classifier cannot skip.
pub fn link_header(link: &Link) -> Result<LinkHeader> {
    match link.layer {
        LinkLayerType::Ether | LinkLayerType::Loopback => Ok(LinkHeader::Ethernet),
        // No header of their own, or one that the driver adds behind the hook.
        LinkLayerType::None
        | LinkLayerType::Ppp
        | LinkLayerType::Rawip
        | LinkLayerType::Tunnel
        | LinkLayerType::Tunnel6
        | LinkLayerType::Sit => Ok(LinkHeader::None),
        other => bail!(
            "attaching to {}: it is a device of type {other:?}, whose link header netoken does not know; attach to \
             the Ethernet, loopback, tun, WireGuard, PPP or IP tunnel device above or below it",
            link.name
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, layer: LinkLayerType) -> Link {
        Link { index: 1, name: name.into(), mtu_bytes: 1500, layer }
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
    fn link_headers_are_known_or_refused() {
        assert_eq!(link_header(&link("eth0", LinkLayerType::Ether)).unwrap(), LinkHeader::Ethernet);
        assert_eq!(link_header(&link("wg0", LinkLayerType::None)).unwrap(), LinkHeader::None);
        assert!(link_header(&link("ib0", LinkLayerType::Infiniband)).is_err());
    }
}
