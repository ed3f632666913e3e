"""What users complain about in other trainers, and the tests that show that it cannot happen here."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
COMPLAINTS: dict[int, tuple[str, ...]] = {
    # Data and captions
    1: (
        "a stray file is opened as a picture",
        "tests/unit/test_data_folder.py::test_what_is_no_picture_is_skipped_with_its_reason_and_never_decoded",
    ),
    2: (
        "photos lie on their side",
        "tests/unit/test_data_picture.py::test_all_orientations_load_to_equal_pixels",
    ),
    3: (
        "a colour that nobody chose lies under transparency",
        "tests/unit/test_data_picture.py::test_transparency_is_composited_on_the_stated_matte",
        "tests/unit/test_training_data.py::test_transparency_is_stated_and_can_be_left_out_of_the_loss",
    ),
    4: (
        "captions are overlooked",
        "tests/unit/test_data_folder.py::test_missing_and_empty_captions_are_counted_and_named",
        "tests/unit/test_training_data.py::test_a_trigger_stands_in_front_where_it_lacked",
        "tests/unit/test_doctor.py::test_all_problems_are_told_at_once",
        "tests/cli/test_examining.py::test_a_dry_run_trains_and_writes_nothing",
    ),
    5: (
        "the end of a caption is lost",
        "tests/unit/test_training_data.py::test_words_that_reach_no_part_of_the_model_are_named",
        "tests/cli/test_examining.py::test_pictures_and_captions_worth_a_look_are_told",
    ),
    6: (
        "no picture is left, and nobody says why",
        "tests/unit/test_data_folder.py::test_nothing_left_counts_files_per_reason_and_names_the_flags",
        "tests/cli/test_examining.py::test_where_no_picture_is_left_the_reasons_are_counted",
        "tests/unit/test_data_sources.py::test_every_flag_that_a_message_names_exists",
    ),
    7: (
        "one bad picture, after hours of encoding",
        "tests/unit/test_data_folder.py::test_all_broken_pictures_are_told_at_once",
        "tests/unit/test_training_data.py::test_a_broken_picture_stops_before_anything_is_encoded",
        "tests/unit/test_doctor.py::test_all_problems_are_told_at_once",
    ),
    8: (
        "pictures are squeezed",
        "tests/unit/test_data_picture.py::test_fit_scales_both_directions_alike",
        "tests/unit/test_training_data.py::test_buckets_give_every_batch_one_size_and_every_picture_its_own",
        "tests/unit/test_data_views.py::test_a_view_is_cut_from_what_fits_and_never_deformed",
        "tests/unit/test_data_views.py::test_a_sheet_shows_what_is_encoded",
    ),
    9: (
        "every epoch has the same order",
        "tests/unit/test_data_order.py::test_each_item_once_epochs_differ_reruns_agree",
        "tests/unit/test_data_order.py::test_batches_of_one_group_still_show_each_item_once_an_epoch",
    ),
    # Caches
    10: (
        "a picture gets another one's caption",
        "tests/unit/test_training_data.py::test_no_picture_is_paired_with_anothers_caption",
        "tests/unit/test_data_cache.py::test_an_entry_moved_to_anothers_place_is_not_believed",
        "tests/unit/test_run_folder.py::test_changed_data_is_noticed_by_a_resumed_run",
    ),
    11: (
        "what was edited is read from the cache",
        "tests/unit/test_training_data.py::test_one_edit_encodes_one_item_again",
        "tests/unit/test_run_folder.py::test_changed_data_is_noticed_by_a_resumed_run",
    ),
    12: (
        "prompts in the cache are of another precision",
        "tests/unit/test_training_data.py::test_another_precision_or_size_finds_nothing_in_the_cache",
        "tests/unit/test_training_data.py::test_what_a_precision_cannot_hold_is_named_with_it_and_not_kept",
    ),
    13: (
        "one new picture, or a crash, and all are encoded again",
        "tests/unit/test_training_data.py::test_one_edit_encodes_one_item_again",
        "tests/unit/test_training_data.py::test_a_killed_run_encodes_only_the_rest",
        "tests/unit/test_training_data.py::test_unrelated_pictures_are_painted_and_kept_a_few_at_a_time",
    ),
    14: (
        "encoding runs out of memory in silence",
        "tests/unit/test_training_data.py::test_a_killed_run_encodes_only_the_rest",
        "tests/unit/test_data_cache.py::test_a_crash_keeps_what_was_written",
    ),
    # Numbers in training
    15: (
        "NaN to the end, and saved",
        "tests/unit/test_training_loop.py::test_a_loss_that_is_not_finite_stops_the_run",
        "tests/unit/test_training_loop.py::test_a_gradient_that_is_not_finite_stops_the_run",
        "tests/cli/test_cli.py::test_nan_exits_2_and_names_the_last_good_checkpoint",
        "tests/unit/test_store.py::test_nan_weights_are_not_saved",
    ),
    16: (
        "a good picture is blamed for a precision",
        "tests/unit/test_training_data.py::test_what_a_precision_cannot_hold_is_named_with_it_and_not_kept",
    ),
    17: (
        "half precision dies after a sample",
        "tests/unit/test_validation.py::test_step_sample_validate_step_in_every_precision",
        "tests/unit/test_training_loop.py::test_half_precision_trains_and_resumes_too",
        "tests/unit/test_training_loop.py::test_in_fp16_an_overflow_leaves_a_step_out",
    ),
    18: (
        "several processes stretch the schedule",
        "tests/unit/test_training_loop.py::test_the_learning_rate_counts_optimizer_steps_alone",
        "tests/unit/test_optimizers.py::test_the_last_rate_is_near_the_stated_floor",
    ),
    19: (
        "options of the time steps do nothing",
        "tests/unit/test_training_parts.py::test_times_are_drawn_as_their_density_says",
        "tests/unit/test_training_parts.py::test_a_shift_moves_the_times_as_the_sampler_does",
    ),
    20: (
        "an objective is wrong for what the model predicts",
        "tests/unit/test_training_parts.py::test_noised_runs_from_the_picture_to_noise",
        "tests/unit/test_training_parts.py::test_the_target_of_a_scheduler_leads_back_to_the_picture",
        "tests/unit/test_training_parts.py::test_a_scheduler_that_predicts_something_else_is_told",
    ),
    21: (
        "prior pictures have another prompt than their own",
        "tests/unit/test_training_data.py::test_prior_preservation_has_its_own_prompts_encoded",
        "tests/unit/test_validation.py::test_prompts_of_the_bases_pictures_are_those_that_are_encoded",
    ),
    22: (
        "names of layers match nothing, or not all",
        "tests/unit/test_training_loop.py::test_what_is_wrong_is_known_before_anything_is_painted_or_written",
        "tests/unit/test_tuner_config.py::test_bad_targets_leave_the_model_alone",
        "tests/contract/test_backbones.py::test_every_default_site_exists_and_learns",
        "tests/cli/test_cli.py::test_train_atoms_prune_generate",
    ),
    23: (
        "the same seed, another adapter",
        "tests/unit/test_training_loop.py::test_the_seed_decides_everything",
    ),
    # Saving and going on
    24: (
        "a damaged checkpoint is gone on from",
        "tests/unit/test_training_loop.py::test_a_truncated_checkpoint_is_passed_over",
        "tests/unit/test_reliability.py::test_a_damaged_checkpoint_and_damaged_papers",
    ),
    25: (
        "a resumed run sees the same data again",
        "tests/unit/test_training_loop.py::test_three_stops_change_nothing",
        "tests/unit/test_run_folder.py::test_the_resumed_run_is_the_one_that_was_never_stopped_with_everything_on",
        "tests/unit/test_run_folder.py::test_changed_data_is_noticed_by_a_resumed_run",
    ),
    26: (
        "a second stop loses the count",
        "tests/unit/test_training_loop.py::test_three_stops_change_nothing",
        "tests/unit/test_run_folder.py::test_the_resumed_run_is_the_one_that_was_never_stopped_with_everything_on",
    ),
    27: (
        "a resumed run forgets its accumulation",
        "tests/unit/test_training_loop.py::test_three_stops_change_nothing",
        "tests/unit/test_run_folder.py::test_the_resumed_run_is_the_one_that_was_never_stopped_with_everything_on",
    ),
    28: (
        "a resumed run has lost its weights",
        "tests/unit/test_training_loop.py::test_three_stops_change_nothing",
        "tests/unit/test_run_folder.py::test_the_resumed_run_is_the_one_that_was_never_stopped_with_everything_on",
        "tests/unit/test_store.py::test_an_altered_bit_is_noticed_and_files_without_a_checksum_load",
    ),
    29: (
        "a resumed run has another schedule",
        "tests/unit/test_run_folder.py::test_a_schedule_that_differs_from_the_checkpoints_is_told",
        "tests/unit/test_training_loop.py::test_a_resumed_run_keeps_its_options_and_says_so",
    ),
    30: (
        "a new run overwrites an old one's files (of a run's own checkpoints the newest stay: --keep-checkpoints)",
        "tests/unit/test_training_loop.py::test_an_existing_folder_is_left_alone",
        "tests/unit/test_training_loop.py::test_a_finished_run_resumes_to_itself",
        "tests/unit/test_adapter.py::test_pictures_are_never_overwritten",
    ),
    31: (
        "a failing sample or clean-up ends the run",
        "tests/unit/test_training_loop.py::test_validation_pictures_are_written_and_a_raising_sampler_is_only_a_warning",
        "tests/unit/test_training_loop.py::test_a_checkpoint_is_written_before_pictures_are_painted",
        "tests/unit/test_store.py::test_what_cannot_be_cleaned_up_is_no_failure",
    ),
    32: (
        "what is saved is empty",
        "tests/unit/test_store.py::test_what_was_written_is_read_back_before_it_counts",
        "tests/unit/test_validation.py::test_an_adapter_that_learned_nothing_is_told",
    ),
    # Loading, and other programs
    33: (
        "a loaded adapter has another strength",
        "tests/unit/test_store.py::test_round_trip_is_bit_equal",
        "tests/contract/test_backbones.py::test_a_loaded_adapter_paints_what_the_trained_one_did",
        "tests/contract/test_backbones.py::test_a_fresh_process_paints_the_same",
        "tests/unit/test_lora.py::test_dense_atoms_leave_exactly_and_by_every_door",
    ),
    34: (
        "nothing of a file fits, and it loads",
        "tests/unit/test_store.py::test_bad_files_load_nothing",
        "tests/unit/test_lora.py::test_a_foreign_lora_is_one_line_and_leaves_the_base",
    ),
    35: (
        "an adapter loads on a strange base",
        "tests/unit/test_adapter.py::test_another_base_is_refused_unless_allowed",
        "tests/unit/test_store.py::test_another_base",
        "tests/unit/test_store.py::test_fingerprint",
    ),
    36: (
        "unloading leaves something behind",
        "tests/unit/test_adapter.py::test_removing_gives_the_base_back",
        "tests/contract/test_tuner_peft.py::test_remove_adapter_gives_the_base_back",
        "tests/contract/test_tuner_gate.py::test_removing_takes_gate_and_hook_away",
    ),
    37: (
        "no other program reads the file",
        "tests/unit/test_store.py::test_peft_reads_the_same_folder",
        "tests/contract/test_tuner_peft.py::test_peft_save_and_from_pretrained",
        "tests/unit/test_lora.py::test_dense_atoms_leave_exactly_and_by_every_door",
        "tests/unit/test_lora.py::test_a_unet_leaves_and_comes_back",
    ),
    38: (
        "merged is not what was unmerged",
        "tests/contract/test_tuner_peft.py::test_merging_raises_and_leaves_the_model_alone",
        "tests/unit/test_lora.py::test_an_export_is_near_and_says_how_far_it_is",
    ),
    39: (
        "nobody knows what an adapter belongs to",
        "tests/unit/test_run_folder.py::test_a_run_says_what_it_is_without_its_base",
        "tests/unit/test_adapter.py::test_the_base_is_named_in_the_file",
    ),
    # Memory and speed
    40: (
        "memory is too small for the recipe (foretold for a step on a CPU; whole runs and GPUs are not held to it)",
        "tests/unit/test_doctor.py::test_small_steps_foretell_what_a_step_of_full_size_holds",
        "tests/unit/test_doctor.py::test_what_grows_with_the_area_is_carried_on",
    ),
    41: (
        "every sample takes more memory",
        "tests/unit/test_validation.py::test_sampling_leaves_no_memory_behind",
    ),
    42: (
        "an update is slower (versions are pinned and a run tells its pace; no release is compared with another)",
        "tests/docs/test_repository.py::test_constraints_are_exact_and_sorted",
        "tests/docs/test_repository.py::test_every_direct_dependency_is_pinned",
        "tests/unit/test_run_folder.py::test_status_says_how_a_run_ended_and_config_what_it_was",
    ),
    43: (
        "a run becomes slow, and nobody says so",
        "tests/unit/test_run_folder.py::test_a_slow_step_is_told_once",
        "tests/cli/test_cli.py::test_train_atoms_prune_generate",
    ),
    # Pictures
    44: (
        "concepts taught together mix (where no gate opens; in one picture of both they may, as docs/method.md tells)",
        "tests/contract/test_many.py::test_trained_together_as_alone",
        "tests/unit/test_mix.py::test_where_no_gate_opens_the_picture_is_the_base",
        "tests/unit/test_mix.py::test_conflicts_are_pairs_that_fire_together_along_or_against",
        "tests/unit/test_compare_parts.py::test_inner_leak_sees_the_other_half_only",
    ),
    45: (
        "all of a class become the concept (drift is told at each validation; bleed is measured by compare)",
        "tests/contract/test_backbones.py::test_where_the_gate_is_shut_pictures_are_the_bases",
        "tests/unit/test_validation.py::test_every_validation_tells_how_far_unrelated_pictures_drift",
        "tests/unit/test_training_loop.py::test_silence_lowers_codes_on_unrelated_rows",
        "tests/cli/test_compare.py::test_a_grid_is_measured_once_and_told",
    ),
    46: (
        "no rule says which step to keep",
        "tests/unit/test_validation.py::test_the_best_step_is_the_runs_adapter_and_the_last_is_kept",
        "tests/unit/test_validation.py::test_validation_is_the_same_whenever_it_is_asked",
        "tests/unit/test_validation.py::test_held_out_pictures_are_not_learned_from",
    ),
    47: (
        "samples of a run are not what it paints later",
        "tests/unit/test_validation.py::test_samples_are_what_generate_makes_from_the_saved_file",
    ),
    # Use
    48: (
        "a run hangs or is dead without a word",
        "tests/unit/test_run_folder.py::test_status_says_how_a_run_ended_and_config_what_it_was",
        "tests/unit/test_run_folder.py::test_a_run_that_is_being_trained_is_left_alone_and_a_dead_one_is_recognised",
    ),
    49: (
        "a misspelt option is dropped",
        "tests/cli/test_train_config.py::test_a_wrong_file_is_one_line",
        "tests/cli/test_cli.py::test_an_unknown_option_gets_a_suggestion",
        "tests/unit/test_training_parts.py::test_an_unknown_option_of_a_saved_run_is_an_error",
    ),
    50: (
        "an optional package breaks the install (imports are read; no install without the extras is tried)",
        "tests/docs/test_repository.py::test_nothing_optional_is_needed_to_import_the_package",
        "tests/unit/test_optimizers.py::test_prodigy_without_its_rate_and_a_missing_package_are_told",
        "tests/docs/test_repository.py::test_ci_is_make_test",
    ),
}
"""Number -> what goes wrong elsewhere, and the tests that hold it here."""


@cache
def docstrings(path: str) -> dict[str, str]:
    """Every test of a file, and what it says of itself."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    tests = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {test.name: ast.get_docstring(test) or "" for test in tests}


def numbers(docstring: str) -> Iterator[int]:
    """Of the complaints that a docstring names: `Complaints 4, 7 and 25 to 28`."""
    for listed in re.findall(r"Complaints? ((?:\d+(?:, | and | to )?)+)", docstring):
        for first, last in re.findall(r"(\d+)(?: to (\d+))?", listed):
            yield from range(int(first), int(last or first) + 1)


def test_every_complaint_has_tests_that_exist() -> None:
    assert list(COMPLAINTS) == list(range(1, 51))
    for _, *tests in COMPLAINTS.values():
        assert tests
        for test in tests:
            path, _, name = test.partition("::")
            assert name in docstrings(path), test


def test_a_test_that_names_a_complaint_is_in_its_row() -> None:
    assert list(numbers("Complaints 4, 7 and 25 to 27: x. Complaint 9.")) == [4, 7, 25, 26, 27, 9]
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name, docstring in docstrings(file).items():
            missing = [n for n in numbers(docstring) if f"{file}::{name}" not in COMPLAINTS[n]]
            assert missing == [], name
