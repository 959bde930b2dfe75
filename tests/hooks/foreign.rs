//! What others put on an interface stays, whatever is typed.

use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::fs::symlink;
use std::ptr;

use anyhow::{Result, bail, ensure};
use libbpf_rs::{MapHandle, MapType, TC_EGRESS, TcHook};
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkHeader, NetlinkMessage,
    NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

use crate::lab::OBSERVE;
use crate::look::{expect_bare, expect_no_state, expect_ours, foreign, has_clsact, ours, records};
use crate::support::{ensure_eq, sh};
use crate::world::World;

/// Filters of two kinds that let every packet go on, at the priorities of somebody who was there first. Kinds
/// that every kernel has which can run ours: `u32`, and `bpf` with a classic program.
fn add_foreign(ns: &str, iface: &str) -> Result<()> {
    ["ingress", "egress"].iter().try_for_each(|side| add_foreign_to(ns, iface, side))
}

fn add_foreign_to(ns: &str, iface: &str, side: &str) -> Result<()> {
    let add = format!("tc -n {ns} filter add dev {iface} {side}");
    sh(&format!("{add} pref 10 protocol ip u32 match ip dst 192.0.2.1/32 classid 1:1"))?;
    sh(&format!("{add} pref 20 bpf da bytecode '1,6 0 0 4294967295,'"))?;
    sh(&format!("{add} pref 20 handle 0x7 bpf da bytecode '1,6 0 0 4294967295,'"))?;
    sh(&format!("{add} pref 60000 protocol ipv6 u32 match ip6 dst 2001:db8::1/128 classid 1:2"))?;
    Ok(())
}

/// Every command, in an order that somebody could type; `before` and `behind` are priorities around others'.
const COMMANDS: [&str; 14] = [
    "--query",
    "--attach --quiet",
    "--query",
    "--attach --quiet",
    "--attach --quiet --priority 5",
    "--attach --quiet --priority 20",
    "--attach --quiet --priority 20 --handle 0x99",
    "--attach --quiet --priority 65000",
    "--attach --quiet --priority 10",
    "--detach",
    "--attach --quiet",
    "--destroy",
    "--destroy",
    "--detach",
];

fn expect_untouched_by_every_command(world: &World) -> Result<()> {
    let before = foreign(&world.ns, "c0")?;
    ensure!(before.len() > 8, "the foreign filters are not there: {before:#?}");
    for command in COMMANDS {
        let output = world.run(&format!("-i c0 {command}"))?;
        ensure_eq!(foreign(&world.ns, "c0")?, before, "the others' filters after {command} ({output:?})");
        ensure!(has_clsact(&world.ns, "c0")?, "the qdisc is gone after {command}");
    }
    expect_ours(&world.ns, "c0", 0)
}

pub fn foreign_filters_stay_in_place_and_in_order() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    add_foreign(&world.ns, "c0")?;
    expect_untouched_by_every_command(&world)?;
    expect_no_state(&world.lab)
}

pub fn foreign_filters_on_our_clsact_stay() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    add_foreign(&world.ns, "c0")?;
    expect_untouched_by_every_command(&world)
}

