//! What is said to a person beside the output proper, on standard error. That nobody listens is no failure.

use std::borrow::Cow;
use std::fmt;
use std::io::Write;
use std::os::fd::AsFd;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

/// How long a reader of standard error may take, in milliseconds. One that has stopped must not stop us.
const PATIENCE_MS: u16 = 1000;

/// What a pipe that is ready for writing takes without waiting: PIPE_BUF of pipe(7).
pub(crate) const AT_ONCE: usize = 4096;

/// Prints a line on standard error, if that works.
pub(crate) fn note(line: fmt::Arguments<'_>) {
    // As a whole: an argument's own parts would each be a write.
    write_while_read(&mut std::io::stderr().lock(), format!("{line}\n").as_bytes());
}

/// Writes as much as is read of it.
fn write_while_read(out: &mut (impl Write + AsFd), text: &[u8]) {
    for piece in text.chunks(AT_ONCE) {
        let mut fds = [PollFd::new(out.as_fd(), PollFlags::POLLOUT)];
        if poll(&mut fds, PollTimeout::from(PATIENCE_MS)) == Ok(0) || out.write_all(piece).is_err() {
            return;
        }
    }
}

/// A name that somebody else gave, without what a terminal would obey or a line would end at: the kernel takes nearly any
/// byte in the name of an interface, also from the root of a container.
pub(crate) fn printable(name: &str) -> String {
    let parts =
        name.chars().map(|c| if c.is_control() { c.escape_default().to_string() } else { c.to_string() });
    parts.collect()
}

/// An argument of a command that a person is told to type, as a shell reads it.
pub(crate) fn quoted(argument: &str) -> Cow<'_, str> {
    let is_plain = |c: char| c.is_alphanumeric() || "_@%+=:,./-".contains(c);
    match !argument.is_empty() && argument.chars().all(is_plain) {
        true => Cow::Borrowed(argument),
        false => Cow::Owned(format!("'{}'", argument.replace('\'', r"'\''"))),
    }
}

/// Prints a line on standard error, if that works.
macro_rules! note {
    ($($text:tt)*) => { $crate::note::note(format_args!($($text)*)) };
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread;
    use std::time::Duration;

    use super::*;

    #[test]
    fn who_stops_reading_stops_nobody() {
        let (_reader, mut writer) = std::io::pipe().unwrap();
        let (done, is_done) = channel();
        thread::spawn(move || {
            // Much more than fits into a pipe.
            write_while_read(&mut writer, &vec![b'x'; 1 << 20]);
            done.send(()).ok();
        });
        is_done.recv_timeout(Duration::from_secs(20)).expect("it still waits");
    }

    #[test]
    fn a_shell_reads_what_was_quoted() {
        for plain in ["eth0", "br-1.7@x", "/proc/7/ns/net", "Zürich"] {
            assert_eq!(quoted(plain), plain);
        }
        assert_eq!(quoted("a;id$(id)"), "'a;id$(id)'");
        assert_eq!(quoted("it's"), r"'it'\''s'");
        assert_eq!(quoted(""), "''");
    }

    #[test]
    fn a_name_has_no_power_over_a_terminal() {
        assert_eq!(printable("eth0 Zürich \u{fffd}"), "eth0 Zürich \u{fffd}");
        assert_eq!(printable("\u{1b}[31mv\n\u{9b}\u{7f}"), "\\u{1b}[31mv\\n\\u{9b}\\u{7f}");
    }
}
