//! Rotation: what the next step of a ring is, and whether it may be done. Decides only; the caller writes files and
//! maps.
//!
//! 1. *add*: a new key that everybody can verify with, before anybody signs with it;
//! 2. *sign*: the newest key signs, the one before only verifies;
//! 3. *retire*: the old one is given up, once no token that was made with it is seen any more.

use std::fmt;
use std::time::{Duration, SystemTime};

use anyhow::{Result, bail};

use super::live::Use;
use super::{KEYS_MAX, Key, RingName, State, signer};
use crate::state::instance_flag;

/// One step.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Step {
    /// Make a key that only verifies.
    Add,
    /// Let the newest key sign.
    Sign,
    /// Give up the keys that are older than the signing one.
    Retire,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Step::Add => "add",
            Step::Sign => "sign",
            Step::Retire => "retire",
        })
    }
}

/// The newest of those that only verify, if it is newer than the one that signs.
fn successor(keys: &[Key], ring: RingName) -> Option<&Key> {
    let signing = signer(keys, ring).map(|key| key.created);
    keys.iter()
        .filter(|key| key.ring == ring && key.state == State::VerifyOnly)
        .filter(|key| signing.is_none_or(|created| key.created > created))
        .max_by_key(|key| key.created)
}

/// Those that only verify and are not to sign any more.
fn outdated(keys: &[Key], ring: RingName) -> Vec<u8> {
    let Some(signing) = signer(keys, ring) else { return Vec::new() };
    keys.iter()
        .filter(|key| key.ring == ring && key.state == State::VerifyOnly && key.created <= signing.created)
        .map(|key| key.id)
        .collect()
}

/// What comes next for a ring.
pub fn next_step(keys: &[Key], ring: RingName) -> Step {
    match () {
        () if successor(keys, ring).is_some() => Step::Sign,
        () if !outdated(keys, ring).is_empty() => Step::Retire,
        () => Step::Add,
    }
}

/// An id for a new key: one that was never used, or else that of the key that was retired first made.
///
/// # Errors
/// All are live.
pub fn free_id(keys: &[Key], instance: &str) -> Result<u8> {
    let unused = (0..KEYS_MAX as u8).find(|id| !keys.iter().any(|key| key.id == *id));
    let retired = || keys.iter().filter(|key| !key.is_live()).min_by_key(|key| key.created).map(|key| key.id);
    match unused.or_else(retired) {
        Some(id) => Ok(id),
        None => bail!(
            "finding an id for a new key: all {KEYS_MAX} are live, and a token has four bits for it; retire old \
             ones with: netoken key rotate RING --step retire{flag}; or give a ring up: remove its files, and run: \
             netoken key load{flag}",
            flag = instance_flag(instance)
        ),
    }
}

/// The time from which a new key of a ring is dated: now, or, as the order of keys goes by it, behind all that the ring
/// has, also those that were made while the clock was ahead.
pub fn date(keys: &[Key], ring: RingName, now: SystemTime) -> SystemTime {
    let newest = keys.iter().filter(|key| key.ring == ring && key.is_live()).map(|key| key.created).max();
    // Key files have microseconds.
    newest.map_or(now, |newest| now.max(newest + Duration::from_micros(1)))
}

/// Lets the newest key of a ring sign. Returns its id and that of the one that signed before.
///
/// # Errors
/// There is none that is newer than the one that signs.
pub fn sign(keys: &mut [Key], ring: RingName) -> Result<(u8, Option<u8>)> {
    let Some(next) = successor(keys, ring).map(|key| key.id) else {
        bail!(
            "choosing the signing key of ring '{ring}': there is no newer key; the step that makes one is: add"
        );
    };
    let before = signer(keys, ring).map(|key| key.id);
    for key in keys.iter_mut().filter(|key| key.ring == ring && key.is_live()) {
        key.state = if key.id == next { State::Signing } else { State::VerifyOnly };
    }
    Ok((next, before))
}

/// From when on it is known what is done with keys.
#[derive(Clone, Debug)]
pub struct Known {
    /// What was done before nobody has counted.
    pub since: SystemTime,
    /// Why not before.
    pub why: String,
}

