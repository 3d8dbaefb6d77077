import zlib

import jax
import pytest

# Eight devices on one CPU, for the sharding tests; read once, when the backend starts.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """64-bit types for one test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


# Fast tests run every rule with float32 and int8, and these with the other storages, and with int8 where a test takes a
# second; the other rows are slow tests. What a rule does to its velocity ends before a storage begins.
EVERY_STORAGE = {"heavy_ball", "nesterov", "aggregated", "complex_heavy_ball", "schedule_free", "adan_mix"}
SECONDS = {
    "test_a_compiled_step_donates_its_state_compiles_once_and_shares_no_buffer",
    "test_state_and_update_keep_their_types_in_64_bits",
    "test_a_missing_gradient_keeps_its_leaf_to_the_bit_and_moves_the_others",
}
# Of these long tables the fast tests run one row in so many, always the same ones, drawn by a hash of their names.
ONE_IN = {
    "test_a_compiled_step_donates_its_state_compiles_once_and_shares_no_buffer": 2,
    "test_a_converted_state_is_one_of_the_new_optimizer_with_the_old_velocities": 2,
    "test_a_hundred_steps_are_the_librarys": 3,
    "test_a_leaf_without_gradients_for_three_steps_begins_at_the_fourth": 3,
    "test_a_missing_gradient_keeps_its_leaf_to_the_bit_and_moves_the_others": 2,
    "test_a_split_state_is_that_of_one_device_bit_for_bit": 2,
    "test_a_step_sends_nothing_but_the_scales_of_its_bytes": 2,
    "test_an_eager_update_shares_no_buffer_with_anything": 2,
    "test_fifty_steps_here_and_fifty_there_are_a_hundred_there": 2,
    "test_fifty_steps_there_and_fifty_here_are_a_hundred_there": 2,
    "test_float32_is_the_optimizer_itself_to_the_bit": 2,
    "test_float32_updates_keep_within_the_rounding_of_their_arithmetic": 2,
    "test_state_and_update_keep_their_types_for_every_pair_of_dtypes": 2,
    "test_state_and_update_keep_their_types_in_64_bits": 2,
    "test_the_closed_loop_is_the_papers_over_200_steps": 2,
    "test_the_learning_rate_meets_the_gradient_or_the_velocity": 3,
    "test_traced_scheduled_and_vmapped_arguments_equal_a_python_loop_over_numbers": 2,
    "test_types_never_drift_and_a_scan_runs": 2,
    "test_velocities_of_an_nnx_model_are_split_as_its_parameters_are": 2,
}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        rare = values.get("storage") in {"bfloat16", "int4"} or (
            values.get("storage") == "int8" and item.originalname in SECONDS
        )
        if rare and values.get("rule", "heavy_ball") not in EVERY_STORAGE:
            item.add_marker(pytest.mark.slow)
        if zlib.crc32(item.name.encode()) % ONE_IN.get(item.originalname, 1):
            item.add_marker(pytest.mark.slow)
