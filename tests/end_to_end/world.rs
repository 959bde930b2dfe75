//! The networks that the cases play in: a client and a server, on one link or with a router between them.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::lab::{Lab, expect_count, ip, kernel_counter};
use crate::support::{ensure_eq, sh};

/// The client's interface, and the router's towards the server.
pub const OUT: &str = "out0";
/// The server's interface, and the router's towards the client.
pub const IN: &str = "in0";

/// IPv4 or IPv6, where a case is the same for both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

pub const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// How a case's name calls it.
pub const OFFLOADS: [(bool, &str); 2] = [(true, "with TX offload"), (false, "without TX offload")];

impl Family {
    pub fn name(self) -> &'static str {
        match self {
            Family::V4 => "IPv4",
            Family::V6 => "IPv6",
        }
    }

    /// Host number `host` of network number `net`.
    pub fn addr(self, net: u8, host: u8) -> IpAddr {
        match self {
            Family::V4 => Ipv4Addr::new(10, net, 0, host).into(),
            Family::V6 => Ipv6Addr::new(0xfd00, net.into(), 0, 0, 0, 0, 0, host.into()).into(),
        }
    }

    fn on_link(self, net: u8, host: u8) -> String {
        let bits = if self == Family::V4 { 24 } else { 64 };
        format!("{}/{bits}", self.addr(net, host))
    }
}

/// The same host in both families, with the length of its network's prefix.
fn on_link(net: u8, host: u8) -> [String; 2] {
    FAMILIES.map(|family| family.on_link(net, host))
}

const CLIENT_HOST: u8 = 1;
const SERVER_HOST: u8 = 2;
const ROUTER_HOST: u8 = 254;
const CLIENT_NET: u8 = 1;
const SERVER_NET: u8 = 2;

/// Where netoken is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    Client,
    Router,
}

impl Hook {
    pub fn name(self) -> &'static str {
        match self {
            Hook::Client => "client",
            Hook::Router => "router",
        }
    }
}

/// One case's networks. SYNs leave the client by [`OUT`] and reach the server by [`IN`].
pub struct World {
    pub lab: Lab,
    pub client: String,
    pub server: String,
    /// Namespace and interface that netoken is attached to.
    hook: (String, &'static str),
    server_net: u8,
}

impl World {
    /// Client and server on one link.
    pub fn new(tx_offload: bool) -> Result<World> {
        let mut lab = Lab::new()?;
        let [client, server] = lab.add_netns(["client", "server"])?;
        lab.add_veth((&client, OUT), (&server, IN), tx_offload)?;
        lab.up_with(&client, OUT, &on_link(CLIENT_NET, CLIENT_HOST))?;
        lab.up_with(&server, IN, &on_link(CLIENT_NET, SERVER_HOST))?;
        Ok(World { hook: (client.clone(), OUT), lab, client, server, server_net: CLIENT_NET })
    }

    /// Client and server with a router between them.
    pub fn routed(tx_offload: bool, hook: Hook) -> Result<(World, String)> {
        let mut lab = Lab::new()?;
        let [client, router, server] = lab.add_netns(["client", "router", "server"])?;
        lab.add_veth((&client, OUT), (&router, IN), tx_offload)?;
        lab.add_veth((&router, OUT), (&server, IN), tx_offload)?;
        lab.up_with(&client, OUT, &on_link(CLIENT_NET, CLIENT_HOST))?;
        lab.up_with(&router, IN, &on_link(CLIENT_NET, ROUTER_HOST))?;
        lab.up_with(&router, OUT, &on_link(SERVER_NET, ROUTER_HOST))?;
        lab.up_with(&server, IN, &on_link(SERVER_NET, SERVER_HOST))?;
        for (ns, net) in [(&client, CLIENT_NET), (&server, SERVER_NET)] {
            ip(
                ns,
                FAMILIES.map(|family| format!("route add default via {}", family.addr(net, ROUTER_HOST))),
            )?;
        }
        let hook = match hook {
            Hook::Client => (client.clone(), OUT),
            Hook::Router => (router.clone(), OUT),
        };
        let world = World { lab, client, server, hook, server_net: SERVER_NET };
        world.set(&router, "ipv4/ip_forward", "1")?;
        world.set(&router, "ipv6/conf/all/forwarding", "1")?;
        Ok((world, router))
    }

    /// Lets nobody ask for the addresses between client and router, of a routed world: for tests that take away what comes in
    /// there.
    pub fn ask_nobody(&self, router: &str) -> Result<()> {
        let macs = ["02:00:00:00:00:01", "02:00:00:00:00:02"];
        for (ns, interface, mac) in [(self.client.as_str(), OUT, macs[0]), (router, IN, macs[1])] {
            ip(ns, [format!("link set {interface} address {mac}")])?;
        }
        let neighbours = |interface: &str, host, mac: &str| {
            FAMILIES.map(|family| {
                let addr = family.addr(CLIENT_NET, host);
                format!("neigh replace {addr} lladdr {mac} dev {interface} nud permanent")
            })
        };
        ip(&self.client, neighbours(OUT, ROUTER_HOST, macs[1]))?;
        ip(router, neighbours(IN, CLIENT_HOST, macs[0]))
    }

