"""How far a calibration is from what a model will be asked, by what goes through the model.

GPTQ moves errors to where the calibration has no inputs. So the inputs of some blocks are compared: how large those of
the use are in units of those of the calibration (the squared Mahalanobis distance from 0, by the second moments, whose
diagonal is damped as GPTQ damps it), beside what held-out inputs of the calibration itself measure. Tokens are first
scaled to one size, as norms do before each layer.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.quantization.calibration import Calibration, named, sequences
from langchain_quantllm.quantization.decoder_layers import DecoderLayers, Layout

logger = logging.getLogger(__name__)

FAR = 1.5
"""Distance from which on a calibration is called far."""

_TOKENS = 8192
_PLACES = (0.25, 0.5, 0.75)
"""Depths at which inputs are compared, as parts of all blocks."""

Ids = Sequence[Sequence[int]]


def sequences_of_use(use: Calibration, texts: Sequence[Any], tokenizer: Any, calibration: Ids) -> list[list[int]]:
    """Cut a sample of what the model will be asked into sequences, none longer than those of a calibration.

    Args:
        use: Where the sample comes from.
        texts: What `read_texts` has returned for it.
        tokenizer: The model's tokenizer.
        calibration: Token ids of the calibration.

    Raises:
        InvalidOptionError: If the sample has too few tokens, or the chat template refuses a conversation.
    """
    with named("for_texts"):
        return sequences(replace(use, tokens=min(use.tokens, len(calibration[0]))), texts, tokenizer, None)


def compare_with_use(model: Any, layout: Layout, calibration: Ids, use: Ids, source_label: str, device: str) -> float:
    """Compare a calibration with a sample of what the model will be asked; warns if it is far.

    Args:
        model: The model on the CPU, unquantized.
        layout: Its layers.
        calibration: Token ids of the calibration.
        use: Token ids of the sample.
        source_label: Name of its source.
        device: Where blocks go, one at a time.

    Returns:
        The distance, as of `calibration_distance`.
    """
    distance = calibration_distance(model, layout, calibration, use, device)
    about = "The sample of for_texts lies %.2f times as far from the calibration as its parts from each other"
    if distance < FAR:
        logger.info(about, distance)
        return distance
    logger.warning(
        about + "; from %.1f on that is far, and errors go where the model is asked. Calibrate with texts like the "
        "sample, or a mix of both: Calibration(source=[(%r, 0.7), ('built-in', 0.3)]).",
        distance,
        FAR,
        source_label,
    )
    return distance


def calibration_distance(model: Any, layout: Layout, calibration: Ids, use: Ids, device: str) -> float:
    """Compare two sets of token ids by what goes through a model.

    Args:
        model: The model on the CPU.
        layout: Its layers.
        calibration: Sequences of one length.
        use: Sequences of another length, or the same.
        device: Where blocks go, one at a time.

    Returns:
        The ratio: about 1 where the use is like the calibration itself, more where it is elsewhere.
    """
    count = max(2, _TOKENS // len(calibration[0]))
    if len(calibration) == 1:
        half = len(calibration[0]) // 2
        calibration = [calibration[0][:half], calibration[0][half : 2 * half]]
    known = _inputs(model, layout, calibration[:count], device)
    used = _inputs(model, layout, use[: max(1, _TOKENS // len(use[0]))], device)
    ratios = [_ratio(own, other) for own, other in zip(known, used, strict=True)]
    return sum(ratios) / len(ratios)


def _inputs(model: Any, layout: Layout, sequences: Ids, device: str) -> list[torch.Tensor]:
    """Return the inputs of some blocks, each of shape `(sequences, tokens, hidden)`, float32."""
    blocks = DecoderLayers(model, layout, sequences, device)
    places = sorted({max(1, round(place * layout.count)) for place in _PLACES} - {layout.count})
    found = []
    for index in range(max(places, default=0)):
        with blocks.on_device(index):
            blocks.advance(index)
        if index + 1 in places:
            found.append(torch.cat([state.float() for state in blocks.states]))
    return found or [torch.cat([state.float() for state in blocks.states])]


def _ratio(calibration: torch.Tensor, use: torch.Tensor) -> float:
    """Compare the use with the held-out half of a calibration, by the other half; the mean of both ways."""
    halves = calibration[0::2], calibration[1::2]
    found = []
    for own, held_out in (halves, halves[::-1]):
        rows = _scaled(own)
        moments = rows.t() @ rows / len(rows)
        damping = 0.01 * moments.diagonal().mean().clamp(min=1e-12)
        factor = torch.linalg.cholesky(moments + damping * torch.eye(len(moments), dtype=moments.dtype))
        sizes = [
            torch.linalg.solve_triangular(factor, _scaled(other).t(), upper=False).square().sum(0).mean()
            for other in (use, held_out)
        ]
        found.append(float(sizes[0] / sizes[1]))
    return sum(found) / len(found)


def _scaled(states: torch.Tensor) -> torch.Tensor:
    """Return tokens of one size, without the first of each sequence, which models use for something else."""
    rows = states[:, 1:].flatten(0, 1)
    return rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-6)
