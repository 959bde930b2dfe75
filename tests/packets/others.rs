//! What is not a SYN passes byte for byte, and no counter moves.

use anyhow::{Result, ensure};

use crate::packet::{
    ACK, AH, DEST_OPTS, ESP, FIN, HOP_BY_HOP, LINUX, PSH, Packet, ROUTING, RST, SYN, URG, syn,
};
use crate::run::{Bench, How, name};
use crate::support::Hex;
use netoken::program::{LinkHeader, Settings};

fn other_protocol(packet: Packet, protocol: u8) -> Packet {
    Packet { protocol, ..packet }
}

fn with_ether_type(ether_type: u16) -> Vec<u8> {
    let mut frame = syn().options(LINUX).build();
    frame[12..14].copy_from_slice(&ether_type.to_be_bytes());
    frame
}

fn with_byte(packet: &Packet, at: usize, byte: u8) -> Vec<u8> {
    let mut frame = packet.build();
    frame[at] = byte;
    frame
}

/// Where that many words would end, the flags of a TCP header would be those of a SYN.
fn short_header(packet: &Packet, words: u8) -> Vec<u8> {
    let mut frame = with_byte(packet, 14, 0x40 | words);
    frame[14 + usize::from(words) * 4 + 13] = SYN;
    frame
}

/// For both families and with and without payload.
fn described() -> Vec<(&'static str, Packet)> {
    let nine = (0..9).fold(syn().v6(), |packet, _| packet.extension(DEST_OPTS, 0));
    let mut all = vec![
        ("AH v6", syn().v6().extension(AH, 1)),
        ("AH behind hop-by-hop", syn().v6().extension(HOP_BY_HOP, 0).extension(AH, 1)),
        ("nine extension headers", nine),
        ("mobility header", syn().v6().extension(135, 0)),
        ("HIP", syn().v6().extension(139, 0)),
        ("shim6", syn().v6().extension(140, 0)),
        ("no next header", other_protocol(syn().v6().extension(ROUTING, 0), 59)),
        ("non-first fragment behind hop-by-hop", syn().v6().extension(HOP_BY_HOP, 0).fragment(1, false)),
    ];
    for v6 in [false, true] {
        let base = syn().family(v6).options(LINUX);
        all.extend([
            ("SYN-ACK", base.clone().flags(SYN | ACK)),
            ("RST", base.clone().flags(RST)),
            ("FIN", base.clone().flags(FIN)),
            ("FIN-ACK", base.clone().flags(FIN | ACK)),
            ("SYN+FIN", base.clone().flags(SYN | FIN)),
            ("SYN+RST", base.clone().flags(SYN | RST)),
            ("every flag", base.clone().flags(0xff)),
            ("no flag", base.clone().flags(0)),
            ("URG and PSH alone", base.clone().flags(URG | PSH)),
            ("an ACK", base.clone().flags(ACK)),
            ("data", base.clone().flags(ACK | PSH).payload(1400)),
            ("UDP", other_protocol(base.clone(), 17)),
            ("ICMP", other_protocol(base.clone(), if v6 { 58 } else { 1 })),
            ("ESP", other_protocol(base.clone(), ESP)),
            ("AH", other_protocol(base.clone(), AH)),
            ("SCTP", other_protocol(base.clone(), 132)),
            ("IPv4 in IP", other_protocol(base.clone(), 4)),
            ("IPv6 in IP", other_protocol(base.clone(), 41)),
            ("GRE", other_protocol(base.clone(), 47)),
            ("second fragment", base.clone().fragment(1, true)),
            ("last fragment", base.clone().fragment(0x1fff, false)),
            ("three VLAN tags", base.clone().tag(0x88a8, 1).vlan(2).vlan(3)),
            ("four VLAN tags", base.tag(0x9100, 1).tag(0x88a8, 1).vlan(2).vlan(3)),
        ]);
    }
    all
}

/// What the builder would not write.
fn raw() -> Vec<(&'static str, Vec<u8>)> {
    let (v4, v6) = (syn().options(LINUX), syn().v6().options(LINUX));
    let mut arp = with_ether_type(0x0806);
    arp.truncate(42);
    vec![
        ("ARP", arp),
        ("MPLS", with_ether_type(0x8847)),
        ("PPPoE", with_ether_type(0x8864)),
        ("LLC", with_ether_type(0x002e)),
        ("MACsec", with_ether_type(0x88e5)),
        ("IPv4 under the EtherType of IPv6", with_ether_type(0x86dd)),
        ("IP version 5", with_byte(&v4, 14, 0x55)),
        ("IP version 6 with the EtherType of IPv4", with_byte(&v4, 14, 0x65)),
        ("IP version 4 with the EtherType of IPv6", with_byte(&v6, 14, 0x45)),
        ("header length of 4 words", short_header(&v4, 4)),
        ("header length of 0 words", short_header(&v4, 0)),
        ("an extension that ends behind the frame", with_byte(&v6.clone().extension(DEST_OPTS, 0), 55, 200)),
        ("only an Ethernet header", with_ether_type(0x0806)[..14].to_vec()),
        ("a VLAN tag and nothing behind", v4.vlan(1).build()[..18].to_vec()),
    ]
}

pub fn what_is_not_a_syn_passes_untouched() -> Result<()> {
    let mut bench = Bench::strict(Default::default())?;
    let described = described().into_iter().map(|(what, packet)| (what, packet.build()));
    let mut number = 0;
    for (what, frame) in described.chain(raw()) {
        untouched(&mut bench, what, &frame)?;
        number += 1;
    }
    ensure!(bench.counted()? == 0, "a counter moved");
    println!("not a SYN: {number} kinds of packets");
    Ok(())
}

pub fn what_is_not_a_syn_passes_without_a_link_header() -> Result<()> {
    let mut bench = Bench::strict(Settings { link_header: LinkHeader::None, ..Default::default() })?;
    for (what, packet) in described() {
        if packet.tags.is_empty() {
            untouched(&mut bench, what, &packet.without_link_header().build())?;
        }
    }
    Ok(())
}

fn untouched(bench: &mut Bench, what: &str, frame: &[u8]) -> Result<()> {
    let got = bench.run(frame, How::default())?;
    ensure!(
        got.verdict.is_none() && !got.dropped && got.frame == frame,
        "{what}: {} dropped: {}\n  in  {}\n  out {}",
        name(got.verdict),
        got.dropped,
        Hex(frame),
        Hex(&got.frame)
    );
    Ok(())
}

/// Every value of the flag byte: only SYN without ACK, RST and FIN counts.
pub fn only_a_syn_counts() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let mut syns = 0;
    for flags in 0..=255 {
        for packet in [syn(), syn().v6()] {
            let frame = packet.options(LINUX).flags(flags).build();
            syns += u64::from(bench.judge(&format!("flags {flags:#04x}"), &frame)?.is_some());
        }
    }
    // URG, PSH, ECE and CWR are free: 16 values, two families.
    ensure!(syns == 32, "{syns} SYNs");
    let total = bench.counted()?;
    ensure!(total == syns, "the counters say {total}, there were {syns} SYNs");
    Ok(())
}
