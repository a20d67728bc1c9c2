"""The check of where routers send tokens, apart from what the experts of a mixture make of them.

Two experts with almost the same score change places by rounding, and the logits of a small mixture show it. So the
model's own forward sends such tokens to the experts that the engine has chosen, and its own routers say how many of
these they would not have chosen. All other tokens keep the model's own routing, weights included.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from langchain_quantllm.compat.transformers_experts import are_routed_tokens, is_experts
from langchain_quantllm.engine.attention import PagedForward
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import PatchedModules, Replacement
from langchain_quantllm.engine.sequence import Sequence
from langchain_quantllm.errors import UnsupportedError

_LAST = 3  # tokens of a text that are counted apart, too: they are decoded
_OTHERS = {torch.float32: 1e-5, torch.float64: 1e-5}
_OTHERS_16BIT = 0.1  # of tokens routed at random, at least half would differ
"""Share of choices that rounding changes: in 16 bits, 0.003 in models of 4 experts, and more with more experts."""


_Routed = tuple[torch.Tensor, torch.Tensor]
"""The experts of tokens in a layer, and their weights."""


class RoutingTrial(PatchedModules):
    """The experts of the tokens of short texts, in the engine's steps and in the model's own forwards afterwards.

    Attributes:
        has_experts: Whether the model has experts whose tokens are known here.
    """

    def __init__(self, model: torch.nn.Module, *, texts: int, most_tokens: int) -> None:
        """Patch the experts until `close`.

        Steps of the engine that are captured meanwhile are of no use afterwards: they record as well.

        Args:
            model: The model.
            texts: Texts at once; they run in the first slots.
            most_tokens: Tokens of the longest text.
        """
        self._shape = texts + 1, most_tokens  # the last row is for padding
        self._thread = threading.get_ident()
        self._routed: dict[int, _Routed] = {}  # by slot and position
        self._latest: dict[int, PagedForward] = {}  # the forward that recorded a layer last
        self._repeated: set[int] = set()  # layers that run several times in a forward: they are left as they are
        self._texts: dict[int, dict[int, _Routed]] = {}  # by the number of their tokens
        self._tokens: int | None = None  # of the text that is replayed
        self._counted: set[tuple[int | None, int]] = set()  # texts by their tokens, and layers
        # Choices that differ, and all: of all tokens, and of the last ones.
        self._others: list[torch.Tensor | int] = [0, 0]
        self._all = [0, 0]
        super().__init__(model)
        self.has_experts = bool(self._patches)

    def _find(self) -> Iterable[tuple[Any, Replacement]]:
        return ((module, self._run) for module in self._model.modules() if is_experts(module))

    def keep(self, sequence: Sequence) -> None:
        """Keep what was recorded of a sequence that is complete, before another one takes its slot."""
        tokens = len(sequence.ids) - 1  # the last one was sampled, and not read
        self._texts[tokens] = {
            layer: (index[sequence.slot, :tokens].clone(), weights[sequence.slot, :tokens].clone())
            for layer, (index, weights) in self._routed.items()
            if layer not in self._repeated
        }

    @contextlib.contextmanager
    def replaying(self, tokens: int) -> Iterator[None]:
        """Compare the model's own forwards of the text of so many tokens with the engine's."""
        self._tokens = tokens
        try:
            yield
        finally:
            self._tokens = None

    def check(self, dtype: torch.dtype) -> None:
        """Check that tokens are routed as by the model, up to rounding.

        Raises:
            UnsupportedError: If not.
        """
        share = _OTHERS.get(dtype, _OTHERS_16BIT)
        for others, count in zip(map(int, self._others), self._all, strict=True):
            mean = share * count
            if others > mean + 2 * mean**0.5:  # of a few choices, chance changes more
                msg = f"its tokens go to other experts over KV cache blocks: {others} of {count}"
                raise UnsupportedError(msg)

    def _run(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        if threading.get_ident() != self._thread or kwargs or not are_routed_tokens(args):
            return forward(*args, **kwargs)
        if context.attention is not None:
            self._record(id(module), context.attention, *args[1:])
        elif self._tokens is not None:
            args = (args[0], *self._replay(id(module), context.first_position, *args[1:]))
        return forward(*args)

    def _record(self, layer: int, forward: PagedForward, index: torch.Tensor, weights: torch.Tensor) -> None:
        """Keep the experts and weights of a step's tokens, both of shape `(tokens, experts of a token)`.

        Nothing here waits for the device, so that the step can be captured.
        """
        batch = forward.batch
        if len(batch.slots) != len(index):
            return
        if self._latest.get(layer) is forward:
            self._repeated.add(layer)
        self._latest[layer] = forward
        if layer not in self._routed:
            shape = *self._shape, index.shape[1]
            self._routed[layer] = index.new_full(shape, -1, dtype=torch.int32), weights.new_zeros(shape)
        slots = batch.slots.to(index.device).long().clamp(max=self._shape[0] - 1)
        positions = batch.positions.to(index.device).long().clamp(max=self._shape[1] - 1)
        for kept, new in zip(self._routed[layer], (index, weights), strict=True):
            kept[slots, positions] = new.to(kept.dtype)

    def _replay(self, layer: int, first: int, index: torch.Tensor, weights: torch.Tensor) -> _Routed:
        """Return the experts and weights of the text's tokens from position `first` on."""
        routed = self._texts.get(self._tokens or 0, {}).get(layer)
        if routed is None:
            return index, weights
        theirs, their_weights = (kept[first : first + len(index)].to(index.device) for kept in routed)
        if len(index) == len(routed[0]) and (self._tokens, layer) not in self._counted:
            # Once for a whole text: a model in pieces, or that rounds more, may differ from itself.
            self._counted.add((self._tokens, layer))
            self._count(routed, (index, weights))
        moves = (theirs.sort(-1).values != index.sort(-1).values).any(-1, keepdim=True)
        moves &= their_weights.isfinite().all(-1, keepdim=True)  # NaN of the engine must not look like the model's
        return torch.where(moves, theirs.to(index.dtype), index), torch.where(moves, their_weights, weights)

    def _count(self, theirs: _Routed, own: _Routed) -> None:
        """Count the choices of the engine that differ from the model's own ones, in a layer for a whole text."""
        others = torch.maximum(_others(*theirs, own[0]).sum(-1), _others(*own, theirs[0]).sum(-1))  # of each token
        for kind, part in enumerate((others, others[-_LAST:])):
            self._others[kind] = self._others[kind] + part.sum()
            self._all[kind] += part.numel() * own[0].shape[1]


def _others(index: torch.Tensor, weights: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
    """Say which experts of tokens are not among the known ones; those whose weight is lost in rounding do not count.

    A router whose scores are far apart leaves weights of 0, and which of these it chooses follows from nothing.
    """
    sizes = weights.abs()
    counts = sizes > torch.finfo(weights.dtype).eps * sizes.amax(-1, keepdim=True)
    return counts & ~(index[:, :, None] == known[:, None, :]).any(-1)
