//! What a policy says of the token of a rule: the bytes, or what to make them of.

use std::fmt;

use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::keyed::Bind;
use super::{TOKEN_LEN, Token};
use crate::keys::RingName;
use crate::types::{Form, TokenSpec as RawTokenSpec};

/// How the token of a rule is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TokenSpec {
    /// It is always the same.
    Static(Token),
    /// It is made for each SYN.
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
    /// The ring that it needs a key of.
    pub fn ring(&self) -> Option<RingName> {
        match self {
            TokenSpec::Static(_) => None,
            TokenSpec::Keyed { key, .. } => Some(*key),
        }
    }

    /// As the kernel stores it. `ring` is the number that the instance has given to the ring's name; a static
    /// token has no use for it.
    pub fn to_raw(self, ring: u8) -> RawTokenSpec {
        match self {
            TokenSpec::Static(Token(bytes)) => {
                RawTokenSpec { form: Form::FORM_STATIC.0 as u8, bytes, ..Default::default() }
            }
            TokenSpec::Keyed { tag, bind, .. } => RawTokenSpec {
                form: Form::FORM_KEYED.0 as u8,
                bind: bind.number(),
                ring,
                tag_be: tag.to_be(),
                bytes: [0; TOKEN_LEN],
                ..Default::default()
            },
        }
    }
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
            TokenSpec::Keyed { tag, key, bind } => write!(f, "tag {tag} with key '{key}' bound to {bind}"),
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct KeyedFile {
    tag: u16,
    key: RingName,
    #[serde(default)]
    bind: Bind,
}

/// A string or a table, and an error that belongs to the one that was written.
impl<'de> Deserialize<'de> for TokenSpec {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<TokenSpec, D::Error> {
        struct EitherForm;

        impl<'de> Visitor<'de> for EitherForm {
            type Value = TokenSpec;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("16 hexadecimal digits, or a table like { tag = 17, key = \"edge\" }")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<TokenSpec, E> {
                text.parse().map(TokenSpec::Static).map_err(E::custom)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<TokenSpec, A::Error> {
                let KeyedFile { tag, key, bind } = KeyedFile::deserialize(MapAccessDeserializer::new(map))?;
                Ok(TokenSpec::Keyed { tag, key, bind })
            }
        }

        deserializer.deserialize_any(EitherForm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Deserialize)]
    struct Holder {
        token: TokenSpec,
    }

    fn read(token: &str) -> Result<TokenSpec, String> {
        toml::from_str::<Holder>(&format!("token = {token}"))
            .map(|holder| holder.token)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn both_forms_are_read() {
        assert_eq!(read("'4e45544f4b454e31'"), Ok(TokenSpec::Static(Token::DEFAULT)));
        let key: RingName = "edge".parse().unwrap();
        assert_eq!(
            read("{ tag = 17, key = 'edge' }"),
            Ok(TokenSpec::Keyed { tag: 17, key, bind: Bind::Server })
        );
        assert_eq!(
            read("{ tag = 65535, key = 'edge', bind = 'isn' }"),
            Ok(TokenSpec::Keyed { tag: 65535, key, bind: Bind::Isn })
        );
    }

    #[test]
    fn what_is_wrong_is_said_of_the_form_that_was_written() {
        for (token, expect) in [
            ("'00'", "16 hexadecimal digits"),
            ("17", "a table like"),
            ("{ tag = 65536, key = 'edge' }", "65536"),
            ("{ key = 'edge' }", "tag"),
            ("{ tag = 1 }", "key"),
            ("{ tag = 1, key = 'edge', bind = 'client' }", "client"),
            ("{ tag = 1, key = 'Edge 1' }", "name of a key ring"),
            ("{ tag = 1, key = 'edge', mac = 1 }", "mac"),
        ] {
            let error = read(token).unwrap_err();
            assert!(error.contains(expect), "{token} gave {error}");
        }
    }
}
