"""What rounding each group of layers costs: the divergence of the model's predictions that its error brings.

To second order, an error `d` in the outputs of a layer moves the predictions by `E[(g . d)^2] / 2` nats, where `g` is
the gradient of the log probability of words that the model itself draws (the Fisher information). So one forward and
one backward pass over some text, a block at a time, weigh the errors of all layers. They are those of GPTQ itself on
the inputs of the same text, for one number of bits; for others, they go with the square of a step between codes. Terms
between outputs of a layer and between groups are left out.

Source: Kim et al., SqueezeLLM, https://arxiv.org/abs/2306.07629, section 4.1, and Malinovskii et al., Pushing the
limits of large language model quantization via the linearity theorem, https://arxiv.org/abs/2411.17525 (costs add up).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from langchain_quantllm.errors import UnsupportedError, first_line
from langchain_quantllm.quantization.decoder_layers import DecoderLayers, Layout
from langchain_quantllm.quantization.expert_layers import ExpertLayers, RoutedTokens
from langchain_quantllm.quantization.journal import Journal
from langchain_quantllm.quantization.solver import InputStatistics, Rounding, solve

TOKENS = 8192
"""Most tokens of the calibration on which costs are measured."""

_EXPERTS = ".experts."


@dataclass(frozen=True, kw_only=True)
class LayerGroup:
    """Layers that have the same bits: those with the same input, which engines join, or all experts of a block.

    Args:
        block: Number of the block.
        names: Names inside the block; one that ends in a dot stands for all layers below.
        weights: Number of their weights.
        costs: Estimated nats that rounding them to each number of bits adds to the divergence at a token.
    """

    block: int
    names: tuple[str, ...]
    weights: int
    costs: tuple[float, ...]


class Sensitivity:
    """The measurement of one model, which is not changed."""

    def __init__(
        self,
        model: Any,
        layout: Layout,
        sequences: Sequence[Sequence[int]],
        bits: Sequence[int],
        rounding: Rounding,
        device: str,
    ) -> None:
        """Prepare it.

        Args:
            model: The model on the CPU, unquantized.
            layout: Its layers.
            sequences: Token ids, of one length; the first `TOKENS` of them are used.
            bits: Numbers of bits, ascending.
            rounding: How weights are rounded, apart from the number of bits.
            device: Where blocks go, one at a time.
        """
        self._model = model
        self._layout = layout
        self._sequences = list(sequences[: max(1, TOKENS // len(sequences[0]))])
        self._bits = list(bits)
        # The number next to all means that are chosen from, as costs are best known there.
        self._measured = replace(rounding, bits=min(self._bits, key=lambda count: abs(count - 3.4)))
        self._device = device
        self._tokens = sum(map(len, self._sequences))

    def measure(self, journal: Journal, finished: Callable[[int, bool], None]) -> list[LayerGroup]:
        """Measure all groups of layers; blocks that the journal has are not measured again.

        Args:
            journal: Keeps the costs of each block.
            finished: Called after each block with their number, and whether it came from the journal.

        Raises:
            UnsupportedError: If no gradients come through the model.
        """
        blocks = DecoderLayers(self._model, self._layout, self._sequences, self._device)
        inputs = []
        for index in range(self._layout.count):
            inputs.append([state.to(self._model.dtype) for state in blocks.states])  # half the memory
            with blocks.on_device(index):
                blocks.advance(index)
        found: list[LayerGroup] = []
        with _fixed(self._model), _told_as_unsupported(self._model):
            gradients = self._last_gradients(blocks)
            for done, index in enumerate(reversed(range(self._layout.count)), 1):
                blocks.states = inputs.pop()
                kept = journal.read(f"bits-{index:04}")
                with blocks.on_device(index) as block:
                    groups = blocks.groups(index, self._layout.layers[index])
                    seen = _Seen()
                    with (
                        contextlib.nullcontext() if kept else seen.watching(block, groups, self._layout.experts[index])
                    ):
                        gradients = self._backward(blocks, index, gradients, seen)
                    costs = kept["costs"] if kept else self._costs(block, index, groups, seen)
                    if not kept:
                        journal.write(f"bits-{index:04}", {"costs": costs})
                    found += self._named(block, index, groups, costs)
                finished(done, bool(kept))
        return found

    def _last_gradients(self, blocks: DecoderLayers) -> list[torch.Tensor]:
        """Return the gradients of the log probability of drawn words, by the outputs of the last block."""
        generator = torch.Generator().manual_seed(0)
        found, rows = [], iter(self._sequences)
        with _rest_on_device(self._model, self._layout.prefix, self._device, blocks.dtype):
            for state in blocks.states:
                gradients = []
                for row in state:
                    outputs = row[None].to(self._device, blocks.dtype).requires_grad_()
                    logits = blocks.logits(torch.tensor([list(next(rows))], device=self._device), outputs)
                    log_probs = logits[0].float().log_softmax(-1)
                    drawn = torch.multinomial(log_probs.detach().exp().cpu(), 1, generator=generator)
                    drawn_log_prob = log_probs.gather(1, drawn.to(log_probs.device)).sum()
                    gradients.append(torch.autograd.grad(drawn_log_prob, outputs)[0].float().cpu())
                found.append(torch.cat(gradients))
        return found

    def _backward(
        self, blocks: DecoderLayers, index: int, gradients: Sequence[torch.Tensor], seen: _Seen
    ) -> list[torch.Tensor]:
        """Return the gradients by the inputs of a block, given those by its outputs."""
        found = []
        for batch, gradient in enumerate(gradients):
            scale = float(gradient.abs().max()) or 1.0  # so that 16 bits hold gradients of any size
            seen.scales.append(scale)
            seen.rows.append(len(gradient))
            inputs, outputs = blocks.differentiable(index, batch)
            (own,) = torch.autograd.grad(outputs, inputs, (gradient / scale).to(outputs))
            found.append(own.float().cpu() * scale)
        return found

    def _costs(self, block: Any, index: int, groups: Sequence[Sequence[str]], seen: _Seen) -> torch.Tensor:
        """Compute the costs of a block's groups, and of its experts, float64 of shape `(groups, bits)`."""
        found = [self._group_costs(block, names, seen) for names in groups]
        found += [self._expert_costs(block, experts, seen) for experts in self._layout.experts[index]]
        return torch.tensor(found, dtype=torch.float64) / (2 * self._tokens)

    def _group_costs(self, block: Any, names: Sequence[str], seen: _Seen) -> list[float]:
        linears = [block.get_submodule(name) for name in names]
        weight = torch.cat([linear.weight.detach().float() for linear in linears])
        inputs = seen.inputs.get(names[0], [])
        statistics = InputStatistics(weight.shape[1], weight.device)
        for x in inputs:
            statistics.add(x)

        error = solve(weight, statistics, self._measured).dequantize() - weight
        errors = dict(zip(names, error.split([linear.out_features for linear in linears]), strict=True))
        cost = 0.0
        for batch, x in enumerate(inputs):
            for name in names:
                cost += seen.moved(name, batch, x.float() @ errors[name].t())
        return self._per_bits(cost)

    def _expert_costs(self, block: Any, experts: ExpertLayers, seen: _Seen) -> list[float]:
        module = block.get_submodule(experts.path)
        calls = seen.calls.get(experts.path, [])
        tokens = RoutedTokens()
        for args, kwargs in calls:
            tokens.add(*[*args, *kwargs.values()][:2])
        if not calls:
            return self._per_bits(0.0)
        before = {name: getattr(module, name).detach().clone() for name in experts.projections}
        with torch.no_grad():
            expected = [module(*args, **kwargs) for args, kwargs in calls]
            experts.quantize(module, tokens, self._measured)
            found = [module(*args, **kwargs) for args, kwargs in calls]
        for name, weight in before.items():
            getattr(module, name).data.copy_(weight)
        pairs = enumerate(zip(found, expected, strict=True))
        cost = sum(seen.moved(experts.path, batch, ours.float() - theirs.float()) for batch, (ours, theirs) in pairs)
        return self._per_bits(cost)

    def _per_bits(self, cost: float) -> list[float]:
        """Return the costs for all numbers of bits, which go with the square of a step between codes."""
        step = 2**self._measured.bits - 1
        return [cost * (step / (2**bits - 1)) ** 2 for bits in self._bits]

    def _named(self, block: Any, index: int, groups: Sequence[Sequence[str]], costs: torch.Tensor) -> list[LayerGroup]:
        """Make the groups of a block of their costs; experts are one group."""
        experts = self._layout.experts[index]
        weights = [sum(block.get_submodule(name).weight.numel() for name in names) for names in groups]
        weights += [own.elements for own in experts]
        sums: dict[tuple[str, ...], tuple[int, torch.Tensor]] = {}
        for names, count, cost in zip([*groups, *([f"{own.path}."] for own in experts)], weights, costs, strict=True):
            path, marked, _ = names[0].partition(_EXPERTS)
            key = (f"{path}{_EXPERTS}",) if marked else tuple(names)
            before = sums.get(key, (0, torch.zeros_like(cost)))
            sums[key] = (before[0] + count, before[1] + cost)
        return [
            LayerGroup(block=index, names=names, weights=count, costs=tuple(cost.tolist()))
            for names, (count, cost) in sums.items()
        ]


