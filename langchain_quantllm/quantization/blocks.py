"""A model's decoder blocks, run one by one over stored activations.

Owns finding the blocks and their linear layers, what each block is called with, and the activations between two
blocks. Knows nothing of how weights are rounded, and changes the model only while `Blocks` records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from langchain_quantllm.errors import UnsupportedError

_PROBE_TOKENS = 12
_MOST_TOKENS = 4096  # of the sequences that run beside each other


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the quantizable layers of a model are.

    Args:
        prefix: Name of the list of blocks, such as `"model.layers"`.
        count: Number of blocks.
        layers: Names of the linear layers inside a block, for each block, in the order of the model.
    """

    prefix: str
    count: int
    layers: tuple[tuple[str, ...], ...]


def find_layout(model: Any) -> Layout:
    """Find the blocks of a decoder, on weights or on the meta device.

    Raises:
        UnsupportedError: If it has no list of blocks, or linear layers of another kind.
    """
    count = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if not lists:
        msg = f"{type(model).__name__} has no list of {count} decoder blocks, which GPTQ goes through; use nf4 or int8."
        raise UnsupportedError(msg)
    prefix, blocks = max(lists, key=lambda found: sum(p.numel() for p in found[1].parameters()))
    layers = tuple(
        tuple(name for name, module in block.named_modules() if isinstance(module, nn.Linear)) for block in blocks
    )
    if not all(layers):
        kinds = sorted({type(module).__name__ for module in blocks[0].modules() if not list(module.children())})
        msg = (
            f"the blocks of {type(model).__name__} have no torch.nn.Linear (they consist of {', '.join(kinds)}), and "
            "GPTQ checkpoints hold nothing else; use nf4 or int8."
        )
        raise UnsupportedError(msg)
    return Layout(prefix=prefix, count=count, layers=layers)


