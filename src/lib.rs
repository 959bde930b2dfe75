//! netoken writes a token into the first packet of TCP connections, as a TCP option, in the kernel.
//!
//! Data flows one way. Downwards: [`cli`] turns arguments into checked values, [`policy`] and
//! [`program`] put them into maps, [`hooks`] attach the program. Upwards: [`events`] reads what the
//! program reports and shows it. [`state`] knows where things are kept between two commands.
//!
//! [`guard`] is the other side: it checks the tokens of what comes in.
//!
//! Beside that, [`token::keyed`] makes and checks keyed tokens without any kernel, [`keys`] keeps what they are
//! made with, and [`decode`] finds them in captures. [`peer`] tells an application who opened a connection.

#[macro_use]
mod note;

pub mod cli;
pub mod clock;
pub mod counters;
pub mod decode;
pub mod events;
pub mod files;
pub mod guard;
pub mod hooks;
mod inner;
pub mod kernel;
pub mod keys;
pub mod netns;
mod object;
pub mod peer;
mod pins;
pub mod policy;
pub mod privileges;
pub mod program;
mod realtime;
mod rings;
pub mod state;
pub mod token;

/// What `libbpf-cargo` generates from `src/bpf`: the loader, and the types that cross the border.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
mod skel {
    include!(concat!(env!("OUT_DIR"), "/netoken.skel.rs"));
}

/// The same for the guard.
#[allow(missing_docs, clippy::all, clippy::pedantic, clippy::undocumented_unsafe_blocks)]
mod guard_skel {
    include!(concat!(env!("OUT_DIR"), "/guard.skel.rs"));
}

/// The types and constants that C and Rust share, read out of the compiled program's BTF.
pub mod types {
    pub use crate::skel::types::{
        netoken_accept as Accept, netoken_action as Action, netoken_bind as Bind, netoken_check as Check,
        netoken_clock as Clock, netoken_condition as RawCondition, netoken_condition_kind as ConditionKind,
        netoken_config as Config, netoken_counter as Counter, netoken_entry as Entry, netoken_event as Event,
        netoken_facts as Facts, netoken_fault as Fault, netoken_field as Field, netoken_flow as Flow,
        netoken_form as Form, netoken_generation as Generation, netoken_hits as Hits, netoken_key as Key,
        netoken_key_count as KeyCount, netoken_key_size as KeySize, netoken_key_state as KeyState,
        netoken_live as Live, netoken_need as Need, netoken_question as Question, netoken_record as Record,
        netoken_ring as Ring, netoken_rule as Rule, netoken_set_key as SetKey, netoken_shape as Shape,
        netoken_size as Size, netoken_token_spec as RawTokenSpec, netoken_verdict as Verdict,
        netoken_when_full as WhenFull,
    };
}

/// True if an error says that nobody reads our output any more, which ends a command but is no failure.
pub fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let io = cause.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        let json = cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
        io.or(json) == Some(std::io::ErrorKind::BrokenPipe)
    })
}
