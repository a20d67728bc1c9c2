"""Rotary positions whose frequencies follow from a text's length ("longrope", "dynamic"), for each sequence by itself.

transformers chooses the frequencies of a whole call by its longest position. A packed forward holds several sequences,
and chunks of them, so each token is rotated here by the length of its own text: that of the prompt, or its own
position where that is further, as `generate` does for the sequence alone.

Owns what these modules compute and the patch over them. `Sequence` knows the lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from langchain_quantllm.compat.transformers_rotary import (
    DYNAMIC,
    frequencies_of,
    moving_rope,
    moving_rotary_modules,
    original_length,
    recomputes_beyond,
)
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.forward_patch import ForwardPatch
from langchain_quantllm.errors import UnsupportedError

_TOLERANCE = 1e-5  # cosines and sines in float32, of the same angles

_Form = Callable[[torch.Tensor], tuple[torch.Tensor, ...]]
"""Lays out cosines and sines of angles: positions times inverse frequencies, of `(1, tokens, dim / 2)`, float32."""


def _halves(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = torch.cat([angles, angles], -1)
    return both.cos(), both.sin()


def _pairs(angles: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    both = angles.repeat_interleave(2, -1)
    return both.cos(), both.sin()


def _complex(angles: torch.Tensor) -> tuple[torch.Tensor]:
    return (torch.polar(torch.ones_like(angles), angles),)


_FORMS: tuple[_Form, ...] = (_halves, _pairs, _complex)


@dataclass(frozen=True, kw_only=True)
class _Range:
    """The rotation in texts up to the original length, or beyond it.

    Args:
        inv_freq: Inverse frequencies of shape `(dim / 2,)`, float32.
        scale: Factor of cosines and sines.
    """

    inv_freq: torch.Tensor
    scale: float


@dataclass(frozen=True, kw_only=True)
class _Rotation:
    """What a rotary module computes.

    Args:
        form: How cosines and sines of the angles are laid out.
        limit: The original length.
        short: In texts up to it.
        long: In longer ones.
    """

    form: _Form
    limit: int
    short: _Range
    long: _Range

    def run(self, positions: torch.Tensor, lengths: torch.Tensor, dtype: torch.dtype) -> Any:
        """Compute what the module gives for positions of shape `(1, tokens)`, by lengths of shape `(tokens,)`."""
        is_long = (lengths > self.limit)[None, :, None]
        # accelerate may have put the module on another device than the layers that come first.
        long, short = (one.inv_freq.to(positions.device) for one in (self.long, self.short))
        frequencies = torch.where(is_long, long, short)
        parts = self.form(positions[..., None].float() * frequencies)
        if self.short.scale == self.long.scale:
            parts = tuple(part * self.short.scale for part in parts)
        else:
            parts = tuple(torch.where(is_long, part * self.long.scale, part * self.short.scale) for part in parts)
        parts = tuple(part if part.is_complex() else part.to(dtype) for part in parts)
        return parts if len(parts) > 1 else parts[0]


class RotaryLengths:
    """The rotary modules of a model, patched to choose frequencies for each token.

    Attributes:
        limit: The most tokens of a text with the original frequencies.
        recomputes: Whether `generate` computes a text anew when it grows beyond the limit.
    """

    def __init__(self, model: Any, context_tokens: int | None) -> None:
        """Find and patch the modules.

        Args:
            model: A causal language model of transformers, with `moving_rope`.
            context_tokens: Most tokens of a sequence; None if there is no limit.

        Raises:
            UnsupportedError: If they compute something else than is known here.
        """
        self._model = model
        self._context_tokens = context_tokens
        self._patches: list[ForwardPatch] = []
        self._rotations: dict[int, _Rotation] = {}
        self.limit = 0
        self.recomputes = False
        self.build()

    @without_gradients
    def build(self) -> None:
        """Find the modules anew, as after a change of the model; see `__init__`."""
        self.close()
        kind = moving_rope(self._model.config.get_text_config())
        modules = list(moving_rotary_modules(self._model))
        if not modules:
            msg = f"its {kind!r} rotary positions are computed in an unknown way"
            raise UnsupportedError(msg)
        limits = {original_length(module) for module in modules}
        if len(limits) > 1:
            msg = f"its {kind!r} rotary positions change at several lengths ({', '.join(map(str, sorted(limits)))})"
            raise UnsupportedError(msg)
        self.limit = limits.pop()
        if kind == DYNAMIC and (self._context_tokens is None or self._context_tokens > self.limit):
            msg = f"its 'dynamic' rotary positions change with every length beyond {self.limit} tokens"
            raise UnsupportedError(msg)
        try:
            self._rotations = {id(module): _rotation_of(module, self.limit) for module in modules}
            self.recomputes = recomputes_beyond(self._model, self.limit)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            msg = f"its {kind!r} rotary positions are computed in an unknown way: {error!r}"
            raise UnsupportedError(msg) from error
        self._patches = [ForwardPatch(module, self._run) for module in modules]

    def close(self) -> None:
        """Restore the modules' `forward`."""
        for patch in self._patches:
            patch.close()
        self._patches, self._rotations = [], {}

    def _run(
        self,
        context: ForwardContext,
        module: Any,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        rotation, lengths = self._rotations.get(id(module)), context.text_lengths
        if rotation is None or lengths is None:
            return forward(*args, **kwargs)
        given = dict(zip(("x", "position_ids"), args, strict=False)) | kwargs
        x, positions = given["x"], given["position_ids"]
        return rotation.run(positions.to(x.device), lengths.to(x.device), x.dtype)


def _rotation_of(module: Any, limit: int) -> _Rotation:
    """Find what a rotary module computes, by its own outputs for texts of both ranges.

    Raises:
        UnsupportedError: If it is none of the known forms.
    """
    device = frequencies_of(module)[0].device
    x, places = torch.zeros(1, dtype=torch.float32, device=device), [0, 1, 2, limit // 2, limit - 1]
    for form in _FORMS:
        short = _range_of(module, form, x, places)
        long = _range_of(module, form, x, [*places, limit, 2 * limit]) if module.rope_type != DYNAMIC else short
        if short is not None and long is not None:
            return _Rotation(form=form, limit=limit, short=short, long=long)
    msg = f"its {module.rope_type!r} rotary positions are computed in an unknown way"
    raise UnsupportedError(msg)


def _range_of(module: Any, form: _Form, x: torch.Tensor, places: Sequence[int]) -> _Range | None:
    """Find frequencies and scale of the range that the last of some positions is in; None if the form is another."""
    positions = torch.tensor([list(places)], device=x.device)
    output = type(module).forward(module, x, positions)
    expected = output if isinstance(output, tuple) else (output,)
    scale = float(expected[0][0, 0].real.max())  # the cosine at position 0 is 1
    for inv_freq in frequencies_of(module):
        found = _Range(inv_freq=inv_freq.float().clone(), scale=scale)
        alone = _Rotation(form=form, limit=0, short=found, long=found)
        ours = alone.run(positions, positions[0], x.dtype)
        ours = ours if isinstance(ours, tuple) else (ours,)
        if len(ours) == len(expected) and all(map(_is_same, ours, expected)):
            return found
    return None


def _is_same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return bool((ours - theirs).abs().max() <= _TOLERANCE * theirs.abs().max())
