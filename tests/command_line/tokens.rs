//! `netoken token`: tokens made, checked and found without the kernel.

use std::fs;
use std::io::pipe;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::lab::{NETOKEN, Running, wait_until};
use crate::said::{Said, said, said_to};
use crate::support::{ensure_eq, sh};
use crate::world::World;

const DATA: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");

fn vectors() -> Result<Vec<Value>> {
    let all: Value = serde_json::from_str(&fs::read_to_string(format!("{DATA}/token-vectors.json"))?)?;
    Ok(all["tokens"].as_array().context("no tokens")?.clone())
}

fn netoken(args: &str) -> Result<Said> {
    said(Command::new(NETOKEN).args(args.split_whitespace()))
}

/// A key file with this secret.
fn key_file(dir: &Path, id: &Value, secret: &Value) -> Result<PathBuf> {
    use std::io::Write;
    let path = dir.join(format!("edge-{id}.key"));
    fs::remove_file(&path).ok();
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    write!(
        file,
        "ring = \"edge\"\nid = {id}\nstate = \"signing\"\ncreated = \"2026-11-21T08:30:00Z\"\nsecret = {secret}\n"
    )?;
    Ok(path)
}

fn end(vector: &Value, addr: &str, port: &str) -> Result<String> {
    let addr: std::net::IpAddr = vector[addr].as_str().context("an address")?.parse()?;
    let port = vector[port].as_u64().context("a port")?;
    Ok(std::net::SocketAddr::new(addr, port as u16).to_string())
}

/// The arguments that say what a vector's token was made for.
fn flow(vector: &Value) -> Result<String> {
    Ok(format!(
        "--src {} --dst {} --isn {} --time {} --slot {}",
        end(vector, "src", "sport")?,
        end(vector, "dst", "dport")?,
        vector["isn"],
        vector["unix_s"],
        vector["slot_s"]
    ))
}

pub fn the_vectors_are_made_and_found_valid() -> Result<()> {
    let dir = tempfile::tempdir()?;
    for vector in vectors()? {
        let key = key_file(dir.path(), &vector["key_id"], &vector["secret"])?;
        let (bind, token) =
            (vector["bind"].as_str().context("bind")?, vector["token"].as_str().context("token")?);
        let common = format!("--key-file {} {}", key.display(), flow(&vector)?);
        let made = netoken(&format!("token make {common} --tag {} --bind {bind}", vector["tag"]))?.code(0)?;
        ensure_eq!(made.out.trim(), token, "{vector}");
        let checked = netoken(&format!("token check {token} {common} --json"))?.code(0)?;
        let record: Value = serde_json::from_str(&checked.out)?;
        ensure_eq!(record["valid"], true, "{record}");
        for field in ["bind", "slot", "tag", "key_id"] {
            ensure_eq!(record[field], vector[field], "{field} of {record}");
        }
    }
    Ok(())
}

