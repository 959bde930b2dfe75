//! What is wrong with a policy, and where: collected, so that one run shows all of it, and rendered with file, line,
//! column and the line itself.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use annotate_snippets::{AnnotationKind, Group, Level, Renderer, Snippet};

use super::Place;

/// More than these are counted and not shown: nobody reads a million lines.
const SHOWN_MAX: usize = 40;
/// A longer line, such as a list of a million prefixes, is shown in part.
const LINE_MAX: usize = 160;

/// The files of a policy.
#[derive(Clone, Debug, Default)]
pub struct Sources(Vec<Source>);

#[derive(Clone, Debug)]
struct Source {
    name: String,
    text: Arc<str>,
}

impl Sources {
    /// Keeps a file, and returns its number.
    pub fn add(&mut self, name: String, text: Arc<str>) -> u32 {
        self.0.push(Source { name, text });
        (self.0.len() - 1) as u32
    }

    fn get(&self, file: u32) -> Option<&Source> {
        self.0.get(file as usize)
    }

    /// How many lines down a place is, from 1, and the name of its file.
    pub fn line(&self, place: Place) -> Option<(&str, usize)> {
        let source = self.get(place.file)?;
        let before = source.text.as_bytes().get(..place.start as usize)?;
        Some((&source.name, before.iter().filter(|byte| **byte == b'\n').count() + 1))
    }
}

/// Whether a policy can be used in spite of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Severity {
    /// It cannot.
    Error,
    /// It can, but it is probably not what was meant.
    Warning,
}

/// One thing that is wrong.
#[derive(Clone, Debug)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// Where; nothing for what is wrong with the policy as a whole.
    pub place: Option<Place>,
    /// What.
    pub what: String,
    /// What to do about it.
    pub help: Option<String>,
    /// Another place that has to do with it, and how.
    pub other: Option<(Place, String)>,
}

impl Problem {
    /// Something that makes a policy unusable.
    pub fn error(place: Place, what: impl Into<String>) -> Problem {
        Problem { severity: Severity::Error, place: Some(place), what: what.into(), help: None, other: None }
    }

    /// Something that is worth a look.
    pub fn warning(place: Place, what: impl Into<String>) -> Problem {
        Problem { severity: Severity::Warning, ..Problem::error(place, what) }
    }

    /// Adds what to do.
    pub fn help(mut self, help: impl Into<String>) -> Problem {
        self.help = Some(help.into());
        self
    }

    /// Adds another place.
    pub fn see(mut self, place: Place, how: impl Into<String>) -> Problem {
        self.other = Some((place, how.into()));
        self
    }
}

/// Everything that is wrong with a policy, or worth a look.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// The files it is about.
    pub sources: Sources,
    /// In the order of the files, errors and warnings mixed.
    pub problems: Vec<Problem>,
    /// Problems that were found and not kept.
    pub more: usize,
}

impl Report {
    /// Keeps a problem, unless there are so many that nobody would read it. Errors come before warnings.
    pub fn push(&mut self, problem: Problem) {
        if self.problems.len() < SHOWN_MAX {
            self.problems.push(problem);
            return;
        }
        self.more += 1;
        let is_warning = |problem: &Problem| problem.severity == Severity::Warning;
        if !is_warning(&problem)
            && let Some(at) = self.problems.iter().rposition(is_warning)
        {
            self.problems.remove(at);
            self.problems.push(problem);
        }
    }

    /// True if the policy cannot be used.
    pub fn has_errors(&self) -> bool {
        self.problems.iter().any(|problem| problem.severity == Severity::Error)
    }

    /// True if there is nothing to tell.
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// As text for a person, with colours or without.
    pub fn render(&self, colours: bool) -> String {
        let renderer = if colours { Renderer::styled() } else { Renderer::plain() };
        let mut text = String::new();
        for problem in &self.problems {
            text.push_str(&renderer.render(&[self.group(problem)]));
            text.push('\n');
        }
        if self.more > 0 {
            text.push_str(&format!("and {} more\n", self.more));
        }
        text
    }

