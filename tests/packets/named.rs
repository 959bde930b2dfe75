//! Small cases with a name, each a promise of its own. The oracle checks every byte of them as well.

use anyhow::{Result, ensure};
use netoken::policy::Policy;
use netoken::program::LinkHeader;
use netoken::program::Settings;
use netoken::token::Token;
use netoken::types::Verdict;

use crate::packet::{
    AO, CWR, ECE, LINUX, MD5, MSS, NOP, PSH, Packet, SACK_PERMITTED, STAMP, SYN, TIMESTAMPS, TOKEN, URG,
    WINDOW_SCALE, syn, unknown,
};
use crate::run::{Bench, How};
use crate::support::{Hex, ensure_eq};

const STAMPED: Verdict = Verdict::VERDICT_STAMPED;

fn both(options: &[u8]) -> [Packet; 2] {
    [syn().options(options), syn().v6().options(options)]
}

pub fn an_ecn_syn_is_stamped() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for flags in [SYN | ECE | CWR, SYN | PSH, SYN | URG, SYN | ECE | CWR | PSH | URG] {
        for packet in both(LINUX) {
            bench.expect(&format!("flags {flags:#x}"), &packet.flags(flags).build(), STAMPED)?;
        }
    }
    Ok(())
}

/// Ends the list where a header can end.
fn to_words(mut list: Vec<u8>) -> Vec<u8> {
    list.resize(list.len().next_multiple_of(4), 0);
    list
}

/// The reserved bits and the AccECN bit share a byte with the data offset.
pub fn the_bits_beside_the_data_offset_stay() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for packet in both(LINUX) {
        let mut frame = packet.build();
        frame[packet.tcp_at() + 12] |= 0xf;
        bench.expect("reserved bits", &frame, STAMPED)?;
    }
    Ok(())
}

pub fn a_signed_syn_leaves_as_it_came() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for signature in [MD5, AO] {
        for list in [
            [signature, &[1, 1]].concat(),
            [MSS, NOP, signature, NOP].concat(),
            [signature, &[0, 0]].concat(),
            // A signature may be as short as its own two bytes.
            vec![signature[0], 2, 0, 0],
        ] {
            for packet in both(&to_words(list)) {
                bench.expect("signed", &packet.build(), Verdict::VERDICT_AUTH_OPTION)?;
            }
        }
        // Behind the end of the list there is no signature.
        let list = [&[0][..], signature, &[0]].concat();
        for packet in both(&list[..16]) {
            bench.expect("a signature behind EOL", &packet.build(), STAMPED)?;
        }
    }
    Ok(())
}

pub fn a_second_pass_changes_nothing() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for list in [&[][..], MSS, LINUX, &[1; 40], &[0; 12]] {
        for packet in both(list) {
            let once = bench.run(&packet.payload(33).build(), How::default())?;
            ensure_eq!(once.verdict, Some(STAMPED), "first pass over {}", Hex(list));
            bench.expect("second pass", &once.frame, Verdict::VERDICT_ALREADY_STAMPED)?;
        }
    }
    Ok(())
}

pub fn only_this_option_and_exid_is_already_stamped() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for (list, verdict) in [
        (vec![253, 4, 0x4e, 0x54], Verdict::VERDICT_ALREADY_STAMPED),
        (vec![253, 6, 0x4e, 0x54, 1, 2, 0, 0], Verdict::VERDICT_ALREADY_STAMPED),
        (vec![1, 253, 8, 0x4e, 0x54, 1, 2, 3, 4, 1, 1, 1], Verdict::VERDICT_ALREADY_STAMPED),
        (vec![253, 4, 0x54, 0x4e], STAMPED),
        (vec![253, 12, 0x4e, 0x55, 1, 2, 3, 4, 5, 6, 7, 8], STAMPED),
        (vec![253, 12, 0xf9, 0x89, 1, 2, 3, 4, 5, 6, 7, 8], STAMPED),
        (vec![254, 12, 0x4e, 0x54, 1, 2, 3, 4, 5, 6, 7, 8], STAMPED),
        (vec![253, 2, 0x4e, 2], STAMPED),
        (vec![253, 3, 0x4e, 1], STAMPED),
        // Too short for an ExID: the byte behind it is the next option's kind.
        (vec![253, 3, 0x4e, 0x54, 5, 9, 9, 9], STAMPED),
        (vec![253, 2, 253, 2], STAMPED),
        // The bytes are there, but inside another option.
        (vec![200, 6, 253, 4, 0x4e, 0x54, 1, 1], STAMPED),
    ] {
        for packet in both(&list) {
            bench.expect(&format!("options {}", Hex(&list)), &packet.build(), verdict)?;
        }
    }
    Ok(())
}

