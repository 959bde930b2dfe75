//! The structures that cross from C to Rust have the sizes and offsets that are documented for readers in
//! other languages. A change here breaks them, and needs a new version.

use std::mem::{offset_of, size_of};

use anyhow::Result;
use netoken::types::{
    Clock, Config, Counter, Entry, Event, Facts, Flow, Generation, Hits, Key, KeyCount, Question,
    RawCondition, RawTokenSpec, Record, Ring, Rule, SetKey, Shape, Size,
};

use crate::support::ensure_eq;

pub fn structures_have_their_documented_sizes() -> Result<()> {
    for (what, is, documented) in [
        ("event", size_of::<Event>(), 80),
        ("flow", size_of::<Flow>(), 44),
        ("token spec", size_of::<RawTokenSpec>(), 16),
        ("key", size_of::<Key>(), 24),
        ("ring", size_of::<Ring>(), 32),
        ("clock", size_of::<Clock>(), 32),
        ("key count", size_of::<KeyCount>(), 48),
        ("facts", size_of::<Facts>(), 64),
        ("shape", size_of::<Shape>(), 72),
        ("entry", size_of::<Entry>(), 40),
        ("rule", size_of::<Rule>(), 32),
        ("condition", size_of::<RawCondition>(), 12),
        ("record", size_of::<Record>(), 80),
        ("set key", size_of::<SetKey>(), 24),
        ("hits", size_of::<Hits>(), 16),
        ("generation", size_of::<Generation>(), 64 + 72 * Size::SHAPES_MAX.0 as usize),
        ("question", size_of::<Question>(), 384),
        ("config", size_of::<Config>(), 24),
        ("counter", size_of::<Counter>(), 24),
    ] {
        ensure_eq!(is, documented, "size of {what}");
    }
    Ok(())
}

pub fn an_event_has_its_fields_where_they_are_documented() -> Result<()> {
    let flow = offset_of!(Event, flow);
    for (what, is, documented) in [
        ("time_ns", offset_of!(Event, time_ns), 0),
        ("netns_ino", offset_of!(Event, netns_ino), 8),
        ("ifindex", offset_of!(Event, ifindex), 12),
        ("flow.saddr", flow + offset_of!(Flow, saddr), 16),
        ("flow.daddr", flow + offset_of!(Flow, daddr), 32),
        ("flow.sport_be", flow + offset_of!(Flow, sport_be), 48),
        ("flow.dport_be", flow + offset_of!(Flow, dport_be), 50),
        ("flow.isn", flow + offset_of!(Flow, isn), 52),
        ("flow.family", flow + offset_of!(Flow, family), 56),
        ("rule", offset_of!(Event, rule), 60),
        ("token", offset_of!(Event, token), 64),
        ("verdict", offset_of!(Event, verdict), 72),
        ("dropped", offset_of!(Event, dropped), 73),
        ("old_options_len_bytes", offset_of!(Event, old_options_len_bytes), 74),
        ("new_options_len_bytes", offset_of!(Event, new_options_len_bytes), 75),
        ("generation", offset_of!(Event, generation), 76),
    ] {
        ensure_eq!(is, documented, "offset of {what}");
    }
    Ok(())
}

pub fn maps_have_keys_and_values_of_those_sizes() -> Result<()> {
    use libbpf_rs::MapCore;
    let program = netoken::program::Program::load(Default::default(), None)?;
    program.maps.set_policy(&netoken::policy::Policy::stamp_all(netoken::token::Token::DEFAULT))?;
    let policy = program.maps.policy()?.ok_or_else(|| anyhow::anyhow!("no policy in use"))?;
    ensure_eq!(policy.key_size(), 4, "key of the policy");
    ensure_eq!(policy.value_size() as usize, size_of::<Generation>(), "value of the policy");
    ensure_eq!(program.maps.hits.value_size(), 16, "value of the hit counters");
    ensure_eq!(program.maps.counters.key_size(), 4, "key of the counters");
    ensure_eq!(program.maps.counters.value_size(), 24, "value of the counters");
    Ok(())
}
