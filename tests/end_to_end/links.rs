//! Devices that the kernel makes out of modules, with real TCP over them: VLANs, in the skb's metadata and in the
//! packet, a dummy that only sends, and WireGuard. Tun is in [`crate::devices`], which needs no connection.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use libtest_mimic::Trial;
use socket2::{Domain, Socket, Type};

use crate::lab::{Lab, ip};
use crate::segment::{Segment, TOKEN};
use crate::sockets::{Listener, exchange};
use crate::support::{Need, ensure_eq};
use crate::wire::Tap;
use crate::world::{FAMILIES, Family, IN, OUT, World};
use crate::{NET, case, with};

const CONNECTIONS: u64 = 3;
/// The network on top of a device, as [`Family::addr`] numbers them.
const NET_ON_TOP: u8 = 20;
const DUMMY: &str = "dummy0";
const TUNNEL: &str = "wg0";
const OUTER: &str = "outer";
const VLAN: &str = "vlan7";

/// A pile of VLAN devices: `ip link add` arguments from the bottom up, and what the wire then shows.
struct Vlans {
    what: &'static str,
    devices: &'static [(&'static str, &'static str)],
    tags: &'static [(u16, u16)],
}

const VLANS: [Vlans; 3] = [
    Vlans {
        what: "a VLAN device, with its tag beside the packet,",
        devices: &[(VLAN, "type vlan id 7")],
        tags: &[(0x8100, 7)],
    },
    Vlans {
        what: "a VLAN device, with its tag in the packet,",
        devices: &[(VLAN, "type vlan id 7 reorder_hdr off")],
        tags: &[(0x8100, 7)],
    },
    Vlans {
        what: "a VLAN in a VLAN, QinQ,",
        devices: &[(OUTER, "type vlan proto 802.1ad id 9"), (VLAN, "type vlan id 7")],
        tags: &[(0x88a8, 9), (0x8100, 7)],
    },
];

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for family in FAMILIES {
        let name = family.name();
        let vlan =
            [NET, &[Need::Works("ip link add t0 type veth && ip link add link t0 name t1 type vlan id 7")]]
                .concat();
        for vlans in &VLANS {
            for (hook, place) in [(OUT, "below"), (VLAN, "on")] {
                cases.push(case(
                    &format!("SYNs over {name} through {} are stamped {place} it", vlans.what),
                    &vlan,
                    move || through_vlans(family, vlans, hook),
                ));
            }
        }
        cases.push(case(
            &format!("a SYN over {name} into a dummy device is stamped"),
            &[NET, &[Need::Works("ip link add t0 type dummy")]].concat(),
            move || dummy(family),
        ));
        cases.push(case(
            &format!("SYNs over {name} through WireGuard, which has no link header, are stamped"),
            &[with("wg"), vec![Need::Works("ip link add t0 type wireguard")]].concat(),
            move || wireguard(family),
        ));
    }
    cases
}

fn on_top(family: Family, host: u8) -> String {
    format!("{}/{}", family.addr(NET_ON_TOP, host), if family == Family::V4 { 24 } else { 64 })
}

/// Connects over what lies on top, and checks every SYN at the application and with these tags on the wire.
fn connect_on_top(world: &World, family: Family, tags: Option<&[(u16, u16)]>) -> Result<()> {
    let addr = SocketAddr::new(family.addr(NET_ON_TOP, 2), 0);
    let listener = Listener::open_with(&world.lab, &world.server, addr, |_| Ok(()))?;
    let tap = Tap::receiver(&world.lab, &world.server, IN)?;
    let plain = exchange(world, &listener)?;
    plain.check_not_stamped()?;
    world.attach("")?;
    for _ in 0..CONNECTIONS {
        let syn = exchange(world, &listener)?;
        syn.check_stamped(TOKEN)?;
        ensure_eq!(syn.ip_len, plain.ip_len + 12, "length of the IP packet");
        if let Some(tags) = tags {
            let wire = tap.syn_of(&syn)?;
            wire.check_stamped(TOKEN)?;
            wire.check_sums()?;
            ensure_eq!(wire.tags, tags, "tags on the wire");
        }
    }
    world.expect_no_bad_packets()?;
    world.expect_counters(&[("stamped", CONNECTIONS)])
}

