//! Reads the values of a condition: prefixes, ports, marks, users, interfaces and cgroups, one or a list of them.

use std::sync::Arc;

use anyhow::Context;
use toml::Spanned;
use toml::de::{DeInteger, DeValue};

use super::super::report::Problem;
use super::super::values::{Cgroup, Interface, List, Mark, Prefix, Range, merge_prefixes, merge_ranges};
use super::fields::FileReader;
use super::{Known, SetOf, Sets, Span};
use crate::netns::NoSuchNetns;

impl FileReader<'_> {
    /// A list that is nothing but one set is shared with all other rules that name it.
    pub fn prefix_list(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Prefix>> {
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
            list.push(self.reported(span, text.parse())?);
        }
        Some(())
    }

    pub fn port_list(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Range>> {
        if let Some(shared) = shared(value, &known.ports) {
            return Some(List::Many(shared));
        }
        self.ports(value, &mut |_, name| known.ports.get(name).cloned()).map(List::from)
    }

    pub fn ports(&self, value: &Spanned<DeValue<'_>>, set: SetOf<'_, Range>) -> Option<Vec<Range>> {
        let mut list = Vec::new();
        let wanted = "a port, a range like \"8000-8999\" or \"@SET\"";
        let good = self.numbers(value, wanted, &mut |span, text| {
            match text.strip_prefix('@') {
                Some(name) => list.extend(self.set(span, "ports", name, set)?.iter()),
                None => list.push(self.reported(span, Range::parse(text, u16::MAX.into()))?),
            }
            Some(())
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

    pub fn marks(&self, value: &Spanned<DeValue<'_>>) -> Option<List<Mark>> {
        let mut list = Vec::new();
        let good = self.numbers(value, "a mark like 16 or \"0x10/0xff\"", &mut |span, text| {
            list.push(self.reported(span, text.parse())?);
            Some(())
        });
        list.sort_unstable();
        list.dedup();
        (good && !list.is_empty()).then(|| list.into())
    }

    pub fn users(&self, value: &Spanned<DeValue<'_>>) -> Option<List<Range>> {
        let mut list = Vec::new();
        let wanted = "a user id, a range of them or the name of a user";
        let good = self.numbers(value, wanted, &mut |span, text| {
            let range = match text.starts_with(|c: char| c.is_ascii_digit() || c == '-') {
                true => Range::parse(text, u32::MAX),
                false => self.user(text).map(Range::one),
            };
            list.push(self.reported(span, range)?);
            Some(())
        });
        merge_ranges(&mut list);
        (good && !list.is_empty()).then(|| list.into())
    }

    fn user(&self, name: &str) -> anyhow::Result<u32> {
        self.reader.names.user(name)?.with_context(|| format!("there is no user '{name}' on this host"))
    }

    /// Gives every item to `each` as text; false if one is neither a number nor text, or gave nothing.
    fn numbers(
        &self,
        value: &Spanned<DeValue<'_>>,
        wanted: &str,
        each: &mut dyn FnMut(&Span, &str) -> Option<()>,
    ) -> bool {
        let mut good = true;
        self.items(value, &mut |span, item| {
            let done = match item {
                DeValue::Integer(number) => each(&span, &integer(number)),
                DeValue::String(text) => each(&span, text),
                other => {
                    self.wrong_type(span, other, wanted);
                    None
                }
            };
            good &= done.is_some();
        });
        good
    }

    pub fn interfaces(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Interface>> {
        let mut list: Vec<Interface> = Vec::new();
        let texts = self.texts(value, "the name of an interface");
        let mut good = !texts.is_empty();
        for (span, name) in texts {
            match self.reader.names.interface(&name) {
                Ok(interface) => {
                    if interface.index == 0 {
                        good &= self.missing(span, format!("there is no interface '{name}'"), known);
                    }
                    list.push(interface);
                }
                Err(error) if !error.is::<NoSuchNetns>() => {
                    good = false;
                    self.error(span, format!("looking for interface '{name}': {error:#}"));
                }
                Err(none) => {
                    good &= self.missing(span, none.to_string(), known);
                    // Like one that is not there, or a rule about nothing else would not be there either.
                    list.push(Interface { name: name.into(), netns: 0, index: 0 });
                }
            }
        }
        list.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        list.dedup();
        (good && !list.is_empty()).then(|| list.into())
    }

    pub fn cgroups(&self, value: &Spanned<DeValue<'_>>, known: &Known) -> Option<List<Cgroup>> {
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
        self.reader.push(match known.warn_missing {
            true => Problem::warning(place, what).help("it matches nothing until the policy is loaded again"),
            false if self.reader.options.is_typed => Problem::error(place, what)
                .help("add the rule once it is there, or load a file that has missing = \"warn\""),
            false => Problem::error(place, what)
                .help("if it may come later, write missing = \"warn\", or use --allow-missing"),
        });
        known.warn_missing
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
        (radix, digits) => match i64::from_str_radix(digits, radix) {
            Ok(number) => number.to_string(),
            // As it is written, for the message that it is too large.
            Err(_) => {
                let prefix = match radix {
                    2 => "0b",
                    8 => "0o",
                    _ => "0x",
                };
                format!("{prefix}{digits}")
            }
        },
    }
}
