//! What is said to a person beside the output proper, on standard error. That nobody listens is no failure.

use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a reader of standard error may take, in milliseconds. One that has stopped must not stop us.
const PATIENCE_MS: u16 = 1000;

/// Prints a line on standard error, if that works.
pub(crate) fn note(line: fmt::Arguments<'_>) {
    let mut stderr = std::io::stderr().lock();
    let mut fds = [PollFd::new(stderr.as_fd(), PollFlags::POLLOUT)];
    if poll(&mut fds, PollTimeout::from(PATIENCE_MS)) != Ok(0) {
        // In one piece: an argument's own parts would each be a write.
        let _ = stderr.write_all(format!("{line}\n").as_bytes());
    }
}

/// Prints a line on standard error, if that works.
macro_rules! note {
    ($($text:tt)*) => { $crate::note::note(format_args!($($text)*)) };
}
