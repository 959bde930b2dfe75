//! The option lists of [`crate::stacks`], with tokens behind them, and with every byte changed. The guard recognises such
//! a list as a whole and walks any other one, and it walks each that comes in a VLAN: whichever way it takes, the oracle
//! has to agree.

use anyhow::{Result, ensure};
use netoken::guard::program::Kind;
use netoken::token::keyed::Bind;

use crate::packet::{Packet, syn};
use crate::random::Random;
use crate::run::{Bench, SLOT, keyed};
use crate::stacks::{STACKS, variants};
use crate::support::share_of;
use crate::table::{RULES, STATIC, compare, oracle, with};

/// What stands behind the list: a name, the port it goes to, and the packet that has it.
type Ending = (&'static str, u16, fn(&Packet, &[u8]) -> Result<Packet>);

const ENDINGS: &[Ending] = &[
    ("no token", 443, |p, list| Ok(with(p, list, &[]))),
    ("a keyed token", 443, |p, list| Ok(with(p, list, &[keyed(p, 1, 17, Bind::Server, SLOT)?.0]))),
    ("a static token", 22, |p, list| Ok(with(p, list, &[STATIC]))),
    ("a token in vain", 443, |p, list| Ok(with(p, list, &[STATIC]))),
    ("a token that is scrubbed", 5001, |p, list| Ok(with(p, list, &[STATIC]))),
    ("two tokens", 22, |p, list| Ok(with(p, list, &[STATIC, STATIC]))),
];

/// Each of the packets with a name, without a link header as well as with one.
fn packets() -> Result<Vec<(String, Packet)>> {
    let mut packets = Vec::new();
    for v6 in [false, true] {
        for (stack, list) in STACKS {
            for (ending, port, make) in ENDINGS {
                let base = if v6 { syn().to("2001:db8:1::10", *port) } else { syn().to("192.0.2.10", *port) };
                let packet = make(&base, list)?;
                if packet.options.len() <= 40 {
                    packets.push((format!("{stack}, {ending}, to {port}, v6 {v6}"), packet));
                }
            }
        }
    }
    Ok(packets)
}

pub fn every_byte_of_what_stacks_send_counts() -> Result<()> {
    /// A run at XDP takes the kernel ten times as long as one at TC.
    const XDP_EVERY: usize = 10;
    let mut random = Random::seeded()?;
    let percent = share_of(40)?;
    let (mut tc, mut xdp) = (Bench::new(Kind::Tc, RULES)?, Bench::new(Kind::Xdp, RULES)?);
    let mut bare = Bench::new(Kind::TcLayer3, RULES)?;
    let (with_link, without_link) = (oracle(14)?, oracle(0)?);
    let mut count = 0;
    for (what, packet) in packets()? {
        for (at, (what, packet)) in variants(&what, &packet).into_iter().enumerate() {
            if at > 0 && random.below(100) >= percent {
                continue;
            }
            let (frame, tagged) = (packet.build(), packet.clone().vlan(7).build());
            let expected = with_link.judge(&frame);
            ensure!(with_link.judge(&tagged) == expected, "{what}: the oracle goes by the VLAN");
            compare(&mut tc, &what, &frame, &with_link)?;
            compare(&mut tc, &format!("{what}, vlan"), &tagged, &with_link)?;
            compare(&mut bare, &what, &packet.without_link_header().build(), &without_link)?;
            if at == 0 || random.below(XDP_EVERY) == 0 {
                compare(&mut xdp, &what, &frame, &with_link)?;
                compare(&mut xdp, &format!("{what}, vlan"), &tagged, &with_link)?;
            }
            count += 1;
        }
    }
    println!("{count} packets");
    Ok(())
}
