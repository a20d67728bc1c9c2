"""Modules that keep a state, in a forward over packed tokens of several sequences.

Such a module wants each sequence in a row of its own. So its `forward` is replaced: the sequences that decode run as
one batch of shape `(rows, 1)` over their gathered states, which a CUDA graph can hold; each chunk of a prompt runs as
`(1, tokens)` from its sequence's state on. The rest of the model sees packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_state_functions import POOLED, PooledInputs, PooledState
from langchain_quantllm.compat.transformers_states import StateCache, StateKey, is_cache, state_modules
from langchain_quantllm.engine.adapter_choice import AdapterChoice
from langchain_quantllm.engine.attention import Batch
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement
from langchain_quantllm.engine.state_pool import StatePool
from langchain_quantllm.engine.step import PrefillChunk


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Packed tokens that a module runs at once: single tokens of several sequences, or some of one.

    Args:
        first: Index of the first token in the pack.
        count: Tokens.
        slots: Slot of each token's sequence, of shape `(tokens,)`; None for tokens of one sequence.
        source: Row of the states before these; None at the beginning of a text.
        targets: Rows that the states after them go to.
        adapters: The adapters of its tokens; None if the model runs as it is.
    """

    first: int
    count: int
    slots: torch.Tensor | None = None
    source: int | None = None
    targets: tuple[int, ...] = ()
    adapters: AdapterChoice | None = None

    def take(self, packed: torch.Tensor) -> torch.Tensor:
        """Take its tokens from a tensor of shape `(1, all tokens, ...)`, in the shape that a module runs."""
        own = packed[:, self.first : self.first + self.count]
        return own if self.slots is None else own.transpose(0, 1)

    def give(self, output: torch.Tensor) -> torch.Tensor:
        """Turn the module's output into packed tokens, of shape `(1, tokens, ...)`."""
        return output if self.slots is None else output.transpose(0, 1)


