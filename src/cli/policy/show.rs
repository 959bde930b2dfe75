//! `netoken policy show`: what is in use, and how often each rule decided.

use std::collections::BTreeSet;
use std::io::{self, Write};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result};
use clap::Args;
use serde::Serialize;

use super::Common;
use crate::events::model::since_epoch;
use crate::keys::RingName;
use crate::policy::ask::Ask;
use crate::policy::install::DEFAULT_HITS;
use crate::policy::names::Names;
use crate::policy::running::{self, Running};
use crate::policy::write::{conditions_line, to_toml};
use crate::policy::{Decision, Rule};
use crate::privileges;
use crate::state::instance_flag;
use crate::types::Hits;

/// Show the policy that is in use, with how often each rule decided and when last
#[derive(Debug, Args)]
#[command(
    after_help = "Example, which keeps what is in use as a file:\n  netoken policy show --toml > policy.toml"
)]
pub(super) struct ShowArgs {
    /// Print it as a policy file
    #[arg(long, conflicts_with = "json")]
    toml: bool,

    #[command(flatten)]
    common: Common,
}

/// A rule, as `--json` prints it; the default has number 0 and no name.
#[derive(Serialize)]
#[serde(tag = "type", rename = "rule")]
struct RuleLine<'a> {
    rule: usize,
    name: Option<&'a str>,
    matches: String,
    action: String,
    hits: u64,
    last_hit: Option<String>,
    /// What is not any more what it was when the policy was loaded.
    stale: Option<String>,
    /// The key ring of its token, if no key of it signs.
    ring_without_key: Option<RingName>,
}

pub(super) fn run(args: &ShowArgs) -> Result<()> {
    privileges::check("showing the policy")?;
    args.common.enter()?;
    let (state, lock) = args.common.open()?;
    let instance = state.instance(&args.common.instance);
    let maps = instance.maps()?;
    let running = running::read(&instance, &maps)?;
    if args.toml {
        let text = to_toml(&running.policy);
        // Whoever reads may take their time, and nobody has to wait for that.
        drop((maps, lock));
        return io::stdout().write_all(text.as_bytes()).context("writing to standard output");
    }
    let numbers: Vec<u32> = [DEFAULT_HITS].into_iter().chain(running.hits.iter().copied()).collect();
    let hits = maps.hits(&numbers)?;
    let unsigned = maps.keys.without_signer()?;
    let clock = Clock::now()?;
    drop((maps, lock));
    tell(args, &running, &hits, unsigned, clock).context("writing to standard output")
}

/// By which it is told what a rule has come to.
struct Now {
    names: Names,
    /// Key rings of which no key signs.
    unsigned: BTreeSet<RingName>,
    clock: Clock,
}

fn tell(
    args: &ShowArgs,
    running: &Running,
    hits: &[Hits],
    unsigned: BTreeSet<RingName>,
    clock: Clock,
) -> Result<()> {
    let now = Now { names: Names::default(), unsigned, clock };
    let mut out = io::BufWriter::new(io::stdout().lock());
    let flag = instance_flag(&args.common.instance);
    let policy = running.outline(&args.common.instance);
    if args.common.json {
        writeln!(out, "{}", serde_json::to_string(&policy)?)?;
    } else {
        writeln!(out, "instance '{}': {policy}, generation {}\n", policy.instance, policy.generation)?;
        writeln!(out, "{:>7} {:>12}  {:<20}  WHAT", "RULE", "HITS", "LAST (UTC)")?;
    }
    let rules = (1..).zip(&running.policy.rules).zip(&hits[1..]);
    let lines = rules.map(|((number, rule), hits)| line(number, Some(rule), &rule.decision, hits, &now));
    let default = running.policy.default.iter().map(|decision| line(0, None, decision, &hits[0], &now));
    for line in lines.chain(default) {
        if args.common.json {
            writeln!(out, "{}", serde_json::to_string(&line)?)?;
            continue;
        }
        let number = if line.rule == 0 { "default".to_string() } else { line.rule.to_string() };
        let last = line.last_hit.as_deref().unwrap_or("never");
        let name = line.name.map_or(String::new(), |name| format!("{name}: {} -> ", line.matches));
        let stale =
            line.stale.map_or(String::new(), |what| format!("  [stale: {what}; load the policy again]"));
        let unsigned = line.ring_without_key.map_or(String::new(), |ring| {
            format!("  [no key of ring '{ring}' signs: its SYNs get no token; see netoken key list{flag}]")
        });
        writeln!(out, "{number:>7} {:>12}  {last:<20}  {name}{}{stale}{unsigned}", line.hits, line.action)?;
    }
    Ok(out.flush()?)
}

