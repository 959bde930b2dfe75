//! Reads what a rule decides, and its token.

use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::super::report::Problem;
use super::super::{Decision, WhenFull};
use super::Span;
use super::fields::FileReader;
use crate::keys::RingName;
use crate::token::TokenSpec;
use crate::token::keyed::Bind;

impl FileReader<'_> {
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
        let token = self.reported(&value.span(), TokenSpec::parse(text))?;
        if text.len() <= 8 && text.len() > 3 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let what = format!("this token is the text '{text}', not a number");
            let help = "a token in hexadecimal has all 16 digits";
            self.reader.push(Problem::warning(self.place(value.span()), what).help(help));
        }
        Some(token)
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
