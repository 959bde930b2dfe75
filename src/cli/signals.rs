//! What other processes tell one that streams.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use signal_hook::consts::{SIGHUP, SIGTERM};

/// Set by signals.
#[derive(Default)]
pub(super) struct Signals {
    pub stop: Arc<AtomicBool>,
    pub reload: Arc<AtomicBool>,
}

impl Signals {
    /// Without a file that could be loaded again, SIGHUP ends the stream: the terminal is gone.
    pub fn catch(has_file: bool) -> Result<Signals> {
        let signals = Signals::default();
        let hangup = if has_file { &signals.reload } else { &signals.stop };
        for (signal, flag) in [(SIGTERM, &signals.stop), (SIGHUP, hangup)] {
            signal_hook::flag::register(signal, Arc::clone(flag)).context("preparing for signals")?;
        }
        let stop = Arc::clone(&signals.stop);
        ctrlc::set_handler(move || stop.store(true, Ordering::Relaxed)).context("preparing for Ctrl-C")?;
        Ok(signals)
    }
}