class _Seen:
    """The inputs of groups of layers, and the gradients by their outputs, one tensor for each batch."""

    def __init__(self) -> None:
        self.inputs: dict[str, list[torch.Tensor]] = {}
        self.calls: dict[str, list[tuple[Any, Any]]] = {}
        self.gradients: dict[str, list[torch.Tensor]] = {}
        self.scales: list[float] = []
        """By which the gradients of each batch are too small."""
        self.rows: list[int] = []
        """Sequences of each batch."""

    def moved(self, name: str, batch: int, error: torch.Tensor) -> float:
        """Sum the squares of what an error in outputs moves: of each output, over the tokens of a sequence."""
        by_token = (self.gradients[name][batch].float() * error).view(self.rows[batch], -1, error.shape[-1])
        total: float = by_token.double().sum(1).square().sum().item()
        return total * self.scales[batch] ** 2

    @contextlib.contextmanager
    def watching(self, block: Any, groups: Sequence[Sequence[str]], experts: Sequence[ExpertLayers]) -> Iterator[None]:
        """Watch the layers of a block, and its experts."""
        with contextlib.ExitStack() as stack:
            for names in groups:
                for name in names:
                    hook = self._linear_hook(name, is_first=name == names[0])
                    stack.enter_context(block.get_submodule(name).register_forward_hook(hook))
            for own in experts:
                module = block.get_submodule(own.path)
                stack.enter_context(module.register_forward_hook(self._experts_hook(own.path), with_kwargs=True))
            yield

    def _linear_hook(self, name: str, *, is_first: bool) -> Callable[..., None]:
        def hook(_: Any, args: Any, output: torch.Tensor) -> None:
            if output.requires_grad:  # the call that is differentiated
                if is_first:
                    self.inputs.setdefault(name, []).append(args[0].detach())
                output.register_hook(self.gradients.setdefault(name, []).append)

        return hook

    def _experts_hook(self, path: str) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
            if output.requires_grad:
                detached = tuple(_detached(value) for value in args), {k: _detached(v) for k, v in kwargs.items()}
                self.calls.setdefault(path, []).append(detached)
                output.register_hook(self.gradients.setdefault(path, []).append)

        return hook


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, torch.Tensor) else value


@contextlib.contextmanager
def _fixed(model: Any) -> Iterator[None]:
    """Compute no gradients by parameters."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _rest_on_device(model: Any, blocks: str, device: str, dtype: torch.dtype) -> Iterator[None]:
    """Bring all but the blocks of a model to a device and a dtype, and back."""
    own = model.dtype
    named = [*model.named_parameters(), *model.named_buffers()]
    tensors = [(tensor, tensor.data) for name, tensor in named if not name.startswith(f"{blocks}.")]
    for tensor, before in tensors:
        tensor.data = before.to(device, dtype if before.dtype == own else before.dtype)
    try:
        yield
    finally:
        for tensor, before in tensors:
            tensor.data = before


@contextlib.contextmanager
def _told_as_unsupported(model: Any) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        msg = f"bits='auto:...' needs gradients, which do not come through {type(model).__name__}: {first_line(error)}"
        raise UnsupportedError(msg) from error
