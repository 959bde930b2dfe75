//! Types what a person or a script would type, and reads what comes back: output, errors, exit codes. What an
//! attach does to packets is elsewhere.
//!
//! [`said`] runs the program and holds every output against what no output may contain; the other modules
//! hold the cases.

mod documented;
mod guard;
mod help;
mod json;
mod keys;
#[path = "../support/lab.rs"]
#[allow(dead_code)]
mod lab;
#[path = "../hooks/look.rs"]
#[allow(dead_code)]
mod look;
mod names;
mod output;
mod policy;
mod progress;
mod query;
mod reload;
mod remarks;
mod rights;
mod rotation;
mod rules;
mod said;
mod state;
mod stream;
#[path = "../support/mod.rs"]
mod support;
mod tokens;
mod units;
mod upgrade;
#[path = "../hooks/world.rs"]
#[allow(dead_code)]
mod world;

use std::process::ExitCode;

use libtest_mimic::Trial;
use support::{Need, cases};

fn main() -> ExitCode {
    let mut cases = everywhere();
    cases.extend(with_python());
    cases.extend(with_tcpdump());
    cases.extend(with_root());
    cases.extend(cases![&[Need::RealTime]; progress: a_person_who_waits_sees_how_far_it_is;]);
    cases.extend(cases![&[Need::Root, Need::Tool("ip"), Need::Tool("ethtool"), Need::RealTime];
        progress: a_load_says_how_far_it_is_to_people_only;
    ]);
    cases.extend(cases![&[Need::Root, Need::Tool("setpriv"), Need::BufferLimit];
        stream: a_stream_that_cannot_begin_leaves_all_as_it_was;
    ]);
    cases.extend(cases![&[Need::Root, Need::Tool("ip"), Need::Tool("ethtool"), Need::Tool("setarch")];
        state: a_kernel_that_is_too_old_is_named;
    ]);
    support::run(cases)
}

fn everywhere() -> Vec<Trial> {
    cases![&[];
        help: every_flag_is_described an_example_is_shown every_command_has_an_example_that_fits
            options_stand_below_their_heading a_flag_in_the_wrong_place_is_named_alone help_and_version_are_no_errors
            wrong_usage_is_exit_code_2 a_bad_token_is_named_with_what_is_right;
        policy: a_missing_file_is_named a_bad_file_is_named_with_the_line;
        rules: all_errors_are_shown_in_one_run_with_their_lines
            a_good_file_is_checked_without_rights_and_warnings_are_told;
        names: an_unknown_namespace_is_named;
        progress: what_is_wrong_has_colours_where_they_are_wanted;
        tokens: the_vectors_are_made_and_found_valid a_token_that_is_not_valid_is_exit_code_1_and_says_why
            only_a_key_that_signs_makes_a_token a_capture_is_decoded what_is_wrong_with_a_capture_is_named
            an_output_that_nobody_reads_makes_no_wrong_token_right;
        rights: without_rights_the_capabilities_and_the_remedy_are_named;
    ]
}

fn with_python() -> Vec<Trial> {
    cases![&[Need::Tool("python3")];
        tokens: another_language_makes_the_same_tokens;
    ]
}

fn with_tcpdump() -> Vec<Trial> {
    let needs =
        &[Need::Root, Need::Tool("ip"), Need::Tool("tc"), Need::Tool("ethtool"), Need::Tool("tcpdump")];
    cases![needs;
        tokens: what_tcpdump_sends_is_decoded_as_it_comes;
    ]
}

