//! Alerts, as they come out of the buffer.

use std::time::Duration;

use anyhow::{Result, ensure};
use netoken::guard::events::Reader;
use netoken::guard::program::Kind;

use crate::packet::syn;
use crate::run::{Bench, in_time, within};

const RULES: &str = "alerts = { within = '2s', low = 3, high = 6, critical = 7 }\n[[rule]]\nname = 'a'\ndst = \
                     ['0.0.0.0/0', '::/0']\nmode = 'drop'\ntokens = 'a1b2c3d4e5f60718'\n";

pub fn each_severity_is_told_once_in_a_window() -> Result<()> {
    [Kind::Tc, Kind::Xdp].into_iter().try_for_each(|kind| in_time(|| told_once_in_a_window(kind)))
}

fn told_once_in_a_window(kind: Kind) -> Result<Option<()>> {
    const WINDOW: Duration = Duration::from_secs(2);
    let bench = Bench::new(kind, RULES)?;
    let mut reader = Reader::open(&bench.program.maps)?;
    let mut told = |refused: usize| -> Result<Vec<(&'static str, u64)>> {
        for _ in 0..refused {
            bench.run_uncounted(&syn().build())?;
        }
        let seen = reader.read(Duration::ZERO)?;
        ensure!(seen.len() == refused, "{} events of {refused} packets", seen.len());
        let alerts = reader.alerts();
        ensure!(alerts.iter().all(|alert| alert.within_s == 2.0), "{alerts:?}");
        Ok(alerts.iter().map(|alert| (alert.severity, alert.refused)).collect())
    };
    let first = within(WINDOW, || {
        for (refused, expected) in [
            (2, vec![]),
            (1, vec![("low", 3)]),
            (2, vec![]),
            (5, vec![("high", 6), ("critical", 7)]),
            (9, vec![]),
        ] {
            let alerts = told(refused)?;
            ensure!(alerts == expected, "{kind:?}: {alerts:?}, not {expected:?}");
        }
        Ok(())
    })?;
    let Some(()) = first else { return Ok(None) };
    // In a new one from the beginning.
    std::thread::sleep(WINDOW);
    within(WINDOW, || {
        let alerts = told(4)?;
        ensure!(alerts == [("low", 3)], "{kind:?}: {alerts:?} in the second window");
        Ok(())
    })
}