pub fn kind_and_exid_are_settings() -> Result<()> {
    let mut bench = Bench::load(Settings { option_kind: 254, exid: 0xbeef, ..Settings::default() })?;
    bench.program.maps.set_policy(&Policy::stamp_all(Token(TOKEN)))?;
    let own = [&[254, 12, 0xbe, 0xef], &TOKEN[..]].concat();
    for list in [&[][..], LINUX, &STAMP] {
        for packet in both(list) {
            let out = bench.run(&packet.build(), How::default())?.frame;
            let stamped = packet.options(&[list, &own].concat()).build();
            ensure_eq!(out, stamped, "stamped with another kind and ExID");
            bench.expect_untouched("again", &stamped, Verdict::VERDICT_ALREADY_STAMPED, false)?;
        }
    }
    Ok(())
}

/// What stands in front of the stamp and what behind it, to the byte.
pub fn the_token_stands_where_it_must() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for (what, list, before, behind) in [
        ("nothing", vec![], vec![], vec![]),
        ("a word", MSS.to_vec(), MSS.to_vec(), vec![]),
        ("EOL at once", vec![0, 0, 0, 0], vec![], vec![]),
        ("EOL and junk", vec![0, 19, 18, 2], vec![], vec![]),
        ("trailing NOPs are used", [MSS, &[1; 12]].concat(), MSS.to_vec(), vec![]),
        ("one NOP is used", [WINDOW_SCALE, NOP].concat(), WINDOW_SCALE.to_vec(), vec![0]),
        ("leading NOPs stay", [&[1, 1], TIMESTAMPS].concat(), [&[1, 1], TIMESTAMPS].concat(), vec![]),
        ("NOP, then EOL", [MSS, &[1, 0, 9, 9]].concat(), MSS.to_vec(), vec![]),
        ("only NOPs", vec![1; 8], vec![], vec![]),
        ("a longer list ends behind the token", vec![1; 20], vec![], vec![0]),
        ("a longer list of EOL", vec![0; 40], vec![], vec![0]),
        ("not at a word", [SACK_PERMITTED, &[1; 18]].concat(), SACK_PERMITTED.to_vec(), vec![0, 0, 0]),
        ("Linux", LINUX.to_vec(), LINUX.to_vec(), vec![]),
    ] {
        for packet in both(&list) {
            bench.expect(what, &packet.build(), STAMPED)?;
            let out = bench.run(&packet.build(), How::default())?.frame;
            let wanted = [&before[..], &STAMP, &behind].concat();
            let list = &out[packet.tcp_at() + 20..];
            ensure!(list.starts_with(&wanted), "{what}: {} instead of {}", Hex(list), Hex(&wanted));
        }
    }
    Ok(())
}

/// 33 bytes with NOPs between them, 28 without.
pub fn nops_between_options_make_room() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let spread = [NOP, NOP, TIMESTAMPS, NOP, WINDOW_SCALE, NOP, NOP, &unknown(11), MSS, &[0, 7]].concat();
    let packed = [TIMESTAMPS, WINDOW_SCALE, &unknown(11), MSS, &STAMP].concat();
    ensure_eq!((spread.len(), packed.len()), (35, 40), "the test itself");
    let spread = [&spread[..], &[7]].concat();
    for packet in both(&spread) {
        let packet = packet.payload(5);
        bench.expect("squeeze", &packet.build(), STAMPED)?;
        let out = bench.run(&packet.build(), How::default())?.frame;
        ensure_eq!(out, packet.options(&packed).build(), "squeezed to the byte");
    }
    // RFC 9293 section 3.1: what is left behind the end of the list is zeros, and not what moved away.
    let packed = [&unknown(15)[..], &STAMP, &[0; 13]].concat();
    for packet in both(&[&[1; 25][..], &unknown(15)].concat()) {
        let out = bench.run(&packet.build(), How::default())?.frame;
        ensure_eq!(out, packet.options(&packed).build(), "zeros behind the list");
    }
    for packet in both(&[NOP, &unknown(30), NOP, MSS].concat()) {
        bench.expect("squeezing does not help", &packet.build(), Verdict::VERDICT_NO_ROOM)?;
    }
    Ok(())
}