fn through_vlans(family: Family, vlans: &Vlans, hook: &'static str) -> Result<()> {
    let world = World::new(false)?.hooked_at(hook);
    for (ns, bottom, host) in [(&world.client, OUT, 1), (&world.server, IN, 2)] {
        let mut below = bottom;
        let mut commands = Vec::new();
        for (name, kind) in vlans.devices {
            commands.push(format!("link add link {below} name {name} {kind}"));
            commands.push(format!("link set {name} up"));
            below = name;
        }
        ip(ns, commands)?;
        world.lab.up_with(ns, VLAN, &[on_top(family, host)])?;
    }
    connect_on_top(&world, family, Some(vlans.tags))
}

/// What a dummy device is given to send is seen by packet sockets, and by nobody else.
fn dummy(family: Family) -> Result<()> {
    let mut lab = Lab::new()?;
    let ns = lab.netns("client")?;
    ip(&ns, [format!("link add {DUMMY} type dummy")])?;
    lab.ethtool(&ns, &format!("-K {DUMMY} tx off"))?;
    lab.up_with(&ns, DUMMY, &[on_top(family, 1)])?;
    let place = format!("--netns {ns} --iface {DUMMY}");
    lab.ok(&format!("{place} --attach --quiet"))?;
    let tap = Tap::receiver(&lab, &ns, DUMMY)?;

    let to = SocketAddr::new(family.addr(NET_ON_TOP, 2), 80);
    let syn = send_syn(&lab, &ns, to, || Ok(tap.next_syn(to.port())?.1))?;
    syn.check_stamped(TOKEN)?;
    syn.check_sums()?;
    ensure_eq!(syn.dst, to, "destination");
    let counters = lab.ok(&format!("{place} --query --json"))?;
    ensure!(counters.contains("\"no_policy\":0") && !counters.contains("\"stamped\":0"), "{counters}");
    Ok(())
}

/// Begins to connect to where nobody answers, and returns what `see` makes of it.
fn send_syn(lab: &Lab, ns: &str, to: SocketAddr, see: impl FnOnce() -> Result<Segment>) -> Result<Segment> {
    let _socket = lab.within(ns, || {
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        let started = socket.connect(&to.into()).err().and_then(|error| error.raw_os_error());
        ensure_eq!(started, Some(libc::EINPROGRESS), "connecting to {to}");
        Ok(socket)
    })?;
    see()
}

/// Runs wg, in a namespace, with this on its standard input.
fn wg(lab: &Lab, ns: &str, args: &[&str], input: &str) -> Result<String> {
    lab.within(ns, || {
        let mut command = Command::new("wg");
        let mut child =
            command.args(args).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        child.stdin.take().context("stdin")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if !output.status.success() {
            bail!("wg {args:?}: {}", String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8(output.stdout)?.trim().to_string())
    })
}

fn wireguard(family: Family) -> Result<()> {
    const PORT: &str = "51820";
    let world = World::new(false)?.hooked_at(TUNNEL);
    let ends: [(&str, IpAddr, u8); 2] = [
        (&world.client, world.client_addr(Family::V4), 1),
        (&world.server, world.server_addr(Family::V4), 2),
    ];
    let private = ends.map(|(ns, ..)| wg(&world.lab, ns, &["genkey"], ""));
    let [near, far] = private;
    let private = [near?, far?];
    for (at, (ns, _, host)) in ends.into_iter().enumerate() {
        let (_, peer, _) = ends[1 - at];
        let public = wg(&world.lab, ns, &["pubkey"], &private[1 - at])?;
        ip(ns, [format!("link add {TUNNEL} type wireguard")])?;
        let endpoint = format!("{peer}:{PORT}");
        // The key comes by standard input, as a file.
        let set = ["set", TUNNEL, "listen-port", PORT, "private-key", "/dev/stdin", "peer", &public];
        let peer = ["allowed-ips", "0.0.0.0/0,::/0", "endpoint", &endpoint];
        wg(&world.lab, ns, &[&set[..], &peer[..]].concat(), &private[at])?;
        world.lab.up_with(ns, TUNNEL, &[on_top(family, host)])?;
    }
    // What the veth carries is encrypted; the application sees what came out of the tunnel.
    connect_on_top(&world, family, None)
}
