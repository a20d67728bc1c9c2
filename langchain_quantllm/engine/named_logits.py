"""Logits of named tokens in float32, beside a model that computes its own in 16 bits.

In bfloat16, logits near 16 lie 1/8 apart: of 32 documents that are scored by two logits, a third get different scores.
So the rows of the output layer that belong to the named tokens are multiplied again, in float32. What the model does
with its logits afterwards (caps, scales) is not known here: where the two differ by more than the model's rounding, the
model's own count.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from langchain_quantllm.engine.forward_context import ForwardContext, current_context

_ROUNDINGS = 2
"""How far the model's logit may lie from the finer one, in spaces between numbers of its dtype."""


class HeadInput:
    """Records the input of a model's output layer in a forward of the engine."""

    def __init__(self, model: Any) -> None:
        """Find the layer; there is nothing to record if it is quantized, adapted, elsewhere, or in float32."""
        head = model.get_output_embeddings()
        fits = type(head) is torch.nn.Linear and head.weight.dtype in (torch.float16, torch.bfloat16)
        self._head = head if fits and head.weight.device.type != "meta" else None
        self._found: torch.Tensor | None = None

    @contextlib.contextmanager
    def recording(self, context: ForwardContext) -> Iterator[None]:
        """Record the input of the layer in a forward of this context inside the block."""

        def note(module: Any, args: Any) -> None:
            if current_context() is context and args:  # other threads may call the model meanwhile
                self._found = args[0]

        if self._head is None:
            yield
            return
        handle = self._head.register_forward_pre_hook(note)
        try:
            yield
        finally:
            handle.remove()

    def logits(self, token_ids: Sequence[int], rows: Sequence[int] | None, own: torch.Tensor) -> torch.Tensor | None:
        """Compute the logits of tokens, and forget the recorded input.

        Args:
            token_ids: The tokens.
            rows: Which rows of the input the model's logits belong to; None for all.
            own: The model's logits of shape `(rows, vocab)`.

        Returns:
            Logits of shape `(rows, tokens)`, float32; None if nothing was recorded.
        """
        hidden, self._found = self._found, None
        if hidden is None or self._head is None:
            return None
        hidden = hidden.flatten(0, -2)
        if rows is not None and len(hidden) != len(own):
            hidden = hidden[list(rows)]
        if len(hidden) != len(own):
            return None
        weight, bias = self._head.weight, self._head.bias
        at = torch.tensor(token_ids, dtype=torch.long).to(weight.device, non_blocking=True)
        # A sum for each row and token, whose order does not depend on the other rows.
        fine = (hidden.to(weight.device).float()[:, None] * weight[at].float()).sum(-1)
        if bias is not None:
            fine = fine + bias[at].float()
        fine, coarse = fine.to(own.device), own[:, at.to(own.device)].float()
        is_rounding = (fine - coarse).abs() <= _ROUNDINGS * torch.finfo(weight.dtype).eps * coarse.abs()
        return torch.where(is_rounding, fine, coarse)