    /// Client and server on one link that goes through a bridge, with netoken on the bridge's way out.
    pub fn bridged() -> Result<World> {
        let mut lab = Lab::new()?;
        let [client, bridge, server] = lab.add_netns(["client", "bridge", "server"])?;
        lab.add_veth((&client, OUT), (&bridge, IN), false)?;
        lab.add_veth((&bridge, OUT), (&server, IN), false)?;
        let ports = [IN, OUT].map(|port| format!("link set {port} master br0 up"));
        ip(
            &bridge,
            ["link add br0 type bridge".to_string(), "link set br0 up".to_string()].into_iter().chain(ports),
        )?;
        lab.up_with(&client, OUT, &on_link(CLIENT_NET, CLIENT_HOST))?;
        lab.up_with(&server, IN, &on_link(CLIENT_NET, SERVER_HOST))?;
        Ok(World { lab, client, server, hook: (bridge, OUT), server_net: CLIENT_NET })
    }

    /// The same world, with netoken on another interface of the client.
    pub fn hooked_at(mut self, interface: &'static str) -> World {
        self.hook = (self.client.clone(), interface);
        self
    }

    pub fn client_addr(&self, family: Family) -> IpAddr {
        family.addr(CLIENT_NET, CLIENT_HOST)
    }

    pub fn server_addr(&self, family: Family) -> IpAddr {
        family.addr(self.server_net, SERVER_HOST)
    }

    /// Gives the server another network, `net`, which the client reaches through it.
    pub fn add_server_net(&self, net: u8) -> Result<()> {
        self.lab.up_with(&self.server, IN, &on_link(net, SERVER_HOST))?;
        let route =
            |family: Family| format!("route add {} via {}", family.on_link(net, 0), self.server_addr(family));
        ip(&self.client, FAMILIES.map(route))
    }

    /// Writes a setting below /proc/sys/net of a namespace.
    pub fn set(&self, ns: &str, setting: &str, value: &str) -> Result<()> {
        self.lab.within(ns, || {
            fs::write(format!("/proc/sys/net/{setting}"), value).with_context(|| format!("setting {setting}"))
        })
    }

    /// Attaches netoken where this world has it, with further arguments, and comes back.
    pub fn attach(&self, arguments: &str) -> Result<()> {
        self.lab.ok(&format!("{} --attach --quiet {arguments}", self.place())).map(drop)
    }

    /// The arguments that name where netoken is attached.
    pub fn place(&self) -> String {
        format!("--netns {} --iface {}", self.hook.0, self.hook.1)
    }

    /// The counters of netoken, as `--query --json` prints them.
    pub fn counters(&self) -> Result<Value> {
        let text = self.lab.ok(&format!("{} --query --json", self.place()))?;
        for line in text.lines() {
            let record: Value = serde_json::from_str(line)?;
            if record["type"] == "counters" {
                return Ok(record);
            }
        }
        bail!("no counters in {text}")
    }

    /// SYNs that the client's TCP has sent again: because a machine that had much to do let an answer wait for a second,
    /// or because a case wants it.
    pub fn sent_again(&self) -> Result<u64> {
        kernel_counter(&self.client, "TcpExtTCPSynRetrans")
    }

    /// Fails unless so many SYNs of the client were counted.
    pub fn expect_count(&self, found: u64, wanted: u64, what: &str) -> Result<()> {
        expect_count(&self.client, found, wanted, what)
    }

    /// Fails unless these verdicts have been counted so often, and no others.
    pub fn expect_counters(&self, expected: &[(&str, u64)]) -> Result<()> {
        let counters = self.counters()?;
        for (name, value) in counters.as_object().context("not an object")? {
            let Some(value) = value.as_u64() else { continue };
            let wanted = match name.as_str() {
                "syns" => expected.iter().filter(|(name, _)| *name != "not_sent").map(|(_, n)| n).sum(),
                _ => expected.iter().find(|(wanted, _)| wanted == name).map_or(0, |(_, n)| *n),
            };
            match wanted {
                0 => ensure_eq!(value, 0, "counter {name} of {counters}"),
                _ => self.expect_count(value, wanted, &format!("counter {name} of {counters}"))?,
            }
        }
        for (name, _) in expected {
            counters[name].as_u64().with_context(|| format!("no counter {name} in {counters}"))?;
        }
        Ok(())
    }

    /// Fails if the server's kernel has seen a packet that is wrong.
    pub fn expect_no_bad_packets(&self) -> Result<()> {
        for name in [
            "TcpInCsumErrors",
            "TcpInErrs",
            "IpInHdrErrors",
            "Ip6InHdrErrors",
            "IpExtInCsumErrors",
            "IpExtInTruncatedPkts",
        ] {
            ensure_eq!(self.server_counter(name)?, 0, "{name} of the server");
        }
        Ok(())
    }

    /// A counter of the server's kernel.
    pub fn server_counter(&self, name: &str) -> Result<u64> {
        kernel_counter(&self.server, name)
    }

    /// Adds rules to the chain of what the server receives.
    pub fn server_rules(&self, rules: &[&str]) -> Result<()> {
        self.nft("add table inet lab; add chain inet lab in { type filter hook input priority 0; }")?;
        rules.iter().try_for_each(|rule| self.nft(&format!("add rule inet lab in {rule}")).map(drop))
    }

    /// Packets that a named counter of nftables in the server has seen.
    pub fn server_counted(&self, counter: &str) -> Result<u64> {
        let text = self.nft(&format!("list counter inet lab {counter}"))?;
        let number = text.split_whitespace().skip_while(|word| *word != "packets").nth(1);
        Ok(number.with_context(|| format!("no number in {text}"))?.parse()?)
    }

    /// Runs nft in the server.
    pub fn nft(&self, command: &str) -> Result<String> {
        sh(&format!("ip netns exec {} nft '{command}'", self.server))
    }
}
