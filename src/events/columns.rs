//! Standard output of what streams: lines in columns for a person, JSON for a program, and a reader who may stop reading.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::Serialize;

use crate::note::AT_ONCE;

/// How often one who waits for the reader of standard output looks whether to stop, in milliseconds.
const LOOK_MS: u16 = 100;
/// How long the reader may take for the last lines.
const GRACE: Duration = Duration::from_secs(1);

/// Standard output, whose reader may stop reading: a pager, a terminal after Ctrl-S. A write that waits for it ends
/// when we are told to stop, as if the reader had gone.
pub(crate) struct Patient {
    out: File,
    stop: Arc<AtomicBool>,
    /// When to stop waiting, once we were told.
    until: Option<Instant>,
}

impl Patient {
    /// Waits until `stop` is set.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn stdout(stop: Arc<AtomicBool>) -> io::Result<Patient> {
        let out = File::from(io::stdout().as_fd().try_clone_to_owned()?);
        Ok(Patient { out, stop, until: None })
    }

    fn gives_up(&mut self) -> bool {
        // Once told, for good: a stream that ends uses the flag again.
        if self.until.is_none() && !self.stop.load(Ordering::Relaxed) {
            return false;
        }
        Instant::now() >= *self.until.get_or_insert_with(|| Instant::now() + GRACE)
    }
}

impl Write for Patient {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            let mut fds = [PollFd::new(self.out.as_fd(), PollFlags::POLLOUT)];
            match poll(&mut fds, PollTimeout::from(LOOK_MS)) {
                Ok(0) | Err(nix::errno::Errno::EINTR) if self.gives_up() => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                _ => return self.out.write(&bytes[..bytes.len().min(AT_ONCE)]),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Between the time and the token, both of which always have the same width, `N` columns.
pub struct Columns<const N: usize> {
    out: BufWriter<Patient>,
    heads: [&'static str; N],
    /// Widths of the columns, which only grow; the heads are printed again when one has.
    widths: [usize; N],
}

impl<const N: usize> Columns<N> {
    /// Of standard output, until `stop` is set and nobody takes what is printed. The columns are at first as wide as
    /// `widths` and their heads.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new(
        heads: [&'static str; N],
        widths: [usize; N],
        stop: Arc<AtomicBool>,
    ) -> io::Result<Columns<N>> {
        let out = BufWriter::new(Patient::stdout(stop)?);
        let mut columns = Columns { out, heads, widths };
        columns.grow(&heads.map(str::to_string));
        Ok(columns)
    }

    /// Makes a column as wide as what is known to come there, so that the heads need not be printed again for it.
    pub fn make_room(&mut self, column: usize, width: usize) {
        self.widths[column] = self.widths[column].max(width);
    }

    /// Prints the heads.
    ///
    /// # Errors
    /// Standard output is closed, as for all that prints here.
    pub fn heads(&mut self) -> io::Result<()> {
        self.print("TIME (UTC)", &self.heads.map(str::to_string), "TOKEN")
    }

    /// Prints one line, and the heads in front of it if it needs wider columns. `time` is RFC 3339 in UTC with at least
    /// milliseconds: a person who watches knows the day, and what needs more reads JSON.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn line(&mut self, time: &str, cells: &[String; N], token: &str) -> io::Result<()> {
        if self.grow(cells) {
            self.heads()?;
        }
        self.print(time.get(11..23).unwrap_or_default(), cells, token)
    }

    /// Prints a line that stands in no columns.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn text(&mut self, line: &str) -> io::Result<()> {
        writeln!(self.out, "{line}")
    }

    /// Prints one object.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn json(&mut self, record: &impl Serialize) -> io::Result<()> {
        serde_json::to_writer(&mut self.out, record)?;
        self.out.write_all(b"\n")
    }

    /// Sends what was printed.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }

    /// Makes room for the cells. True if there was too little.
    fn grow(&mut self, cells: &[String; N]) -> bool {
        let before = self.widths;
        for (cell, width) in cells.iter().zip(&mut self.widths) {
            *width = (*width).max(cell.chars().count());
        }
        self.widths != before
    }

    fn print(&mut self, first: &str, cells: &[String; N], rest: &str) -> io::Result<()> {
        write!(self.out, "{first:<12}")?;
        for (cell, width) in cells.iter().zip(self.widths) {
            write!(self.out, "  {cell:<width$}")?;
        }
        writeln!(self.out, "  {rest}")
    }
}
