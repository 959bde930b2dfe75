//! Reads a policy from its file, the files that it includes and the lists that it names, and checks all of it: what is
//! wrong is collected in a [`Report`], and only a policy without errors leaves here.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::compile::Refused;
use super::cover;
use super::names::Names;
use super::report::{Problem, Report};
use super::split::Pieces;
use super::values::{Cgroup, Interface, List, Mark, Prefix, Range, merge_prefixes, merge_ranges};
use super::{Condition, Decision, Place, Policy, Rule, TokenSpec, Values, WhenFull};

/// Told how far something is: what is done, how much of how much.
pub type Progress<'a> = &'a (dyn Fn(&str, usize, usize) + Sync);

/// How to read.
#[derive(Clone, Copy, Default)]
pub struct Options<'a> {
    /// A cgroup or interface that does not exist is a warning, as with `missing = "warn"` in the file.
    pub allow_missing: bool,
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
    /// Every file that was read.
    pub files: Vec<PathBuf>,
}

/// Every key of a rule but those that begin with `not_`.
const CONDITIONS: [&str; 8] = ["interface", "src", "dst", "src_port", "port", "mark", "cgroup", "uid"];
const RULE_KEYS: [&str; 4] = ["name", "action", "token", "when_full"];
const FILE_KEYS: [&str; 6] = ["default", "missing", "include", "prefixes", "ports", "rule"];
const DECISION_KEYS: [&str; 3] = ["action", "token", "when_full"];
/// So many files may include each other.
const FILES_MAX: usize = 1000;
/// Offsets in a file are kept in 32 bits.
const FILE_MAX_BYTES: u64 = 1 << 32;

/// Reads a file and everything that it names.
///
/// # Errors
/// It cannot be used; the report says everything that is wrong.
pub fn read_file(path: &Path, options: &Options<'_>) -> Result<Checked, Box<Report>> {
    let reader = Reader::new(options, Names::default());
    let text = match read_text_file(path) {
        Ok(text) => text,
        Err(error) => {
            let mut report = Report::default();
            let file = report.sources.add(path.display().to_string(), "".into());
            let what = format!("reading the policy {}: {error}", path.display());
            report.push(Problem { place: None, ..Problem::error(Place { file, start: 0, end: 0 }, what) });
            return Err(Box::new(report));
        }
    };
    reader.run(path, text.into())
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
    Reader::new(options, names).run(path, text.into())
}

fn read_text_file(path: &Path) -> Result<String, String> {
    let metadata = fs::metadata(path).map_err(|error| error.to_string())?;
    let kind = metadata.file_type();
    if kind.is_char_device() || kind.is_block_device() {
        return Err("it is a device".to_string());
    }
    if metadata.len() >= FILE_MAX_BYTES {
        return Err("it is larger than 4 GiB".to_string());
    }
    fs::read_to_string(path).map_err(|error| error.to_string())
}

/// Sets by name, as they are used.
type Sets<T> = HashMap<String, Arc<[T]>>;

struct Reader<'a> {
    options: &'a Options<'a>,
    names: Names,
    shared: Mutex<Shared>,
    /// By canonical path; nothing if it could not be read.
    lists: Mutex<HashMap<PathBuf, Option<Arc<[Prefix]>>>>,
}

/// What every thread adds to.
#[derive(Default)]
struct Shared {
    report: Report,
    files: Vec<PathBuf>,
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
    fn new(options: &'a Options<'a>, names: Names) -> Self {
        Reader { options, names, shared: Mutex::default(), lists: Mutex::default() }
    }

    fn run(self, path: &Path, text: Arc<str>) -> Result<Checked, Box<Report>> {
        let mut known = Known { warn_missing: self.options.allow_missing, ..Known::default() };
        self.file(path, text, &mut known, true);
        let Known { rules, default, .. } = known;
        let Shared { mut report, files } = self.shared.into_inner().unwrap_or_else(|e| e.into_inner());
        let policy = Policy { default, rules };
        check_names(&policy, &mut report);
        if !report.has_errors() && !self.options.is_checked {
            cover::warn(&policy, &mut report);
        }
        report.problems.sort_by_key(|problem| problem.place.map(|place| (place.file, place.start)));
        match report.has_errors() {
            true => Err(Box::new(report)),
            false => Ok(Checked { policy, report, files }),
        }
    }

    fn push(&self, problem: Problem) {
        self.shared.lock().unwrap_or_else(|e| e.into_inner()).report.push(problem);
    }

