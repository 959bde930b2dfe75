//! Reads a policy from its file, the files that it includes and the lists that it names, and checks all of it: what is
//! wrong is collected in a [`Report`], and only a policy without errors leaves here.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use fields::FileReader;

use super::compile::Refused;
use super::cover;
use super::names::Names;
use super::report::{Problem, Report};
use super::split::Pieces;
use super::values::{Prefix, Range, merge_prefixes};
use super::{Decision, Place, Policy, Rule};
use crate::files::Files;

mod decision;
mod fields;
mod lists;

/// Told how far something is: what is done, how much of how much.
pub type Progress<'a> = &'a (dyn Fn(&str, usize, usize) + Sync);

/// How to read.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// A cgroup or interface that does not exist is a warning, as with `missing = "warn"` in the file.
    pub allow_missing: bool,
    /// It was typed as arguments of a command, which have no place for `missing = "warn"`.
    pub is_typed: bool,
    /// It was read and checked before: what was worth a look then is not looked for.
    pub is_checked: bool,
    /// Who wants to know how far it is.
    pub progress: Option<Progress<'a>>,
}

impl std::fmt::Debug for Options<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Options").field("allow_missing", &self.allow_missing).finish_non_exhaustive()
    }
}

/// A policy that was read and has no errors.
#[derive(Debug)]
pub struct Checked {
    /// The policy.
    pub policy: Policy,
    /// What is worth a look.
    pub report: Report,
}

/// Every key of a rule but those that begin with `not_`.
const CONDITIONS: [&str; 8] = ["interface", "src", "dst", "src_port", "port", "mark", "cgroup", "uid"];
const RULE_KEYS: [&str; 4] = ["name", "action", "token", "when_full"];
const FILE_KEYS: [&str; 6] = ["default", "missing", "include", "prefixes", "ports", "rule"];
const DECISION_KEYS: [&str; 3] = ["action", "token", "when_full"];
/// So many files may include each other.
const FILES_MAX: usize = 1000;
/// So many sets may name each other in a row: each is read while those before it wait.
const SETS_DEEP_MAX: usize = 100;

/// Reads a file and everything that it names, by way of `files`, which knows all of them afterwards, also if this fails.
///
/// # Errors
/// It cannot be used; the report says everything that is wrong.
pub fn read_file(path: &Path, files: &Files, options: &Options<'_>) -> Result<Checked, Box<Report>> {
    let reader = Reader::new(options, files, Names::default());
    let text = match files.read(path) {
        Ok(text) => text,
        Err(error) => {
            let mut report = Report::default();
            let file = report.sources.add(path.display().to_string(), "".into());
            let what = format!("reading the policy {}: {error}", path.display());
            report.push(Problem { place: None, ..Problem::error(Place { file, start: 0, end: 0 }, what) });
            return Err(Box::new(report));
        }
    };
    let mut checked = reader.run(path, text.into())?;
    // What is left of a file that was cut off, or is still being written.
    if checked.policy.rules.is_empty() && checked.policy.default.is_none() {
        let what = format!(
            "the policy {} has neither a rule nor a default, and nothing would be stamped; if that is meant, write: default = \
             {{ action = \"skip\" }}",
            path.display()
        );
        let nowhere = Place { file: 0, start: 0, end: 0 };
        checked.report.push(Problem { place: None, ..Problem::error(nowhere, what) });
        return Err(Box::new(checked.report));
    }
    Ok(checked)
}

/// Reads a text as if it were a file of that name.
///
/// # Errors
/// It cannot be used; the report says everything that is wrong.
pub fn read_text(name: &str, text: &str, options: &Options<'_>) -> Result<Checked, Box<Report>> {
    read_with(Path::new(name), text, options, Names::default())
}

/// The same, where it is known what some names mean.
///
/// # Errors
/// It cannot be used; the report says everything that is wrong.
pub fn read_with(
    path: &Path,
    text: &str,
    options: &Options<'_>,
    names: Names,
) -> Result<Checked, Box<Report>> {
    Reader::new(options, &Files::default(), names).run(path, text.into())
}

/// Sets by name, as they are used.
type Sets<T> = HashMap<String, Arc<[T]>>;

struct Reader<'a> {
    options: &'a Options<'a>,
    files: &'a Files,
    names: Names,
    /// What every thread adds to.
    report: Mutex<Report>,
    /// By canonical path; nothing if it could not be read.
    lists: Mutex<HashMap<PathBuf, Option<Arc<[Prefix]>>>>,
}

/// What is known of all files so far.
#[derive(Default)]
struct Known {
    prefixes: Sets<Prefix>,
    ports: Sets<Range>,
    /// Files that are being read, to notice a circle, and those that were.
    open: Vec<PathBuf>,
    rules: Vec<Rule>,
    default: Option<Decision>,
    warn_missing: bool,
}

