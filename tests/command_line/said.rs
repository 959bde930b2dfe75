//! Runs the program to its end, within bounds, and keeps what it said. Whatever the case is about: no output
//! may ever show a panic.

use std::process::{Command, Output, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::lab::{NETOKEN, wait_until};

/// What came out of one run.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

/// Runs a command that ends by itself.
pub fn said(command: &mut Command) -> Result<Said> {
    command.stdout(Stdio::piped());
    said_to(command)
}

/// The same with a standard output, and perhaps a standard error, that the caller chose.
pub fn said_to(command: &mut Command) -> Result<Said> {
    let shown = format!("{command:?}");
    let mut child = command.stdin(Stdio::null()).stderr(Stdio::piped()).spawn().context(shown.clone())?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let read = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        thread::spawn(move || {
            let mut text = String::new();
            pipe.map(|mut pipe| pipe.read_to_string(&mut text));
            text
        })
    };
    let out = read(out.map(|pipe| Box::new(pipe) as _));
    let err = read(err.map(|pipe| Box::new(pipe) as _));
    let status = wait_until(&format!("the end of {shown}"), || Ok(child.try_wait()?));
    if status.is_err() {
        child.kill()?;
        child.wait()?;
    }
    let join = |reader: thread::JoinHandle<String>| reader.join().unwrap_or_default();
    let said = Said { code: status?.code(), out: join(out), err: join(err) };
    said.expect_calm().context(shown)?;
    Ok(said)
}

/// Runs the program with these arguments, outside of any laboratory.
pub fn netoken(args: &[&str]) -> Result<Said> {
    said(Command::new(NETOKEN).args(args))
}

impl Said {
    /// What a command said that was run by somebody else.
    pub fn from_output(output: Output) -> Result<Said> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        let said = Said { code: output.status.code(), out: text(output.stdout), err: text(output.stderr) };
        said.expect_calm()?;
        Ok(said)
    }

    /// Fails if something panicked, or was said for nobody.
    fn expect_calm(&self) -> Result<()> {
        for text in [&self.out, &self.err] {
            if let Some(word) = sign_of_panic(text) {
                bail!("'{word}' in what it said: {self:#?}");
            }
            ensure!(!text.contains("/proc/self/fd"), "a path that means nothing to others: {self:#?}");
        }
        // The exit code of a panic, whose message may have had nowhere to go.
        ensure!(self.code != Some(101), "it panicked without a word: {self:#?}");
        Ok(())
    }

    /// Fails unless it ended with this code.
    pub fn code(self, code: i32) -> Result<Said> {
        ensure!(self.code == Some(code), "exit code {code} expected: {self:#?}");
        Ok(self)
    }

    /// Fails unless standard error has all of these words, and standard output nothing.
    pub fn err(self, words: &[&str]) -> Result<Said> {
        for word in words {
            ensure!(self.err.contains(word), "'{word}' expected on standard error: {self:#?}");
        }
        ensure!(self.out.is_empty(), "an error belongs on standard error: {self:#?}");
        Ok(self)
    }
}

/// What a person must never see.
pub fn sign_of_panic(text: &str) -> Option<&'static str> {
    ["panicked at", "stack backtrace", "RUST_BACKTRACE"].into_iter().find(|sign| text.contains(sign))
}
