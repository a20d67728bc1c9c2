"""A model's decoder layers, run one by one over stored activations.

They are called blocks here, as in GPTQ's configs; layers are the linear ones inside them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.quantization.expert_layers import ExpertLayers, RoutedTokens, find_experts

_CHECK_TOKENS = 12
_BATCH_TOKENS = 4096

LayerCall = tuple[tuple[Any, ...], dict[str, Any]]
"""Arguments and keyword arguments of a block beside its hidden states."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Names of the quantizable layers of a model.

    Args:
        prefix: Name of the list of blocks, such as `"model.layers"`.
        layers: Names of the linear layers inside a block, for each block, in the order of the model.
        experts: The experts of mixtures inside a block, for each block.
        left_out: Names inside a block of further linear layers, which cannot be packed and stay unquantized.
    """

    prefix: str
    layers: tuple[tuple[str, ...], ...]
    experts: tuple[tuple[ExpertLayers, ...], ...]
    left_out: tuple[str, ...] = ()

    @property
    def count(self) -> int:
        """Number of blocks."""
        return len(self.layers)


def find_layout(model: Any) -> Layout:
    """Find the blocks of a decoder and their linear layers; the model may be on the meta device.

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
        msg = f"{type(model).__name__} has no list of {count} decoder blocks, which GPTQ needs; use nf4 or int8."
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
    return Layout(prefix=prefix, layers=layers, experts=find_experts(model, prefix))