pub fn a_token_that_is_not_valid_is_exit_code_1_and_says_why() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let vector = &vectors()?[0];
    let key = key_file(dir.path(), &vector["key_id"], &vector["secret"])?;
    let token = vector["token"].as_str().context("token")?;
    let args = format!("token check {token} --key-file {} {}", key.display(), flow(vector)?);
    netoken(&args)?.code(0)?;
    let later = vector["unix_s"].as_u64().context("unix_s")? + 100;
    for (args, why) in [
        (args.replace(":443", ":444"), "not made for this flow"),
        (args.replace(":443", ":444") + " --bind isn", "not made for this flow"),
        (args.replace(&vector["unix_s"].to_string(), &later.to_string()), "time slot"),
        (args.replace(token, "0011f30000000000"), "no key with this id"),
    ] {
        netoken(&args)?.code(1)?.err(&["not valid", why])?;
        let said = netoken(&format!("{args} --json"))?.code(1)?;
        let record: Value = serde_json::from_str(&said.out)?;
        ensure_eq!(record["valid"], false, "{record}");
        ensure!(record["reason"].is_string(), "{record}");
    }
    // Eight slots of patience.
    let patient = args.replace(&vector["unix_s"].to_string(), &later.to_string()) + " --behind 8";
    netoken(&patient)?.code(0)?;
    for wrong in [
        "token make --tag 1 --src 192.0.2.1:1 --dst 192.0.2.2:2 --isn 1".to_string(),
        "token check 00 --src 192.0.2.1:1 --dst 192.0.2.2:2 --isn 1 --keys /".to_string(),
        "token".to_string(),
        format!("{args} --bind all"),
        format!("{args} --slot 0"),
    ] {
        netoken(&wrong)?.code(2).context(wrong)?;
    }
    netoken(&format!("{args} --behind 8 --ahead 8"))?.code(1)?.err(&["at most 15"])?;
    netoken(&args.replace("192.0.2.1:", "[2001:db8::1]:"))?.code(1)?.err(&["different families"])?;
    netoken(&format!("{args} --keys /no/such/dir"))?.code(1)?.err(&["/no/such/dir"])?;
    let empty = tempfile::tempdir()?;
    let keys = empty.path().display();
    netoken(&format!("token make --src 192.0.2.1:1 --dst 192.0.2.2:2 --isn 1 --tag 1 --keys {keys}"))?
        .code(1)?
        .err(&["there is no key; name a file with --key-file"])?;
    sh(&format!("chmod 644 {}", key.display()))?;
    netoken(&args)?.code(1)?.err(&["chmod 600"])?;
    Ok(())
}

/// Of files that are named one by one as of those of a directory.
pub fn only_a_key_that_signs_makes_a_token() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let vector = &vectors()?[0];
    let [one, two] = [3, 4].map(|id| key_file(dir.path(), &Value::from(id), &vector["secret"]));
    let (one, two) = (one?, two?);
    let flow = format!("--tag 1 {}", flow(vector)?);
    for source in [
        format!("--keys {}", dir.path().display()),
        format!("--key-file {} --key-file {}", one.display(), two.display()),
    ] {
        // Of two that sign, the newer one does.
        let made = netoken(&format!("token make --json {source} {flow}"))?.code(0)?.out;
        ensure!(made.contains("\"key_id\":4"), "{made}");
    }
    let text = fs::read_to_string(&one)?.replace("\"signing\"", "\"verify-only\"");
    fs::write(&one, text)?;
    for source in [String::new(), "--key edge ".to_string()] {
        netoken(&format!("token make {source}--key-file {} {flow}", one.display()))?
            .code(1)?
            .err(&["no key of ring 'edge' signs"])?;
    }
    netoken(&format!("token make --keys {} {flow}", dir.path().display()))?.code(0)?;
    Ok(())
}

/// A second implementation, written from the page of the format alone.
pub fn another_language_makes_the_same_tokens() -> Result<()> {
    let made = sh(&format!("python3 {DATA}/token-vectors.py"))?;
    ensure_eq!(made, fs::read_to_string(format!("{DATA}/token-vectors.json"))?, "vectors");
    Ok(())
}

/// One pcap packet: a SYN over IPv4 on Ethernet, with those options.
pub fn record(unix_s: u64, options: &[u8]) -> Vec<u8> {
    let tcp_len = 20 + options.len();
    let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0, 0x45, 0, 0, 20 + tcp_len as u8];
    frame.extend([0, 1, 0x40, 0, 64, 6, 0, 0, 192, 0, 2, 1, 198, 51, 100, 7]);
    frame.extend([0x9c, 0x40, 1, 0xbb, 1, 2, 3, 4, 0, 0, 0, 0, (tcp_len * 4) as u8, 2, 0, 0, 0, 0, 0, 0]);
    frame.extend(options);
    let head = [unix_s as u32, 500_000, frame.len() as u32, frame.len() as u32];
    [head.map(u32::to_le_bytes).concat(), frame].concat()
}

pub fn pcap(records: &[Vec<u8>]) -> Vec<u8> {
    let head: [u32; 6] = [0xa1b2_c3d4, 0x0004_0002, 0, 0, 65_535, 1];
    [head.map(u32::to_le_bytes).concat(), records.concat()].concat()
}

