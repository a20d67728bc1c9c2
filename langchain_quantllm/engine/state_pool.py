"""The states of layers that keep one for each sequence: linear attention, state spaces, short convolutions.

Owns their shapes, their memory and its share of the budget: for each state a tensor with a row for each slot. How a
module gets its rows is `state_forward`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from langchain_quantllm.compat.transformers_states import StateKey
from langchain_quantllm.engine.kv_cache import budget_on, zeros
from langchain_quantllm.engine.state_steps import StateSteps
from langchain_quantllm.errors import NotEnoughMemoryError
from langchain_quantllm.memory import format_bytes

LEAST_ROWS = 3
"""Rows of the two sequences that verify a model, and of padding."""

_SHARE = 2  # states take at most this part of the budget: a half, for models that keep keys and values as well


@dataclass(frozen=True, kw_only=True)
class StateShape:
    """One state of a model: its size for one sequence, without the dimension of the rows."""

    key: StateKey
    size: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def row_bytes(self) -> int:
        """Bytes of one sequence's state."""
        return math.prod(self.size) * int(self.dtype.itemsize)


def state_shapes(states: Mapping[StateKey, torch.Tensor]) -> list[StateShape]:
    """Read the shapes of a model's states, of shape `(1, ...)`."""
    return [
        StateShape(key=key, size=tuple(state.shape[1:]), dtype=state.dtype, device=state.device)
        for key, state in states.items()
    ]


def state_bytes(shapes: Sequence[StateShape], rows: int) -> dict[torch.device, int]:
    """Compute the bytes of the states of so many rows on each device."""
    devices = {shape.device for shape in shapes}
    return {device: rows * sum(s.row_bytes for s in shapes if s.device == device) for device in devices}


def count_rows(shapes: Sequence[StateShape], budget: float | int | None, *, most: int) -> int:
    """Compute how many rows of states fit the budget, the padding row included.

    Args:
        shapes: The states' shapes.
        budget: A fraction of what is free, bytes, or None; see `kv_cache.count_blocks`.
        most: Rows that are of use.

    Raises:
        NotEnoughMemoryError: If there is no room for the states of a few sequences.
    """
    needed = state_bytes(shapes, 1)
    if isinstance(budget, int):
        fitting = budget // _SHARE // max(1, sum(needed.values()))
    else:
        fitting = min(int(budget_on(device, budget)) // _SHARE // max(1, size) for device, size in needed.items())
    if fitting < LEAST_ROWS:
        msg = (
            f"kv_cache_memory leaves no room for the states of {LEAST_ROWS} sequences of "
            f"{format_bytes(sum(needed.values()))} each in half of it; raise it, "
            "free memory, or load the model in fewer bits."
        )
        raise NotEnoughMemoryError(msg)
    return min(fitting, most)


def slots_of(rows: int, *, most: int, continues: bool) -> int:
    """Compute how many of a pool's rows are slots, beside the one for padding; others keep states at block borders.

    Args:
        rows: Rows of the pool.
        most: Maximum number of sequences at once.
        continues: Whether prompts go on from kept states, which then get a quarter of the rows or more.
    """
    return min(most, max(LEAST_ROWS - 1, 3 * (rows - 1) // 4) if continues else rows - 1)


class StatePool:
    """The states of all slots, of a row for padding behind them, and at block borders in the rest of the rows.

    Attributes:
        rows: Rows of each tensor.
        continues: Whether several tokens at once go on from a state; else single tokens do.
        tensors: Each state of all rows, of shape `(rows, ...)`. On a CPU they take memory as they are first written to.
        widths: Size of each state's last dimension.
        steps: The states that a decode step changes where they are.
    """

    def __init__(self, shapes: Sequence[StateShape], rows: int, *, continues: bool = True) -> None:
        """Allocate the states, as zeros.

        Raises:
            NotEnoughMemoryError: If the device has too little memory.
        """
        self.rows, self.continues = rows, continues
        try:
            self.tensors = {shape.key: zeros((rows, *shape.size), shape.dtype, shape.device) for shape in shapes}
        except (torch.OutOfMemoryError, MemoryError, OSError, OverflowError) as error:
            size = format_bytes(sum(state_bytes(shapes, rows).values()))
            msg = f"the states of {rows} sequences, {size}, do not fit; lower kv_cache_memory."
            raise NotEnoughMemoryError(msg) from error
        self.widths = {shape.key: shape.size[-1] for shape in shapes}
        self.steps = StateSteps()

    def prefix_note(self, slots: int) -> str:
        """Say whether prompts that begin alike share what is computed, if so many of the rows are slots."""
        if not self.continues:
            return "no prefix caching and no parts of prompts: its layers go on from a state by single tokens only"
        if kept := self.rows - slots - 1:
            return f"its layers keep a state: prompts that begin alike go on from one of {kept} that are kept"
        return "no prefix caching: there is no memory to keep its layers' states"
