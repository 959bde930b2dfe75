//! Prints what happens: aligned columns for a person, or one JSON object a line for a program.

use std::io;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::Serialize;

use super::columns::Columns;
use super::interfaces::Interfaces;
use super::model::Syn;
use super::rules::RuleNames;
use super::watch::Change;
use crate::counters::Counters;
use crate::types::Verdict;

/// Everything that `--attach --json` prints, by its `type`.
#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum Record<'a> {
    /// A filter was attached or replaced.
    Attached {
        /// Name of the interface.
        interface: &'a str,
        /// Where, as a query shows it.
        hook: &'static str,
        /// Priority of the filter; none at tcx.
        priority: Option<u16>,
        /// Handle of the filter; none at tcx.
        handle: Option<u32>,
        /// It took the place of one of ours.
        replaced: bool,
        /// We made the clsact qdisc.
        made_qdisc: bool,
    },
    /// A SYN and its verdict.
    Syn {
        /// Name of the interface.
        interface: &'a str,
        /// All that the event says.
        #[serde(flatten)]
        syn: &'a Syn,
        /// Name of the rule; none for the default, and if the policy that decided is not remembered any more.
        rule_name: Option<&'a str>,
    },
    /// All counters since the instance was made, and events lost since this process began to read.
    Totals {
        /// By verdict.
        #[serde(flatten)]
        counters: &'a Counters,
        /// Events for which there was no room in the buffer.
        lost: u64,
    },
    /// Something happened to an interface that we are attached to.
    Interface {
        /// Its name, before if it was renamed.
        interface: &'a str,
        /// What happened.
        #[serde(flatten)]
        change: &'a Change,
    },
}

/// Where the stream is printed.
pub struct Output {
    out: Columns<COLUMNS>,
    json: bool,
    interfaces: Interfaces,
    rules: RuleNames,
}

const COLUMNS: usize = 7;
const HEADS: [&str; COLUMNS] = ["INTERFACE", "VERDICT", "SOURCE", "DESTINATION", "ISN", "OPTIONS", "RULE"];
/// The column of the rule.
const RULE: usize = COLUMNS - 1;
/// So many characters of a rule's name are shown: one long name must not push the tokens off everybody's screen.
const NAME_MAX: usize = 24;
/// What most IPv4 lines need, so that they fit into 120 columns.
const WIDTHS: [usize; COLUMNS] = [9, 7, 19, 18, 8, 7, 7];

impl Output {
    /// Prints to standard output, until `stop` is set and nobody takes what is printed.
    ///
    /// # Errors
    /// There is no descriptor left.
    pub fn new(json: bool, rules: RuleNames, stop: Arc<AtomicBool>) -> io::Result<Output> {
        let out = Columns::new(HEADS, WIDTHS, stop)?;
        Ok(Output { out, json, interfaces: Interfaces::here(), rules })
    }

    /// True if the lines are JSON.
    pub fn is_json(&self) -> bool {
        self.json
    }

    /// Prints the heads of the columns.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn heads(&mut self) -> io::Result<()> {
        if self.json {
            return Ok(());
        }
        self.out.make_room(RULE, self.rules.widest().min(NAME_MAX));
        self.out.heads()
    }

    /// Prints a record, which only JSON has.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn record(&mut self, record: &Record<'_>) -> io::Result<()> {
        self.out.json(record)
    }

    /// To be called before SYNs are printed that came together: an interface may have another name since the last.
    pub fn refresh_names(&mut self) {
        self.interfaces.refresh();
    }

    /// Prints one SYN.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn syn(&mut self, syn: &Syn) -> io::Result<()> {
        let name = self.interfaces.name(syn.netns_inode, syn.ifindex);
        let rule_name = self.rules.get(syn.generation, syn.rule);
        if self.json {
            let record = Record::Syn { interface: &name, syn, rule_name };
            return self.out.json(&record);
        }
        let time = humantime::format_rfc3339_millis(syn.time).to_string();
        let verdict = match (syn.verdict, syn.dropped) {
            ("dropped", _) | (_, false) => syn.verdict.to_string(),
            (reason, true) => format!("{reason}!"),
        };
        let options = match syn.old_options_len == syn.new_options_len {
            true => syn.old_options_len.to_string(),
            false => format!("{}->{}", syn.old_options_len, syn.new_options_len),
        };
        let rule = match (syn.rule, syn.verdict) {
            (0, "no_policy") => "-".to_string(),
            (0, _) => "default".to_string(),
            (number, _) => rule_name.map_or_else(|| format!("#{number}"), cut),
        };
        let cells = [
            name,
            verdict,
            std::net::SocketAddr::new(syn.src, syn.sport).to_string(),
            std::net::SocketAddr::new(syn.dst, syn.dport).to_string(),
            format!("{:08x}", syn.isn),
            options,
            rule,
        ];
        let token = syn.token.map_or("-".to_string(), |token| token.to_string());
        self.out.line(&time, &cells, &token)
    }

    /// Prints the totals.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn totals(&mut self, counters: &Counters, lost: u64) -> io::Result<()> {
        if self.json {
            return self.record(&Record::Totals { counters, lost });
        }
        self.out.text(&format!("-- {}", totals_line(counters, lost)))
    }

    /// Sends to standard output what was printed.
    ///
    /// # Errors
    /// Standard output is closed.
    pub fn flush(&mut self) -> io::Result<()> {
        self.out.flush()
    }
}

/// A name, or what fits of it.
fn cut(name: &str) -> String {
    match name.char_indices().nth(NAME_MAX) {
        None => name.to_string(),
        Some(_) => name.chars().take(NAME_MAX - 1).chain(['…']).collect(),
    }
}

/// The counters in one line: those that are not zero, and always the stamped ones.
pub fn totals_line(counters: &Counters, lost: u64) -> String {
    let stamped = crate::counters::verdict_name(Verdict::VERDICT_STAMPED.0);
    let mut line = format!("{} SYN{}", counters.total(), if counters.total() == 1 { "" } else { "s" });
    for (name, packets) in counters.iter().filter(|(name, packets)| *packets > 0 || *name == stamped) {
        line.push_str(&format!(", {packets} {name}"));
    }
    if counters.dropped() > 0 {
        line.push_str(&format!("; {} not sent", counters.dropped()));
    }
    if lost > 0 {
        line.push_str(&format!("; {lost} events lost"));
    }
    line
}