fn line<'a>(
    rule_number: usize,
    rule: Option<&'a Rule>,
    decision: &Decision,
    hits: &Hits,
    now: &Now,
) -> RuleLine<'a> {
    let conditions = rule.iter().flat_map(|rule| rule.conditions.iter());
    RuleLine {
        rule: rule_number,
        name: rule.map(|rule| &*rule.name),
        matches: rule.map_or(String::new(), conditions_line),
        action: decision.to_string(),
        hits: hits.packets,
        last_hit: (hits.packets > 0)
            .then(|| humantime::format_rfc3339_seconds(now.clock.at(hits.last_jiffies)).to_string()),
        stale: conditions.filter_map(|condition| running::stale(&condition.values, &now.names)).next(),
        ring_without_key: decision.ring().filter(|ring| now.unsigned.contains(ring)),
    }
}

/// Turns jiffies into wall-clock time. A classifier reads jiffies without a call; how many make a second is a setting
/// that the kernel tells nobody.
struct Clock {
    now: SystemTime,
    jiffies: u64,
    per_second: u64,
}

impl Clock {
    fn now() -> Result<Clock> {
        let question = crate::policy::ask::Syn {
            src: [0, 0, 0, 0].into(),
            dst: [0, 0, 0, 0].into(),
            src_port: 0,
            port: 0,
            mark: 0,
            interface: (0, 0),
            sender: None,
        };
        let (ns, jiffies) = Ask::load(None)?.about(&question)?.now;
        Ok(Clock { now: SystemTime::now(), jiffies, per_second: jiffies_per_second(ns, jiffies) })
    }

    fn at(&self, jiffies: u64) -> SystemTime {
        let ago = self.jiffies.saturating_sub(jiffies);
        // Who sets the clock back may set it to less than the time since then.
        since_epoch(self.now - Duration::from_millis(ago * 1000 / self.per_second))
    }
}

/// The setting that explains best how far both clocks are: jiffies begin 300 seconds before 2^32 (INITIAL_JIFFIES of
/// include/linux/jiffies.h), the monotonic clock at zero.
fn jiffies_per_second(monotonic_ns: u64, jiffies: u64) -> u64 {
    let seconds = monotonic_ns as f64 / 1e9;
    let error = |hz: &u64| {
        let since_boot = (jiffies as f64 - ((1u64 << 32) as f64 - 300.0 * *hz as f64)) / *hz as f64;
        (since_boot - seconds).abs()
    };
    [100, 250, 300, 1000].into_iter().min_by(|a, b| error(a).total_cmp(&error(b))).unwrap_or(250)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_that_was_set_back_is_no_panic() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(10);
        let clock = Clock { now, jiffies: 1_000_000, per_second: 100 };
        let at = |jiffies| humantime::format_rfc3339_seconds(clock.at(jiffies)).to_string();
        assert_eq!((at(999_900), at(1)), ("1970-01-01T00:00:09Z".into(), "1970-01-01T00:00:00Z".into()));
    }

    #[test]
    fn the_length_of_a_jiffy_is_found() {
        for hz in [100u64, 250, 300, 1000] {
            for seconds in [1u64, 60, 86_400, 30_000_000] {
                // The clocks drift apart by some parts in a million.
                let jiffies = (1u64 << 32) - 300 * hz + seconds * hz + seconds * hz / 50_000;
                assert_eq!(jiffies_per_second(seconds * 1_000_000_000, jiffies), hz, "{seconds} s");
            }
        }
    }
}