pub fn a_capture_is_decoded() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let vector = &vectors()?[0];
    let unix_s = vector["unix_s"].as_u64().context("unix_s")?;
    let key = key_file(dir.path(), &vector["key_id"], &vector["secret"])?;
    let token: netoken::token::Token = vector["token"].as_str().context("token")?.parse()?;
    let option = [&[253, 12, 0x4e, 0x54][..], &token.0].concat();
    let file = dir.path().join("capture.pcap");
    fs::write(
        &file,
        pcap(&[
            record(unix_s, &option),
            record(unix_s + 100, &option),
            record(unix_s, &[2, 4, 5, 180]),
            record(unix_s, &[254, 8, 0x1f, 0x90, 203, 0, 113, 9, 253, 4, 3, 72]),
        ]),
    )?;
    let shown = netoken(&format!("token decode {} --key-file {}", file.display(), key.display()))?.code(0)?;
    for line in [
        "2026-11-21T08:30:00.500000Z 192.0.2.1:40000 > 198.51.100.7:443 isn 01020304\n    token 0011",
        ": valid: tag 17, key 3 of ring 'edge', bound to flow, slot 112203112\n",
        ": not valid: its time slot is not one of those that are accepted at that time (tag 17, key 3, slot ..8)\n",
        "\n    no token\n",
        "\n    TOA (kind 254): client 203.0.113.9:8080\n    HOST_ID (RFC 7974): kind 253, ExID 0x0348\n",
    ] {
        ensure!(shown.out.contains(line), "no '{line}' in {}", shown.out);
    }
    ensure!(shown.err.contains("4 SYNs in 4 packets"), "{shown:#?}");
    let without = netoken(&format!("token decode {}", file.display()))?.code(0)?;
    ensure!(without.out.contains("if keyed: tag 17, key 3, slot ..8"), "{}", without.out);

    // The same as JSON, from standard input.
    let json = said(Command::new("sh").arg("-c").arg(format!(
        "{NETOKEN} token decode - --json --key-file {} <{}",
        key.display(),
        file.display()
    )))?
    .code(0)?;
    let records: Vec<Value> =
        json.out.lines().map(serde_json::from_str).collect::<Result<_, _>>().context(json.out.clone())?;
    ensure_eq!(records.len(), 4, "records");
    let option = |record: usize, option: usize| &records[record]["options"][option];
    ensure_eq!(option(0, 0)["option"], "token", "{}", records[0]);
    ensure_eq!(
        (&option(0, 0)["valid"], &option(0, 0)["bind"]),
        (&true.into(), &"flow".into()),
        "{}",
        records[0]
    );
    ensure_eq!(
        (&option(1, 0)["valid"], &option(1, 0)["reason"]),
        (&false.into(), &"wrong_time".into()),
        "{}",
        records[1]
    );
    ensure_eq!(records[2]["options"], Value::Array(Vec::new()), "{}", records[2]);
    ensure_eq!(option(3, 0)["client"], "203.0.113.9:8080", "{}", records[3]);
    ensure_eq!(option(3, 1)["exid"], "0348", "{}", records[3]);
    Ok(())
}

pub fn what_is_wrong_with_a_capture_is_named() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let path = dir.path().join("capture");
    let whole = pcap(&[record(1, &[1, 1, 1, 1]), record(2, &[1, 1, 1, 1])]);
    let mut other_link = whole.clone();
    other_link[20] = 105;
    for (bytes, why, syns) in [
        (&b"nothing"[..], "neither pcap nor pcapng", 0),
        (&whole[..whole.len() - 9], "cut short", 1),
        (&other_link, "link type 105", 0),
    ] {
        fs::write(&path, bytes)?;
        let said = netoken(&format!("token decode {}", path.display()))?.code(1)?;
        ensure!(said.err.contains(why) && said.err.contains("reading the capture"), "{said:#?}");
        ensure_eq!(said.out.matches("isn ").count(), syns, "SYNs shown");
    }
    netoken("token decode /no/such/file")?.code(1)?.err(&["opening the capture", "No such file"])?;
    Ok(())
}

