//! What the policy decides before anything is stamped: which rule wins, and what each decision does.

use anyhow::{Result, ensure};
use netoken::policy::Policy;
use netoken::policy::compile::{Naming, compile};
use netoken::program::LinkHeader;
use netoken::program::Settings;
use netoken::types::{Size, Verdict};

use crate::oracle::{Judgement, Path, judge};
use crate::packet::{LINUX, MD5, Packet, STAMP, syn};
use crate::run::{Bench, How};
use crate::support::ensure_eq;

/// No default: what no rule names has no policy. Narrow rules stand in front of wide ones, but for one that shows that
/// the order is what counts.
const RULES: &str = r#"
[[rule]]
name = "host"
dst = "10.1.2.3"
action = "stamp"
token = "a1b2c3d4e5f60718"

[[rule]]
name = "narrow, one port"
dst = "10.1.0.0/16"
port = 22
action = "drop"

[[rule]]
name = "narrow, any port"
dst = "10.1.0.0/16"
action = "skip"

[[rule]]
name = "wide, one port"
dst = "10.0.0.0/8"
port = 443
action = "drop"

[[rule]]
name = "odd length"
dst = "172.16.0.0/13"
action = "drop"

[[rule]]
name = "host, v6"
dst = "2001:db8:1::3"
action = "stamp"
token = "a1b2c3d4e5f60718"

[[rule]]
name = "narrow, one port, v6"
dst = "2001:db8:1::/48"
port = 22
action = "drop"

[[rule]]
name = "narrow, any port, v6"
dst = "2001:db8:1::/48"
action = "skip"

[[rule]]
name = "wide, one port, v6"
dst = "2001:db8::/32"
port = 443
action = "drop"

[[rule]]
name = "too late"
dst = "10.1.2.4"
action = "drop"
"#;

pub fn the_first_rule_that_matches_decides() -> Result<()> {
    let mut bench = Bench::under(RULES)?;
    for (dst, port, verdict) in [
        ("10.0.0.1", 443, Verdict::VERDICT_DROPPED),
        ("10.0.0.1", 444, Verdict::VERDICT_NO_POLICY),
        ("11.0.0.1", 443, Verdict::VERDICT_NO_POLICY),
        ("10.1.0.1", 443, Verdict::VERDICT_SKIPPED),
        ("10.1.255.255", 443, Verdict::VERDICT_SKIPPED),
        ("10.2.0.0", 443, Verdict::VERDICT_DROPPED),
        ("10.1.0.1", 22, Verdict::VERDICT_DROPPED),
        ("10.1.2.3", 22, Verdict::VERDICT_STAMPED),
        ("10.1.2.3", 443, Verdict::VERDICT_STAMPED),
        ("10.1.2.2", 80, Verdict::VERDICT_SKIPPED),
        ("10.1.2.4", 80, Verdict::VERDICT_SKIPPED),
        ("172.23.255.255", 0, Verdict::VERDICT_DROPPED),
        ("172.24.0.0", 80, Verdict::VERDICT_NO_POLICY),
        ("2001:db8:2::1", 443, Verdict::VERDICT_DROPPED),
        ("2001:db8:2::1", 444, Verdict::VERDICT_NO_POLICY),
        ("2001:db9::1", 443, Verdict::VERDICT_NO_POLICY),
        ("2001:db8:1::1", 443, Verdict::VERDICT_SKIPPED),
        ("2001:db8:1::1", 22, Verdict::VERDICT_DROPPED),
        ("2001:db8:1::3", 22, Verdict::VERDICT_STAMPED),
        ("2001:db8:1::3", 443, Verdict::VERDICT_STAMPED),
        // An IPv4 rule is not for the IPv6 address whose bytes begin alike.
        ("a01::1", 443, Verdict::VERDICT_NO_POLICY),
        ("::a01:203", 443, Verdict::VERDICT_NO_POLICY),
    ] {
        let frame = syn().options(LINUX).to(dst, port).build();
        let what = format!("{dst} port {port}");
        match verdict {
            Verdict::VERDICT_STAMPED => bench.expect(&what, &frame, verdict)?,
            _ => bench.expect_untouched(&what, &frame, verdict, verdict == Verdict::VERDICT_DROPPED)?,
        }
    }
    Ok(())
}

pub fn a_default_is_for_both_families_and_rules_beat_it() -> Result<()> {
    let rules = RULES.replace("a1b2c3d4e5f60718", "0000000000000001");
    let default = "default = { action = 'stamp', token = 'a1b2c3d4e5f60718' }";
    let mut bench = Bench::under(&format!("{default}\n{rules}"))?;
    for dst in ["11.0.0.1", "2001:db9::1", "10.0.0.1", "2001:db8:2::1"] {
        bench.expect(dst, &syn().options(LINUX).to(dst, 444).build(), Verdict::VERDICT_STAMPED)?;
    }
    for dst in ["10.1.0.1", "2001:db8:1::1"] {
        bench.expect_untouched(dst, &syn().to(dst, 1).build(), Verdict::VERDICT_SKIPPED, false)?;
    }
    Ok(())
}

