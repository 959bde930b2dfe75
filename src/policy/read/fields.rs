//! Reads the rules of one file. What is wrong with a value is reported where it stands, and reading goes on.

use std::path::Path;

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::super::report::Problem;
use super::super::{Condition, Place, Rule, Values, check_rule_name};
use super::{CONDITIONS, Known, RULE_KEYS, Reader, Span};

/// Reads values of one file.
#[derive(Clone, Copy)]
pub(super) struct FileReader<'a> {
    pub reader: &'a Reader<'a>,
    pub number: u32,
    /// Where the text that is parsed begins in the file.
    pub offset: usize,
    pub dir: &'a Path,
}

impl FileReader<'_> {
    pub fn place(&self, span: Span) -> Place {
        let at = |offset: usize| (self.offset + offset) as u32;
        Place { file: self.number, start: at(span.start), end: at(span.end) }
    }

    pub fn error(&self, span: Span, what: impl Into<String>) {
        self.reader.push(Problem::error(self.place(span), what));
    }

    /// The value, unless it is an error, which is reported.
    pub fn reported<T>(&self, span: &Span, result: anyhow::Result<T>) -> Option<T> {
        result.map_err(|error| self.error(span.clone(), format!("{error:#}"))).ok()
    }

    pub fn syntax(&self, error: &toml::de::Error) {
        self.error(error.span().unwrap_or(0..0), error.message());
    }

    pub fn unknown_key(&self, key: &Spanned<impl AsRef<str>>, known: &[&str]) {
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

    pub fn expect_key(&self, key: &Spanned<impl AsRef<str>>, conditions: &[&str], others: &[&str]) {
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
    pub fn texts(&self, value: &Spanned<DeValue<'_>>, what: &str) -> Vec<(Span, String)> {
        let mut texts = Vec::new();
        self.items(value, &mut |span, item| match item {
            DeValue::String(text) => texts.push((span, text.to_string())),
            other => self.wrong_type(span, other, what),
        });
        texts
    }

    /// Every item of a list, or the one that is no list.
    pub fn items(&self, value: &Spanned<DeValue<'_>>, each: &mut dyn FnMut(Span, &DeValue<'_>)) {
        match value.get_ref() {
            DeValue::Array(items) if items.is_empty() => {
                self.error(value.span(), "this list is empty; it needs at least one value");
            }
            DeValue::Array(items) => items.iter().for_each(|item| each(item.span(), item.get_ref())),
            one => each(value.span(), one),
        }
    }

    pub fn wrong_type(&self, span: Span, value: &DeValue<'_>, wanted: &str) {
        self.error(
            span,
            format!("expected {wanted}, not {} {}", article(value.type_str()), value.type_str()),
        );
    }

    /// A rule; nothing if it has an error, which was reported.
    pub fn rule(&self, text: &str, known: &Known) -> Option<Rule> {
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
                let checked = check_rule_name(name);
                if let Err(error) = &checked {
                    self.error(span.clone(), error.to_string());
                }
                checked.is_ok().then(|| (span, Box::from(&**name)))
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
}

fn article(word: &str) -> &'static str {
    if word.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" }
}
