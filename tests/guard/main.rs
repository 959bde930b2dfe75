//! Runs packets through the loaded guard with BPF_PROG_TEST_RUN, as TC and as XDP, and holds what it decides
//! against an oracle that was written from the RFCs. Nothing is attached anywhere.
//!
//! [`packet`] writes frames, [`run`] runs them, [`oracle`] judges; the other modules hold the cases.

mod alerts;
mod block;
mod events;
mod forged;
mod layouts;
mod lists;
mod mutate;
mod oracle;
#[path = "../packets/packet.rs"]
#[allow(dead_code)]
mod packet;
mod races;
#[path = "../packets/random.rs"]
#[allow(dead_code)]
mod random;
mod replay;
mod run;
mod scrub;
#[path = "../packets/stacks.rs"]
mod stacks;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::process::ExitCode;

use support::Need;

/// Each case under the name of its function.
macro_rules! cases {
    ($($module:ident: $($function:ident)*;)*) => {
        vec![$($(support::case(
            concat!(stringify!($module), "::", stringify!($function)),
            &[Need::Root],
            $module::$function,
        ),)*)*]
    };
}

fn main() -> ExitCode {
    let mut cases = cases![
        table: tc_and_xdp_do_what_the_oracle_says every_verdict_has_a_packet
            a_truncated_frame_to_a_protected_port_never_passes without_a_link_header_the_same_is_decided
            what_may_go_on_to_another_address_never_passes the_packet_stays_as_it_came marks_are_set_at_tc without_rules_everything_passes;
        mutate: mutants_get_what_the_oracle_says;
        forged: a_million_forged_syns_and_none_is_accepted a_key_without_its_secret_accepts_nothing;
        replay: a_token_is_good_for_one_flow_and_its_retransmissions the_bind_mode_leaves_something_free
            a_full_bucket_refuses_and_forgets_in_time nothing_of_what_is_free_may_differ
            what_is_bound_to_the_flow_needs_no_room a_clock_that_is_set_makes_nothing_good_again
            only_what_is_accepted_is_counted_as_use_of_its_key;
        layouts: every_byte_of_what_stacks_send_counts;
        scrub: the_checksum_is_that_of_a_packet_without_a_token a_checksum_that_is_left_to_the_device_stays
            a_whole_checksum_that_looks_partial_is_mended at_the_edge_of_trust_nothing_is_refused
            what_cannot_be_scrubbed_is_dropped a_rule_can_mark_and_scrub the_application_can_ask_who_it_was;
        block: too_many_refused_packets_block_their_source_and_no_other
            a_source_that_is_blocked_gets_in_with_a_keyed_token who_is_exempt_is_never_blocked
            in_mode_observe_nothing_is_dropped without_being_asked_nobody_is_blocked a_source_can_be_let_in_again
            who_finds_no_room_is_not_counted who_has_a_right_static_token_is_not_counted
            a_source_is_as_many_bits_as_the_rules_say a_block_ends_and_a_window_as_well;
        alerts: each_severity_is_told_once_in_a_window new_thresholds_count_at_once
            a_window_of_older_rules_ends_where_theirs_are_shorter
            an_alert_that_finds_no_room_is_told_later;
        events: an_event_says_what_was_decided_and_nothing_of_the_packet_before
            one_of_ten_packets_makes_an_event_and_all_are_counted
            without_a_reader_packets_are_counted_but_make_no_event;
        lists: exempt_and_blocked_sources_by_their_longest_prefix an_entry_that_has_expired_shows_what_is_around_it
            an_entry_expires_by_the_clock_of_tokens
            a_mapped_source_reaches_no_list new_rules_replace_all_of_the_old_ones rules_without_a_list_forget_it
            while_lists_are_replaced_a_source_is_on_the_old_one_or_the_new_one
            random_lists_decide_as_a_look_at_every_entry a_million_entries_and_then_few_and_none
            a_list_that_needs_one_page_more however_sources_lie_all_are_found;
    ];
    cases.push(support::case(
        "races::two_cpus_never_accept_one_token_for_two_flows",
        &[Need::Root, Need::Cpus(races::CPUS)],
        races::two_cpus_never_accept_one_token_for_two_flows,
    ));
    cases.push(support::case(
        "races::a_bucket_that_is_never_free_takes_no_new_token",
        &[
            Need::Root,
            Need::Is(races::is_lock_a_count(), "its lock is bpf_spin_lock(), which only a program can hold"),
        ],
        races::a_bucket_that_is_never_free_takes_no_new_token,
    ));
    support::run(cases)
}