class Blocks:
    """The blocks of one model with the activations that go into the next of them."""

    def __init__(self, model: Any, layout: Layout, sequences: Sequence[Sequence[int]], device: str) -> None:
        """Run what comes before the first block.

        Args:
            model: On the CPU, or on the device that computes.
            layout: Of this model.
            sequences: Token ids, all of one length; may be empty.
            device: The device that computes; blocks go there one at a time.

        Raises:
            UnsupportedError: If the blocks run one by one give something else than the model.
        """
        self._model = model
        self._blocks: Any = model.get_submodule(layout.prefix)
        self._device = device
        self._home = next(model.parameters()).device
        self._dtype = torch.float32 if device == "cpu" else model.dtype  # CPUs compute 16 bits slowly, or roughly
        self._own_dtype = model.dtype
        self._check_probe()
        rows = max(1, _MOST_TOKENS // len(sequences[0])) if sequences else 1
        batches = [sequences[at : at + rows] for at in range(0, len(sequences), rows)]
        self._calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        self.states: list[torch.Tensor] = []
        """Activations that go into the next block, one tensor of shape `(rows, tokens, hidden)` for each batch."""
        for batch in batches:
            state, calls = self._record(torch.tensor(batch))
            self.states.append(state)
            self._calls.append(calls)

    def _check_probe(self) -> None:
        """Compare the blocks one by one with the model as a whole."""
        ids = torch.arange(_PROBE_TOKENS).unsqueeze(0) % self._model.config.get_text_config().vocab_size
        self._returns_tuple = False
        outputs: list[torch.Tensor] = []

        def note(_: Any, __: Any, output: Any) -> None:
            self._returns_tuple = isinstance(output, tuple)
            outputs.append(output[0] if isinstance(output, tuple) else output)

        handles = [block.register_forward_hook(note) for block in self._blocks]
        try:
            with torch.no_grad():
                self._model(input_ids=ids.to(self._home), use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        state, calls = self._record(ids)
        for block, call in zip(self._blocks, calls, strict=True):
            state = self._run(block, state, call)
        if not torch.allclose(
            state.float(), outputs[-1].float(), rtol=1e-2, atol=1e-3 * outputs[-1].abs().max().item()
        ):
            msg = (
                f"the blocks of {type(self._model).__name__} cannot be run one by one: what comes out differs from the "
                "model's; use nf4 or int8."
            )
            raise UnsupportedError(msg)

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[tuple[tuple[Any, ...], dict[str, Any]]]]:
        """Note what each block is called with, without running it; what goes into the first one is the state."""
        states: list[torch.Tensor] = []
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

        def stand_in(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            states.append(hidden_states)
            calls.append((args, kwargs))
            return (hidden_states,) if self._returns_tuple else hidden_states

        with torch.no_grad(), _forwards_replaced(self._blocks, stand_in):
            self._model.base_model(input_ids=ids.to(self._home), use_cache=False)
        return states[0].to(self._home), calls

    def _run(self, block: Any, state: torch.Tensor, call: tuple[tuple[Any, ...], dict[str, Any]]) -> torch.Tensor:
        parameter = next(block.parameters())
        args, kwargs = _moved(call, parameter)
        with torch.no_grad():
            output = block(state.to(parameter), *args, **kwargs)
        return (output[0] if isinstance(output, tuple) else output).to(self._home)

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[Any]:
        """Bring a block to the device that computes, and back."""
        block = self._blocks[index]
        block.to(self._device, self._dtype)
        try:
            yield block
        finally:
            block.to(self._home, self._own_dtype)

    def groups(self, index: int, names: Sequence[str]) -> list[list[str]]:
        """Sort the linear layers of a block by what they read: those of one input together, in the order of use.

        Layers that read nothing in this call, such as experts that no token was sent to, come last, each for itself.
        """
        order: list[tuple[int, str]] = []
        kept: list[torch.Tensor] = []  # or a later input could lie where an earlier one did

        def note(name: str) -> Callable[..., None]:
            def hook(_: Any, args: Any) -> None:
                kept.append(args[0])
                order.append((id(args[0]), name))

            return hook

        self._with_hooks(index, {name: note(name) for name in names}, batches=1)
        grouped: dict[int, list[str]] = {}
        seen: set[str] = set()
        for key, name in order:
            if name not in seen:
                grouped.setdefault(key, []).append(name)
                seen.add(name)
        return [*grouped.values(), *([name] for name in names if name not in seen)]

    def observe(self, index: int, names: Sequence[str], see: Callable[[torch.Tensor], None]) -> None:
        """Show what the layers of one group read, over all sequences; what comes after them is not computed."""

        def hook(_: Any, args: Any) -> None:
            see(args[0])
            raise _SeenError

        self._with_hooks(index, {names[0]: hook})

    def _with_hooks(self, index: int, hooks: dict[str, Callable[..., None]], batches: int | None = None) -> None:
        block = self._blocks[index]
        handles = [block.get_submodule(name).register_forward_pre_hook(hook) for name, hook in hooks.items()]
        try:
            for state, calls in list(zip(self.states, self._calls, strict=True))[:batches]:
                with contextlib.suppress(_SeenError):
                    self._run(block, state, calls[index])
        finally:
            for handle in handles:
                handle.remove()

    def advance(self, index: int) -> None:
        """Run a block as its weights are now, so that `states` goes into the one after it."""
        block = self._blocks[index]
        self.states = [
            self._run(block, state, calls[index]) for state, calls in zip(self.states, self._calls, strict=True)
        ]


class _SeenError(Exception):
    """Ends a forward after what was to be seen."""


@contextlib.contextmanager
def _forwards_replaced(modules: Any, function: Callable[..., Any]) -> Iterator[None]:
    before = [module.__dict__.get("forward") for module in modules]  # accelerate's hooks put one there
    for module in modules:
        module.forward = function
    try:
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            del module.forward
            if forward is not None:
                module.forward = forward


def _moved(value: Any, like: torch.Tensor) -> Any:
    """Bring the tensors in tuples, lists and dicts to a device, and numbers to a dtype."""
    if isinstance(value, torch.Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, like) for part in value)
    if isinstance(value, dict):
        return {name: _moved(part, like) for name, part in value.items()}
    return value