/// IPv4 addresses are stored mapped into IPv6, which is no business of a policy's reader.
pub fn a_prefix_is_for_its_own_family() -> Result<()> {
    let mut bench = Bench::under("")?;
    let rule = |dst: &str, port: u16| {
        let port = if port == 0 { String::new() } else { format!("port = {port}\n") };
        format!("[[rule]]\nname = \"{dst}\"\ndst = \"{dst}\"\n{port}action = \"drop\"\n")
    };
    let skip = "default = { action = 'skip' }\n";
    for (dst, own, other) in [
        ("::/0", "2001:db8::1", "10.1.2.3"),
        ("::/64", "::1:2:3:4", "10.1.2.3"),
        ("0.0.0.0/0", "10.1.2.3", "::1"),
    ] {
        for port in [0, 443] {
            for (default, else_verdict) in
                [("", Verdict::VERDICT_NO_POLICY), (skip, Verdict::VERDICT_SKIPPED)]
            {
                bench.set_policy(&format!("{default}{}", rule(dst, port)))?;
                let what = format!("{dst} port {port} with '{default}'");
                for (addr, verdict) in [(own, Verdict::VERDICT_DROPPED), (other, else_verdict)] {
                    let frame = syn().to(addr, 443).build();
                    let dropped = verdict == Verdict::VERDICT_DROPPED;
                    bench.expect_untouched(&format!("{what}: {addr}"), &frame, verdict, dropped)?;
                }
            }
        }
    }
    Ok(())
}

pub fn without_any_policy_nothing_changes() -> Result<()> {
    let mut bench = Bench::load(Settings::default())?;
    for packet in [syn(), syn().v6()] {
        let frame = packet.options(LINUX).build();
        bench.expect_untouched("no policy was ever set", &frame, Verdict::VERDICT_NO_POLICY, false)?;
        bench.set_policy("")?;
        bench.expect_untouched("an empty policy", &frame, Verdict::VERDICT_NO_POLICY, false)?;
    }
    Ok(())
}

pub fn each_rule_stamps_its_own_token() -> Result<()> {
    let mut bench = Bench::under(
        r#"
        default = { action = "stamp", token = "1111111111111111" }
        [[rule]]
        name = "other"
        dst = "192.0.2.0/24"
        action = "stamp"
        token = "0x0000000000000000"
        "#,
    )?;
    for (dst, byte) in [("192.0.2.1", 0), ("192.0.3.1", 0x11)] {
        let packet = syn().to(dst, 80);
        let out = bench.run(&packet.build(), How::default())?.frame;
        let option = [&STAMP[..4], &[byte; 8]].concat();
        // The builder's own checksum: the oracle knows one token only.
        ensure_eq!(out, packet.options(&option).build(), "{dst}");
    }
    Ok(())
}

/// Policy comes first: what it skips or drops is not looked at any further.
pub fn skip_and_drop_come_before_everything_else() -> Result<()> {
    let mut bench = Bench::under("")?;
    for (action, verdict) in [("skip", Verdict::VERDICT_SKIPPED), ("drop", Verdict::VERDICT_DROPPED)] {
        bench.set_policy(&format!("default = {{ action = '{action}' }}"))?;
        for packet in failures().into_iter().map(|(packet, _)| packet).chain([syn(), syn().v6()]) {
            let dropped = verdict == Verdict::VERDICT_DROPPED;
            bench.expect_untouched(action, &packet.build(), verdict, dropped)?;
        }
    }
    Ok(())
}

/// One SYN for each reason not to stamp it.
fn failures() -> Vec<(Packet, Verdict)> {
    vec![
        (syn().fragment(0, true), Verdict::VERDICT_FRAGMENT),
        (syn().v6().fragment(0, true), Verdict::VERDICT_FRAGMENT),
        (syn().v6().fragment(0, false), Verdict::VERDICT_FRAGMENT),
        (syn().data_offset(4), Verdict::VERDICT_MALFORMED),
        (syn().options(&[200, 1, 0, 0]), Verdict::VERDICT_MALFORMED),
        (syn().ip_len_lie(1), Verdict::VERDICT_MALFORMED),
        (syn().v6().ip_len_lie(-1), Verdict::VERDICT_MALFORMED),
        (syn().options(MD5).data_offset(10), Verdict::VERDICT_MALFORMED),
        (syn().options(&[MD5, &[0, 0]].concat()), Verdict::VERDICT_AUTH_OPTION),
        (syn().options(&crate::packet::unknown(32)), Verdict::VERDICT_NO_ROOM),
        (syn().v6().options(&crate::packet::unknown(40)), Verdict::VERDICT_NO_ROOM),
        (syn().options(&STAMP), Verdict::VERDICT_ALREADY_STAMPED),
    ]
}

pub fn when_full_drop_drops_what_cannot_be_stamped() -> Result<()> {
    let mut bench = Bench::strict(Settings::default())?;
    for (packet, verdict) in failures() {
        bench.expect("when_full = drop", &packet.build(), verdict)?;
    }
    let gso = How { gso_size: 100, ..How::default() };
    bench.expect_how("gso", &syn().payload(200).build(), Verdict::VERDICT_TOO_BIG, gso)?;
    bench.expect("one that fits", &syn().options(LINUX).build(), Verdict::VERDICT_STAMPED)?;
    Ok(())
}

