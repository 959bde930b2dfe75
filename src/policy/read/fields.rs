//! Reads the values of one file: rules, their conditions and decisions. What is wrong with a value is reported where it
//! stands, and reading goes on.

use std::path::Path;
use std::sync::Arc;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::super::report::Problem;
use super::super::values::{Cgroup, Interface, List, Mark, Prefix, Range, merge_prefixes, merge_ranges};
use super::super::{Condition, Decision, Place, Rule, Values, WhenFull};
use super::{CONDITIONS, Known, RULE_KEYS, Reader, SetOf, Sets, Span};
use crate::keys::RingName;
use crate::token::TokenSpec;
use crate::token::keyed::Bind;

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

    pub fn prefixes(&self, value: &Spanned<DeValue<'_>>, set: SetOf<'_, Prefix>) -> Option<Vec<Prefix>> {
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

    pub fn ports(&self, value: &Spanned<DeValue<'_>>, set: SetOf<'_, Range>) -> Option<Vec<Range>> {
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

    pub fn decision(&self, owner: Span, table: &DeTable<'_>) -> Option<Decision> {
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
        if let DeValue::Table(table) = value.get_ref() {
            return self.keyed_token(table, value.span());
        }
        let DeValue::String(text) = value.get_ref() else {
            let wanted =
                "16 hexadecimal digits, 1 to 8 bytes of text, or a table like { tag = 17, key = \"edge\" }";
            self.wrong_type(value.span(), value.get_ref(), wanted);
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

    /// A token that is made with a key for each SYN.
    fn keyed_token(&self, table: &DeTable<'_>, span: Span) -> Option<TokenSpec> {
        const KEYS: [&str; 3] = ["tag", "key", "bind"];
        let (mut tag, mut ring, mut bind, mut good) = (None, None, Some(Bind::default()), true);
        for (key, value) in table {
            let text = value.get_ref().as_str();
            let problem = match key.get_ref().as_ref() {
                "tag" => {
                    let number = value.get_ref().as_integer();
                    tag = number.and_then(|number| u16::from_str_radix(number.as_str(), number.radix()).ok());
                    tag.is_none().then(|| "a tag is a number from 0 to 65535".to_string())
                }
                "key" => match text.map(str::parse::<RingName>) {
                    Some(Ok(name)) => {
                        ring = Some(name);
                        None
                    }
                    Some(Err(error)) => Some(format!("{error:#}")),
                    None => Some("it is the name of a key ring".to_string()),
                },
                "bind" => {
                    bind = text.and_then(|text| text.parse().ok());
                    bind.is_none().then(|| "it is \"flow\", \"server\" or \"isn\"".to_string())
                }
                _ => {
                    self.unknown_key(key, &KEYS);
                    good = false;
                    None
                }
            };
            if let Some(problem) = problem {
                self.error(value.span(), problem);
                good = false;
            }
        }
        for key in ["tag", "key"] {
            if !table.contains_key(key) {
                self.error(span.clone(), format!("a keyed token needs '{key}'"));
                good = false;
            }
        }
        good.then_some(TokenSpec::Keyed { tag: tag?, key: ring?, bind: bind? })
    }
}

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
