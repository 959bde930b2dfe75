//! What other processes tell one that streams, or that has begun to attach.

use std::mem::MaybeUninit;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGHUP, SIGTERM};

/// Set by signals.
#[derive(Default)]
pub(super) struct Signals {
    pub stop: Arc<AtomicBool>,
    pub reload: Arc<AtomicBool>,
    /// SIGHUP is not ignored.
    pub hears_hangup: bool,
}

impl Signals {
    /// Without a file that could be loaded again, SIGHUP ends the stream, or what attaches: the terminal is gone. Where the parent has it
    /// ignored, as `nohup` does, it stays so. Not so SIGINT, which a shell has ignored in whatever a script starts in the
    /// background: Ctrl-C is to end the stream with the script.
    pub fn catch(has_file: bool) -> Result<Signals> {
        let signals = Signals { hears_hangup: !is_ignored(SIGHUP), ..Signals::default() };
        let register = |signal, flag: &Arc<AtomicBool>| {
            signal_hook::flag::register(signal, Arc::clone(flag)).context("preparing for signals")
        };
        register(SIGTERM, &signals.stop)?;
        if signals.hears_hangup {
            register(SIGHUP, if has_file { &signals.reload } else { &signals.stop })?;
        }
        let stop = Arc::clone(&signals.stop);
        ctrlc::set_handler(move || stop.store(true, Ordering::Relaxed)).context("preparing for Ctrl-C")?;
        Ok(signals)
    }

    /// To be asked where something has been done and more is to follow, by who can take it back. `doing` begins the message.
    ///
    /// # Errors
    /// It was told to stop.
    pub fn go_on(&self, doing: &str) -> Result<()> {
        if self.is_stopped() {
            bail!("{doing}: stopped by a signal; taking back what was done");
        }
        Ok(())
    }

    /// Whether it was told to stop.
    pub fn is_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

fn is_ignored(signal: libc::c_int) -> bool {
    let mut now = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: a null pointer changes nothing, and the other one is valid for the call.
    let result = unsafe { libc::sigaction(signal, ptr::null(), now.as_mut_ptr()) };
    // SAFETY: all zeros are a valid value, and the call writes none that is not.
    result == 0 && unsafe { now.assume_init() }.sa_sigaction == libc::SIG_IGN
}
