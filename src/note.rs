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

/// A name that somebody else gave, without what a terminal would obey or a line would end at: the kernel takes nearly any
/// byte in the name of an interface, also from the root of a container.
pub(crate) fn printable(name: &str) -> String {
    let parts =
        name.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() });
    parts.collect()
}

/// Prints a line on standard error, if that works.
macro_rules! note {
    ($($text:tt)*) => { $crate::note::note(format_args!($($text)*)) };
}

#[cfg(test)]
mod tests {
    use super::printable;

    #[test]
    fn a_name_has_no_power_over_a_terminal() {
        assert_eq!(printable("eth0 Zürich \u{fffd}"), "eth0 Zürich \u{fffd}");
        assert_eq!(printable("\u{1b}[31mv\n\u{9b}\u{7f}"), "\\u{1b}[31mv\\n\\u{9b}\\u{7f}");
    }
}
