"""Distillation of a quantized model: its scales are trained to predict as the unquantized model does, codes if wanted.

Zero points and groups stay as they are, so the format, the size and the speed do. The loss is the divergence from the
unquantized model at each token of the calibration, over the whole vocabulary and through all layers, where GPTQ looks
at one layer after the other.

Source: Li et al., Norm tweaking, https://arxiv.org/abs/2309.02784, and Shao et al., EfficientQAT,
https://arxiv.org/abs/2407.11062, section 3.3 (scales are trained through the whole model).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from langchain_quantllm.errors import InvalidOptionError, NamedOptions
from langchain_quantllm.quantization.packing import RoundedLinear
from langchain_quantllm.quantization.trained_linear import TrainedLinear

_WARMUP_STEPS = 8
_LEAST_RATE = 0.1  # of the learning rate, at the last step
State = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Distillation(NamedOptions):
    """How scales and codes are trained.

    Args:
        epochs: How often each sequence of the calibration is seen.
        learning_rate: Adam's, of scales relative to their first value.
        code_rate: Train the codes too: how far a weight goes at the first step, in codes, before it is rounded again,
            such as 0.001; it takes four bytes more for each weight. 0 leaves the codes as they are.

    Raises:
        InvalidOptionError: If a number is not allowed.
    """

    epochs: int = 4
    learning_rate: float = 2e-3
    code_rate: float = 0.0

    def __post_init__(self) -> None:
        """Check the numbers."""
        if type(self.epochs) is not int or self.epochs < 1:
            msg = f"distill epochs={self.epochs!r} is not allowed; it must be a whole number of at least 1."
            raise InvalidOptionError(msg)
        if not isinstance(self.learning_rate, float | int) or not 0 < self.learning_rate < 1:
            msg = f"distill learning_rate={self.learning_rate!r} is not allowed; it must lie between 0 and 1."
            raise InvalidOptionError(msg)
        if not isinstance(self.code_rate, float | int) or not 0 <= self.code_rate < 0.5:
            msg = f"distill code_rate={self.code_rate!r} is not allowed; it must be 0, or below 0.5."
            raise InvalidOptionError(msg)


class Teacher:
    """The predictions of a model before it is quantized, kept as the inputs of its head."""

    def __init__(self, model: Any, sequences: Sequence[Sequence[int]], device: str) -> None:
        """Run the model over the sequences, each of shape `(tokens,)`."""
        self.hidden: list[torch.Tensor] = []
        head = model.get_output_embeddings()
        with _prepared(model, device), head.register_forward_pre_hook(self._keep), torch.no_grad():
            for ids in sequences:
                model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)

    def _keep(self, _: Any, args: Any) -> None:
        self.hidden.append(args[0].cpu())


class ModelTraining:
    """The training of the layers of one model, which are replaced while it lasts."""

    def __init__(
        self,
        model: Any,
        layers: Mapping[str, RoundedLinear],
        options: Distillation,
        *,
        device: str,
        weights: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Take over a model in which modules of these names stand for the rounded layers.

        Args:
            model: The model on the CPU, whose head is not quantized.
            layers: The rounded layers by the names of their modules.
            options: Options.
            device: Where the model is trained, as a whole.
            weights: The unquantized weights of the layers, of shape `(out_features, in_features)`, for training codes.
        """
        self._model = model
        self.options = options
        self._device = device
        self._layers = {
            name: TrainedLinear(
                rounded, bias=getattr(model.get_submodule(name), "bias", None), weight=(weights or {}).get(name)
            )
            for name, rounded in layers.items()
        }
        parameters = [layer.change for layer in self._layers.values()]
        self._optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, betas=(0.9, 0.95))
        self.done_epochs = 0
        """Epochs that are done, the ones before a restored state included."""

    def run(
        self,
        teacher: Teacher,
        sequences: Sequence[Sequence[int]],
        *,
        finished: Callable[[int, float], None] = lambda *_: None,
    ) -> None:
        """Train.

        Args:
            teacher: The predictions to learn.
            sequences: The sequences that the teacher has seen.
            finished: Called after each epoch with their number and the mean divergence of the last one, in nats.
        """
        total = self.options.epochs * len(sequences)
        with self._replaced(), _prepared(self._model, self._device):
            for epoch in range(self.done_epochs, self.options.epochs):
                order = torch.randperm(len(sequences), generator=torch.Generator().manual_seed(epoch))
                sum_nats = 0.0
                for step, chosen in enumerate(order.tolist(), epoch * len(sequences)):
                    for group in self._optimizer.param_groups:
                        group["lr"] = self.options.learning_rate * _rate(step, total)
                    for layer in self._layers.values():
                        layer.step = self.options.code_rate * (1 - step / total)
                    sum_nats += self._step(sequences[chosen], teacher.hidden[chosen])
                self.done_epochs = epoch + 1
                finished(self.done_epochs, sum_nats / len(sequences))

    def _step(self, ids: Sequence[int], taught: torch.Tensor) -> float:
        head = self._model.get_output_embeddings()
        # The head computes both predictions in one call, with whatever the model does to them after it.
        with head.register_forward_pre_hook(lambda _, args: (torch.cat([args[0], taught.to(args[0])]), *args[1:])):
            logits = self._model(input_ids=torch.tensor([list(ids)], device=self._device), use_cache=False).logits
        found, expected = logits.float().log_softmax(-1)
        kl = nn.functional.kl_div(found, expected.detach(), reduction="sum", log_target=True) / len(found)
        self._optimizer.zero_grad(set_to_none=True)
        kl.backward()
        self._optimizer.step()
        return float(kl.detach())

    def results(self) -> dict[str, RoundedLinear]:
        """Return the trained layers, on the CPU."""
        return {name: layer.rounded() for name, layer in self._layers.items()}

    def state(self) -> State:
        """Return all that the training needs to go on from here."""
        found: State = {"epochs": torch.tensor(self.done_epochs)}
        for name, layer in self._layers.items():
            moments = self._optimizer.state[layer.change]
            found |= {f"{name}.{key}": moments[key].detach().cpu().contiguous() for key in _MOMENTS}
            found |= {f"{name}.{key}": tensor.cpu().contiguous() for key, tensor in layer.trained().items()}
        return found

    def restore(self, state: State) -> None:
        """Go on from a state."""
        self.done_epochs = int(state["epochs"])
        for name, layer in self._layers.items():
            for key, tensor in layer.trained().items():
                tensor.copy_(state[f"{name}.{key}"])
            moments = {key: state[f"{name}.{key}"].to(self._device) for key in _MOMENTS}
            self._optimizer.state[layer.change] = {**moments, "step": state[f"{name}.step"].clone()}

    @contextlib.contextmanager
    def _replaced(self) -> Iterator[None]:
        """Put the trained layers into the model."""
        before = {name: self._model.get_submodule(name) for name in self._layers}
        required = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        for parameter in required:
            parameter.requires_grad_(False)
        for name, layer in self._layers.items():
            self._model.set_submodule(name, layer)
        try:
            yield
        finally:
            for name, module in before.items():
                self._model.set_submodule(name, module)
            for parameter in required:
                parameter.requires_grad_(True)


