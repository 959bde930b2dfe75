//! What a policy says of the token of a rule: the bytes, or what to make them of.

use std::fmt;
use std::sync::Arc;

use anyhow::{Context, Result, bail};

use super::keyed::Bind;
use super::{TOKEN_LEN, Token};
use crate::keys::RingName;
use crate::types::{Form, RawTokenSpec};

/// Where the eight bytes of a rule's token come from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenSpec {
    /// They are always the same.
    Static(Token),
    /// Text with the number of the rule and the name of the instance in it, filled in when it is put into use.
    Template(Arc<str>),
    /// They are made for each SYN.
    Keyed {
        /// Who opens the connection.
        tag: u16,
        /// Whose signing key it is made with.
        key: RingName,
        /// What it belongs to.
        bind: Bind,
    },
}

impl TokenSpec {
    /// Reads a token as it is written in a policy: 16 hexadecimal digits, text of at most 8 bytes, or a template
    /// with `{rule:N}` or `{instance:N}` in it.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(text: &str) -> Result<TokenSpec> {
        if text.contains(['{', '}']) {
            // It is shown as it is written.
            if text.contains(char::is_control) {
                bail!("a token that has {{rule:N}} or {{instance:N}} in it has no control characters");
            }
            // Any rule and instance do to find out whether it is right.
            fill_template(text, 0, "")?;
            return Ok(TokenSpec::Template(text.into()));
        }
        if let Ok(token) = text.parse() {
            return Ok(TokenSpec::Static(token));
        }
        let mut bytes = [0; 8];
        match text.len() {
            1..=8 => bytes[..text.len()].copy_from_slice(text.as_bytes()),
            _ => bail!("a token is 16 hexadecimal digits, like {}, or text of 1 to 8 bytes", Token::DEFAULT),
        }
        Ok(TokenSpec::Static(Token(bytes)))
    }

    /// Whether its bytes change with the place of its rule.
    pub fn has_rule_number(&self) -> bool {
        matches!(self, TokenSpec::Template(text) if text.contains("{rule:"))
    }

    /// The ring that it needs a key of.
    pub fn ring(&self) -> Option<RingName> {
        match self {
            TokenSpec::Keyed { key, .. } => Some(*key),
            _ => None,
        }
    }

    /// As the kernel stores it, for the rule with this number in this instance. `ring_number` is what the instance
    /// calls the ring of a keyed token.
    ///
    /// # Errors
    /// The number of the rule has more bytes than the template has room for.
    pub fn to_raw(
        &self,
        rule: u32,
        instance: &str,
        ring_number: impl FnOnce(RingName) -> u8,
    ) -> Result<RawTokenSpec> {
        let of_bytes =
            |Token(bytes)| RawTokenSpec { form: Form::FORM_STATIC.0 as u8, bytes, ..Default::default() };
        Ok(match self {
            TokenSpec::Static(token) => of_bytes(*token),
            TokenSpec::Template(text) => of_bytes(fill_template(text, rule, instance)?),
            TokenSpec::Keyed { tag, key, bind } => RawTokenSpec {
                form: Form::FORM_KEYED.0 as u8,
                bind: bind.number(),
                ring: ring_number(*key),
                tag_be: tag.to_be(),
                bytes: [0; TOKEN_LEN],
                ..Default::default()
            },
        })
    }
}

/// `{rule:N}` becomes the number in N bytes, most significant first; `{instance:N}` the first N bytes of the name,
/// followed by zeros if it is shorter; the rest stands as it is.
fn fill_template(text: &str, rule: u32, instance: &str) -> Result<Token> {
    let mut bytes = Vec::new();
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('{') {
        bytes.extend(before.as_bytes());
        let (inside, behind) = after.split_once('}').with_context(|| format!("no '}}' in '{text}'"))?;
        let (what, len) = inside.split_once(':').with_context(|| {
            format!("'{{{inside}}}' has no length; write it like {{rule:4}} or {{instance:4}}")
        })?;
        let len: usize = len
            .parse()
            .ok()
            .filter(|len| (1..=8).contains(len))
            .with_context(|| format!("the length in '{{{inside}}}' is not a number from 1 to 8"))?;
        match what {
            "rule" => {
                let number = u64::from(rule).to_be_bytes();
                let (unused, used) = number.split_at(8 - len);
                if unused.iter().any(|byte| *byte != 0) {
                    bail!("the number of rule {rule} has no room in the {len} bytes of '{{{inside}}}'");
                }
                bytes.extend(used);
            }
            "instance" => bytes.extend(instance.bytes().chain(std::iter::repeat(0)).take(len)),
            _ => bail!("'{{{inside}}}' is not known; there are {{rule:N}} and {{instance:N}}"),
        }
        rest = behind;
    }
    if rest.contains('}') {
        bail!("no '{{' before '}}' in '{text}'");
    }
    bytes.extend(rest.as_bytes());
    if bytes.is_empty() || bytes.len() > 8 {
        bail!("the token '{text}' has {} bytes; it must have 1 to 8", bytes.len());
    }
    bytes.resize(8, 0);
    Ok(Token(bytes.try_into().unwrap_or_default()))
}

impl From<Token> for TokenSpec {
    fn from(token: Token) -> TokenSpec {
        TokenSpec::Static(token)
    }
}

impl fmt::Display for TokenSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenSpec::Static(token) => token.fmt(f),
            TokenSpec::Template(text) => f.write_str(text),
            TokenSpec::Keyed { tag, key, bind } => write!(f, "tag {tag} with key '{key}' bound to {bind}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_digits_text_or_templates() {
        let bytes =
            |text: &str, rule| TokenSpec::parse(text).unwrap().to_raw(rule, "edge", |_| 0).unwrap().bytes;
        assert_eq!(bytes("4e45544f4b454e31", 1), *b"NETOKEN1");
        assert_eq!(bytes("NETOKEN1", 1), *b"NETOKEN1");
        assert_eq!(bytes("edge", 1), *b"edge\0\0\0\0");
        assert_eq!(bytes("{instance:5}{rule:3}", 0x01_02_03), *b"edge\0\x01\x02\x03");
        assert_eq!(bytes("r{rule:2}", 0xff), *b"r\0\xff\0\0\0\0\0");
        for bad in [
            "",
            "NETOKEN12",
            "4e45544f4b454e3",
            "{rule}",
            "{rule:0}",
            "{rule:9}",
            "{rule:2",
            "rule}",
            "{x:1}",
            "\u{1b}[{rule:1}",
            "{rule:1}\u{9b}",
        ] {
            assert!(TokenSpec::parse(bad).is_err(), "{bad}");
        }
        assert!(TokenSpec::parse("{rule:1}").unwrap().to_raw(256, "", |_| 0).is_err());
    }
}