pub fn destroy_says_what_became_of_the_qdisc() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("clsact qdisc removed"), "ours, unused: {said}");
    expect_bare(&world.ns, "c0")?;

    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    world.ok("-i c0 --attach --quiet")?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("clsact qdisc kept: somebody else made it"), "foreign: {said}");
    ensure!(has_clsact(&world.ns, "c0")?, "a foreign qdisc is gone");
    sh(&format!("tc -n {} qdisc del dev c0 clsact", world.ns))?;

    world.ok("-i c0 --attach --quiet")?;
    sh(&format!("tc -n {} filter add dev c0 ingress bpf da bytecode '1,6 0 0 4294967295,'", world.ns))?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("clsact qdisc kept: 1 other filter"), "in use: {said}");
    expect_ours(&world.ns, "c0", 0)?;

    // It is still known to be ours when the other one has left.
    sh(&format!("tc -n {} filter del dev c0 ingress", world.ns))?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("clsact qdisc removed"), "ours, unused again: {said}");
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_foreign_chain_without_filters_keeps_the_qdisc() -> Result<()> {
    let world = World::new()?;
    for side in ["ingress", "egress"] {
        world.ok("-i c0 --attach --quiet")?;
        sh(&format!("tc -n {} chain add dev c0 {side} chain 7", world.ns))?;
        let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
        ensure!(said.contains("kept: somebody made a chain"), "{side}: {said}");
        let chains = sh(&format!("tc -n {} chain show dev c0 {side}", world.ns))?;
        ensure!(chains.contains("chain 7"), "{side}: the chain is gone: {chains}");
        expect_no_state(&world.lab)?;

        sh(&format!("tc -n {} chain del dev c0 {side} chain 7", world.ns))?;
        world.ok("-i c0 --destroy")?;
        expect_bare(&world.ns, "c0")?;
    }
    Ok(())
}

/// What is in another chain sees only packets that a filter of the first one sends there.
pub fn filters_of_other_chains_take_no_place() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    for side in ["ingress", "egress"] {
        let add = format!("tc -n {} filter add dev c0 {side}", world.ns);
        sh(&format!("{add} pref 100 bpf da bytecode '1,6 0 0 0,'"))?;
        sh(&format!("{add} chain 7 pref 1 bpf da bytecode '1,6 0 0 4294967295,'"))?;
    }
    // In front of the one that lets packets pass behind which it would see none.
    world.ok("-i c0 --attach --quiet")?;
    world.expect_token("4e45544f4b454e31", "the token")?;
    let hooks = records(&world.ok("-i c0 --query --json")?, "hook")?;
    ensure_eq!((&hooks[0]["priority"], &hooks[0]["filters_before"]), (&99.into(), &0.into()), "of {hooks:?}");
    let rules = world.lab.run.join("guard.toml");
    fs::write(
        &rules,
        "[[rule]]\nname = 'all'\ndst = '10.0.0.0/8'\nmode = 'drop'\ntokens = '0000000000000001'\n",
    )?;
    let guard = format!("guard --netns {} -i c0", world.ns);
    world.lab.ok(&format!("{guard} --attach --hook tc --rules {}", rules.display()))?;

    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("filter removed"), "{said}");
    world.lab.ok(&format!("{guard} --destroy"))?;
    let left =
        sh(&format!("tc -n {0} filter show dev c0 egress; tc -n {0} filter show dev c0 ingress", world.ns))?;
    ensure_eq!(left.matches("chain 7 handle").count(), 2, "filters of chain 7 in {left}");
    Ok(())
}

pub fn destroy_counts_the_filters_that_keep_the_qdisc() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    // One filter, of a kind whose hash table the kernel lists beside it.
    sh(&format!("tc -n {} filter add dev c0 egress protocol ip u32 match u32 0 0 classid 1:1", world.ns))?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    ensure!(said.contains("kept: 1 other filter"), "one u32 filter keeps it: {said}");
    Ok(())
}

pub fn a_foreign_ingress_qdisc_is_an_error_and_stays() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 ingress", world.ns))?;
    let before = sh(&format!("tc -n {} qdisc show dev c0", world.ns))?;
    let said = world.fails("-i c0 --attach --quiet")?;
    ensure!(said.contains("clsact") && said.contains("c0"), "{said}");
    ensure!(said.contains("ingress qdisc"), "the message does not say what is in the way: {said}");
    // Typed as it stands, it acts on this interface and not on one of that name elsewhere.
    let ns = &world.ns;
    let remedy = format!("tc -n {ns} qdisc del dev c0 ingress; tc -n {ns} qdisc add dev c0 clsact");
    ensure!(said.contains(&remedy) && said.contains("the filters on it, which go with it"), "{said}");
    let by_path = world.lab.run(&format!("--netns /run/netns/{ns} -i c0 --attach --quiet"))?;
    let said = String::from_utf8(by_path.stderr)?;
    let remedy = format!("nsenter --net=/run/netns/{ns} tc qdisc del dev c0 ingress; nsenter");
    ensure!(said.contains(&remedy), "{said}");
    for command in ["--detach", "--destroy"] {
        world.ok(&format!("-i c0 {command}"))?;
        ensure_eq!(
            sh(&format!("tc -n {} qdisc show dev c0", world.ns))?,
            before,
            "the qdiscs after {command}"
        );
    }
    expect_no_state(&world.lab)
}

