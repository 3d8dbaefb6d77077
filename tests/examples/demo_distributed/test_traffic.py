"""The bytes that collectives send: planned by hand, and read from the text of a program."""

import pathlib
import re

import pytest

pytest.importorskip("flax")

import small_network
from small_network import SETTINGS

from examples.demo_distributed import traffic, training


def test_bytes_that_are_planned_are_a_hand_count():
    # 4 workers: 2 x 3/4 of 72 float32; and to 3 others 72 bytes, with a float32 for each of 7 rows and the vector.
    assert traffic.gradient_bytes(small_network.PARAMS, 4) == 2 * 3 / 4 * 72 * 4
    assert traffic.exchange_bytes(small_network.PARAMS, 4) == 3 * (72 + 4 * 8)
    params, _ = training.model(SETTINGS._replace(data="mnist"))
    assert traffic.gradient_bytes(params, 4) == 6 * 105_866
    assert traffic.exchange_bytes(params, 4) == 3 * (105_866 + 4 * (3 + 3 + 1568 + 64 + 4))


def test_collectives_are_read_from_the_text_of_a_program():
    text = """
      %a = f32[72]{0} all-reduce(%x), channel_id=1
      ROOT %b = (s8[4,7,9]{2,1,0}, f32[4]{0}) all-gather(%y, %z), dimensions={0}
      %c = bf16[] reduce-scatter(%all-gather), metadata={op_name="all-reduce(x)"}
      %d = f32[9]{0} fusion(%all-reduce.1)
    """
    found = traffic.collectives(text)
    assert found == [("all-reduce", 288), ("all-gather", 252 + 16), ("reduce-scatter", 2)]
    assert [traffic.sent(one, 4) for one in found] == [432, 201, 6]
    with pytest.raises(ValueError, match="must be synchronous to be counted, got all-reduce-start"):
        traffic.collectives("%a = f32[72]{0} all-reduce-start(%x)")
    with pytest.raises(ValueError, match=r"types must be one of .*, got f4e2m1"):
        traffic.collectives("%a = f4e2m1[72]{0} all-reduce(%x)")
    with pytest.raises(ValueError, match=r"kind must be one of 'all-reduce', .*, got 'collective-permute'"):
        traffic.sent(traffic.Collective("collective-permute", 8), 4)


@pytest.mark.skipif(not pathlib.Path("/proc/self/io").exists(), reason="only Linux counts")
def test_the_kernel_counts_what_is_written(tmp_path):
    before = traffic.written_by_this_process()
    (tmp_path / "x").write_bytes(b"0" * 123_456)
    assert traffic.written_by_this_process() - before == 123_456


def test_the_page_states_the_bytes_that_are_planned():
    params, _ = training.model(SETTINGS._replace(data="mnist"))
    every, rarely = 500 * traffic.gradient_bytes(params, 4) / 1e6, 25 * traffic.exchange_bytes(params, 4) / 1e6
    root = pathlib.Path(__file__).parents[3]
    page = (root / "docs" / "distributed.md").read_text()
    assert re.search(rf"from the arrays' sizes +{every:.3f} +{rarely:.3f} +{every / rarely:.1f}$", page, re.M)
