//! What keyed tokens are made with. A *ring* is what a policy names, like `edge`; it holds keys, of which one signs
//! and the others only verify. Each key has an id that is unique within an instance, because a token names it.
//!
//! [`mod@file`] keeps them on disk, [`live`] in the kernel, [`rotate`] decides what comes next. A secret is never
//! printed, is not copied where it can be helped, and is wiped when it is dropped.

pub mod file;
pub mod live;
pub mod rotate;

use std::fmt;
use std::str::FromStr;
use std::time::SystemTime;

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, setrlimit};
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use crate::types::KeySize;

/// Length of a secret in bytes: 128 bits.
pub const SECRET_LEN: usize = KeySize::SECRET_LEN.0 as usize;
/// How many ids there are.
pub const KEYS_MAX: usize = KeySize::KEYS_MAX.0 as usize;
/// The length of a ring's name, in bytes, at most.
pub const RING_NAME_LEN: usize = KeySize::RING_NAME_LEN.0 as usize;

/// The name of a ring: 1 to 24 of `a` to `z`, `0` to `9`, `-` and `_`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RingName([u8; RING_NAME_LEN]);

impl RingName {
    /// Its bytes as the kernel stores them, with zeros behind.
    pub fn padded(&self) -> [u8; RING_NAME_LEN] {
        self.0
    }

    /// What the kernel stored; nothing if that is no name.
    pub fn from_padded(bytes: [u8; RING_NAME_LEN]) -> Option<RingName> {
        RingName(bytes).as_str().parse().ok()
    }

    /// As it is written.
    pub fn as_str(&self) -> &str {
        let end = self.0.iter().position(|byte| *byte == 0).unwrap_or(RING_NAME_LEN);
        str::from_utf8(&self.0[..end]).unwrap_or_default()
    }
}

impl FromStr for RingName {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<RingName> {
        let fits = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '_';
        if text.is_empty() || text.len() > RING_NAME_LEN || !text.chars().all(fits) {
            bail!("the name of a key ring is 1 to {RING_NAME_LEN} of a-z, 0-9, '-' and '_'; not '{text}'");
        }
        let mut bytes = [0; RING_NAME_LEN];
        bytes[..text.len()].copy_from_slice(text.as_bytes());
        Ok(RingName(bytes))
    }
}

impl TryFrom<String> for RingName {
    type Error = anyhow::Error;

    fn try_from(text: String) -> Result<RingName> {
        text.parse()
    }
}

impl From<RingName> for String {
    fn from(name: RingName) -> String {
        name.to_string()
    }
}

impl fmt::Display for RingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

impl fmt::Debug for RingName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.as_str().fmt(f)
    }
}

/// Sixteen bytes that nobody may see. On the heap, so that moving it leaves no copy behind.
pub struct Secret(Box<Zeroizing<[u8; SECRET_LEN]>>);

impl Secret {
    /// From the kernel's random source.
    ///
    /// # Errors
    /// It does not answer.
    pub fn random() -> Result<Secret> {
        let mut secret = Secret::zero();
        getrandom::fill(secret.0.as_mut_slice())
            .map_err(|error| anyhow::anyhow!("asking the kernel for random bytes: {error}"))?;
        Ok(secret)
    }

    /// A copy of those bytes; the caller's own is the caller's to wipe.
    pub fn from_bytes(bytes: &[u8; SECRET_LEN]) -> Secret {
        let mut secret = Secret::zero();
        secret.0.copy_from_slice(bytes);
        secret
    }

    /// From 32 hexadecimal digits; nothing if it is not that.
    pub fn from_hex(digits: &[u8]) -> Option<Secret> {
        if digits.len() != 2 * SECRET_LEN {
            return None;
        }
        let mut secret = Secret::zero();
        for (byte, pair) in secret.0.iter_mut().zip(digits.chunks_exact(2)) {
            let value = |digit: u8| char::from(digit).to_digit(16);
            *byte = (value(pair[0])? << 4 | value(pair[1])?) as u8;
        }
        Some(secret)
    }

    fn zero() -> Secret {
        Secret(Box::new(Zeroizing::new([0; SECRET_LEN])))
    }

    /// What must not be seen.
    pub fn bytes(&self) -> &[u8; SECRET_LEN] {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a key is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum State {
    /// Tokens made with it are accepted; none are made.
    VerifyOnly,
    /// Tokens are made with it, and accepted.
    Signing,
    /// Nothing any more; its secret is gone.
    Retired,
}

impl State {
    const ALL: [State; 3] = [State::VerifyOnly, State::Signing, State::Retired];

    /// As it is written in a key file.
    pub fn name(self) -> &'static str {
        match self {
            State::VerifyOnly => "verify-only",
            State::Signing => "signing",
            State::Retired => "retired",
        }
    }

    fn from_name(name: &str) -> Option<State> {
        State::ALL.into_iter().find(|state| state.name() == name)
    }
}

/// One key.
#[derive(Debug)]
pub struct Key {
    ring: RingName,
    id: u8,
    state: State,
    created: SystemTime,
    /// None once it is retired.
    secret: Option<Secret>,
}

impl Key {
    /// A key that verifies, and does not sign yet.
    ///
    /// # Errors
    /// `id` is not below 16.
    pub fn new(ring: RingName, id: u8, secret: Secret, created: SystemTime) -> Result<Key> {
        check_id(id.into())?;
        Ok(Key { ring, id, state: State::VerifyOnly, created, secret: Some(secret) })
    }

