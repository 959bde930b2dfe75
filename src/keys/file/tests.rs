use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use super::*;

const GOOD: &str = "# comment\n\nring = \"edge\"\nid = 3\nstate = \"signing\"\n\
                    created = \"2026-11-21T08:30:00Z\"\nsecret = \"000102030405060708090a0b0c0d0e0f\"\n";

fn dir() -> (tempfile::TempDir, KeyDir) {
    let temp = tempfile::tempdir().unwrap();
    let keys = KeyDir::at(temp.path().join("keys"));
    (temp, keys)
}

fn key(ring: &str, id: u8, state: State) -> Key {
    let made = SystemTime::UNIX_EPOCH + Duration::from_secs(1_795_249_800);
    let mut key = Key::new(ring.parse().unwrap(), id, Secret::random().unwrap(), made).unwrap();
    key.state = state;
    key
}

#[test]
fn a_key_reads_back_as_it_was_written_and_only_its_owner_can_read_it() {
    let (_temp, keys) = dir();
    assert!(keys.load().unwrap().is_empty());
    let lock = keys.lock().unwrap();
    let made = key("edge", 3, State::Signing);
    keys.save(&made, &lock).unwrap();
    keys.save(&made, &lock).unwrap();
    let read = keys.load().unwrap();
    assert_eq!((read.len(), read[0].ring, read[0].id, read[0].state), (1, made.ring, 3, State::Signing));
    assert_eq!(read[0].created, made.created);
    assert_eq!(read[0].secret().unwrap().bytes(), made.secret().unwrap().bytes());
    let mode = fs::metadata(keys.file_of(made.ring, 3)).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    assert_eq!(fs::metadata(keys.path()).unwrap().mode() & 0o777, 0o700);
    assert_eq!(fs::read_dir(keys.path()).unwrap().count(), 1);
}

#[test]
fn a_file_that_others_can_read_is_refused_with_the_remedy() {
    let (_temp, keys) = dir();
    let lock = keys.lock().unwrap();
    let made = key("edge", 3, State::Signing);
    keys.save(&made, &lock).unwrap();
    let path = keys.file_of(made.ring, 3);
    for mode in [0o640, 0o604, 0o620, 0o610, 0o666] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        let error = format!("{:#}", keys.load().unwrap_err());
        assert!(error.contains("chmod 600") && error.contains("edge-3.key"), "{mode:o}: {error}");
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
    keys.load().unwrap();
}

#[test]
fn a_link_is_not_followed() {
    let (temp, keys) = dir();
    let _lock = keys.lock().unwrap();
    let real = temp.path().join("real");
    fs::write(&real, GOOD).unwrap();
    fs::set_permissions(&real, fs::Permissions::from_mode(0o600)).unwrap();
    read(&real).unwrap();
    std::os::unix::fs::symlink(&real, keys.path().join("edge-3.key")).unwrap();
    assert!(keys.load().is_err());
}

#[test]
fn a_pipe_is_refused_and_not_waited_for() {
    let (_temp, keys) = dir();
    let _lock = keys.lock().unwrap();
    let path = keys.path().join("edge-3.key");
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRUSR).unwrap();
    let (sender, loaded) = std::sync::mpsc::channel();
    std::thread::spawn(move || sender.send(keys.load().map(drop)));
    let loaded = loaded.recv_timeout(Duration::from_secs(20)).expect("an answer, and no wait for a writer");
    let error = format!("{:#}", loaded.unwrap_err());
    assert!(error.contains("edge-3.key") && error.contains("no regular file"), "{error}");
}

#[test]
fn what_is_wrong_is_named_without_a_value() {
    let secret = "000102030405060708090a0b0c0d0e0f";
    for (from, to, expect) in [
        ("ring = \"edge\"", "ring = \"EDGE\"", "line 3: the value is not the name of a key ring"),
        ("id = 3", "id = 16", "line 4: the value is not a number from 0 to 15"),
        ("id = 3", "id", "line 4 has no '='"),
        ("signing", "sign", "line 5: the value is not \"verify-only\""),
        ("2026", "20261", "line 6: the value is not a time"),
        ("0e0f", "0e0", "line 7: the value is not 32 hexadecimal digits"),
        ("0e0f\"", "0e0f", "line 7: the value is not 32 hexadecimal digits"),
        ("secret =", "secrt =", "line 7: there is no such field"),
        ("secret =", "id =", "line 7: the value is not a number"),
        ("secret =", "state =", "line 7: the value is not"),
        ("id = 3", "ring = \"edge\"", "line 4: it is given twice"),
        ("id = 3\n", "", "'id' is missing"),
        ("signing", "retired", "a retired key has no secret"),
    ] {
        let text = GOOD.replacen(from, to, 1);
        assert_ne!(text, GOOD);
        let error = format!("{:#}", parse(text.as_bytes()).unwrap_err());
        assert!(error.contains(expect), "{to}: {error}");
        assert!(!error.contains(&secret[..8]), "{error}");
    }
    let (without, _) = GOOD.split_once("secret").unwrap();
    assert!(parse(without.as_bytes()).is_err());
    assert!(parse(without.replace("signing", "retired").as_bytes()).is_ok());
    assert!(parse(&[0xff, b'=', 0xff]).is_err());
}

#[test]
fn keys_that_contradict_each_other_are_refused() {
    let (_temp, keys) = dir();
    let lock = keys.lock().unwrap();
    for ring in ["edge", "other"] {
        keys.save(&key(ring, 3, State::Signing), &lock).unwrap();
    }
    let error = format!("{:#}", keys.load().unwrap_err());
    assert!(error.contains("both have a key 3"), "{error}");
    let (_temp, keys) = dir();
    let lock = keys.lock().unwrap();
    keys.save(&key("edge", 3, State::Signing), &lock).unwrap();
    fs::rename(keys.path().join("edge-3.key"), keys.path().join("edge-4.key")).unwrap();
    assert!(format!("{:#}", keys.load().unwrap_err()).contains("rename it to"));
}
