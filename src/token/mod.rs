//! The token: eight bytes that a policy gives, or makes anew for each connection.
//!
//! Here are the bytes, written as 16 hexadecimal digits. What a keyed token consists of, and how it is made and
//! checked, is in [`keyed`]; what a policy says of either is in [`spec`].

pub mod keyed;
pub mod spec;

use std::fmt;
use std::str::FromStr;

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};

pub use spec::TokenSpec;

use crate::types::Size;

/// Length of a token in bytes.
pub const TOKEN_LEN: usize = Size::TOKEN_LEN.0 as usize;

/// The eight bytes that the option carries, in the order in which they stand on the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Token(pub [u8; TOKEN_LEN]);

impl Token {
    /// What is stamped when nobody has said what to stamp: `NETOKEN1` in ASCII, easy to see in a hex dump.
    pub const DEFAULT: Token = Token(*b"NETOKEN1");
}

impl FromStr for Token {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let digits = text.strip_prefix("0x").unwrap_or(text);
        if digits.len() != 2 * TOKEN_LEN || !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            bail!("a token is {} hexadecimal digits, like {}; not '{text}'", 2 * TOKEN_LEN, Token::DEFAULT);
        }
        let mut bytes = [0; TOKEN_LEN];
        for (byte, at) in bytes.iter_mut().zip((0..).step_by(2)) {
            *byte = u8::from_str_radix(&digits[at..at + 2], 16)?;
        }
        Ok(Token(bytes))
    }
}

impl TryFrom<String> for Token {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<Self> {
        text.parse()
    }
}

impl From<Token> for String {
    fn from(token: Token) -> Self {
        token.to_string()
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_reads_back_as_it_was_written() {
        for text in ["0011223344556677", "ffffffffffffffff", "4e45544f4b454e31"] {
            assert_eq!(text.parse::<Token>().unwrap().to_string(), text);
        }
        assert_eq!("0x00112233445566FF".parse::<Token>().unwrap().0[7], 0xff);
    }

    #[test]
    fn what_is_not_sixteen_digits_is_refused() {
        for text in [
            "",
            "00",
            "00112233445566",
            "001122334455667788",
            "001122334455667g",
            "+011223344556677",
            "ä0112233445566",
        ] {
            assert!(text.parse::<Token>().is_err(), "{text}");
        }
    }
}