impl<'a> Reader<'a> {
    fn new(options: &'a Options<'a>, files: &'a Files, names: Names) -> Self {
        Reader { options, files, names, report: Mutex::default(), lists: Mutex::default() }
    }

    fn run(self, path: &Path, text: Arc<str>) -> Result<Checked, Box<Report>> {
        let mut known = Known { warn_missing: self.options.allow_missing, ..Known::default() };
        self.file(path, text, &mut known, true);
        let Known { rules, default, .. } = known;
        let mut report = self.report.into_inner().unwrap_or_else(|e| e.into_inner());
        let policy = Policy { default, rules };
        check_names(&policy, &mut report);
        if !report.has_errors() && !self.options.is_checked {
            cover::warn(&policy, &mut report);
        }
        report.problems.sort_by_key(|problem| problem.place.map(|place| (place.file, place.start)));
        match report.has_errors() {
            true => Err(Box::new(report)),
            false => Ok(Checked { policy, report }),
        }
    }

    fn push(&self, problem: Problem) {
        self.report.lock().unwrap_or_else(|e| e.into_inner()).push(problem);
    }

    fn add_source(&self, path: &Path, text: Arc<str>) -> u32 {
        let mut report = self.report.lock().unwrap_or_else(|e| e.into_inner());
        report.sources.add(path.display().to_string(), text)
    }

    /// One file: first what it includes, then its sets, then its rules.
    fn file(&self, path: &Path, text: Arc<str>, known: &mut Known, is_main: bool) {
        let number = self.add_source(path, Arc::clone(&text));
        known.open.push(fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf()));
        let pieces = Pieces::find(&text);
        let rest = if pieces.rules.is_empty() { None } else { Some(pieces.rest(&text)) };
        let rest = rest.as_deref().unwrap_or(&text);
        let (table, errors) = DeTable::parse_recoverable(rest);
        let file =
            FileReader { reader: self, number, offset: 0, dir: path.parent().unwrap_or(Path::new("")) };
        errors.iter().for_each(|error| file.syntax(error));

