//! Keys on disk: a directory for each instance, a file for each key.
//!
//! ```text
//! # /etc/netoken/keys/default/edge-3.key
//! ring = "edge"
//! id = 3
//! state = "signing"
//! created = "2026-11-21T08:30:00Z"
//! secret = "32 hexadecimal digits; not there once the key is retired"
//! ```
//!
//! The files are read here and by no general parser, because that would copy the secret and might show it in an
//! error. A file that others than its owner can read is refused.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::ops::Deref;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::SystemTime;

use anyhow::{Context, Result, anyhow, bail};
use nix::fcntl::{Flock, FlockArg};
use zeroize::Zeroizing;

use super::{Key, RingName, SECRET_LEN, Secret, State, check_id};
use crate::state::{instance_flag, wait_for};

/// Names another directory than /etc/netoken/keys.
pub const DIR_VARIABLE: &str = "NETOKEN_KEYS";
pub(crate) const DEFAULT_DIR: &str = "/etc/netoken/keys";
const OPENING: &str = "opening the key directory";
/// Longer than any key file, with comments.
const FILE_LEN_MAX: usize = 4096;

/// The keys of one instance.
#[derive(Clone, Debug)]
pub struct KeyDir {
    path: PathBuf,
}

/// Held while keys are changed. Who takes the lock of the state as well takes that first.
#[derive(Debug)]
pub struct KeyLock(#[expect(dead_code, reason = "held, not read")] Flock<File>);

/// Keys as their files have them. Who gives them to the kernel holds them until then, or would undo there what a command
/// has changed meanwhile.
#[derive(Debug)]
pub struct HeldKeys {
    keys: Vec<Key>,
    _lock: KeyLock,
}

impl Deref for HeldKeys {
    type Target = [Key];

    fn deref(&self) -> &[Key] {
        &self.keys
    }
}

/// The keys of an instance, which must suffice to sign with these rings; nothing if it has no key directory.
///
/// # Errors
/// They cannot be read, or a ring has no key that signs.
pub fn keys_for(instance: &str, rings: impl IntoIterator<Item = RingName>) -> Result<Option<HeldKeys>> {
    keys_unless(None, instance, rings)
}

/// The same, for who handles signals: waits for other commands only until `stop` is set.
///
/// # Errors
/// The same, or `stop` was set while another command changed keys.
pub(crate) fn keys_unless(
    stop: Option<&AtomicBool>,
    instance: &str,
    rings: impl IntoIterator<Item = RingName>,
) -> Result<Option<HeldKeys>> {
    super::guard_process()?;
    let dir = KeyDir::of_instance(instance);
    let held = dir.hold_unless(stop)?;
    for ring in rings {
        if super::signer(held.as_deref().unwrap_or_default(), ring).is_none() {
            bail!(
                "the policy makes tokens with key ring '{ring}', of which no key in {} signs; make one with: netoken \
                 key new {ring}{}",
                dir.path().display(),
                instance_flag(instance)
            );
        }
    }
    Ok(held)
}

impl KeyDir {
    /// Where the keys of an instance are, unless somebody says otherwise.
    pub fn of_instance(instance: &str) -> KeyDir {
        // Set to nothing, as a unit file of systemd does it, it is not set.
        let base = std::env::var_os(DIR_VARIABLE).filter(|dir| !dir.is_empty());
        let base = base.map_or(PathBuf::from(DEFAULT_DIR), PathBuf::from);
        KeyDir { path: base.join(instance) }
    }

    /// Another directory.
    pub fn at(path: PathBuf) -> KeyDir {
        KeyDir { path }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a key is, or would be.
    pub fn file_of(&self, ring: RingName, id: u8) -> PathBuf {
        self.path.join(format!("{ring}-{id}.key"))
    }

    /// Keeps other commands from changing keys; makes the directory if it is not there.
    ///
    /// # Errors
    /// It cannot be made or locked.
    pub fn lock(&self) -> Result<KeyLock> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.path)
            .map_err(|error| explain(error, "making the key directory", &self.path))?;
        let dir = File::open(&self.path).map_err(|error| explain(error, OPENING, &self.path))?;
        self.lock_open(dir, None)
    }

    fn lock_open(&self, dir: File, stop: Option<&AtomicBool>) -> Result<KeyLock> {
        let shown = self.path.display();
        let holder = format!("another netoken command to finish with the keys in {shown}");
        let held = Flock::lock(dir, FlockArg::LockExclusiveNonblock).map(Some).or_else(|(dir, _)| {
            note!("waiting for {holder}");
            wait_for(dir, stop)
        });
        match held.map_err(|errno| anyhow!("locking the key directory {shown}: {errno}"))? {
            Some(held) => Ok(KeyLock(held)),
            None => bail!("stopped while waiting for {holder}"),
        }
    }

    /// All keys, and keeps other commands from changing them; nothing if there is no such directory.
    ///
    /// # Errors
    /// They cannot be locked or read.
    pub fn hold(&self) -> Result<Option<HeldKeys>> {
        self.hold_unless(None)
    }

    /// The same, for who handles signals: waits for other commands only until `stop` is set.
    ///
    /// # Errors
    /// The same, or `stop` was set while another command changed keys.
    pub(crate) fn hold_unless(&self, stop: Option<&AtomicBool>) -> Result<Option<HeldKeys>> {
        let dir = match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other.map_err(|error| explain(error, OPENING, &self.path))?,
        };
        let lock = self.lock_open(dir, stop)?;
        Ok(Some(HeldKeys { keys: self.load()?, _lock: lock }))
    }

    /// All keys, by id; no key if there is no such directory.
    ///
    /// # Errors
    /// A file cannot be read or is not a key, others can read it, or two keys have the same id.
    pub fn load(&self) -> Result<Vec<Key>> {
        let entries = match fs::read_dir(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            other => other.map_err(|error| explain(error, "reading the key directory", &self.path))?,
        };
        let mut keys = Vec::new();
        for entry in entries {
            let path =
                entry.with_context(|| format!("reading the key directory {}", self.path.display()))?.path();
            if path.extension().is_none_or(|extension| extension != "key") {
                continue;
            }
            let key = read(&path)?;
            if path != self.file_of(key.ring, key.id) {
                bail!(
                    "reading the key {}: it holds key {} of ring '{}'; rename it to {}",
                    path.display(),
                    key.id,
                    key.ring,
                    self.file_of(key.ring, key.id).display()
                );
            }
            keys.push(key);
        }
        keys.sort_by_key(|key| key.id);
        super::settle(&mut keys).with_context(|| format!("reading the keys in {}", self.path.display()))?;
        Ok(keys)
    }

    /// Writes a key, in one step and so that nobody else can read it at any time.
    ///
    /// # Errors
    /// It cannot be written; then what was there is still there.
    pub fn save(&self, key: &Key, _lock: &KeyLock) -> Result<()> {
        let path = self.file_of(key.ring, key.id);
        let new = path.with_extension("new");
        let written = write(&new, key).and_then(|()| fs::rename(&new, &path)).and_then(|()| {
            // So that it is still there after a power failure.
            File::open(&self.path)?.sync_all()
        });
        if written.is_err() {
            fs::remove_file(&new).ok();
        }
        written.with_context(|| format!("writing the key {}", path.display()))
    }

    /// Removes a key.
    ///
    /// # Errors
    /// It cannot be removed.
    pub fn remove(&self, key: &Key, _lock: &KeyLock) -> Result<()> {
        let path = self.file_of(key.ring, key.id);
        fs::remove_file(&path).with_context(|| format!("removing the key {}", path.display()))
    }
}