pub fn query_counts_the_filters_that_run_before() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    // The kernel keeps the u32 tables of both sides together and lists those of the same priority on either.
    add_foreign_to(&world.ns, "c0", "egress")?;
    for how in ["attached to", "replaced in place on"] {
        let said = String::from_utf8(world.run("-i c0 --attach --quiet --priority 100")?.stderr)?;
        ensure!(
            said.contains(how) && said.contains("c0: 3 other filters run before ours and may end"),
            "{said}"
        );
    }
    let out = world.ok("-i c0 --query --json")?;
    ensure_eq!(records(&out, "hook")?[0]["filters_before"], 3, "one u32 and two bpf filters run before");
    let said = format!("c0 in {}: 3 other filters run before ours", world.ns);
    let out = world.ok("-i c0 --query")?;
    ensure!(out.contains(&said), "'{said}' expected in {out}");
    world.ok("-i c0 --attach --quiet --priority 1")?;
    let out = world.ok("-i c0 --query --json")?;
    ensure_eq!(records(&out, "hook")?[0]["filters_before"], 0, "none runs before");
    let out = world.ok("-i c0 --query")?;
    ensure!(!out.contains("before ours"), "{out}");
    Ok(())
}

/// Of tcx, as an agent of Kubernetes puts them in front of everything.
pub fn tcx_programs_that_run_before_are_told() -> Result<()> {
    let world = World::new()?;
    let index = ifindex(&world, "c0")?;
    let add = |place| tcx_link(index, place, 0);
    let said = |args: &str| Ok::<_, anyhow::Error>(String::from_utf8(world.run(args)?.stderr)?);
    let rules = world.lab.file("guard.toml", OBSERVE)?;
    let guard = format!("guard -i c0 --netns {}", world.ns);

    let there = world.lab.within(&world.ns, || {
        (0..2)
            .map(|_| add(libbpf_sys::BPF_TCX_EGRESS))
            .chain([add(libbpf_sys::BPF_TCX_INGRESS)])
            .collect::<Result<Vec<_>>>()
    })?;
    let attached = said("-i c0 --attach --quiet")?;
    ensure!(attached.contains("c0: 2 tcx programs run before ours"), "{attached}");
    let output = world.lab.run(&format!("{guard} --attach --hook tc --rules {}", rules.display()))?;
    let attached = String::from_utf8(output.stderr)?;
    ensure!(attached.contains("c0: a tcx program runs before the guard"), "{attached}");
    let out = world.ok("-i c0 --query")?;
    ensure!(out.contains(&format!("c0 in {}: 2 tcx programs run before ours", world.ns)), "{out}");
    let out = world.lab.ok(&format!("{guard} --query"))?;
    ensure!(out.contains(&format!("c0 in {}: a tcx program runs before the guard", world.ns)), "{out}");
    let count = |out: &str, kind| Ok::<_, anyhow::Error>(records(out, kind)?[0]["tcx_before"].clone());
    ensure_eq!(count(&world.ok("-i c0 --query --json")?, "hook")?, 2, "of the stamp");
    ensure_eq!(count(&world.lab.ok(&format!("{guard} --query --json"))?, "guard_hook")?, 1, "of the guard");

    drop(there);
    let out = world.ok("-i c0 --query --json")?;
    ensure_eq!(count(&out, "hook")?, 0, "with them gone");
    ensure!(!said("-i c0 --attach --quiet")?.contains("tcx"), "nothing is there any more");
    world.lab.ok(&format!("{guard} --destroy"))?;
    world.ok("-i c0 --destroy")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

/// Puts a program of somebody else behind those that are at tcx, in the namespace of the calling thread. It goes with what
/// is returned.
/// With `flags` 0 behind all.
pub fn tcx_link(ifindex: i32, place: u32, flags: u32) -> Result<OwnedFd> {
    tcx_link_of(load("other")?.as_fd(), ifindex, place, flags)
}

/// The same with that program.
pub fn tcx_link_of(program: BorrowedFd<'_>, ifindex: i32, place: u32, flags: u32) -> Result<OwnedFd> {
    let opts = libbpf_sys::bpf_link_create_opts {
        sz: size_of::<libbpf_sys::bpf_link_create_opts>() as libbpf_sys::size_t,
        flags,
        ..Default::default()
    };
    // SAFETY: the descriptor is open, and `opts` is a whole structure whose size says so.
    let link = unsafe { libbpf_sys::bpf_link_create(program.as_raw_fd(), ifindex, place, &opts) };
    ensure!(link >= 0, "attaching at tcx: {}", std::io::Error::last_os_error());
    // SAFETY: it was made a line ago, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Puts a filter on the way out of an interface that has a clsact qdisc, in the namespace of the calling thread, as neither
/// libbpf nor `tc` would: for one protocol of linux/if_ether.h, and under any name.
pub fn add_filter(
    ifindex: i32,
    priority: u16,
    protocol: i32,
    program: BorrowedFd<'_>,
    name: &[u8],
) -> Result<()> {
    const TCA_BPF_NAME: u16 = 7;
    const TCA_BPF_FLAGS: u16 = 8;
    const TCA_BPF_FLAG_ACT_DIRECT: u32 = 1;
    let other = |kind, value| TcOption::Bpf(TcFilterBpfOption::Other(DefaultNla::new(kind, value)));
    let mut filter = TcMessage::default();
    filter.header.index = ifindex;
    filter.header.parent = TcHandle { major: TcHandle::CLSACT.major, minor: TcHandle::MIN_EGRESS };
    filter.header.info = u32::from(priority) << 16 | u32::from((protocol as u16).to_be());
    filter.attributes = vec![
        TcAttribute::Kind("bpf".to_string()),
        TcAttribute::Options(vec![
            TcOption::Bpf(TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned())),
            other(TCA_BPF_NAME, [name, b"\0"].concat()),
            other(TCA_BPF_FLAGS, TCA_BPF_FLAG_ACT_DIRECT.to_ne_bytes().to_vec()),
        ]),
    ];
    let mut header = NetlinkHeader::default();
    header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    let request = RouteNetlinkMessage::NewTrafficFilter(filter);
    let mut message = NetlinkMessage::new(header, NetlinkPayload::from(request));
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    let socket = Socket::new(NETLINK_ROUTE)?;
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)?.payload {
        NetlinkPayload::Error(error) if error.code.is_none() => Ok(()),
        other => bail!("adding a filter: {other:?}"),
    }
}

