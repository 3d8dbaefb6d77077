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


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        values = item.callspec.params if hasattr(item, "callspec") else {}
        rare = values.get("storage") in {"bfloat16", "int4"} or (
            values.get("storage") == "int8" and item.originalname in SECONDS
        )
        if rare and values.get("rule", "heavy_ball") not in EVERY_STORAGE:
            item.add_marker(pytest.mark.slow)