class DecoderLayers:
    """The blocks of one model, with the inputs of the next one."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        sequences: Sequence[Sequence[int]],
        device: str,
        *,
        batch_tokens: int = _BATCH_TOKENS,
        holds_gradients: bool = False,
    ) -> None:
        """Run the part of the model before the first block.

        All sequences of token ids have the same length; the list may be empty. Blocks go to `device` one at a time to
        compute, over sequences of `batch_tokens` in all at a time, or one. `holds_gradients` says that gradients run
        through blocks, most of which are 0 in float16.

        Raises:
            UnsupportedError: If the blocks run one by one compute something else than the model.
        """
        self._model = model
        self._blocks: Any = model.get_submodule(layout.prefix)
        self._device = device
        self._home = next(model.parameters()).device
        needs_range = holds_gradients and model.dtype == torch.float16
        is_single = device == "cpu" or needs_range  # CPUs are slow or imprecise in 16 bits
        self.dtype = torch.float32 if is_single else model.dtype
        self._own_dtype = model.dtype
        self._beside: tuple[None, ...] | None = None  # what a block returns beside its output; None for a lone tensor
        self._check_blocks()
        rows = max(1, batch_tokens // len(sequences[0])) if sequences else 1
        recorded = [self._record(torch.tensor(sequences[at : at + rows])) for at in range(0, len(sequences), rows)]
        self._calls = [calls for _, calls in recorded]
        self.states = [state for state, _ in recorded]
        """Inputs of the next block, one tensor of shape `(rows, tokens, hidden)` for each batch."""

    def _check_blocks(self) -> None:
        """Compare the blocks run one by one with the model as a whole."""
        ids = torch.arange(_CHECK_TOKENS).unsqueeze(0) % self._model.config.get_text_config().vocab_size
        outputs: list[Any] = []
        hook = self._blocks[-1].register_forward_hook(lambda _, __, output: outputs.append(output))
        with torch.no_grad(), hook:
            self._model(input_ids=ids.to(self._home), use_cache=False)
        self._beside = (None,) * (len(outputs[0]) - 1) if isinstance(outputs[0], tuple) else None
        expected = _hidden(outputs[0]).float()
        what = f"the blocks of {type(self._model).__name__} cannot be run one by one"
        try:
            state, calls = self._record(ids)
            for block, call in zip(self._blocks, calls, strict=True):
                state = self._run(block, state, call)
        except ValueError as error:  # a block that goes on from what another one gave beside its output, or runs twice
            msg = f"{what}: {error}; use nf4 or int8."
            raise UnsupportedError(msg) from error
        if not torch.allclose(state.float(), expected, rtol=1e-2, atol=1e-3 * expected.abs().max().item()):
            msg = f"{what}: their output differs from the model's; use nf4 or int8."
            raise UnsupportedError(msg)

    def _record(self, ids: torch.Tensor) -> tuple[torch.Tensor, list[LayerCall]]:
        """Return the input of the first block, and the call of each block, without running any block."""
        states: list[torch.Tensor] = []
        calls: list[LayerCall] = []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            states.append(hidden_states)
            calls.append((args, kwargs))
            return hidden_states if self._beside is None else (hidden_states, *self._beside)

        with torch.no_grad(), _forwards_replaced(self._blocks, record):
            self._model.base_model(input_ids=ids.to(self._home), use_cache=False)
        return states[0].to(self._home), calls

    def _run(self, block: Any, state: torch.Tensor, call: LayerCall) -> torch.Tensor:
        with torch.no_grad():
            return self._output(block, state.to(next(block.parameters())), call).to(self._home)

    def _output(self, block: Any, state: torch.Tensor, call: LayerCall) -> torch.Tensor:
        args, kwargs = _moved(call, state)
        return _hidden(block(state, *args, **kwargs))

    def differentiable(self, index: int, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return a batch's inputs of a block, and its outputs, which can be differentiated by them."""
        block = self._blocks[index]
        state = self.states[batch].to(next(block.parameters())).detach().requires_grad_()
        return state, self._output(block, state, self._calls[batch][index])

    def logits(self, ids: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        """Run what follows the last block.

        Args:
            ids: Token ids of shape `(1, tokens)`, on the device of the model's head.
            outputs: Outputs of the last block for them, of shape `(1, tokens, hidden)`.
        """

        def skip(*_: Any, **__: Any) -> Any:
            return outputs if self._beside is None else (outputs, *self._beside)

        with _forwards_replaced(self._blocks, skip):
            logits: torch.Tensor = self._model(input_ids=ids, use_cache=False).logits
        return logits

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[Any]:
        """Move a block to the device that computes, and back."""
        block = self._blocks[index]
        block.to(self._device, self.dtype)
        try:
            yield block
        finally:
            block.to(self._home, self._own_dtype)

    def block(self, index: int) -> Any:
        """Return a block."""
        return self._blocks[index]

    def groups(self, index: int, names: Sequence[str]) -> list[list[str]]:
        """Group the linear layers of a block that share an input, in the order of use.

        Layers that are not called, such as experts without a token, come last, each for itself.
        """
        inputs: list[torch.Tensor] = []  # all kept, as a later input could reuse the id of an earlier one
        order: dict[str, int] = {}

        def note(name: str) -> Callable[..., None]:
            def hook(_: Any, args: Any) -> None:
                inputs.append(args[0])
                order.setdefault(name, id(args[0]))

            return hook

        self._run_hooked(index, {name: note(name) for name in names}, batches=1)
        grouped: dict[int, list[str]] = {}
        for name, key in order.items():
            grouped.setdefault(key, []).append(name)
        return [*grouped.values(), *([name] for name in names if name not in order)]

    def observe(self, index: int, names: Sequence[str], see: Callable[[torch.Tensor], None]) -> None:
        """Pass the inputs of one group of layers to `see`, over all sequences; nothing after them is computed."""

        def hook(_: Any, args: Any) -> None:
            see(args[0])
            raise _SeenError

        self._run_hooked(index, {names[0]: hook})

    def routed(self, index: int, experts: str) -> RoutedTokens:
        """Return the inputs of a block's experts, over all sequences."""
        found = RoutedTokens()

        def hook(_: Any, args: Any, kwargs: Any) -> None:
            hidden, chosen = [*args, *kwargs.values()][:2]
            found.add(hidden, chosen)
            raise _SeenError

        module = self._blocks[index].get_submodule(experts)
        with module.register_forward_pre_hook(hook, with_kwargs=True):
            self._run_hooked(index, {})
        return found

    def _run_hooked(self, index: int, hooks: dict[str, Callable[..., None]], batches: int | None = None) -> None:
        block = self._blocks[index]
        with contextlib.ExitStack() as stack:
            for name, hook in hooks.items():
                stack.enter_context(block.get_submodule(name).register_forward_pre_hook(hook))
            for state, calls in list(zip(self.states, self._calls, strict=True))[:batches]:
                with contextlib.suppress(_SeenError):
                    self._run(block, state, calls[index])

    def advance(self, index: int) -> None:
        """Run a block with its present weights, so that `states` are the inputs of the one after it."""
        self.states = self.outputs(index, self.states)

    def outputs(self, index: int, states: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Run a block with its present weights over inputs of the shapes of `states`."""
        block = self._blocks[index]
        return [self._run(block, state, calls[index]) for state, calls in zip(states, self._calls, strict=True)]

    def predict(self, index: int, batch: int) -> torch.Tensor:
        """Run a block over one of `states`, for gradients; the output stays on the device."""
        like = torch.empty(0, dtype=self.dtype, device=self._device)
        args, kwargs = _moved(self._calls[batch][index], like)
        return _hidden(self._blocks[index](self.states[batch].to(like), *args, **kwargs))


class _SeenError(Exception):
    """Ends a forward once its input was seen."""


def _hidden(output: Any) -> torch.Tensor:
    """Return the hidden states in a block's output."""
    hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return hidden


@contextlib.contextmanager
def _forwards_replaced(modules: Any, function: Callable[..., Any]) -> Iterator[None]:
    before = [module.__dict__.get("forward") for module in modules]  # hooks of accelerate set one
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
    """Move the tensors in tuples, lists and dicts to a tensor's device, floats to its dtype too."""
    if isinstance(value, torch.Tensor):
        return value.to(like) if value.is_floating_point() else value.to(like.device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(part, like) for part in value)
    if isinstance(value, dict):
        return {name: _moved(part, like) for name, part in value.items()}
    return value