/// Retires the keys of a ring that are older than the one that signs. Returns their ids. `use_of` says what has been
/// done with a key on this host, as far as it is `known`; one that may have been used in the last `idle` is still seen.
///
/// # Errors
/// There is none, or one is still seen and nobody forces it.
pub fn retire(
    keys: &mut [Key],
    ring: RingName,
    use_of: impl Fn(u8) -> Result<Use>,
    known: &Known,
    now: SystemTime,
    idle: Duration,
    force: bool,
) -> Result<Vec<u8>> {
    let old = outdated(keys, ring);
    if old.is_empty() {
        bail!(
            "retiring keys of ring '{ring}': none is older than the one that signs; the step that comes next is: {}",
            next_step(keys, ring)
        );
    }
    for id in old.iter().copied().filter(|_| !force) {
        let last = use_of(id)?.last();
        // A time in the future means that the clock was set back: how long ago it was nobody knows.
        let ago =
            now.duration_since(last.map_or(known.since, |last| last.max(known.since))).unwrap_or_default();
        if ago >= idle {
            continue;
        }
        let seen = match last {
            Some(last) if last >= known.since => format!("it was used {} s ago", ago.as_secs()),
            _ => format!("whether it was used until {} s ago is not known ({})", ago.as_secs(), known.why),
        };
        bail!(
            "retiring key {id} of ring '{ring}': {seen}, and tokens made with it may still be on their way; wait until \
             it is idle for {} s, or retire it with --force and lose those connections' first attempts",
            idle.as_secs()
        );
    }
    keys.iter_mut().filter(|key| old.contains(&key.id)).for_each(Key::retire);
    Ok(old)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::Secret;

    const EDGE: &str = "edge";

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn key(ring: &str, id: u8, created: u64) -> Key {
        Key::new(ring.parse().unwrap(), id, Secret::random().unwrap(), at(created)).unwrap()
    }

    fn since(seconds: u64) -> Known {
        Known { since: at(seconds), why: "it counts since then".to_string() }
    }

    fn unused(_: u8) -> Result<Use> {
        Ok(Use::default())
    }

    #[test]
    fn a_rotation_has_three_steps_and_begins_anew() {
        let ring = EDGE.parse().unwrap();
        let mut keys = vec![key("other", 9, 5)];
        for round in 0..3u8 {
            assert_eq!(next_step(&keys, ring), Step::Add);
            keys.push(key(EDGE, round, 10 + u64::from(round)));
            assert_eq!(next_step(&keys, ring), Step::Sign);
            let before = round.checked_sub(1);
            assert_eq!(sign(&mut keys, ring).unwrap(), (round, before));
            assert_eq!(signer(&keys, ring).unwrap().id(), round);
            let Some(before) = before else { continue };
            assert_eq!(next_step(&keys, ring), Step::Retire);
            let retired =
                retire(&mut keys, ring, unused, &since(900), at(1000), Duration::from_secs(60), false)
                    .unwrap();
            assert_eq!(retired, [before]);
            let old = keys.iter().find(|key| key.id() == before).unwrap();
            assert!(!old.is_live() && old.secret().is_none());
        }
        assert_eq!(keys[0].state(), State::VerifyOnly);
    }

    #[test]
    fn a_step_of_a_ring_leaves_all_others_as_they_are() {
        let (ring, other) = (EDGE.parse().unwrap(), "other".parse().unwrap());
        let mut keys = vec![key(EDGE, 0, 1), key(EDGE, 1, 2), key("other", 8, 1), key("other", 9, 5)];
        assert_eq!(sign(&mut keys, other).unwrap(), (9, None));
        assert_eq!(signer(&keys, ring).map(Key::id), None);
        assert_eq!((next_step(&keys, ring), next_step(&keys, other)), (Step::Sign, Step::Retire));
        assert_eq!(sign(&mut keys, ring).unwrap(), (1, None));
        let signers = [ring, other].map(|ring| signer(&keys, ring).map(Key::id));
        assert_eq!(signers, [Some(1), Some(9)]);
        crate::keys::settle(&mut keys).unwrap();
        let retired = retire(&mut keys, ring, unused, &since(2), at(1000), Duration::ZERO, false).unwrap();
        assert_eq!(retired, [0]);
        assert!(keys.iter().filter(|key| key.ring == other).all(Key::is_live));
        assert_eq!(date(&keys, ring, at(3)), at(3));
    }

    #[test]
    fn only_what_is_older_is_retired_and_what_is_retired_never_signs_again() {
        let ring = EDGE.parse().unwrap();
        let mut keys = vec![key(EDGE, 0, 1), key(EDGE, 1, 2)];
        sign(&mut keys, ring).unwrap();
        // Of the same moment as the one that signs.
        keys.push(key(EDGE, 2, 2));
        assert_eq!(next_step(&keys, ring), Step::Retire);
        // One that comes next, and one that was given up before its time.
        keys.extend([key(EDGE, 3, 3), key(EDGE, 4, 9)]);
        keys[4].retire();
        assert_eq!(next_step(&keys, ring), Step::Sign);
        let retired = retire(&mut keys, ring, unused, &since(2), at(1000), Duration::ZERO, false).unwrap();
        assert_eq!(retired, [0, 2]);
        assert_eq!(sign(&mut keys, ring).unwrap(), (3, Some(1)));
        let states: Vec<State> = keys.iter().map(Key::state).collect();
        assert_eq!(
            states,
            [State::Retired, State::VerifyOnly, State::Retired, State::Signing, State::Retired]
        );
        assert!(keys[4].secret().is_none());
        // Nor does it hold up the date of the next.
        assert_eq!(date(&keys, ring, at(5)), at(5));
        retire(&mut keys, ring, unused, &since(2), at(1000), Duration::ZERO, false).unwrap();
        assert_eq!(next_step(&keys, ring), Step::Add);
        assert!(sign(&mut keys, ring).is_err());
    }

    #[test]
    fn a_new_key_signs_next_though_the_clock_was_ahead() {
        let ring = EDGE.parse().unwrap();
        let mut keys = vec![key(EDGE, 0, 5000), key("other", 9, 9000)];
        sign(&mut keys, ring).unwrap();
        for id in 1..3 {
            let created = date(&keys, ring, at(100));
            keys.push(Key::new(ring, id, Secret::random().unwrap(), created).unwrap());
            assert_eq!(next_step(&keys, ring), Step::Sign);
            assert_eq!(sign(&mut keys, ring).unwrap().0, id);
        }
        assert!(keys.iter().all(|key| key.is_live()) && date(&keys, ring, at(6000)) == at(6000));
        assert_eq!(date(&[], ring, at(100)), at(100));
    }

    #[test]
    fn a_key_that_is_still_seen_is_not_retired_unless_forced() {
        let ring = EDGE.parse().unwrap();
        let idle = Duration::from_secs(60);
        for (last, now, force, works) in [
            (1000, 1059, false, false),
            (1000, 1060, false, true),
            (1000, 1000, true, true),
            // The clock was set back.
            (1000, 400, false, false),
        ] {
            let mut keys = vec![key(EDGE, 0, 1), key(EDGE, 1, 2)];
            sign(&mut keys, ring).unwrap();
            for by_use in [
                Use { made: 1, made_at: Some(at(last)), ..Use::default() },
                Use { accepted: 1, accepted_at: Some(at(last)), ..Use::default() },
            ] {
                let retired = retire(&mut keys, ring, |_| Ok(by_use), &since(2), at(now), idle, force);
                assert_eq!(retired.is_ok(), works, "{last} {now} {force}: {retired:?}");
                if let Err(error) = retired {
                    assert!(format!("{error:#}").contains("--force"), "{error:#}");
                    assert!(keys[0].is_live());
                } else {
                    break;
                }
            }
        }
    }

    #[test]
    fn what_nobody_counted_may_have_been_a_use() {
        let ring = EDGE.parse().unwrap();
        let counted = |last| Use { accepted: 1, accepted_at: Some(at(last)), ..Use::default() };
        for (used, known, now, says) in [
            (Use::default(), 1000, 1059, Some("until 59 s ago is not known (it counts since then)")),
            (Use::default(), 1000, 1060, None),
            (counted(900), 1000, 1030, Some("until 30 s ago is not known")),
            (counted(1010), 1000, 1030, Some("it was used 20 s ago")),
            (counted(1010), 1000, 1070, None),
            // The clock was set back.
            (Use::default(), 1000, 400, Some("until 0 s ago")),
        ] {
            let mut keys = vec![key(EDGE, 0, 1), key(EDGE, 1, 2)];
            sign(&mut keys, ring).unwrap();
            let idle = Duration::from_secs(60);
            let retired = retire(&mut keys, ring, |_| Ok(used), &since(known), at(now), idle, false);
            match (says, retired) {
                (None, Ok(ids)) => assert_eq!(ids, [0]),
                (Some(says), Err(error)) => assert!(format!("{error:#}").contains(says), "{error:#}"),
                (_, other) => panic!("{known} {now}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_step_out_of_turn_is_refused_with_the_one_that_is_due() {
        let ring = EDGE.parse().unwrap();
        let mut keys = vec![key(EDGE, 0, 1)];
        sign(&mut keys, ring).unwrap();
        assert!(format!("{:#}", sign(&mut keys, ring).unwrap_err()).contains("add"));
        let early = retire(&mut keys, ring, unused, &since(2), at(9), Duration::ZERO, true);
        assert!(format!("{:#}", early.unwrap_err()).contains("add"));
    }

    #[test]
    fn ids_are_used_up_before_one_is_used_again() {
        let mut keys: Vec<Key> = (0..16).map(|id| key(EDGE, id, 100 - u64::from(id))).collect();
        assert!(format!("{:#}", free_id(&keys, "default").unwrap_err()).contains("retire"));
        keys[3].state = State::Retired;
        keys[7].state = State::Retired;
        assert_eq!(free_id(&keys, "default").unwrap(), 7);
        keys.remove(5);
        assert_eq!(free_id(&keys, "default").unwrap(), 5);
    }
}