/// All lists of one option and NOPs in front of it, around the limit.
pub fn the_limit_is_forty_bytes() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for real in 2..=40usize {
        for nops in 0..=40 - real {
            let mut list = [&vec![1; nops][..], &unknown(real)].concat();
            list.resize(list.len().next_multiple_of(4), 0);
            let verdict = if real <= 28 { STAMPED } else { Verdict::VERDICT_NO_ROOM };
            for packet in both(&list) {
                bench.expect(&format!("{nops} NOPs, {real} bytes"), &packet.build(), verdict)?;
            }
        }
    }
    Ok(())
}

/// The longest and the shortest list that a walker has to get through.
pub fn extreme_lists_are_walked_to_the_end() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let pairs = |number: usize| [200, 2].repeat(number);
    for (what, list, verdict) in [
        ("14 options of two bytes", pairs(14), STAMPED),
        ("15", [&pairs(15)[..], &[0, 0]].concat(), Verdict::VERDICT_NO_ROOM),
        ("20", pairs(20), Verdict::VERDICT_NO_ROOM),
        ("13 with a NOP in front of each", [1, 200, 2].repeat(13).into_iter().chain([0]).collect(), STAMPED),
        ("40 NOPs", vec![1; 40], STAMPED),
        ("39 NOPs and half an option", [&[1; 39][..], &[200]].concat(), Verdict::VERDICT_MALFORMED),
        ("a lie in the last two bytes", [&[1; 38][..], &[200, 3]].concat(), Verdict::VERDICT_MALFORMED),
        ("length 1 at the end", [&[1; 38][..], &[200, 1]].concat(), Verdict::VERDICT_MALFORMED),
        ("length 255", vec![200, 255, 0, 0], Verdict::VERDICT_MALFORMED),
        (
            "a token whose length is a lie",
            [&STAMP[..1], &[16], &STAMP[2..]].concat(),
            Verdict::VERDICT_MALFORMED,
        ),
        ("a signature at the very end", [&[1; 38][..], &[19, 2]].concat(), Verdict::VERDICT_AUTH_OPTION),
        ("a token at the very end", [&[1; 28][..], &STAMP].concat(), Verdict::VERDICT_ALREADY_STAMPED),
    ] {
        for packet in both(&list) {
            bench.expect(what, &packet.payload(3).build(), verdict)?;
        }
    }
    Ok(())
}

pub fn ethernet_padding_stays_behind_the_packet() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    for len in [1, 2, 3, 6, 18, 46] {
        let trailer: Vec<u8> = (0..len).map(|i| 0xc0 | i).collect();
        for payload in [0, 1, 2, 7] {
            for packet in both(MSS) {
                let frame = packet.payload(payload).trailer(&trailer).build();
                bench.expect(&format!("{len} bytes of padding"), &frame, STAMPED)?;
            }
        }
    }
    Ok(())
}

/// Only where nothing grows: growing makes the kernel forget the sum, which BPF_PROG_TEST_RUN does not know.
pub fn the_kernel_sum_of_the_whole_frame_stays_right() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let how = How { checksum_complete: true, ..How::default() };
    for list in
        [&[1; 12][..], &[0; 20], &[1; 40], &to_words([MSS, &[1; 13], WINDOW_SCALE, &[1; 13]].concat())]
    {
        for payload in [0, 1, 2, 101, 3001] {
            for packet in both(list).into_iter().chain(both(list).map(|packet| packet.vlan(9))) {
                let frame = packet.payload(payload).build();
                bench.expect_how("CHECKSUM_COMPLETE", &frame, STAMPED, how)?;
            }
        }
    }
    for (what, packet) in [("signed", syn().options(AO)), ("no room", syn().options(&unknown(32)))] {
        bench.judge_how(what, &packet.build(), how)?;
    }
    Ok(())
}