        let table = table.get_ref();
        // In front of all that is read by it, which is what the file includes as well.
        let missing = table.get("missing").and_then(|missing| missing.get_ref().as_str());
        known.warn_missing |= is_main && missing == Some("warn");
        for (key, value) in table {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("include", _) => {
                    for (span, included) in file.texts(value, "paths of files") {
                        self.include(&file, span, &included, known);
                    }
                }
                ("default" | "missing", _) if !is_main => {
                    file.error(key.span(), format!("'{}' belongs into the main file only", key.get_ref()));
                }
                ("default", DeValue::Table(decision)) => {
                    for key in decision.keys() {
                        file.expect_key(key, &[], &DECISION_KEYS);
                    }
                    known.default = file.decision(value.span(), decision);
                }
                ("default", _) => file.error(value.span(), "a default is a table: { action = \"skip\" }"),
                ("missing", DeValue::String(text)) if text == "warn" || text == "error" => {}
                ("missing", _) => file.error(value.span(), "it is \"error\" or \"warn\""),
                ("rule", _) => {
                    file.error(key.span(), "rules are written as [[rule]], each on a line of its own");
                }
                ("prefixes" | "ports", DeValue::Table(_)) => {}
                ("prefixes" | "ports", _) => file.error(value.span(), "it is a table of named sets"),
                _ => file.unknown_key(key, &FILE_KEYS),
            }
        }
        SetReader { file: &file, raw: table, key: "prefixes", read: FileReader::prefixes, busy: vec![] }
            .all(&mut known.prefixes);
        SetReader { file: &file, raw: table, key: "ports", read: FileReader::ports, busy: vec![] }
            .all(&mut known.ports);
        self.rules(&file, &text, &pieces, known);
        known.open.pop();
    }

    fn include(&self, from: &FileReader<'_>, span: Span, path: &str, known: &mut Known) {
        let path = from.dir.join(path);
        let canonical = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        if known.open.contains(&canonical) {
            return from.error(span, format!("{} includes itself", path.display()));
        }
        if self.files.len() >= FILES_MAX {
            return from.error(span, format!("there are more than {FILES_MAX} files"));
        }
        match self.files.read(&path) {
            Ok(text) => self.file(&path, text.into(), known, false),
            Err(error) => from.error(span, format!("reading {}: {error}", path.display())),
        }
    }

    /// All rules of a file, in parallel.
    fn rules(&self, file: &FileReader<'_>, text: &str, pieces: &Pieces, known: &mut Known) {
        let total = pieces.rules.len();
        let threads = thread::available_parallelism().map_or(1, usize::from).min(total / 1000 + 1);
        let share = total.div_ceil(threads.max(1)).max(1);
        let done = std::sync::atomic::AtomicUsize::new(0);
        let read = |pieces: &[std::ops::Range<usize>]| {
            let mut rules = Vec::with_capacity(pieces.len());
            for (at, piece) in pieces.iter().enumerate() {
                let file = FileReader { offset: piece.start, ..*file };
                rules.extend(file.rule(&text[piece.clone()], known));
                if at % 10_000 == 9_999
                    && let Some(progress) = self.options.progress
                {
                    let before = done.fetch_add(10_000, std::sync::atomic::Ordering::Relaxed);
                    progress("reading rules", before + 10_000, total);
                }
            }
            rules
        };
        let read = &read;
        let parts: Vec<Vec<Rule>> = thread::scope(|scope| {
            let work: Vec<_> =
                pieces.rules.chunks(share).map(|share| scope.spawn(move || read(share))).collect();
            let join = |work: thread::ScopedJoinHandle<'_, _>| {
                work.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            };
            work.into_iter().map(join).collect()
        });
        parts.into_iter().for_each(|part| known.rules.extend(part));
    }

    /// A list of prefixes, one a line.
    fn list(&self, file: &FileReader<'_>, span: &Span, path: &str) -> Option<Arc<[Prefix]>> {
        let path = file.dir.join(path);
        let key = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
        // Held while it is read: the other threads want the same list.
        let mut lists = self.lists.lock().unwrap_or_else(|e| e.into_inner());
        if let Some(known) = lists.get(&key) {
            return known.clone();
        }
        let list = match self.files.read(&path) {
            Ok(text) => self.read_list(&path, text.into()),
            Err(error) => {
                file.error(span.clone(), format!("reading the list {}: {error}", path.display()));
                None
            }
        };
        lists.insert(key, list.clone());
        list
    }

    fn read_list(&self, path: &Path, text: Arc<str>) -> Option<Arc<[Prefix]>> {
        let number = self.add_source(path, Arc::clone(&text));
        let file = FileReader { reader: self, number, offset: 0, dir: Path::new("") };
        let mut list = Vec::new();
        let mut good = true;
        let mut at = 0;
        for line in text.split('\n') {
            let item = line.split(['#', ';']).next().unwrap_or_default();
            let start = at + item.len() - item.trim_start().len();
            let item = item.trim();
            if !item.is_empty() {
                match item.parse() {
                    Ok(prefix) => list.push(prefix),
                    Err(error) => {
                        good = false;
                        file.error(start..start + item.len(), format!("{error:#}"));
                    }
                }
            }
            at += line.len() + 1;
        }
        if list.is_empty() && good {
            self.push(Problem::warning(file.place(0..0), "this list is empty"));
        }
        merge_prefixes(&mut list);
        good.then(|| list.into())
    }
}

type Span = std::ops::Range<usize>;

/// Finds a set that an item names.
type SetOf<'a, T> = &'a mut dyn FnMut(Span, &str) -> Option<Arc<[T]>>;

/// Reads the values of a set, which may name others.
type ReadSet<'a, T> = fn(&FileReader<'a>, &Spanned<DeValue<'_>>, SetOf<'_, T>) -> Option<Vec<T>>;

/// The named sets of one file, each read when it is first asked for, because they may name each other in any order.
struct SetReader<'a, T> {
    file: &'a FileReader<'a>,
    raw: &'a DeTable<'a>,
    key: &'static str,
    read: ReadSet<'a, T>,
    /// Those that are being read, to notice a circle.
    busy: Vec<String>,
}

impl<T> SetReader<'_, T> {
    fn all(mut self, known: &mut Sets<T>) {
        let Some(sets) = self.raw.get(self.key).and_then(|value| value.get_ref().as_table()) else { return };
        let from_others: HashSet<String> = known.keys().cloned().collect();
        for (name, _) in sets {
            if from_others.contains(name.get_ref().as_ref()) {
                let what = format!("another file has a set '{}' already", name.get_ref());
                self.file.error(name.span(), what);
            } else {
                self.one(name.get_ref(), known);
            }
        }
    }

    fn one(&mut self, name: &str, known: &mut Sets<T>) -> Option<Arc<[T]>> {
        if let Some(set) = known.get(name) {
            return Some(Arc::clone(set));
        }
        let sets = self.raw.get(self.key)?.get_ref().as_table()?;
        let (key, value) = sets.get_key_value(name)?;
        if self.busy.iter().any(|busy| busy == name) {
            self.file.error(key.span(), format!("the set '{name}' contains itself"));
            return Some(Arc::from([]));
        }
        let list = if self.busy.len() == SETS_DEEP_MAX {
            let what =
                format!("the set '{name}' is the last of more than {SETS_DEEP_MAX} that name each other");
            self.file.error(key.span(), what);
            None
        } else if value.get_ref().as_array().is_some_and(|items| items.is_empty()) {
            let what = format!("the set '{name}' is empty");
            self.file.reader.push(Problem::warning(self.file.place(value.span()), what));
            None
        } else {
            self.busy.push(name.to_string());
            let (file, read) = (self.file, self.read);
            let list = read(file, value, &mut |_, other| self.one(other, known));
            self.busy.pop();
            list
        };
        // One that is wrong is there all the same, so that nobody hears that it is not.
        let set: Arc<[T]> = list.unwrap_or_default().into();
        known.insert(name.to_string(), Arc::clone(&set));
        Some(set)
    }
}