fn with_root() -> Vec<Trial> {
    let needs =
        &[Need::Root, Need::Tool("ip"), Need::Tool("tc"), Need::Tool("ethtool"), Need::Tool("setpriv")];
    cases![needs;
        names: an_unknown_namespace_gets_a_list_of_those_known an_unknown_interface_gets_near_names
            a_query_where_nothing_is_attached an_alternative_name_can_stand_in_a_policy;
        rules: the_example_can_be_used_as_it_says counters_of_rules_that_keep_their_name_survive_a_reload rules_are_added_and_removed
            an_edit_is_told_what_it_does_to_other_rules_and_to_itself a_policy_with_an_empty_list_is_shown_and_changed
            an_interface_that_took_the_name_of_another_is_told
            the_kernel_says_which_rule_decides_and_why the_stream_shows_rules_by_their_names
            a_rule_about_a_namespace_that_comes_later_is_a_rule
            an_attach_that_keeps_a_policy_tells_which_interfaces_are_others;
        reload: sighup_loads_the_file_again watch_notices_every_way_of_changing_a_file
            a_change_while_files_are_read_is_not_missed a_list_that_is_mended_is_noticed a_reload_that_waits_ends_with_a_signal
            a_reload_that_waits_for_the_keys_ends_with_a_signal;
        query: the_policy_and_what_programs_were_told_are_shown instances_without_filters_are_shown
            one_instance_can_be_asked_for an_instance_that_is_not_whole_does_not_hide_the_others
            an_attached_instance_that_cannot_be_read_does_not_hide_the_others
            an_interface_that_is_down_is_told a_setting_that_an_attach_changes_is_told
            slots_that_change_are_told_and_the_window_is_the_guards
            a_command_that_changes_something_raises_no_alarm a_query_meets_an_attach_at_any_moment;
        policy: a_rejected_file_changes_nothing_that_runs a_policy_is_summed_up;
        rights: each_missing_capability_is_named keys_are_for_root_alone without_the_right_to_mount_the_error_says_so
            without_the_right_to_look_nothing_is_said_or_changed;
        rotation: a_rotation_in_three_steps adding_is_possible_whatever_is_due
            a_new_key_alone_is_enough_for_another_host a_key_that_is_still_seen_is_not_retired
            a_key_is_not_idle_because_nobody_counted;
        keys: nothing_is_written_for_an_instance_that_cannot_be_told hints_name_the_instance
            a_file_that_others_can_read_is_refused a_policy_without_a_signing_key_is_refused
            what_the_kernel_does_not_know_of_the_files_is_told
            the_files_decide_what_the_kernel_knows
            a_ring_that_nothing_needs_makes_room_for_another
            who_gives_keys_to_the_kernel_waits_for_a_rotation nobody_sees_a_secret
            slots_have_the_length_that_was_asked_for
            a_stream_and_a_watch_follow_a_step_of_the_clock_within_two_seconds
            a_time_namespace_does_not_shift_the_clock;
        state: a_directory_that_cannot_be_made_is_an_error_with_a_remedy
            a_directory_that_is_full_is_named_and_the_policy_stays a_name_that_is_no_utf8_is_a_name
            a_relative_directory_is_below_the_current_one
            a_query_names_a_broken_instance a_query_finds_what_is_attached_without_its_state
            an_attach_that_fails_without_the_pins_forgets_nothing what_is_destroyed_without_its_pins_is_forgotten
            what_a_killed_attach_began_to_remember_is_no_policy a_directory_of_others_is_refused
            a_policy_of_an_attach_that_was_killed_is_forgotten a_policy_of_a_load_that_was_killed_is_forgotten;
        guard: what_is_watched_stands_under_heads a_new_name_of_an_interface_is_shown_at_once
            each_error_of_the_rules_has_its_place the_end_of_an_entry_is_a_time_in_any_usual_form
            an_output_that_nobody_reads_does_not_keep_it_alive
            an_output_that_is_closed_ends_it an_attach_that_nobody_listens_to_keeps_nobody_waiting
            a_destroyed_guard_ends_the_watch a_watch_leaves_the_rules_of_another_guard_alone a_second_reader_is_told_who_the_first_is;
        remarks: where_only_guards_are_a_query_tells_where a_query_of_the_guard_shows_its_rules_and_the_clock
            rules_whose_keys_are_gone_are_marked a_load_that_comes_too_soon_says_what_uses_its_file
            who_unblocks_what_the_rules_block_is_told entries_that_have_ended_are_counted
            a_rule_that_an_earlier_one_hides_is_told heads_are_not_repeated_for_a_long_verdict_or_name
            a_long_name_of_a_rule_is_cut_for_people_only;
        documented: every_documented_type_is_printed_as_it_says;
        units: the_units_attach_reload_and_detach;
        upgrade: a_map_of_another_shape_is_replaced_and_the_loss_told
            counters_of_a_version_with_fewer_verdicts_are_carried_over
            an_attach_that_fails_leaves_the_maps_of_the_other_version
            what_another_version_has_compiled_is_compiled_again a_policy_that_cannot_be_read_any_more_is_asked_for
            a_policy_of_an_attach_that_failed_is_forgotten
            rules_of_a_load_that_was_killed_are_forgotten
            keys_of_another_shape_are_read_from_their_files rules_and_lists_of_a_guard_are_compiled_again
            tokens_that_another_version_has_seen_are_forgotten_and_that_is_told
            what_a_guard_loses_to_an_attach_of_the_stamp_is_told;
        json: attach_prints_one_object_a_line query_prints_one_object_a_line
            detach_and_destroy_print_one_object_a_line;
        stream: ctrl_c_and_sigterm_end_it_in_peace a_hangup_that_the_parent_ignores_stays_ignored detach_on_exit_removes_everything
            a_signal_during_the_attach_detaches_on_exit a_signal_during_a_quiet_attach_leaves_all_or_nothing
            an_output_that_nobody_reads_does_not_keep_it_alive
            detach_on_exit_leaves_what_others_use detach_on_exit_names_what_was_there_before
            a_second_signal_ends_the_wait_of_detach_on_exit a_destroy_leaves_nothing_for_who_streams_or_watches a_sample_counts_all_and_shows_some
            every_syn_is_shown_once the_columns_stand_under_their_heads what_is_counted_is_shown_before_the_count;
        output: an_early_reader_ends_the_stream_in_peace a_closed_pipe_is_no_error_anywhere
            a_closed_output_is_no_panic an_output_that_is_full_is_an_error
            an_error_of_the_output_says_what_it_is_about a_stream_that_fails_says_what_stays
            a_stream_that_fails_still_detaches_on_exit a_full_standard_error_is_no_panic
            a_pipe_of_both_that_closes_early_is_no_panic an_attach_without_descriptors_leaves_nothing
            a_command_without_descriptors_removes_nothing_of_others;
    ]
}