    /// The ring that it belongs to.
    pub fn ring(&self) -> RingName {
        self.ring
    }

    /// 0 to 15.
    pub fn id(&self) -> u8 {
        self.id
    }

    /// What it is used for.
    pub fn state(&self) -> State {
        self.state
    }

    /// When it was made.
    pub fn created(&self) -> SystemTime {
        self.created
    }

    /// None if it is retired.
    pub fn secret(&self) -> Option<&Secret> {
        self.secret.as_ref()
    }

    /// Gives it up: nothing is made or accepted with it any more, and its secret is wiped.
    pub fn retire(&mut self) {
        self.state = State::Retired;
        self.secret = None;
    }

    /// It verifies, and perhaps signs.
    pub fn is_live(&self) -> bool {
        self.state != State::Retired
    }
}

fn check_id(id: u64) -> Result<u8> {
    match u8::try_from(id) {
        Ok(id) if usize::from(id) < KEYS_MAX => Ok(id),
        _ => bail!("a key id is a number from 0 to {}; not {id}", KEYS_MAX - 1),
    }
}

/// Makes keys fit together that come from files. Where several of a ring say that they sign, the newest does: to a host
/// that only has the next one copied, nobody has told that the one before stopped.
///
/// # Errors
/// Two have the same id.
pub fn settle(keys: &mut [Key]) -> Result<()> {
    for (at, key) in keys.iter().enumerate() {
        for other in &keys[..at] {
            if key.id == other.id {
                bail!(
                    "rings '{}' and '{}' both have a key {}; a token names its key by that number alone, so make one of \
                     them anew",
                    other.ring,
                    key.ring,
                    key.id
                );
            }
        }
    }
    for at in 0..keys.len() {
        let key = &keys[at];
        let is_newer = |other: &Key| {
            other.ring == key.ring
                && other.state == State::Signing
                && (other.created, other.id) > (key.created, key.id)
        };
        if key.state == State::Signing && keys.iter().any(is_newer) {
            keys[at].state = State::VerifyOnly;
        }
    }
    Ok(())
}

/// The key of a ring that signs.
pub fn signer(keys: &[Key], ring: RingName) -> Option<&Key> {
    keys.iter().find(|key| key.ring == ring && key.state == State::Signing)
}

/// To be called before a secret is read: this process leaves no core dump, and nobody but root can look into it.
///
/// # Errors
/// The kernel refused.
pub fn guard_process() -> Result<()> {
    nix::sys::prctl::set_dumpable(false).context("forbidding a core dump, which could hold a secret")?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).context("forbidding a core dump, which could hold a secret")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_secret_is_read_from_hexadecimal_digits_and_never_printed() {
        let secret = Secret::from_hex(b"000102030405060708090a0b0c0d0e0f").unwrap();
        assert_eq!(secret.bytes()[15], 15);
        assert_eq!(format!("{secret:?}"), "Secret(..)");
        let key = Key::new("edge".parse().unwrap(), 3, secret, SystemTime::UNIX_EPOCH).unwrap();
        let shown = format!("{key:?}");
        assert!(!shown.contains("14, 15") && !shown.contains("0e0f"), "{shown}");
        for bad in ["", "00", "000102030405060708090a0b0c0d0e0g", "000102030405060708090a0b0c0d0e0f00"] {
            assert!(Secret::from_hex(bad.as_bytes()).is_none(), "{bad}");
        }
    }

    #[test]
    fn of_several_that_sign_the_newest_does() {
        let (edge, other) = ("edge".parse().unwrap(), "other".parse().unwrap());
        let key = |ring, id, seconds, state| {
            let created = SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
            Key { state, ..Key::new(ring, id, Secret::random().unwrap(), created).unwrap() }
        };
        let mut keys = [
            key(edge, 0, 20, State::Signing),
            key(edge, 1, 10, State::Signing),
            key(edge, 2, 30, State::VerifyOnly),
            key(other, 3, 40, State::Signing),
            key(edge, 4, 20, State::Signing),
        ];
        settle(&mut keys).unwrap();
        let signing: Vec<u8> = keys.iter().filter(|key| key.state == State::Signing).map(Key::id).collect();
        assert_eq!(signing, [3, 4]);
        assert!(keys.iter().all(Key::is_live));
    }

    #[test]
    fn a_guarded_process_leaves_no_core() {
        guard_process().unwrap();
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
        assert_eq!(nix::sys::resource::getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0));
    }

    #[test]
    fn two_random_secrets_differ() {
        assert_ne!(Secret::random().unwrap().bytes(), Secret::random().unwrap().bytes());
    }

    #[test]
    fn a_ring_name_reads_back_as_it_was_written() {
        for good in ["e", "edge", "edge-1_b", "abcdefghijklmnopqrstuvwx"] {
            let name: RingName = good.parse().unwrap();
            assert_eq!(name.as_str(), good);
            assert_eq!(RingName::from_padded(name.padded()), Some(name));
        }
        for bad in ["", "Edge", "a b", "a.b", "../a", "abcdefghijklmnopqrstuvwxy", "ä"] {
            assert!(bad.parse::<RingName>().is_err(), "{bad}");
        }
        assert_eq!(RingName::from_padded([0; RING_NAME_LEN]), None);
    }

    #[test]
    fn an_id_has_four_bits() {
        let key = |id| {
            Key::new("edge".parse().unwrap(), id, Secret::random().unwrap(), SystemTime::UNIX_EPOCH).is_ok()
        };
        assert!(key(0) && key(15) && !key(16));
    }
}
