//! Describes packets, runs them through the loaded classifier with BPF_PROG_TEST_RUN, and holds what comes
//! out against an oracle that was written from the RFCs. Nothing is attached anywhere.
//!
//! [`packet`] writes frames, [`run`] runs them, [`oracle`] judges; the other modules hold the cases.

mod events;
mod faults;
mod keyed;
mod layout;
mod layouts;
mod mutate;
mod named;
mod oracle;
mod others;
mod packet;
mod policies;
mod random;
mod reference;
mod run;
mod shared;
mod sizes;
mod stacks;
#[path = "../support/mod.rs"]
mod support;
mod table;

use std::process::ExitCode;

use libtest_mimic::Trial;
use support::{Need, cases};

fn main() -> ExitCode {
    // For machines without a compiler, which get it from there: NETOKEN_TEST_COMPILED.
    if let Some(dir) = std::env::var_os("NETOKEN_TEST_COMPILE_TO") {
        return match shared::compile(dir.as_ref()) {
            Ok(_) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:?}");
                ExitCode::FAILURE
            }
        };
    }
    let mut cases = everywhere();
    cases.extend(with_a_kernel_sum());
    cases.extend(with_long_packets());
    cases.extend(with_a_small_mtu());
    support::run(cases)
}

fn everywhere() -> Vec<Trial> {
    cases![&[Need::Root];
        table: every_combination_comes_out_right;
        layouts: every_byte_of_what_stacks_send_counts a_restored_list_is_the_one_that_came;
        mutate: a_truncated_frame_leaves_as_it_came mutants_get_what_the_oracle_says;
        others: what_is_not_a_syn_passes_untouched what_is_not_a_syn_passes_without_a_link_header
            only_a_syn_counts;
        named: an_ecn_syn_is_stamped the_bits_beside_the_data_offset_stay a_signed_syn_leaves_as_it_came
            a_second_pass_changes_nothing kind_and_exid_are_settings
            only_this_option_and_exid_is_already_stamped
            the_token_stands_where_it_must nops_between_options_make_room the_limit_is_forty_bytes
            extreme_lists_are_walked_to_the_end ethernet_padding_stays_behind_the_packet;
        sizes: a_payload_of_any_size_moves_whole extension_headers_may_be_long
            a_segment_that_waits_for_offload_must_not_grow
            tcp_checksums_at_the_edges_stay_right ipv4_checksums_at_the_edges_stay_right
            a_wrong_checksum_stays_wrong;
        policies: the_first_rule_that_matches_decides a_default_is_for_both_families_and_rules_beat_it a_prefix_is_for_its_own_family
            without_any_policy_nothing_changes each_rule_stamps_its_own_token
            skip_and_drop_come_before_everything_else when_full_drop_drops_what_cannot_be_stamped
            of_two_reasons_the_first_is_named the_oracle_agrees_with_the_list_of_failures
            the_last_of_as_many_ranges_as_one_packet_may_try_decides each_rule_has_a_counter_however_many_there_are;
        reference: the_kernel_agrees_with_the_reference the_classifier_agrees_with_the_reference;
        faults: a_helper_that_fails_leaves_the_packet_as_it_came
            a_helper_that_fails_drops_where_the_policy_says_so a_restore_that_fails_drops_the_packet
            a_fault_off_the_way_changes_nothing;
        events: an_event_says_what_happened an_event_says_which_policy_decided without_a_reader_syns_are_counted_but_make_no_event
            what_is_not_a_syn_makes_no_event
            one_of_ten_syns_makes_an_event_and_all_are_counted;
        keyed: kernel_and_library_make_the_same_token slots_change_at_their_edges_and_wrap
            a_stepped_clock_is_followed_both_ways a_rule_without_a_signing_key_leaves_the_syn_as_it_came
            another_signer_is_one_write a_key_counts_what_is_made_with_it the_clock_is_read_anew
            a_signer_that_is_not_whole_makes_no_token only_what_a_ring_had_is_told_as_lost
            every_option_list_takes_a_keyed_token_as_a_static_one;
        shared: siphash_gives_its_published_results the_vectors_are_made_and_found_valid
            kernel_and_library_check_alike both_clocks_are_read_as_user_space_reads_them;
        layout: structures_have_their_documented_sizes an_event_has_its_fields_where_they_are_documented
            maps_have_keys_and_values_of_those_sizes;
    ]
}

/// BPF_F_TEST_SKB_CHECKSUM_COMPLETE
fn with_a_kernel_sum() -> Vec<Trial> {
    cases![&[Need::Root, Need::Kernel(6, 18)];
        named: the_kernel_sum_of_the_whole_frame_stays_right;
    ]
}

/// Before 6.19 BPF_PROG_TEST_RUN makes linear skbs of at most a page.
fn with_long_packets() -> Vec<Trial> {
    cases![&[Need::Root, Need::Kernel(6, 19)];
        sizes: a_payload_of_several_pages_moves_whole a_payload_beyond_reason_is_stamped_or_left_alone
            an_skb_in_fragments_is_stamped_as_well a_syn_that_cannot_be_brought_together_is_counted;
    ]
}

fn with_a_small_mtu() -> Vec<Trial> {
    cases![&[Need::Root, Need::Tool("ip")];
        sizes: the_mtu_is_kept_to_the_byte;
    ]
}