/// Nor a capture whole: with a pipe whose reader is gone, the exit code is all that is heard.
pub fn an_output_that_nobody_reads_makes_no_wrong_token_right() -> Result<()> {
    let dir = tempfile::tempdir()?;
    let vector = &vectors()?[0];
    let key = key_file(dir.path(), &vector["key_id"], &vector["secret"])?;
    let token = vector["token"].as_str().context("token")?;
    let check = format!("token check {token} --json --key-file {} {}", key.display(), flow(vector)?);
    let whole = pcap(&[record(1, &[1, 1, 1, 1]), record(2, &[1, 1, 1, 1])]);
    let capture = dir.path().join("capture");
    let decode = format!("token decode {}", capture.display());
    let code = |args: &str| -> Result<Option<i32>> {
        let (reader, writer) = pipe()?;
        drop(reader);
        Ok(said_to(Command::new(NETOKEN).args(args.split_whitespace()).stdout(writer))?.code)
    };
    ensure_eq!(code(&check)?, Some(0), "the exit code of a right token");
    ensure_eq!(code(&check.replace(":443", ":444"))?, Some(1), "the exit code of a wrong token");
    fs::write(&capture, &whole)?;
    ensure_eq!(code(&decode)?, Some(0), "the exit code of a whole capture");
    fs::write(&capture, &whole[..whole.len() - 9])?;
    ensure_eq!(code(&decode)?, Some(1), "the exit code of a capture that was cut short");
    Ok(())
}

/// Stamped by the kernel, captured by tcpdump on the other side, and found valid while it runs.
/// With the filter of the example, which has to let SYNs of both families through.
pub fn what_tcpdump_sends_is_decoded_as_it_comes() -> Result<()> {
    let world = World::new()?;
    for (ns, device, addr) in [(&world.ns, "c0", 1), (&world.server_ns, "s0", 2)] {
        sh(&format!("ip -n {ns} addr add 2001:db8:77::{addr}/64 dev {device} nodad"))?;
    }
    let help = netoken("token decode --help")?.code(0)?.out;
    let filter = help.split_once("-w - '").and_then(|(_, rest)| rest.split_once('\''));
    let (filter, _) = filter.with_context(|| format!("no filter in {help}"))?;
    fs::create_dir_all(world.lab.keys())?;
    let policy = world.lab.keys().join("policy.toml");
    fs::write(
        &policy,
        "default = { action = \"stamp\", token = { tag = 4711, key = \"edge\", bind = \"flow\" } }\n",
    )?;
    world.lab.ok("key new edge")?;
    world.ok(&format!("-i c0 --attach --quiet --policy {}", policy.display()))?;

    let mut tcpdump = Command::new("ip")
        .args(["netns", "exec", &world.server_ns, "tcpdump", "-U", "-w", "-", "-i", "s0", "--immediate-mode"])
        .args(["-B", "8192", "-s", "2000", filter])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut decode =
        world.lab.netoken(&format!("token decode - --keys {}/default", world.lab.keys().display()));
    decode.stdin(tcpdump.stdout.take().context("no output of tcpdump")?);
    let mut decode = Running::start(&mut decode)?;
    // tcpdump says nothing when it listens; so SYNs are sent until one is seen.
    let lines = ["10.77.0.2:9", "[2001:db8:77::2]:9"].map(|to| {
        wait_until(&format!("a token for {to}"), || {
            world.syns_to(to, 1)?;
            let time = std::time::Duration::from_millis(100);
            let found = decode.wait_within(time, |line| line.contains(to));
            Ok(found.and_then(|_| decode.wait_within(time, |line| line.contains("valid:"))))
        })
    });
    tcpdump.kill()?;
    tcpdump.wait()?;
    for line in lines {
        let line = line.with_context(|| format!("seen: {:?}", decode.seen))?;
        ensure!(line.contains("valid: tag 4711, key 0 of ring 'edge', bound to flow"), "{line}");
        ensure!(!line.contains("not valid"), "{line}");
    }
    Ok(())
}