fn check_names(policy: &Policy, report: &mut Report) {
    let mut names: rustc_hash::FxHashMap<&str, Place> = Default::default();
    names.reserve(policy.rules.len());
    for rule in &policy.rules {
        let first = *names.entry(&rule.name).or_insert(rule.place);
        if first != rule.place {
            let what = format!("two rules are called '{}'", rule.name);
            report.push(Problem::error(rule.place, what).see(first, "the first"));
        }
    }
}

impl Checked {
    /// What the kernel side refuses, as an error of the file.
    pub fn refuse(&self, refused: &Refused) -> Report {
        let place = refused.rule.and_then(|rule| self.policy.rules.get(rule)).map(|rule| rule.place);
        let problem =
            Problem { place, ..Problem::error(Place::default(), &refused.what).help(&refused.help) };
        Report { sources: self.report.sources.clone(), problems: vec![problem], more: 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> Report {
        *read_text("p.toml", text, &Options::default()).expect_err(text)
    }

    fn whats(report: &Report) -> Vec<&str> {
        report.problems.iter().map(|problem| &*problem.what).collect()
    }

    #[test]
    fn what_may_be_missing_may_be_in_included_files_too() {
        let dir = tempfile::tempdir().unwrap();
        let rule = "[[rule]]\nname = 'a'\ninterface = 'none0'\naction = 'skip'\n";
        fs::write(dir.path().join("more.toml"), rule).unwrap();
        let path = dir.path().join("p.toml");
        for (missing, is_good) in [("missing = 'warn'", true), ("missing = 'error'", false), ("", false)] {
            fs::write(&path, format!("include = 'more.toml'\n{missing}\n")).unwrap();
            let read = read_file(&path, &Files::default(), &Options::default());
            assert_eq!(read.is_ok(), is_good, "{missing}");
        }
    }

    #[test]
    fn the_first_of_many_rules_of_one_name_is_shown_to_all_others() {
        let rule = |mark: usize| format!("[[rule]]\nname = 'x'\nmark = {mark}\naction = 'skip'\n");
        let report = refused(&(0..3).map(rule).collect::<String>());
        assert_eq!(whats(&report), ["two rules are called 'x'"; 2]);
        let firsts = report.problems.iter().map(|problem| problem.other.as_ref().unwrap().0);
        assert!(firsts.map(|first| first.start).all(|start| start == 16), "{report}");
    }

    #[test]
    fn what_is_said_of_a_value_is_true_wherever_it_stands() {
        let rule = |line: &str| format!("[[rule]]\nname = 'a'\n{line}\naction = 'skip'\n");
        let empty = "this list is empty; it needs at least one value";
        for (text, expected) in [
            ("include = []\n".to_string(), empty),
            (rule("not_dst = []"), empty),
            (rule("port = 0xFFFFFFFFFFFFFFFFFF"), "'0xFFFFFFFFFFFFFFFFFF' is not a number from 0 to 65535"),
            (rule("port = 0x1_0000"), "'65536' is not a number from 0 to 65535"),
        ] {
            assert_eq!(whats(&refused(&text)), [expected], "{text}");
        }
    }

    #[test]
    fn sets_that_name_each_other_have_an_end() {
        let chain = |len: usize| {
            let sets = (1..len).map(|n| format!("s{n:05} = ['@s{:05}']\n", n + 1)).collect::<String>();
            format!("[prefixes]\n{sets}s{len:05} = ['10.0.0.0/8']\n")
        };
        assert!(read_text("p.toml", &chain(SETS_DEEP_MAX), &Options::default()).is_ok());
        assert_eq!(whats(&refused(&chain(SETS_DEEP_MAX + 1))).len(), 1);
        assert!(refused(&chain(20_000)).to_string().contains("more than 100 that name each other"));
        assert_eq!(whats(&refused("[ports]\na = ['@b']\nb = ['@a']\n")), ["the set 'a' contains itself"]);
    }
}
