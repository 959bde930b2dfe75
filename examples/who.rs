//! An HTTP server that answers who connected: address, token, tag and what is thought of the token. It needs no
//! rights, except to read the keys.
//!
//! ```text
//! cargo run --example who -- '[::]:8080'                              # says what the token is
//! cargo run --example who -- '[::]:8080' /etc/netoken/keys/default    # and whether it is right
//! curl http://192.0.2.2:8080
//! ```

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;
use std::{env, thread};

use anyhow::{Context, Result};
use netoken::clock;
use netoken::keys::file::KeyDir;
use netoken::peer;
use netoken::token::keyed::{Bind, Slots, Verifier};

/// How long a client may be silent.
const PATIENCE: Duration = Duration::from_secs(5);
const REQUEST_MAX: usize = 8192;

#[allow(dead_code, reason = "the tests have this file as a module")]
fn main() -> Result<()> {
    let mut args = env::args().skip(1);
    let addr = args.next().context("usage: who ADDRESS:PORT [KEY_DIRECTORY]")?;
    let keys = args.next();
    let listener: TcpListener = peer::listen(addr.parse().with_context(|| format!("reading '{addr}'"))?)?;
    for stream in listener.incoming() {
        let (stream, keys) = (stream.context("accepting a connection")?, keys.clone());
        thread::spawn(move || {
            if let Err(error) = answer(stream, keys.as_deref().map(Path::new)) {
                eprintln!("{error:#}");
            }
        });
    }
    Ok(())
}

/// Answers one request.
pub fn answer(mut stream: TcpStream, keys: Option<&Path>) -> Result<()> {
    // Before the request is waited for: a token is good for some seconds.
    let text = describe(&stream, keys)?;
    read_request(&mut stream).context("reading a request")?;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close";
    write!(stream, "{head}\r\nContent-Length: {}\r\n\r\n{text}", text.len()).context("answering")
}

fn describe(stream: &TcpStream, keys: Option<&Path>) -> Result<String> {
    let peer = match peer::of(stream) {
        Ok(peer) => peer,
        // Under a flood the kernel answers with SYN cookies, and keeps no SYN.
        Err(peer::Unknown::Gone) => return Ok("the SYN of this connection was not kept\n".to_string()),
        Err(error) => return Err(error.into()),
    };
    let token = peer.token().map_or("none".to_string(), |token| token.to_string());
    let mut text = format!("address  {}\ntoken    {token}\n", peer.flow().src());
    let Some(dir) = keys else { return Ok(text) };
    // Read anew each time, so that a rotation needs no restart.
    let keys = KeyDir::at(dir.to_path_buf()).load()?;
    let verifier = Verifier { keys: &keys, slots: Slots::default(), binds: &Bind::ALL };
    let verdict = peer.check(&verifier, clock::now());
    if let peer::Verdict::Valid(valid) = verdict {
        text.push_str(&format!("tag      {}\n", valid.tag));
    }
    text.push_str(&format!("verdict  {}\n", verdict.name()));
    Ok(text)
}

/// Reads to the empty line that ends the head of a request.
fn read_request(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE))?;
    let (mut head, mut block) = (Vec::new(), [0; 1024]);
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        match stream.read(&mut block)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            len => head.extend_from_slice(&block[..len]),
        }
        if head.len() > REQUEST_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    Ok(())
}
