//! Cuts the text of a policy into one piece for each rule and a rest, so that each is parsed on its own: in parallel,
//! and without holding the document of a million tables in memory, which takes gigabytes.
//!
//! A piece is cut at a header that begins a line. Where strings begin and end, the lexer of TOML knows.

use std::ops::Range;

use toml_parser::Source;
use toml_parser::lexer::TokenKind;

/// The pieces, by their place in the text.
#[derive(Debug, Default)]
pub struct Pieces {
    /// From `[[rule]]` to the next header.
    pub rules: Vec<Range<usize>>,
}

impl Pieces {
    /// Finds them.
    pub fn find(text: &str) -> Pieces {
        let mut pieces = Pieces::default();
        let mut open: Option<usize> = None;
        let mut at_line_start = true;
        let mut in_header = false;
        let mut depth = 0usize;
        for token in Source::new(text).lex() {
            let start = token.span().start();
            match token.kind() {
                TokenKind::Whitespace => continue,
                TokenKind::Newline => {
                    at_line_start = true;
                    in_header = false;
                    continue;
                }
                _ if in_header => continue,
                TokenKind::LeftSquareBracket => {
                    // No value looks like this, so a bracket that was never closed ends here as well.
                    let is_rule = at_line_start && is_rule_header(&text[start..]);
                    if is_rule || (at_line_start && depth == 0) {
                        pieces.rules.extend(open.take().map(|begin| begin..start));
                        open = is_rule.then_some(start);
                        depth = 0;
                        in_header = true;
                    } else {
                        depth += 1;
                    }
                }
                TokenKind::LeftCurlyBracket => depth += 1,
                TokenKind::RightSquareBracket | TokenKind::RightCurlyBracket => {
                    depth = depth.saturating_sub(1)
                }
                _ => {}
            }
            at_line_start = false;
        }
        pieces.rules.extend(open.map(|begin| begin..text.len()));
        pieces
    }

    /// The text without the rules: blanks stand in their place, so that every offset stays right.
    pub fn rest(&self, text: &str) -> String {
        let mut rest = String::with_capacity(text.len());
        let mut at = 0;
        for rule in &self.rules {
            rest.push_str(&text[at..rule.start]);
            rest.extend(std::iter::repeat_n(' ', rule.len()));
            at = rule.end;
        }
        rest.push_str(&text[at..]);
        rest
    }
}

fn is_rule_header(text: &str) -> bool {
    let blank = [' ', '\t'];
    text.strip_prefix("[[")
        .and_then(|rest| rest.trim_start_matches(blank).strip_prefix("rule"))
        .is_some_and(|rest| rest.trim_start_matches(blank).starts_with("]]"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_found_and_nothing_else() {
        let text = "a = 1\n[[rule]]\nb = \"\"\"\n[[rule]]\n\"\"\"\n# [[rule]]\nc = [\n[[1]],\n]\n [[ rule ]] # x\nd = 1\n[x]\ne = 2\n[[rules]]\n[[rule]]";
        let pieces = Pieces::find(text);
        let found: Vec<&str> = pieces.rules.iter().map(|range| &text[range.clone()]).collect();
        assert_eq!(found.len(), 3, "{found:?}");
        assert!(found[0].starts_with("[[rule]]\nb") && found[0].ends_with("]\n "), "{found:?}");
        assert_eq!(found[1], "[[ rule ]] # x\nd = 1\n");
        assert_eq!(found[2], "[[rule]]");
        let rest = pieces.rest(text);
        assert_eq!(rest.len(), text.len());
        assert_eq!(
            rest.split_whitespace().collect::<Vec<_>>(),
            ["a", "=", "1", "[x]", "e", "=", "2", "[[rules]]"]
        );
    }
}