/// Keys are root's, so that is what is missing most of the time.
fn explain(error: io::Error, doing: &str, path: &Path) -> anyhow::Error {
    let remedy =
        if error.kind() == io::ErrorKind::PermissionDenied { "; keys belong to root (try sudo)" } else { "" };
    anyhow!("{doing} {}: {error}{remedy}", path.display())
}

/// Reads one key file.
///
/// # Errors
/// It cannot be read, others can read it, or it is not a key.
pub fn read(path: &Path) -> Result<Key> {
    let doing = || format!("reading the key {}", path.display());
    let failed = |error| explain(error, "reading the key", path);
    // Not even opened: that alone can do something to a device. Nor does a pipe that comes meanwhile keep us for ever.
    check_kind(&fs::symlink_metadata(path).map_err(failed)?).with_context(doing)?;
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
        .open(path)
        .map_err(failed)?;
    let meta = file.metadata().with_context(doing)?;
    check_kind(&meta).with_context(doing)?;
    check_access(path, &meta).with_context(doing)?;
    // One buffer that never grows, so that no copy is left behind.
    let mut text = Zeroizing::new(vec![0; FILE_LEN_MAX]);
    let mut len = 0;
    loop {
        match file.read(&mut text[len..]).with_context(doing)? {
            0 => break,
            more => len += more,
        }
        if len == FILE_LEN_MAX {
            bail!("{}: it is longer than {FILE_LEN_MAX} bytes, which no key is", doing());
        }
    }
    parse(&text[..len]).with_context(doing)
}