pub fn ifindex(world: &World, iface: &str) -> Result<i32> {
    Ok(sh(&format!("ip netns exec {} cat /sys/class/net/{iface}/ifindex", world.ns))?.trim().parse()?)
}

/// `tc` and `ip` take any BPF file system that they find, where /sys/fs/bpf is not one, and make these there; `xdp` is a
/// link where the file system has links.
fn make_as_iproute2(world: &World) -> Result<()> {
    let bpf = world.lab.run.join("bpf");
    for dir in ["tc/globals", "ip", "other/globals"] {
        fs::create_dir_all(bpf.join(dir))?;
    }
    Ok(symlink(bpf.join("tc"), bpf.join("xdp"))?)
}

pub fn directories_of_iproute2_are_no_instances() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    make_as_iproute2(&world)?;
    // As an attach leaves it that was killed before it had pinned anything.
    fs::create_dir(world.lab.run.join("bpf/killed"))?;
    let output = world.run("--query --json")?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(!["'tc'", "'ip'", "'xdp'", "'other'"].iter().any(|name| said.contains(name)), "{said}");
    ensure_eq!(records(&String::from_utf8(output.stdout)?, "counters")?.len(), 1, "instances");
    let output = world.run("-i c0 --destroy --instance other")?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(world.lab.run.join("bpf/other/globals").exists(), "somebody else's directory is gone");
    let said = world.fails("-i c0 --attach --quiet --instance other")?;
    ensure!(said.contains("somebody else's directory") && said.contains("--instance"), "{said}");
    world.ok("-i c0 --destroy")?;
    world.ok("-i c0 --destroy --instance killed")?;
    expect_bare(&world.ns, "c0")?;
    expect_no_state(&world.lab)
}

