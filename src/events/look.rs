//! What whoever streams does between two looks at a buffer, whatever it holds.

use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Result;
use libbpf_rs::MapHandle;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::clock;

/// How long a look at the buffer may wait; also how late a signal or a step of the wall clock is noticed at most.
pub const LOOK: Duration = Duration::from_millis(100);

/// Publishes what the wall clock is now, as it may have been set. False once the stream is to end: `stop` is set, or
/// nobody reads the output any more.
///
/// # Errors
/// The kernel refused.
pub fn goes_on(clock: &MapHandle, stop: &AtomicBool) -> Result<bool> {
    clock::publish(clock, None)?;
    Ok(!stop.load(Ordering::Relaxed) && !is_output_closed())
}

/// True once nobody reads standard output any more, also while there is nothing to print.
fn is_output_closed() -> bool {
    let stdout = io::stdout();
    let mut fds = [PollFd::new(stdout.as_fd(), PollFlags::empty())];
    match poll(&mut fds, PollTimeout::ZERO) {
        Ok(_) => fds[0].revents().is_some_and(|events| events.contains(PollFlags::POLLERR)),
        Err(_) => false,
    }
}