/// The reasons have an order; a packet with two of them gets the first.
pub fn of_two_reasons_the_first_is_named() -> Result<()> {
    let mut bench = Bench::new(LinkHeader::Ethernet)?;
    let auth_and_token = [MD5, &STAMP, &[1, 1]].concat();
    let bad_behind_token = [&STAMP[..], &[200, 1, 0, 0]].concat();
    let auth_and_full = [MD5, &crate::packet::unknown(20), &[0, 0]].concat();
    for (what, packet, verdict) in [
        ("fragment, malformed", syn().fragment(0, true).data_offset(3), Verdict::VERDICT_FRAGMENT),
        ("malformed, token", syn().options(&bad_behind_token), Verdict::VERDICT_MALFORMED),
        ("token, auth", syn().options(&auth_and_token), Verdict::VERDICT_ALREADY_STAMPED),
        ("auth, no room", syn().options(&auth_and_full), Verdict::VERDICT_AUTH_OPTION),
    ] {
        bench.expect(what, &packet.build(), verdict)?;
    }
    let gso = How { gso_size: 100, ..How::default() };
    let full = syn().options(&crate::packet::unknown(36)).payload(200).build();
    bench.expect_how("no room, gso", &full, Verdict::VERDICT_NO_ROOM, gso)?;
    let roomy = syn().options(&[1; 12]).payload(200).build();
    // It does not grow, so its segments do not either.
    bench.expect_how("gso that need not grow", &roomy, Verdict::VERDICT_STAMPED, gso)
}

/// A guard for the tests themselves: the oracle does not stamp what it should refuse.
pub fn the_oracle_agrees_with_the_list_of_failures() -> Result<()> {
    let path = Path { link_len: 14, mtu: 65536, gso: false };
    for (packet, verdict) in failures() {
        let judged = judge(&packet.build(), &path);
        ensure_eq!(judged.verdict(), Some(verdict), "{}", judged.describe());
        ensure_eq!(matches!(judged, Judgement::Stamped(_)), false, "{}", judged.describe());
    }
    Ok(())
}

/// The rules differ only in ranges, so a packet tries one after the other, as many as that may be.
pub fn the_last_of_as_many_ranges_as_one_packet_may_try_decides() -> Result<()> {
    let most = Size::CHAIN_MAX.0 as u16;
    let rule = |n: u16| {
        let action = if n + 1 == most { "drop" } else { "skip" };
        format!("[[rule]]\nname = '{n}'\nport = '{}-{}'\naction = '{action}'\n", n * 100, n * 100 + 99)
    };
    let mut bench = Bench::under(&(0..most).map(rule).collect::<String>())?;
    for v6 in [false, true] {
        let mut to = |port: u16, verdict, dropped| {
            let frame = Packet { dport: port, ..syn().family(v6) }.build();
            bench.expect_untouched(&format!("to port {port}"), &frame, verdict, dropped)
        };
        to(most * 100 - 101, Verdict::VERDICT_SKIPPED, false)?;
        to(most * 100 - 100, Verdict::VERDICT_DROPPED, true)?;
        to(most * 100 - 1, Verdict::VERDICT_DROPPED, true)?;
        to(most * 100, Verdict::VERDICT_NO_POLICY, false)?;
    }
    Ok(())
}

/// The counters of the first rules are in one map, those of the others in chunks, and none is counted beside itself.
pub fn each_rule_has_a_counter_however_many_there_are() -> Result<()> {
    let numbers = [0, 1, Size::HITS_FIRST.0 - 1, Size::HITS_FIRST.0, Size::HITS_FIRST.0 + 1];
    let edge = Size::HITS_FIRST.0 + Size::HITS_CHUNK.0;
    let numbers: Vec<u32> = numbers.into_iter().chain([edge - 1, edge, edge + 1]).collect();
    let rule = |n: usize| format!("[[rule]]\nname = '{n}'\nport = {}\naction = 'skip'\n", 1000 + n);
    let policy = Policy::from_toml(&(0..numbers.len()).map(rule).collect::<String>())?;
    let mut bench = Bench::load(Settings::default())?;
    let compiled = compile(&policy, Naming::none(), &numbers)?;
    bench.program.maps.install(&compiled, None)?;
    let times = |at: usize| at as u64 + 1;
    for at in 0..numbers.len() {
        for _ in 0..times(at) {
            let frame = syn().to("192.0.2.10", 1000 + at as u16).build();
            bench.expect_untouched("a counted SYN", &frame, Verdict::VERDICT_SKIPPED, false)?;
        }
    }
    for (at, hits) in bench.program.maps.hits(&numbers)?.into_iter().enumerate() {
        ensure_eq!(hits.packets, times(at), "packets of counter {}", numbers[at]);
        ensure!(hits.last_jiffies != 0, "no time of the last packet of counter {}", numbers[at]);
    }
    Ok(())
}
