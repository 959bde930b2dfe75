//! `netoken token`: makes and checks keyed tokens without the kernel, and finds tokens in captures.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail};
use clap::{ArgGroup, Subcommand};
use serde::Serialize;

use super::args::exid;
use crate::clock;
use crate::decode::capture::{self, Frame};
use crate::decode::options::{Found, Shape};
use crate::decode::syn::{Syn, find_syn, is_known};
use crate::keys::file::KeyDir;
use crate::keys::{self, Key, RingName, file, signer};
use crate::program::{DEFAULT_EXID, DEFAULT_KIND};
use crate::token::Token;
use crate::token::keyed::{Bind, Flow, Parts, Refusal, SLOT_S, Slots, Stamp, Valid, Verifier, make};

const MAKE_EXAMPLE: &str = "\
Example:
  netoken token make --keys /etc/netoken/keys/default --key edge --tag 17 \\
      --src 192.0.2.1:40000 --dst 198.51.100.7:443 --isn 0x01020304";

const CHECK_EXAMPLE: &str = "\
Example:
  netoken token check 00112d3ab4f30123 --keys /etc/netoken/keys/default \\
      --src 192.0.2.1:40000 --dst 198.51.100.7:443 --isn 0x01020304";

const DECODE_EXAMPLE: &str = "\
Example:
  tcpdump -U -i eth0 -w - 'tcp[13] & 2 != 0 or ip6[53] & 2 != 0' |
      netoken token decode -";

const EXAMPLES: &str = "\
Examples:
  netoken token make --keys /etc/netoken/keys/default --key edge --tag 17 \\
      --src 192.0.2.1:40000 --dst 198.51.100.7:443 --isn 0x01020304
  netoken token check 00112d3ab4f30123 --keys /etc/netoken/keys/default \\
      --src 192.0.2.1:40000 --dst 198.51.100.7:443 --isn 0x01020304 \\
      --time 2026-11-21T08:30:00Z
  tcpdump -U -i eth0 -w - 'tcp[13] & 2 != 0 or ip6[53] & 2 != 0' |
      netoken token decode -
  netoken token decode --keys /etc/netoken/keys/default capture.pcapng

Exit codes: 0 done and, for check, valid; 1 failed or not valid; 2 wrong usage.";

/// Make, check and find tokens, without the kernel
#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES, arg_required_else_help = true)]
pub(super) struct TokenArgs {
    #[command(subcommand)]
    command: TokenCommand,

    /// Print one JSON object a line
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make the token of a SYN
    #[command(after_help = MAKE_EXAMPLE)]
    Make(MakeArgs),
    /// Say whether a token belongs to a SYN, and if not why
    #[command(after_help = CHECK_EXAMPLE)]
    Check(CheckArgs),
    /// Show each SYN of a capture, its token, and what else shares the experimental options
    #[command(after_help = DECODE_EXAMPLE)]
    Decode(DecodeArgs),
}

/// Which keys to use. Never the secret itself: arguments are for everybody to see.
#[derive(Debug, clap::Args)]
struct KeySource {
    /// Directory with key files
    #[arg(long, value_name = "DIR")]
    keys: Option<PathBuf>,

    /// A key file; may be given more than once
    #[arg(long, value_name = "FILE")]
    key_file: Vec<PathBuf>,
}

#[derive(Debug, clap::Args)]
struct FlowArgs {
    /// Source address and port of the SYN, like 192.0.2.1:40000 or [2001:db8::1]:40000
    #[arg(long, value_name = "ADDR:PORT")]
    src: SocketAddr,

    /// Destination address and port
    #[arg(long, value_name = "ADDR:PORT")]
    dst: SocketAddr,

    /// Initial sequence number
    #[arg(long, value_name = "N", value_parser = super::args::number)]
    isn: u32,

    /// When, like 2026-11-21T08:30:00Z or in seconds since 1970 [default: now]
    #[arg(long, value_name = "TIME", value_parser = time)]
    time: Option<Duration>,
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("source").required(true).multiple(true).args(["keys", "key_file"]))]
struct MakeArgs {
    #[command(flatten)]
    source: KeySource,
    #[command(flatten)]
    flow: FlowArgs,

    /// Ring whose signing key makes it [default: the only one]
    #[arg(long, value_name = "RING")]
    key: Option<RingName>,

    /// Who opens the connection
    #[arg(long, value_name = "N")]
    tag: u16,

    /// What the token belongs to: flow, server or isn
    #[arg(long, value_name = "MODE", default_value = "server")]
    bind: Bind,

