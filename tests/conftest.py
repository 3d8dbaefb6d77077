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


# What a rule does to its velocity ends before a storage begins: with the storages that a test calls rare, its fast rows
# are those of these rules.
EVERY_STORAGE = {"heavy_ball", "nesterov", "aggregated", "complex_heavy_ball", "schedule_free", "adan_mix"}


def is_thinned(item):
    """Whether the markers `rare_storages` and `one_in` of a test leave this row of it to the slow tests."""
    values = item.callspec.params if hasattr(item, "callspec") else {}
    rare, drawn = item.get_closest_marker("rare_storages"), item.get_closest_marker("one_in")
    if rare and values["storage"] in {"bfloat16", "int4", *rare.args} and values["rule"] not in EVERY_STORAGE:
        return True
    return drawn is not None and zlib.crc32(item.name.encode()) % drawn.args[0] != 0


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    for item in items:
        if is_thinned(item):
            item.add_marker(pytest.mark.slow)