    fn group<'a>(&'a self, problem: &'a Problem) -> Group<'a> {
        let level = match problem.severity {
            Severity::Error => Level::ERROR,
            Severity::Warning => Level::WARNING,
        };
        let mut group = Group::with_title(level.primary_title(&problem.what));
        if let Some(snippet) =
            problem.place.and_then(|place| self.snippet(place, AnnotationKind::Primary, ""))
        {
            group = group.element(snippet);
        }
        if let Some((place, how)) = &problem.other
            && let Some(snippet) = self.snippet(*place, AnnotationKind::Context, how)
        {
            group = group.element(snippet);
        }
        if let Some(help) = &problem.help {
            group = group.element(Level::HELP.message(help));
        }
        group
    }

    /// The first line of a place. Only that line is handed over: the file may be large.
    fn snippet<'a>(
        &'a self,
        place: Place,
        kind: AnnotationKind,
        label: &'a str,
    ) -> Option<Snippet<'a, annotate_snippets::Annotation<'a>>> {
        let source = self.sources.get(place.file)?;
        let (_, number) = self.sources.line(place)?;
        let (line, span) = line_of(&source.text, place.start as usize..place.end as usize);
        let annotation = kind.span(span);
        let annotation = if label.is_empty() { annotation } else { annotation.label(label) };
        Some(Snippet::source(line).path(&source.name).line_start(number).annotation(annotation))
    }
}

/// The line in which a span begins, and the part of the span that is in it.
fn line_of(text: &str, span: Range<usize>) -> (&str, Range<usize>) {
    let at = floor_char(text, span.start.min(text.len()));
    let begin = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
    let end = text[at..].find('\n').map_or(text.len(), |newline| at + newline);
    let end = if text[begin..end].ends_with('\r') && end > at { end - 1 } else { end };
    // The renderer cuts a long line to the width of a terminal, but it need not see all of it.
    let to = if end - at > LINE_MAX { floor_char(text, at + LINE_MAX) } else { end };
    let stop = floor_char(text, span.end.clamp(at, to));
    (&text[begin..to], at - begin..stop.max(at) - begin)
}

fn floor_char(text: &str, mut at: usize) -> usize {
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    at
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let errors = self.problems.iter().filter(|p| p.severity == Severity::Error).count();
        let name = self.sources.get(0).map_or("", |source| &source.name);
        if errors > 0 {
            writeln!(f, "checking the policy {name}: nothing was changed")?;
        }
        f.write_str(self.render(false).trim_end())
    }
}

impl std::error::Error for Report {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_shows_its_line_and_column() {
        let mut report = Report::default();
        let file = report.sources.add("a.toml".to_string(), "one\ntwo three\r\nfour".into());
        report.push(Problem::error(Place { file, start: 8, end: 13 }, "that is no number").help("count"));
        let text = report.render(false);
        assert!(text.contains("a.toml:2:5"), "{text}");
        assert!(
            text.contains("two three\n") && text.contains("    ^^^^^") && text.contains("help: count"),
            "{text}"
        );
    }

    #[test]
    fn places_at_the_ends_and_inside_of_characters_are_no_panic() {
        let text = "ä\nö";
        for start in 0..=6 {
            for end in start..=7 {
                let mut report = Report::default();
                let file = report.sources.add("a".to_string(), text.into());
                report.push(Problem::error(Place { file, start, end }, "x"));
                report.render(false);
            }
        }
    }

    #[test]
    fn errors_are_not_drowned_by_warnings() {
        let mut report = Report::default();
        (0..100).for_each(|_| report.push(Problem::warning(Place::default(), "w")));
        report.push(Problem::error(Place::default(), "e"));
        assert!(report.has_errors());
        assert_eq!((report.problems.len(), report.more), (SHOWN_MAX, 61));
    }
}