    /// Length of a time slot in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = SLOT_S, value_parser = clap::value_parser!(u32).range(1..=3600))]
    slot: u32,
}

/// What is accepted.
#[derive(Debug, clap::Args)]
struct AcceptArgs {
    /// Bind mode to accept; may be given more than once [default: all]
    #[arg(long, value_name = "MODE")]
    bind: Vec<Bind>,

    /// Length of a time slot in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = SLOT_S, value_parser = clap::value_parser!(u32).range(1..=3600))]
    slot: u32,

    /// How many slots old a token may be
    #[arg(long, value_name = "N", default_value_t = 1)]
    behind: u32,

    /// How many slots ahead a token may be
    #[arg(long, value_name = "N", default_value_t = 1)]
    ahead: u32,
}

#[derive(Debug, clap::Args)]
#[command(group = ArgGroup::new("source").required(true).multiple(true).args(["keys", "key_file"]))]
struct CheckArgs {
    /// The token, 16 hexadecimal digits
    token: Token,
    #[command(flatten)]
    source: KeySource,
    #[command(flatten)]
    flow: FlowArgs,
    #[command(flatten)]
    accept: AcceptArgs,
}

#[derive(Debug, clap::Args)]
struct DecodeArgs {
    /// A pcap or pcapng file, or - for standard input
    file: PathBuf,
    #[command(flatten)]
    source: KeySource,
    #[command(flatten)]
    accept: AcceptArgs,

    /// Kind byte of the tokens' option, 253 or 254
    #[arg(long, value_name = "KIND", default_value_t = DEFAULT_KIND, value_parser = clap::value_parser!(u8).range(253..=254))]
    option_kind: u8,

    /// Experiment identifier of the tokens' option [default: 0x4e54]
    #[arg(long, value_name = "ID", value_parser = exid)]
    exid: Option<u16>,
}

fn time(text: &str) -> Result<Duration, String> {
    if let Ok(seconds) = text.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let time = humantime::parse_rfc3339_weak(text).map_err(|error| error.to_string())?;
    time.duration_since(SystemTime::UNIX_EPOCH).map_err(|_| "that is before 1970".to_string())
}

impl KeySource {
    /// Nothing if none was named.
    fn load(&self) -> Result<Option<Vec<Key>>> {
        if self.keys.is_none() && self.key_file.is_empty() {
            return Ok(None);
        }
        keys::guard_process()?;
        let mut keys = Vec::new();
        if let Some(dir) = &self.keys {
            let dir = KeyDir::at(dir.clone());
            // Who cannot look for it does not know that it is not there.
            let doing = || format!("reading the keys in {}", dir.path().display());
            std::fs::read_dir(dir.path()).with_context(doing)?;
            keys = dir.load()?;
        }
        for path in &self.key_file {
            keys.push(file::read(path)?);
            keys::settle(&mut keys).with_context(|| format!("reading the key {}", path.display()))?;
        }
        Ok(Some(keys))
    }
}

impl AcceptArgs {
    fn slots(&self) -> Result<Slots> {
        Slots::new(self.slot, self.behind, self.ahead)
    }

    fn binds(&self) -> Vec<Bind> {
        if self.bind.is_empty() { Bind::ALL.to_vec() } else { self.bind.clone() }
    }
}

pub(super) fn run(args: &TokenArgs) -> Result<()> {
    match &args.command {
        TokenCommand::Make(make) => run_make(args, make),
        TokenCommand::Check(check) => run_check(args, check),
        TokenCommand::Decode(decode) => run_decode(args, decode),
    }
}

/// A token that was made, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "token")]
struct Made {
    token: Token,
    ring: RingName,
    key_id: u8,
    tag: u16,
    bind: Bind,
    slot: u32,
}

fn signing(keys: &[Key], ring: RingName) -> Result<&Key> {
    signer(keys, ring)
        .with_context(|| format!("making a token: no key of ring '{ring}' signs; see: netoken key list"))
}