class StateForward:
    """The states of all layers in one forward of the engine.

    A step with prompts stores its states when it has ended (`commit`), so that it can be run again after a failure, in
    parts; a step that only decodes stores them layer by layer, which takes no memory.
    """

    def __init__(
        self,
        pool: StatePool,
        batch: Batch,
        adapters: AdapterChoice | None,
        on_layer: Callable[[int], None] | None = None,
        chunks: Sequence[PrefillChunk] = (),
    ) -> None:
        """Divide the tokens of a batch.

        Args:
            pool: The states.
            batch: The tokens.
            adapters: The adapter of each token; None if the model runs as it is.
            on_layer: Called with the number of each layer with a state, before it runs.
            chunks: The chunks of prompts among the tokens.
        """
        self._pool, self._batch, self._on_layer = pool, batch, on_layer
        self._tokens = len(batch.slots)
        self._waits = not batch.decodes
        # Of a step with prompts: states that are not stored yet, by their rows. Later parts may go on from them.
        self._latest: dict[tuple[StateKey, int], torch.Tensor] = {}
        self._of_decoding: list[tuple[StateKey, _Part, torch.Tensor]] = []
        parts = _parts_of(batch, chunks, pool.continues)
        self._parts = [replace(part, adapters=_adapters_of(part, adapters)) for part in parts]

    def run(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Run a module that keeps a state over packed tokens; see `ForwardPatch`."""
        if self._on_layer is not None:
            self._on_layer(getattr(module, "layer_idx", 0))
        outputs = []
        before = context.adapters
        try:
            for part in self._parts:
                cache = StateCache(
                    self._reading(part), self._pool.widths, begins=part.slots is None and part.source is None
                )
                given = [self._given(value, part, cache) for value in args]
                named = {name: self._given(value, part, cache) for name, value in kwargs.items()}
                if "attention_mask" in named:
                    named["attention_mask"] = None  # no token is padding
                context.adapters = part.adapters
                outputs.append(forward(*given, **named))
                self._store(part, cache)
        finally:
            context.adapters = before
        return self._packed(outputs)

    def commit(self) -> None:
        """Store the states of a step with prompts."""
        for key, part, state in self._of_decoding:
            self._write(key, part, state)
        for (key, row), state in self._latest.items():
            self._pool.tensors[key][row : row + 1] = state
        self._of_decoding.clear()
        self._latest.clear()

    def _given(self, value: Any, part: _Part, cache: StateCache) -> Any:
        """Return what a module gets for one of its arguments."""
        if is_cache(value):
            return cache
        if isinstance(value, torch.Tensor):
            return part.take(value) if value.shape[:2] == (1, self._tokens) else value
        if isinstance(value, tuple):
            return tuple(self._given(one, part, cache) for one in value)
        return value

    def _packed(self, outputs: Sequence[Any]) -> Any:
        if isinstance(outputs[0], tuple):  # tensors of tokens; whatever else is among them is of use to nobody
            return tuple(
                self._packed(parts) if self._are_tokens(parts) else None for parts in zip(*outputs, strict=True)
            )
        packed = [part.give(output) for part, output in zip(self._parts, outputs, strict=True)]
        return packed[0] if len(packed) == 1 else torch.cat(packed, 1)

    def _are_tokens(self, outputs: Sequence[Any]) -> bool:
        """Whether one output of a module for each part has the tokens of that part."""
        return all(
            isinstance(output, torch.Tensor)
            and output.shape[:2] == ((1, part.count), (part.count, 1))[part.slots is not None]
            for part, output in zip(self._parts, outputs, strict=True)
        )

    # States.

    def _reading(self, part: _Part) -> Callable[[StateKey], Any]:
        def read(key: StateKey) -> Any:
            states = self._pool.tensors[key]
            if part.slots is not None:
                slots = self._slots_on(states.device, part)
                kernels = None if self._waits else self._pool.steps.kernels.get(key)
                return states.index_select(0, slots) if kernels is None else POOLED[key.kind](states, slots, kernels)
            assert part.source is not None
            latest = self._latest.get((key, part.source))
            return (states[part.source : part.source + 1] if latest is None else latest).clone()

        return read

    def _store(self, part: _Part, cache: StateCache) -> None:
        for key, state in cache.states.items():
            if isinstance(state, PooledState | PooledInputs):
                continue  # changed where it is
            if not self._waits:
                self._write(key, part, state)
                continue
            kept = state.to(self._pool.tensors[key].dtype, copy=True)  # it may be a part of something large
            if part.slots is not None:
                self._of_decoding.append((key, part, kept))
            self._latest.update({(key, row): kept for row in part.targets})

    def _write(self, key: StateKey, part: _Part, state: torch.Tensor) -> None:
        states = self._pool.tensors[key]
        states.index_copy_(0, self._slots_on(states.device, part), state.to(states.dtype))

    def _slots_on(self, device: torch.device, part: _Part) -> torch.Tensor:
        assert part.slots is not None
        slots = part.slots
        return self._batch.cached(("state slots", part.first, device), lambda: slots.to(device, torch.long))


def _parts_of(batch: Batch, chunks: Sequence[PrefillChunk], continues: bool) -> Iterator[_Part]:
    """Divide a batch: sequences that decode, which come first, are one part, and each chunk is one or several."""
    rows = len(batch.slots) if batch.decodes else len(batch.spans) - len(chunks)
    if rows:
        yield _Part(first=0, count=rows, slots=batch.slots[:rows])
    first = rows
    for chunk in chunks:
        yield from _parts_of_chunk(chunk, first, continues)
        first += chunk.count


def _parts_of_chunk(chunk: PrefillChunk, first: int, continues: bool) -> Iterator[_Part]:
    """Divide a chunk behind the tokens whose states are saved, or all of it if several tokens cannot go on."""
    slot, at, end = chunk.sequence.slot, chunk.start, chunk.start + chunk.count
    source = chunk.restored if chunk.restored is not None else slot if at else None
    rows: dict[int, tuple[int, ...]] = {end: ()}
    if source is not None and not continues:
        rows |= dict.fromkeys(range(at + 1, end), ())
    for position, row in chunk.saves:
        rows[position] = (*rows.get(position, ()), row)
    for border in sorted(rows):
        targets = (slot, *rows[border])
        yield _Part(first=first + at - chunk.start, count=border - at, source=source, targets=targets)
        source, at = slot, border


def _adapters_of(part: _Part, adapters: AdapterChoice | None) -> AdapterChoice | None:
    if adapters is None:
        return None
    return replace(adapters, of_tokens=adapters.of_tokens[part.first : part.first + part.count], masks={})


class StateModules(PatchedModules):
    """The modules of a model that keep states, patched for the engine's forwards."""

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        return ((module, _run) for module in state_modules(self._model))


def _run(
    context: ForwardContext, module: Any, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    given = [*args, *kwargs.values()]
    if context.states is None or any(isinstance(value, StateCache) for value in given):  # of another patch: as it is
        return forward(*args, **kwargs)
    return context.states.run(context, module, forward, args, kwargs)
