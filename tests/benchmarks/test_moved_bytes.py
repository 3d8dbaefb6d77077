"""The count of bytes in the text of an optimized program."""

import pytest

from benchmarks import _moved_bytes

PROGRAM = """
HloModule step, is_scheduled=true

%fused (param_0: f32[1024], param_1: s8[1024], param_2: f32[1024]) -> f32[1024] {
  %param_0 = f32[1024]{0} parameter(0)
  %param_1 = s8[1024]{0} parameter(1)
  %param_2 = f32[1024]{0} parameter(2)
  %slice.1 = s8[64]{0} slice(%param_1), slice={[0:64]}
  %root.1 = f32[1024]{0} sqrt(%param_2)
  %slice.2 = f32[16]{0} slice(%root.1), slice={[0:16]}
  ROOT %add.1 = f32[1024]{0} add(%param_0, %param_0)
}

ENTRY %main (p: f32[1024], c: s8[1024]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %c = s8[1024]{0} parameter(1)
  %copy-start.1 = (f32[1024]{0:S(1)}, f32[1024]{0}, u32[]{:S(2)}) copy-start(%p)
  %copy-done.1 = f32[1024]{0:S(1)} copy-done(%copy-start.1)
  %slice-start.1 = ((f32[1024]{0}), f32[256]{0:S(1)}, s32[]{:S(2)}) slice-start(%p), slice={[0:256]}
  %slice-done.1 = f32[256]{0:S(1)} slice-done(%slice-start.1)
  %slice-start.2 = ((f32[1024]{0}), f32[128]{0}, s32[]{:S(2)}) slice-start(%p), slice={[256:384]}
  %slice-done.2 = f32[128]{0} slice-done(%slice-start.2)
  %inner = f32[16]{0} conditional(%p, %c), branch_computations={%fused}
  ROOT %out = f32[1024]{0} fusion(%copy-done.1, %c, %p), kind=kLoop, calls=%fused
}
"""


def test_the_count_charges_slices_asynchronous_copies_and_branches_as_it_says():
    class Program:
        def as_text(self):
            return PROGRAM

        def memory_analysis(self):
            return type("M", (), {"temp_size_in_bytes": 512})

    found = _moved_bytes.count(Program(), 1024)
    # The copy to on-chip memory reads 4 bytes an element; the fusion writes 4, reads 64 codes, 16 elements and nothing
    # of the copy; a quarter is moved to on-chip memory and an eighth within the main one.
    assert found.bytes == pytest.approx(4 + 4 + 64 / 1024 + 4 / 64 + 4 / 4 + 2 * 4 / 8)
    assert found.branch == pytest.approx(4 + 1 + 64 / 1024)
    assert (found.temporaries, found.passes) == (0.5, 4)
    # The copy and the two slices, which start and are waited for, the branch and the fusion.
    assert found.kernels == 5