fn run_make(args: &TokenArgs, wanted: &MakeArgs) -> Result<()> {
    let keys = wanted.source.load()?.unwrap_or_default();
    let key = match (wanted.key, &keys[..]) {
        (Some(ring), _) => signing(&keys, ring)?,
        (None, [first, others @ ..]) if others.iter().all(|other| other.ring() == first.ring()) => {
            signing(&keys, first.ring())?
        }
        (None, []) => {
            bail!("making a token: there is no key; name a file with --key-file, or a directory with --keys")
        }
        (None, all) => {
            bail!("making a token: there are {} keys, of several rings; say whose with --key RING", all.len())
        }
    };
    let secret = key.secret().context("making a token: the key that signs has no secret")?;
    let FlowArgs { src, dst, isn, time } = wanted.flow;
    let flow = Flow::new(src, dst, isn).context("making a token")?;
    let slot = Slots::new(wanted.slot, 1, 1)?.at(time.unwrap_or_else(clock::now));
    let stamp = Stamp { tag: wanted.tag, key_id: key.id(), bind: wanted.bind, slot };
    let token = make(secret, stamp, &flow);
    let mut out = io::stdout().lock();
    let written = if args.json {
        let Stamp { tag, key_id, bind, slot } = stamp;
        writeln!(
            out,
            "{}",
            serde_json::to_string(&Made { token, ring: key.ring(), key_id, tag, bind, slot })?
        )
    } else {
        writeln!(out, "{token}")
    };
    written.context("writing to standard output")
}

/// What is to be said of a token, as `--json` prints it.
#[derive(Serialize)]
struct Verdict {
    tag: u16,
    key_id: u8,
    slot_low: u8,
    /// Null if nobody could check it.
    valid: Option<bool>,
    /// Why it is not valid, or could not be checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<Reason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    ring: Option<RingName>,
    #[serde(skip_serializing_if = "Option::is_none")]
    bind: Option<Bind>,
    #[serde(skip_serializing_if = "Option::is_none")]
    slot: Option<u32>,
}

#[derive(Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
enum Reason {
    /// The capture does not say when.
    NoTime,
    #[serde(untagged)]
    Refused(Refusal),
}

impl Verdict {
    /// `checked`: nothing if no keys were given.
    fn new(token: Token, checked: Option<Result<Valid, Reason>>) -> Verdict {
        let Parts { tag, key_id, slot_low, .. } = token.into();
        let valid = checked.and_then(Result::ok);
        let reason = checked.and_then(Result::err);
        let could_check = checked.is_some() && !matches!(reason, Some(Reason::NoTime));
        Verdict {
            tag,
            key_id,
            slot_low,
            valid: could_check.then_some(valid.is_some()),
            reason,
            ring: valid.map(|valid| valid.ring),
            bind: valid.map(|valid| valid.bind),
            slot: valid.map(|valid| valid.slot),
        }
    }
}

impl std::fmt::Display for Verdict {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Verdict { tag, key_id, slot_low, .. } = self;
        match (self.reason, self.ring, self.bind, self.slot) {
            (_, Some(ring), Some(bind), Some(slot)) => {
                write!(f, "valid: tag {tag}, key {key_id} of ring '{ring}', bound to {bind}, slot {slot}")
            }
            (Some(Reason::Refused(refusal)), ..) => {
                write!(f, "not valid: {refusal} (tag {tag}, key {key_id}, slot ..{slot_low:x})")
            }
            (Some(Reason::NoTime), ..) => {
                write!(
                    f,
                    "not checked: the capture has no time (tag {tag}, key {key_id}, slot ..{slot_low:x})"
                )
            }
            _ => write!(f, "if keyed: tag {tag}, key {key_id}, slot ..{slot_low:x}"),
        }
    }
}

fn run_check(args: &TokenArgs, wanted: &CheckArgs) -> Result<()> {
    let keys = wanted.source.load()?.unwrap_or_default();
    let FlowArgs { src, dst, isn, time } = wanted.flow;
    let flow = Flow::new(src, dst, isn).context("checking a token")?;
    let (slots, binds) = (wanted.accept.slots()?, wanted.accept.binds());
    let verifier = Verifier { keys: &keys, slots, binds: &binds };
    let checked = verifier.check(wanted.token, &flow, time.unwrap_or_else(clock::now));
    let verdict = Verdict::new(wanted.token, Some(checked.map_err(Reason::Refused)));
    let told = if args.json {
        #[derive(Serialize)]
        #[serde(tag = "type", rename = "check")]
        struct Record {
            token: Token,
            #[serde(flatten)]
            verdict: Verdict,
        }
        let record = Record { token: wanted.token, verdict };
        writeln!(io::stdout(), "{}", serde_json::to_string(&record)?)
    } else if checked.is_ok() {
        writeln!(io::stdout(), "{verdict}")
    } else {
        Ok(())
    };
    match checked {
        Ok(_) => told.context("writing to standard output"),
        // Also where nobody reads the output, which would be no failure.
        Err(refusal) => bail!("the token {} is not valid: {refusal}", wanted.token),
    }
}

