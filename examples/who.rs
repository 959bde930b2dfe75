//! An HTTP server that prints who connected, and answers it: address, token, tag and what is thought of the token. It needs
//! no rights, except to read the keys, or to ask a guard that scrubs tokens.
//!
//! ```text
//! who '[::]:8080'                                     says what the token is
//! who '[::]:8080' --keys /etc/netoken/keys/default    and whether it is right
//! who '[::]:8080' --guard default                     asks the guard of this instance, which scrubs tokens
//! curl http://192.0.2.2:8080
//! ```

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result, bail};
use netoken::clock;
use netoken::keys::file::KeyDir;
use netoken::peer::{self, Peers, Unknown, Verdict};
use netoken::token::keyed::{Bind, Slots, Verifier};

/// How long a client may be silent.
const PATIENCE: Duration = Duration::from_secs(5);
/// How long its request may be, in bytes.
const REQUEST_MAX: u64 = 8192;

/// Who is asked about a token.
#[derive(Clone, Default)]
pub struct Judges {
    /// Directory of the keys that it is checked with.
    pub keys: Option<PathBuf>,
    /// A guard that knows the tokens that it has scrubbed.
    pub guard: Option<Arc<Peers>>,
}

#[allow(dead_code, reason = "the tests have this file as a module")]
fn main() -> Result<()> {
    const USAGE: &str = "usage: who ADDRESS:PORT [--keys DIRECTORY] [--guard INSTANCE]";
    let mut args = env::args().skip(1);
    let addr = args.next().context(USAGE)?;
    let mut judges = Judges::default();
    while let Some(flag) = args.next() {
        let value = args.next().context(USAGE)?;
        match flag.as_str() {
            "--keys" => judges.keys = Some(value.into()),
            "--guard" => judges.guard = Some(Arc::new(Peers::open(&value)?)),
            _ => bail!(USAGE),
        }
    }
    let listener = peer::listen(addr.parse().with_context(|| format!("reading '{addr}'"))?)?;
    for stream in listener.incoming() {
        let (stream, judges) = (stream.context("accepting a connection")?, judges.clone());
        thread::spawn(move || match answer(stream, &judges) {
            Ok(text) => println!("{text}"),
            Err(error) => eprintln!("{error:#}"),
        });
    }
    Ok(())
}

/// Answers one request, and returns what it said.
pub fn answer(mut stream: TcpStream, judges: &Judges) -> Result<String> {
    // Before the request is waited for: a token is good for some seconds.
    let text = describe(&stream, judges)?;
    read_request(&mut stream).context("reading a request")?;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close";
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{text}", text.len()).context("answering")?;
    Ok(text)
}

fn describe(stream: &TcpStream, judges: &Judges) -> Result<String> {
    let addr = stream.peer_addr().context("asking who connected")?;
    // A socket for both families has IPv4 addresses mapped into IPv6.
    let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
    let mut text = format!("address  {addr}\n");
    if let Some(guarded) = judges.guard.as_ref().map(|guard| guard.of(stream)).transpose()?.flatten() {
        text.push_str(&format!("token    {}\ntag      {}\n", guarded.token, guarded.tag()));
        text.push_str(&format!("verdict  {} by rule {} of the guard\n", guarded.verdict, guarded.rule));
        return Ok(text);
    }
    // Of what it did not scrub a guard knows nothing, and the SYN has it.
    let peer = match peer::of(stream) {
        Ok(peer) => peer,
        // Under a flood the kernel answers with SYN cookies, and keeps no SYN.
        Err(Unknown::Gone) => return Ok(text + "token    not known: the SYN was not kept\n"),
        Err(error) => return Err(error.into()),
    };
    text.push_str(&format!(
        "token    {}\n",
        peer.token().map_or("none".to_string(), |token| token.to_string())
    ));
    let Some(dir) = &judges.keys else { return Ok(text) };
    // Read anew each time, so that a rotation needs no restart.
    let keys = KeyDir::at(dir.clone()).load()?;
    let verifier = Verifier { keys: &keys, slots: Slots::default(), binds: &Bind::ALL };
    let verdict = peer.check(&verifier, clock::now());
    if let Verdict::Valid(valid) = verdict {
        text.push_str(&format!("tag      {}\n", valid.tag));
    }
    text.push_str(&format!("verdict  {}\n", verdict.name()));
    Ok(text)
}

/// Reads to the empty line that ends the head of a request.
fn read_request(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut head = BufReader::new(stream.take(REQUEST_MAX));
    let mut line = Vec::new();
    while line != b"\r\n" {
        line.clear();
        if head.read_until(b'\n', &mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}