fn check_kind(meta: &fs::Metadata) -> Result<()> {
    if !meta.is_file() {
        bail!("it is no regular file, which a key has to be; put the file itself there, or remove it");
    }
    Ok(())
}

fn check_access(path: &Path, meta: &fs::Metadata) -> Result<()> {
    let shown = path.display();
    if meta.mode() & 0o077 != 0 {
        bail!(
            "others than its owner can read or write it (mode {:04o}); run `chmod 600 {shown}`, and make a new key \
             if somebody may have read this one",
            meta.mode() & 0o7777
        );
    }
    let me = nix::unistd::geteuid().as_raw();
    if meta.uid() != 0 && meta.uid() != me {
        bail!("it belongs to user {}, who can read it; run `chown root {shown}`", meta.uid());
    }
    Ok(())
}

/// What a file says, as far as it is read.
#[derive(Default)]
struct Fields {
    ring: Option<RingName>,
    id: Option<u8>,
    state: Option<State>,
    created: Option<SystemTime>,
    secret: Option<Secret>,
}

/// No error shows a value: it might be the secret in a wrong place.
fn parse(text: &[u8]) -> Result<Key> {
    let mut fields = Fields::default();
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.trim_ascii();
        if line.is_empty() || line.starts_with(b"#") {
            continue;
        }
        let at = line
            .iter()
            .position(|byte| *byte == b'=')
            .with_context(|| format!("line {number} has no '='"))?;
        let (name, value) = (line[..at].trim_ascii(), line[at + 1..].trim_ascii());
        let value = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
        fields.set(name, value).with_context(|| format!("line {number}"))?;
    }
    let missing = |what: &str| format!("'{what}' is missing");
    let state = fields.state.with_context(|| missing("state"))?;
    if state == State::Retired && fields.secret.is_some() {
        bail!("a retired key has no secret; remove that line");
    }
    if state != State::Retired && fields.secret.is_none() {
        bail!(missing("secret"));
    }
    Ok(Key {
        ring: fields.ring.with_context(|| missing("ring"))?,
        id: fields.id.with_context(|| missing("id"))?,
        state,
        created: fields.created.with_context(|| missing("created"))?,
        secret: fields.secret,
    })
}

impl Fields {
    fn set(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        fn put<T>(place: &mut Option<T>, value: Option<T>, what: &str) -> Result<()> {
            let value = value.with_context(|| format!("the value is not {what}"))?;
            match place.replace(value) {
                None => Ok(()),
                Some(_) => bail!("it is given twice"),
            }
        }
        let text = || str::from_utf8(value).ok();
        match name {
            b"ring" => put(&mut self.ring, text().and_then(|t| t.parse().ok()), "the name of a key ring"),
            b"id" => {
                let id = text().and_then(|t| t.parse().ok()).and_then(|id| check_id(id).ok());
                put(&mut self.id, id, "a number from 0 to 15")
            }
            b"state" => {
                let state = text().and_then(State::from_name);
                put(&mut self.state, state, "\"verify-only\", \"signing\" or \"retired\"")
            }
            b"created" => {
                let created = text().and_then(|t| humantime::parse_rfc3339(t).ok());
                put(&mut self.created, created, "a time like 2026-11-21T08:30:00Z")
            }
            b"secret" => put(&mut self.secret, Secret::from_hex(value), "32 hexadecimal digits"),
            _ => bail!("there is no such field; a key has ring, id, state, created and secret"),
        }
    }
}

fn write(path: &Path, key: &Key) -> io::Result<()> {
    // A left-over of a command that was killed.
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    let Key { ring, id, state, created, secret } = key;
    writeln!(file, "# A key of netoken. Whoever can read it can forge tokens.")?;
    writeln!(file, "ring = \"{ring}\"\nid = {id}\nstate = \"{}\"", state.name())?;
    writeln!(file, "created = \"{}\"", humantime::format_rfc3339_micros(*created))?;
    if let Some(secret) = secret {
        let mut digits = Zeroizing::new([0u8; 2 * SECRET_LEN]);
        for (pair, byte) in digits.chunks_exact_mut(2).zip(secret.bytes()) {
            let digit = |value: u8| b"0123456789abcdef"[usize::from(value)];
            (pair[0], pair[1]) = (digit(byte >> 4), digit(byte & 0xf));
        }
        file.write_all(b"secret = \"")?;
        file.write_all(digits.as_slice())?;
        file.write_all(b"\"\n")?;
    }
    file.sync_all()
}

#[cfg(test)]
mod tests;