/// A SYN of a capture, as `--json` prints it.
#[derive(Serialize)]
#[serde(tag = "type", rename = "captured_syn")]
struct SynRecord<'a> {
    /// RFC 3339 in UTC; null if the capture does not say.
    time: Option<String>,
    src: std::net::IpAddr,
    sport: u16,
    dst: std::net::IpAddr,
    dport: u16,
    isn: u32,
    options: Vec<OptionRecord<'a>>,
}

#[derive(Serialize)]
struct OptionRecord<'a> {
    #[serde(flatten)]
    found: &'a Found,
    /// Of tokens only.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    verdict: Option<Verdict>,
}

fn run_decode(args: &TokenArgs, wanted: &DecodeArgs) -> Result<()> {
    let keys = wanted.source.load()?;
    let (slots, binds) = (wanted.accept.slots()?, wanted.accept.binds());
    let verifier = keys.as_deref().map(|keys| Verifier { keys, slots, binds: &binds });
    let shape = Shape { kind: wanted.option_kind, exid: wanted.exid.unwrap_or(DEFAULT_EXID) };
    let is_stdin = wanted.file.as_os_str() == "-";
    let name = if is_stdin { "standard input".to_string() } else { wanted.file.display().to_string() };
    let input: Box<dyn Read + Send> = if is_stdin {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(&wanted.file).with_context(|| format!("opening the capture {name}"))?)
    };

    let mut out = BufWriter::new(io::stdout());
    let (mut frames, mut syns, mut unknown) = (0u64, 0u64, None);
    let read = capture::read(input, |frame| {
        frames += 1;
        if !is_known(frame.link_type) {
            unknown = Some(frame.link_type);
        }
        let Some(syn) = find_syn(frame.link_type, frame.bytes, shape) else { return Ok(()) };
        syns += 1;
        print_syn(args.json, &mut out, frame, &syn, verifier.as_ref())
            .context("writing to standard output")?;
        // Somebody may be watching.
        if is_stdin { out.flush().context("writing to standard output") } else { Ok(()) }
    });
    // What stands before the damage is worth something; that nobody reads it does not undo the damage.
    let told = out.flush().context("writing to standard output");
    read.with_context(|| format!("reading the capture {name}"))?;
    if let Some(link_type) = unknown {
        bail!(
            "reading the capture {name}: it has frames of link type {link_type}, which are not looked into; known are \
             Ethernet, raw IP, loopback and Linux cooked (tcpdump -i any)"
        );
    }
    if !args.json {
        note!("{syns} SYN{} in {frames} packets", if syns == 1 { "" } else { "s" });
    }
    told
}

fn print_syn(
    json: bool,
    out: &mut impl Write,
    frame: Frame<'_>,
    syn: &Syn,
    verifier: Option<&Verifier<'_>>,
) -> Result<()> {
    let time = frame
        .time
        .and_then(|time| SystemTime::UNIX_EPOCH.checked_add(time))
        // What cannot be written as a year is no time.
        .filter(|time| *time < SystemTime::UNIX_EPOCH + Duration::from_secs(253_402_300_800))
        .map(|time| humantime::format_rfc3339_micros(time).to_string());
    let options: Vec<OptionRecord<'_>> = syn
        .options
        .iter()
        .map(|found| {
            let verdict = match found {
                Found::Token { token } => {
                    let check = |verifier: &Verifier<'_>| match frame.time {
                        Some(time) => verifier.check(*token, &syn.flow, time).map_err(Reason::Refused),
                        None => Err(Reason::NoTime),
                    };
                    Some(Verdict::new(*token, verifier.map(check)))
                }
                _ => None,
            };
            OptionRecord { found, verdict }
        })
        .collect();
    let (src, dst, isn) = (syn.flow.src(), syn.flow.dst(), syn.flow.isn());
    if json {
        let record = SynRecord {
            time,
            src: src.ip(),
            sport: src.port(),
            dst: dst.ip(),
            dport: dst.port(),
            isn,
            options,
        };
        return Ok(writeln!(out, "{}", serde_json::to_string(&record)?)?);
    }
    writeln!(out, "{} {src} > {dst} isn {isn:08x}", time.unwrap_or("-".to_string()))?;
    if options.is_empty() {
        writeln!(out, "    no token")?;
    }
    for OptionRecord { found, verdict } in options {
        match verdict {
            Some(verdict) => writeln!(out, "    {found}: {verdict}")?,
            None => writeln!(out, "    {found}")?,
        }
    }
    Ok(())
}