pub fn a_pin_of_somebody_else_keeps_the_file_system() -> Result<()> {
    let world = World::new()?;
    world.ok("-i c0 --attach --quiet")?;
    make_as_iproute2(&world)?;
    let pin = world.lab.run.join("bpf/tc/globals/theirs");
    let options = libbpf_sys::bpf_map_create_opts {
        sz: size_of::<libbpf_sys::bpf_map_create_opts>() as libbpf_sys::size_t,
        ..Default::default()
    };
    MapHandle::create(MapType::Array, Some("theirs"), 4, 4, 1, &options)?.pin(&pin)?;
    let said = String::from_utf8(world.run("-i c0 --destroy")?.stderr)?;
    let kept =
        format!("{}/bpf stays mounted: somebody else has pinned tc/globals/theirs", world.lab.run.display());
    ensure_eq!(said.matches(&kept).count(), 1, "'{kept}' in {said}");
    ensure!(pin.exists(), "somebody else's pin is gone");
    expect_bare(&world.ns, "c0")?;

    fs::remove_file(&pin)?;
    world.ok("-i c0 --destroy")?;
    expect_no_state(&world.lab)
}

/// Loads `return TC_ACT_UNSPEC`, under a name.
pub fn load(name: &str) -> Result<OwnedFd> {
    let name = CString::new(name)?;
    let instructions = [
        libbpf_sys::bpf_insn { code: 0xb7, imm: -1, ..Default::default() },
        libbpf_sys::bpf_insn { code: 0x95, ..Default::default() },
    ];
    // SAFETY: name, license and instructions outlive the call; no options are given.
    let fd = unsafe {
        libbpf_sys::bpf_prog_load(
            libbpf_sys::BPF_PROG_TYPE_SCHED_CLS,
            name.as_ptr(),
            c"GPL".as_ptr(),
            instructions.as_ptr(),
            instructions.len() as _,
            ptr::null_mut(),
        )
    };
    ensure!(fd >= 0, "loading a program: {}", std::io::Error::last_os_error());
    // SAFETY: it was made a line ago, and nobody else knows it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn a_foreign_program_of_our_name_stays() -> Result<()> {
    let world = World::new()?;
    sh(&format!("tc -n {} qdisc add dev c0 clsact", world.ns))?;
    // By another tool that calls its program as we call ours.
    let program = load("netoken_egress")?;
    let (index, ns) = (ifindex(&world, "c0")?, &world.ns);
    world.lab.within(ns, || {
        let mut hook = TcHook::new(program.as_fd());
        hook.ifindex(index).attach_point(TC_EGRESS).priority(10).handle(1);
        hook.attach()?;
        Ok(())
    })?;
    drop(program);
    let before = ours(ns, "c0")?;
    for (command, count) in
        [("--attach --quiet", 2), ("--detach", 1), ("--attach --quiet", 2), ("--destroy", 1)]
    {
        world.ok(&format!("-i c0 {command}"))?;
        let now = ours(ns, "c0")?;
        ensure!(
            now.len() == count && now.contains(&before[0]),
            "after {command}: {now:#?}, before: {before:#?}"
        );
    }
    Ok(())
}