    fn add_source(&self, path: &Path, text: Arc<str>) -> u32 {
        let mut shared = self.shared.lock().unwrap_or_else(|e| e.into_inner());
        shared.files.push(path.to_path_buf());
        shared.report.sources.add(path.display().to_string(), text)
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
                ("missing", DeValue::String(text)) if text == "warn" => known.warn_missing = true,
                ("missing", DeValue::String(text)) if text == "error" => {}
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
        let count = self.shared.lock().unwrap_or_else(|e| e.into_inner()).files.len();
        if count >= FILES_MAX {
            return from.error(span, format!("there are more than {FILES_MAX} files"));
        }
        match read_text_file(&path) {
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
        let list = match read_text_file(&path) {
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

/// Reads values of one file.
#[derive(Clone, Copy)]
struct FileReader<'a> {
    reader: &'a Reader<'a>,
    number: u32,
    /// Where the text that is parsed begins in the file.
    offset: usize,
    dir: &'a Path,
}

impl FileReader<'_> {
    fn place(&self, span: Span) -> Place {
        let at = |offset: usize| (self.offset + offset) as u32;
        Place { file: self.number, start: at(span.start), end: at(span.end) }
    }

    fn error(&self, span: Span, what: impl Into<String>) {
        self.reader.push(Problem::error(self.place(span), what));
    }

    fn syntax(&self, error: &toml::de::Error) {
        self.error(error.span().unwrap_or(0..0), error.message());
    }

    fn unknown_key(&self, key: &Spanned<impl AsRef<str>>, known: &[&str]) {
        let name = key.get_ref().as_ref();
        let likeness = |known: &&str| strsim::jaro_winkler(name, known);
        let nearest = known.iter().copied().max_by(|a, b| likeness(a).total_cmp(&likeness(b)));
        let nearest = nearest.filter(|near| likeness(near) > 0.7);
        let help = match nearest {
            Some(near) => format!("did you mean '{near}'?"),
            None => format!("there are: {}", known.join(", ")),
        };
        let what = format!("unknown key '{name}'");
        self.reader.push(Problem::error(self.place(key.span()), what).help(help));
    }

    fn expect_key(&self, key: &Spanned<impl AsRef<str>>, conditions: &[&str], others: &[&str]) {
        let name = key.get_ref().as_ref();
        let is_condition = conditions.contains(&name.strip_prefix("not_").unwrap_or(name));
        if !is_condition && !others.contains(&name) {
            let negated: Vec<String> = conditions.iter().map(|key| format!("not_{key}")).collect();
            let known: Vec<&str> =
                others.iter().chain(conditions).copied().chain(negated.iter().map(String::as_str)).collect();
            self.unknown_key(key, &known);
        }
    }

    /// The strings of a value that is one or a list of them.
    fn texts(&self, value: &Spanned<DeValue<'_>>, what: &str) -> Vec<(Span, String)> {
        let mut texts = Vec::new();
        self.items(value, &mut |span, item| match item {
            DeValue::String(text) => texts.push((span, text.to_string())),
            other => self.wrong_type(span, other, what),
        });
        texts
    }

    /// Every item of a list, or the one that is no list.
    fn items(&self, value: &Spanned<DeValue<'_>>, each: &mut dyn FnMut(Span, &DeValue<'_>)) {
        match value.get_ref() {
            DeValue::Array(items) if items.is_empty() => {
                self.error(value.span(), "this list is empty: nothing could ever match");
            }
            DeValue::Array(items) => items.iter().for_each(|item| each(item.span(), item.get_ref())),
            one => each(value.span(), one),
        }
    }

    fn wrong_type(&self, span: Span, value: &DeValue<'_>, wanted: &str) {
        self.error(
            span,
            format!("expected {wanted}, not {} {}", article(value.type_str()), value.type_str()),
        );
    }

    /// A rule; nothing if it has an error, which was reported.
    fn rule(&self, text: &str, known: &Known) -> Option<Rule> {
        let (table, errors) = DeTable::parse_recoverable(text);
        errors.iter().for_each(|error| self.syntax(error));
        let (_, rules) = table.get_ref().get_key_value("rule")?;
        let rule = rules.get_ref().as_array()?.iter().next()?;
        let table = rule.get_ref().as_table()?;
        let header = 0..text.find(['\n', '\r']).unwrap_or(text.len());

        let mut good = errors.is_empty();
        for key in table.keys() {
            self.expect_key(key, &CONDITIONS, &RULE_KEYS);
        }
        let name = match table.get("name").map(|name| (name.span(), name.get_ref())) {
            Some((span, DeValue::String(name))) => {
                let fits = !name.is_empty() && name.len() <= 255 && !name.contains(char::is_control);
                if !fits {
                    self.error(span.clone(), "a name has 1 to 255 bytes and no control characters");
                }
                fits.then(|| (span, Box::from(&**name)))
            }
            Some((span, other)) => {
                self.wrong_type(span, other, "a name");
                None
            }
            None => {
                self.error(header.clone(), "this rule has no name");
                None
            }
        };
        let mut conditions = Vec::new();
        for (key, value) in table {
            let (negated, key) = match key.get_ref().strip_prefix("not_") {
                Some(key) => (true, key),
                None => (false, &**key.get_ref()),
            };
            let Some(rank) = CONDITIONS.iter().position(|known| *known == key) else { continue };
            match self.condition(key, value, known) {
                Some(values) => conditions.push((rank, Condition { negated, values })),
                None => good = false,
            }
        }
        conditions.sort_unstable_by_key(|(rank, condition)| (*rank, condition.negated));
        let conditions = conditions.into_iter().map(|(_, condition)| condition).collect();
        let decision = self.decision(header, table);
        let (span, name) = name?;
        let place = self.place(span);
        good.then_some(())?;
        Some(Rule { name, conditions, decision: decision?, place })
    }

    fn condition(&self, key: &str, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<Values> {
        match key {
            "interface" => self.interfaces(value, known).map(Values::Interface),
            "src" => self.prefix_list(value, known).map(Values::Src),
            "dst" => self.prefix_list(value, known).map(Values::Dst),
            "src_port" => self.port_list(value, known).map(Values::SrcPort),
            "port" => self.port_list(value, known).map(Values::Port),
            "mark" => self.marks(value).map(Values::Mark),
            "cgroup" => self.cgroups(value, known).map(Values::Cgroup),
            _ => self.users(value).map(Values::Uid),
        }
    }

    /// A list that is nothing but one set is shared with all other rules that name it.
    fn prefix_list(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Prefix>> {
        if let Some(shared) = shared(value, &known.prefixes) {
            return Some(List::Many(shared));
        }
        if let DeValue::String(text) = value.get_ref()
            && let Some(path) = text.strip_prefix("file:")
        {
            return self.reader.list(self, &value.span(), path).map(List::Many);
        }
        let mut set = |_: Span, name: &str| known.prefixes.get(name).cloned();
        self.prefixes(value, &mut set).map(List::from)
    }

    fn prefixes(&self, value: &Spanned<DeValue<'_>>, set: SetOf<'_, Prefix>) -> Option<Vec<Prefix>> {
        let mut list = Vec::new();
        let mut good = true;
        self.items(value, &mut |span, item| {
            let added = match item {
                DeValue::String(text) => self.prefix(&span, text, set, &mut list),
                other => {
                    self.wrong_type(span, other, "a prefix like \"10.0.0.0/8\", \"@SET\" or \"file:PATH\"");
                    None
                }
            };
            good &= added.is_some();
        });
        if !is_list_with_items(value) || !good {
            return None;
        }
        if list.len() > 1 {
            merge_prefixes(&mut list);
        }
        Some(list)
    }

    fn prefix(&self, span: &Span, text: &str, set: SetOf<'_, Prefix>, list: &mut Vec<Prefix>) -> Option<()> {
        if let Some(name) = text.strip_prefix('@') {
            list.extend(self.set(span, "prefixes", name, set)?.iter());
        } else if let Some(path) = text.strip_prefix("file:") {
            list.extend(self.reader.list(self, span, path)?.iter());
        } else {
            match text.parse() {
                Ok(prefix) => list.push(prefix),
                Err(error) => {
                    self.error(span.clone(), format!("{error:#}"));
                    return None;
                }
            }
        }
        Some(())
    }

    fn port_list(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Range>> {
        if let Some(shared) = shared(value, &known.ports) {
            return Some(List::Many(shared));
        }
        self.ports(value, &mut |_, name| known.ports.get(name).cloned()).map(List::from)
    }

    fn ports(&self, value: &Spanned<DeValue<'_>>, set: SetOf<'_, Range>) -> Option<Vec<Range>> {
        let mut list = Vec::new();
        let mut good = true;
        self.items(value, &mut |span, item| {
            let text = match item {
                DeValue::Integer(number) => Some(integer(number)),
                DeValue::String(text) => Some(text.to_string()),
                _ => None,
            };
            let Some(text) = text else {
                good = false;
                return self.wrong_type(span, item, "a port, a range like \"8000-8999\" or \"@SET\"");
            };
            if let Some(name) = text.strip_prefix('@') {
                match self.set(&span, "ports", name, set) {
                    Some(set) => list.extend(set.iter()),
                    None => good = false,
                }
                return;
            }
            match Range::parse(&text, u16::MAX.into()) {
                Ok(range) => list.push(range),
                Err(error) => {
                    good = false;
                    self.error(span, format!("{error:#}"));
                }
            }
        });
        merge_ranges(&mut list);
        (good && is_list_with_items(value)).then_some(list)
    }

    fn set<T>(&self, span: &Span, kind: &str, name: &str, set: SetOf<'_, T>) -> Option<Arc<[T]>> {
        let found = set(span.clone(), name);
        if found.is_none() {
            self.error(span.clone(), format!("there is no set '{name}' under [{kind}]"));
        }
        found
    }

    fn marks(&self, value: &Spanned<DeValue<'_>>) -> Option<List<Mark>> {
        let mut list = Vec::new();
        let mut good = true;
        self.items(value, &mut |span, item| {
            let text = match item {
                DeValue::Integer(number) => integer(number),
                DeValue::String(text) => text.to_string(),
                other => {
                    good = false;
                    return self.wrong_type(span, other, "a mark like 16 or \"0x10/0xff\"");
                }
            };
            match text.parse() {
                Ok(mark) => list.push(mark),
                Err(error) => {
                    good = false;
                    self.error(span, format!("{error:#}"));
                }
            }
        });
        list.sort_unstable();
        list.dedup();
        (good && !list.is_empty()).then(|| list.into())
    }

    fn users(&self, value: &Spanned<DeValue<'_>>) -> Option<List<Range>> {
        let mut list = Vec::new();
        let mut good = true;
        self.items(value, &mut |span, item| {
            let text = match item {
                DeValue::Integer(number) => integer(number),
                DeValue::String(text) => text.to_string(),
                other => {
                    good = false;
                    return self.wrong_type(span, other, "a user id, a range of them or the name of a user");
                }
            };
            let range = match text.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
                true => Range::parse(&text, u32::MAX),
                false => self.reader.names.user(&text).and_then(|uid| match uid {
                    Some(uid) => Ok(Range::one(uid)),
                    None => Err(anyhow::anyhow!("there is no user '{text}' on this host")),
                }),
            };
            match range {
                Ok(range) => list.push(range),
                Err(error) => {
                    good = false;
                    self.error(span, format!("{error:#}"));
                }
            }
        });
        merge_ranges(&mut list);
        (good && !list.is_empty()).then(|| list.into())
    }

    fn interfaces(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Interface>> {
        let mut list: Vec<Interface> = Vec::new();
        let texts = self.texts(value, "the name of an interface");
        let mut good = !texts.is_empty();
        for (span, name) in texts {
            match self.reader.names.interface(&name) {
                Ok((netns, index)) => {
                    if index == 0 {
                        good &= self.missing(span, format!("there is no interface '{name}'"), known);
                    }
                    list.push(Interface { name: name.into(), netns, index });
                }
                Err(error) => good &= self.missing(span, format!("{error:#}"), known),
            }
        }
        list.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        list.dedup();
        (good && !list.is_empty()).then(|| list.into())
    }

    fn cgroups(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Cgroup>> {
        let mut list: Vec<Cgroup> = Vec::new();
        let texts = self.texts(value, "the path of a cgroup");
        let mut good = !texts.is_empty();
        for (span, path) in texts {
            let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
            if !path.starts_with('/') || parts.iter().any(|part| [".", ".."].contains(part)) {
                good = false;
                self.error(
                    span,
                    "the path of a cgroup begins with '/', the root of the hierarchy, and has no '..'",
                );
                continue;
            }
            let path = format!("/{}", parts.join("/"));
            match self.reader.names.cgroup(&path) {
                Ok((level, id)) => {
                    if id == 0 {
                        good &= self.missing(span, format!("there is no cgroup '{path}'"), known);
                    }
                    list.push(Cgroup { path: path.into(), level, id });
                }
                Err(error) => {
                    good = false;
                    self.error(span, format!("looking for cgroup '{path}': {error:#}"));
                }
            }
        }
        list.sort_unstable_by(|a, b| a.path.cmp(&b.path));
        list.dedup();
        (good && !list.is_empty()).then(|| list.into())
    }

    /// True if the policy can be used in spite of it.
    fn missing(&self, span: Span, what: String, known: &Known) -> bool {
        let place = self.place(span);
        match known.warn_missing {
            true => self.reader.push(
                Problem::warning(place, what).help("it matches nothing until the policy is loaded again"),
            ),
            false => self.reader.push(
                Problem::error(place, what)
                    .help("if it may come later, write missing = \"warn\", or use --allow-missing"),
            ),
        }
        known.warn_missing
    }

    fn decision(&self, owner: Span, table: &DeTable<'_>) -> Option<Decision> {
        let action = match table.get("action").map(|action| (action.span(), action.get_ref())) {
            Some((_, DeValue::String(text))) if ["stamp", "skip", "drop"].contains(&&**text) => &**text,
            Some((span, _)) => {
                self.error(span, "an action is \"stamp\", \"skip\" or \"drop\"");
                return None;
            }
            None => {
                self.error(owner, "it has no action: \"stamp\", \"skip\" or \"drop\"");
                return None;
            }
        };
        let mut good = true;
        let when_full = match table.get("when_full").map(|value| (value.span(), value.get_ref())) {
            None => None,
            Some((_, DeValue::String(text))) if text == "pass" => Some(WhenFull::Pass),
            Some((_, DeValue::String(text))) if text == "drop" => Some(WhenFull::Drop),
            Some((span, _)) => {
                self.error(span, "it is \"pass\" or \"drop\"");
                good = false;
                None
            }
        };
        if action != "stamp" {
            for key in ["token", "when_full"] {
                if let Some((key, _)) = table.get_key_value(key) {
                    self.error(key.span(), format!("'{}' belongs to action \"stamp\" only", key.get_ref()));
                    good = false;
                }
            }
            good.then_some(())?;
            return Some(if action == "drop" { Decision::Drop } else { Decision::Skip });
        }
        let Some(token) = table.get("token") else {
            self.error(owner, "action \"stamp\" needs a token");
            return None;
        };
        let token = self.token(token)?;
        good.then(|| Decision::Stamp { token, when_full: when_full.unwrap_or_default() })
    }

    fn token(&self, value: &Spanned<DeValue<'_>>) -> Option<TokenSpec> {
        let DeValue::String(text) = value.get_ref() else {
            self.wrong_type(
                value.span(),
                value.get_ref(),
                "a token of 16 hexadecimal digits or 1 to 8 bytes of text",
            );
            return None;
        };
        match TokenSpec::parse(text) {
            Ok(token) => {
                if text.len() <= 8 && text.len() > 3 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                    let what = format!("this token is the text '{text}', not a number");
                    let help = "a token in hexadecimal has all 16 digits";
                    self.reader.push(Problem::warning(self.place(value.span()), what).help(help));
                }
                Some(token)
            }
            Err(error) => {
                self.error(value.span(), format!("{error:#}"));
                None
            }
        }
    }
}

/// Finds a set that an item names.
type SetOf<'a, T> = &'a mut dyn FnMut(Span, &str) -> Option<Arc<[T]>>;

/// The set that a value consists of, if it is one and known.
fn shared<T>(value: &Spanned<DeValue<'_>>, sets: &Sets<T>) -> Option<Arc<[T]>> {
    let DeValue::String(text) = value.get_ref() else { return None };
    sets.get(text.strip_prefix('@')?).cloned()
}

/// An empty list has been reported.
fn is_list_with_items(value: &Spanned<DeValue<'_>>) -> bool {
    value.get_ref().as_array().is_none_or(|items| !items.is_empty())
}

fn integer(number: &DeInteger<'_>) -> String {
    match (number.radix(), number.as_str()) {
        (10, digits) => digits.trim_start_matches('+').to_string(),
        (radix, digits) => i64::from_str_radix(digits, radix).map_or("?".to_string(), |n| n.to_string()),
    }
}

fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}

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
            return None;
        }
        self.busy.push(name.to_string());
        let (file, read) = (self.file, self.read);
        let list = read(file, value, &mut |_, other| self.one(other, known));
        self.busy.pop();
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
        if let Some(first) = names.insert(&rule.name, rule.place) {
            let line = report.sources.line(first).map_or(0, |(_, line)| line);
            let what = format!("two rules are called '{}'; the first is in line {line}", rule.name);
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
