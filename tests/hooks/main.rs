//! Attaches to real interfaces and asks the kernel, not the program, what is there. Every case has namespaces
//! and a state directory of its own.
//!
//! [`world`] builds two hosts and connects them, [`look`] reads what is attached and what is left; the other
//! modules hold the cases.

mod changes;
mod crash;
mod foreign;
mod half;
#[path = "../support/lab.rs"]
#[allow(dead_code)]
mod lab;
mod look;
mod many;
mod marks;
mod meanwhile;
mod names;
mod netns;
mod place;
mod replace;
mod rounds;
#[path = "../support/mod.rs"]
mod support;
mod tcx;
mod together;
mod world;

use std::process::ExitCode;

use support::{Need, cases};

const NEEDS: [Need; 4] = [Need::Root, Need::Tool("ip"), Need::Tool("tc"), Need::Tool("ethtool")];

fn main() -> ExitCode {
    // One case runs a part of itself in a process of its own: this one.
    if let Ok(ns) = std::env::var(rounds::ALONE) {
        return match rounds::alone(&ns) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("{error:?}");
                ExitCode::FAILURE
            }
        };
    }
    // The longest comes first, so that the others run beside it.
    let mut cases = cases![&NEEDS;
        rounds: two_hundred_rounds_of_commands_leave_nothing two_hundred_rounds_in_one_process_leave_nothing;
        replace: an_interface_may_be_given_in_three_ways an_alternative_name_will_do and_more_than_once
            attaching_twice_keeps_policy_counters_and_place
            replacing_lets_no_syn_pass_unstamped_and_breaks_no_connect
            two_interfaces_are_attached_by_one_command two_instances_share_an_interface;
        netns: a_query_without_an_interface_lists_every_named_namespace more_namespaces_than_descriptors_are_listed
            a_bare_file_among_the_namespaces_does_not_end_a_query a_namespace_has_a_name_or_a_path
            commands_inside_ip_netns_exec_find_each_other
            commands_inside_ip_netns_exec_find_each_other_below_another_process_1;
        foreign: foreign_filters_stay_in_place_and_in_order foreign_filters_on_our_clsact_stay
            destroy_says_what_became_of_the_qdisc a_foreign_chain_without_filters_keeps_the_qdisc
            destroy_counts_the_filters_that_keep_the_qdisc filters_of_other_chains_take_no_place
            a_foreign_ingress_qdisc_is_an_error_and_stays query_counts_the_filters_that_run_before
            a_foreign_program_of_our_name_stays directories_of_iproute2_are_no_instances
            a_pin_of_somebody_else_keeps_the_file_system;
        marks: a_clsact_that_was_made_anew_is_not_ours a_clsact_of_an_interface_with_a_used_index_is_not_ours
            a_clsact_of_a_namespace_with_a_used_number_is_not_ours a_deleted_namespace_leaves_no_mark;
        place: priority_and_handle_can_be_chosen another_place_leaves_exactly_one_filter
            another_handle_stays_within_the_priority a_taken_place_is_an_error_that_says_so the_default_is_in_front_of_what_is_there
            the_default_is_in_front_of_a_low_priority_too
            a_place_that_cannot_be_is_wrong_usage a_guard_that_marks_goes_where_there_are_marks
            a_guard_of_another_instance_is_no_reason_to_stand_behind_others;
        names: names_that_are_no_text_hinder_no_command names_have_no_power_over_a_terminal;
        meanwhile: a_look_finds_what_is_there_while_interfaces_go
            what_goes_while_it_is_removed_is_gone clsact_is_told_from_what_else_may_be_there
            who_looks_gives_nobody_notice;
        half: a_missing_second_interface_leaves_nothing a_command_for_a_missing_interface_makes_no_state a_second_interface_that_refuses_leaves_nothing
            a_second_interface_that_refuses_leaves_the_first_as_it_was
            a_guard_that_cannot_move_everywhere_stays_where_it_was rules_of_a_guard_that_fails_are_never_in_use
            an_attach_that_cannot_remove_the_old_one_changes_nothing an_interface_that_refuses_keeps_nothing_on_the_others
            a_failed_attach_keeps_what_detach_kept a_failed_attach_leaves_the_slots_as_they_were
            a_first_attach_that_fails_beside_a_guard_leaves_no_policy detach_keeps_policy_and_counters
            the_last_destroy_removes_policy_and_counters
            a_destroy_says_if_the_other_program_uses_the_instance a_destroy_waits_for_nothing_that_is_attached_elsewhere destroy_without_an_interface_takes_all;
        changes: a_removed_interface_is_reported_and_ends_the_stream detach_on_exit_leaves_no_state_after_a_removal a_renamed_interface_is_reported_and_streams_on
            a_moved_interface_is_reported_and_ends_the_stream a_deleted_filter_is_reported_and_ends_the_stream
            a_deleted_qdisc_is_reported_and_ends_the_stream the_stream_goes_on_while_one_interface_is_left
            changes_are_json_lines_too another_instance_of_the_same_name_ends_the_stream_and_stays
            a_reload_that_has_waited_leaves_another_instance_alone
            an_interface_that_is_renamed_at_last_is_detached_on_exit;
        together: eight_attaches_at_once_leave_one_filter attaches_and_destroys_at_once_leave_one_state
            a_second_reader_is_told_who_the_first_is a_killed_reader_does_not_block_the_next
            a_killed_reader_leaves_nothing_behind_a_destroy a_destroy_waits_for_one_who_looks
            what_was_removed_is_told_before_what_failed a_command_that_waits_names_the_one_it_waits_for
            a_command_that_waited_for_a_destroy_makes_nothing_anew a_policy_that_somebody_reads_can_be_changed
            every_query_shows_what_is_replaced_in_place_meanwhile
            two_instances_have_two_readers a_reader_knows_interfaces_that_others_attached;
        many: interfaces_that_are_told_the_same_share_a_program many_interfaces_take_no_longer_each;
        crash: a_killed_attach_is_repaired_by_the_next a_killed_replacement_is_repaired_by_the_next
            a_killed_destroy_is_finished_by_the_next;
    ];
    let has_tcx = [&NEEDS[..], &[Need::Kernel(6, 6)]].concat();
    cases.extend(cases![&has_tcx;
        foreign: tcx_programs_that_run_before_are_told;
        tcx: attaching_twice_keeps_the_hook_and_destroy_leaves_nothing
            programs_of_others_stay_in_their_order_behind_ours
            at_tcx_each_interface_has_a_program_of_its_own
            it_moves_between_clsact_and_tcx_and_no_syn_passes_unstamped moving_leaves_a_clsact_of_others
            a_second_interface_that_is_full_leaves_the_first_as_it_was
            an_attach_that_cannot_remove_another_of_ours_changes_nothing two_instances_can_be_at_two_hooks
            a_program_that_somebody_removes_is_reported
            a_program_that_moves_with_its_interface_is_reported a_program_that_has_moved_is_detached_on_exit;
    ]);
    let is_old = netoken::kernel::Kernel::probe().version() < Some((6, 6));
    cases.push(support::case(
        "tcx::without_tcx_the_error_says_so",
        &[&NEEDS[..], &[Need::Is(is_old, "this kernel has tcx")]].concat(),
        tcx::without_tcx_the_error_says_so,
    ));
    support::run(cases)
}
