//! SYNs whose headers, or some of them, are not in the linear part of the skb when the guard sees them: it reads them
//! all the same. Behind it a router sends on what is left, which shows what became of the packet.

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;

use crate::devices::{TUN, has_tun};
use crate::guard::{STATIC, rules};
use crate::lab::ip;
use crate::segment::TOKEN;
use crate::skbs::payload;
use crate::support::ensure_eq;
use crate::wire::{Checksum, Frame, LINUX_OPTIONS, Tap};
use crate::world::{FAMILIES, Family, Hook, IN, OUT, World};
use crate::{NET, case, case_if, sys};

const MTU: usize = 9000;
const PORT: u16 = 4000;
/// How much is linear: the link header alone; a part of IP, of TCP and of its options; all headers. What is not longer
/// than a page is linear as a whole.
const LINEAR: [usize; 5] = [14, 40, 64, 80, 200];
const PAYLOADS: [usize; 2] = [4100, 8001];

pub fn cases() -> Vec<Trial> {
    let mut cases = Vec::new();
    for (hook, shown) in [("tc", "clsact ingress"), ("xdp", "xdp generic")] {
        for family in FAMILIES {
            for checksum in [Checksum::Partial, Checksum::Complete] {
                let name = format!(
                    "guard: --hook {hook} reads and scrubs SYNs over {} in fragments with a {checksum:?} checksum",
                    family.name()
                );
                cases.push(case(&name, NET, move || fragments(IN, hook, shown, family, checksum)));
            }
        }
    }
    for family in FAMILIES {
        let name = format!(
            "guard: it reads and scrubs SYNs over {} in fragments on a device without link header",
            family.name()
        );
        let bare = move || fragments(TUN, "tc", "clsact ingress", family, Checksum::Complete);
        cases.push(case_if(&name, NET, bare, has_tun));
    }
    cases
}

/// What comes in by the tun device is redirected to there, and has lost its link header, perhaps all that was linear.
fn fragments(guarded: &str, hook: &str, shown: &str, family: Family, checksum: Checksum) -> Result<()> {
    let (world, router) = World::routed(false, Hook::Client)?;
    // What the frames are for.
    ip(&router, [format!("link set {IN} address 02:00:00:00:00:02")])?;
    let mut bare = None;
    if guarded == TUN {
        world.ask_nobody(&router)?;
        let device = world.lab.within(&router, || sys::open_tun(TUN))?;
        ip(&router, [format!("link set {TUN} mtu {MTU} up")])?;
        bare = Some((device, world.lab.within(&router, || sys::attach_redirect(IN, TUN, false))?));
    }
    for (ns, interface) in [(&world.client, OUT), (&router, IN), (&router, OUT), (&world.server, IN)] {
        ip(ns, [format!("link set {interface} mtu {MTU}")])?;
    }
    let rules = rules(&world, "drop", &format!("{STATIC}\nscrub = true"))?;
    let place = format!("--netns {router} --iface {guarded}");
    let said = world.lab.ok(&format!("guard {place} --attach --hook {hook} --json --rules {rules}"))?;
    ensure!(said.contains(shown), "{said}");

    let (sender, receiver) =
        (Tap::sender(&world.lab, &world.client, OUT)?, Tap::receiver(&world.lab, &world.server, IN)?);
    let dst = (world.server_addr(family), PORT).into();
    let token = [&LINUX_OPTIONS[..], &[253, 12, 0x4e, 0x54], &TOKEN].concat();
    let wrong = [&LINUX_OPTIONS[..], &[253, 12, 0x4e, 0x54], &[9; 8]].concat();
    let mut sent = 0u64;
    for len in PAYLOADS {
        for linear in LINEAR {
            let payload = payload(len);
            let syn = |options: &[u8]| Frame::syn(world.client_addr(family), dst, options, &payload);
            // If one of those that are refused came through, it would come first.
            for options in [&LINUX_OPTIONS[..], &wrong, &token] {
                sender.send(&syn(options)?, checksum, linear)?;
            }
            sent += 1;
            let (_, after) = receiver.next_syn(PORT)?;
            let check = || -> Result<()> {
                after.check_not_stamped()?;
                after.check_sums()?;
                ensure_eq!(after.options_len, token.len(), "length of the options");
                ensure!(after.payload == payload, "the payload is another");
                Ok(())
            };
            check().with_context(|| format!("{len} bytes of payload, {linear} linear"))?;
        }
    }
    let counters = world.lab.ok(&format!("guard {place} --query --json"))?;
    let counted = counters.lines().find(|line| line.contains("guard_counters")).context("no counters")?;
    let counted: serde_json::Value = serde_json::from_str(counted)?;
    for (name, count) in [("valid", sent), ("missing", sent), ("wrong_static", sent), ("dropped", 2 * sent)] {
        ensure_eq!(counted[name], count, "{name} of {counted}");
    }
    drop(bare);
    Ok(())
}