_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def _rate(step: int, total: int) -> float:
    """Return the part of the learning rate at a step: a warm-up, then half a cosine."""
    cosine = (1 + math.cos(math.pi * step / total)) / 2
    return min((step + 1) / _WARMUP_STEPS, 1.0) * (_LEAST_RATE + (1 - _LEAST_RATE) * cosine)


@contextlib.contextmanager
def _prepared(model: Any, device: str) -> Iterator[None]:
    """Bring a model to a device, in a dtype that holds its weights exactly and that gradients fit into, and back.

    Tensors of another dtype than the model's keep theirs, such as the frequencies of rotary embeddings.
    """
    home, own = next(model.parameters()).device, model.dtype
    dtype = torch.bfloat16 if own == torch.bfloat16 else torch.float32
    tensors = [*model.parameters(), *model.buffers()]
    cast = [tensor for tensor in tensors if tensor.dtype == own]
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
    for tensor in cast:
        tensor.data = tensor.data.to(dtype)
    try:
        yield
    finally:
        for tensor in cast:
            tensor.data = tensor.data.to(own)
        for tensor in tensors:
            tensor.data = tensor.data.to(home)


def distillation_from(value: Any) -> Distillation | None:
    """Convert the value of an option: True for the defaults, False or None for no distillation.

    Raises:
        InvalidOptionError: If it is of another kind.
    """
    if value is None or isinstance(value, Distillation):
        return value
    if not isinstance(value, bool):
        msg = f"distill={value!r} is not allowed; use True, or Distillation(epochs=..., code_rate=...)."
        raise InvalidOptionError(msg)
    return Distillation() if value else None
