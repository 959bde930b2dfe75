//! Alerts, as they come out of the buffer.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use netoken::guard::events::Reader;
use netoken::guard::program::Kind;

use crate::packet::syn;
use crate::races::{cpus, stay_on};
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

fn for_an_hour(thresholds: &str) -> String {
    format!("alerts = {{ within = '1h', {thresholds} }}\n{}", RULES.split_once('\n').expect("alerts").1)
}

/// Each as severity and how many were refused.
fn told(reader: &mut Reader) -> Result<Vec<(&'static str, u64)>> {
    reader.read(Duration::ZERO)?;
    Ok(reader.alerts().iter().map(|alert| (alert.severity, alert.refused)).collect())
}

fn refuse(bench: &Bench, count: usize) -> Result<()> {
    (0..count).try_for_each(|_| bench.run_uncounted(&syn().build()).map(drop))
}

pub fn new_thresholds_count_at_once() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let bench = Bench::new(kind, &for_an_hour("low = 100000"))?;
        let mut reader = Reader::open(&bench.program.maps)?;
        let mut after = |rules: &str, refused: usize, expected: &[(&str, u64)]| -> Result<()> {
            bench.set_rules(&for_an_hour(rules))?;
            refuse(&bench, refused)?;
            let told = told(&mut reader)?;
            ensure!(told == expected, "{kind:?}, {rules}: {told:?}, not {expected:?}");
            Ok(())
        };
        after("low = 100000", 5, &[])?;
        after("low = 5", 1, &[("low", 6)])?;
        after("low = 5, high = 9", 2, &[])?;
        after("low = 5, high = 9", 1, &[("high", 9)])?;
        // What was told by lower thresholds keeps nothing back.
        after("low = 20, high = 30", 10, &[])?;
        after("low = 20, high = 30", 1, &[("low", 20)])?;
    }
    Ok(())
}

/// It would end later than the rules that are in use say.
pub fn a_window_of_older_rules_ends_where_theirs_are_shorter() -> Result<()> {
    for kind in [Kind::Tc, Kind::Xdp] {
        let bench = Bench::new(kind, &for_an_hour("low = 5"))?;
        let mut reader = Reader::open(&bench.program.maps)?;
        refuse(&bench, 4)?;
        bench.set_rules(&for_an_hour("low = 5").replace("1h", "30m"))?;
        refuse(&bench, 4)?;
        let before = told(&mut reader)?;
        ensure!(before.is_empty(), "{kind:?}: {before:?} of four packets in the new window");
        refuse(&bench, 1)?;
        let then = told(&mut reader)?;
        ensure!(then == [("low", 5)], "{kind:?}: {then:?} of five");
    }
    Ok(())
}

/// The buffer is full of the packets that the alert is about. Each CPU has one, so all are sent on one CPU.
pub fn an_alert_that_finds_no_room_is_told_later() -> Result<()> {
    let on_one_cpu = || {
        stay_on(*cpus()?.first().context("no CPU")?)?;
        [Kind::Tc, Kind::Xdp].into_iter().try_for_each(told_later)
    };
    thread::scope(|scope| scope.spawn(on_one_cpu).join()).map_err(|_| anyhow!("it panicked"))?
}

fn told_later(kind: Kind) -> Result<()> {
    const MOST: usize = 20_000;
    let bench = Bench::new(kind, &for_an_hour(&format!("critical = {MOST}")))?;
    let mut reader = Reader::open(&bench.program.maps)?;
    refuse(&bench, MOST)?;
    let lost = reader.lost(&bench.counters()?)?;
    let first = told(&mut reader)?;
    ensure!(lost > 0 && first.is_empty(), "{kind:?}: {lost} are lost, and {first:?}");
    refuse(&bench, 100)?;
    let then = told(&mut reader)?;
    ensure!(matches!(then[..], [("critical", _)]), "{kind:?}: {then:?}");
    refuse(&bench, 100)?;
    ensure!(told(&mut reader)?.is_empty(), "{kind:?}: it was told twice");
    Ok(())
}
