"""The weights of one launch, as Triton functions: up to three, whose programs follow each other in the grid."""
# No `from __future__ import annotations` here: Triton's interpreter needs `tl.constexpr` as an object.

import triton  # type: ignore[import-not-found,import-untyped,unused-ignore]  # not on every machine, and untyped
import triton.language as tl  # type: ignore[import-not-found,import-untyped,unused-ignore]


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def pick(index: tl.tensor, values: tl.tuple, count: tl.constexpr) -> tl.tensor:
    """Choose the value of the weight at `index` of `count`, at most three."""
    chosen = values[0]
    if count > 1:
        chosen = tl.where(index == 1, values[1], chosen)
    if count > 2:
        chosen = tl.where(index == 2, values[2], chosen)
    return chosen


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def program_place(widths: tl.tuple, weights: tl.constexpr, outputs: tl.constexpr) -> tl.tensor:
    """Find this program's weight, its tile of that weight's outputs, and the outputs of the weights before it."""
    program = tl.program_id(0)
    which = 0
    local = program
    before = 0
    if weights > 1:
        second = tl.cdiv(widths[0], outputs)
        which = tl.where(program >= second, 1, 0)
        local = tl.where(program >= second, program - second, local)
        before = tl.where(program >= second, widths[0], 0)
    if weights > 2:
        third = second + tl.cdiv(widths[1], outputs)
        which = tl.where(program >= third, 2, which)
        local = tl.where(program >= third, program - third, local)
        before = tl.where(program >= third, widths[0] + widths[1], before)
    return which, local, before


@triton.jit  # type: ignore[misc,untyped-decorator,unused-ignore]
def sum_of(widths: tl.tuple, count: tl.constexpr) -> tl.tensor:
    """Count the outputs of all weights of the launch, at most three."""
    total = widths[0]
    if count > 1:
        total += widths[1]
    if count > 2:
        total += widths[2]
    return total
