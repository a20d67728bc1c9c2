"""What an overview of schemes is told and what it gives, and how it is written down.

Owns the options, the results with their units, the comparison with 16 bits, and the document. Measures nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from langchain_quantllm.bench.machine import describe_machine
from langchain_quantllm.bench.speed_results import CopySpeed
from langchain_quantllm.bench.training import TrainingStep
from langchain_quantllm.errors import InvalidOptionError, nearest

PARTS = ("prefill", "batches", "lengths", "cache", "training", "quality")
"""Parts of an overview, each of which can be left out. Loading and memory are always measured."""

_LEAST = {
    "prompt_tokens": 3,
    "new_tokens": 2,
    "peer_new_tokens": 1,
    "prefill_tokens": 3,
    "cache_new_tokens": 1,
    "train_batch": 1,
    "train_tokens": 2,
    "rank": 1,
    "window_tokens": 2,
    "repeats": 1,
    "peer_repeats": 1,
}


@dataclass(frozen=True, kw_only=True)
class OverviewOptions:
    """What is measured, how long, and how often.

    Args:
        parts: Those of `PARTS` that are measured.
        peer: Whether transformers' own `generate` is measured beside our engine.
        batches: Texts at once, for generation by batch.
        prompt_tokens: Length of the prompts of generated texts, in tokens.
        new_tokens: Length of the texts by batch, in tokens.
        peer_new_tokens: The same for `generate`, which takes longer.
        lengths: Lengths of the texts that are generated one at a time, in tokens.
        prefill_batches: Prompts at once, for prefill.
        prefill_tokens: Length of each of them, in tokens.
        cache_new_tokens: Length of the texts with and without KV cache, in tokens.
        train_batch: Texts at once, for training.
        train_tokens: Length of each of them, in tokens.
        rank: Rank of the adapter that is trained.
        window_tokens: Length of the windows that a text's perplexity is measured in, in tokens.
        quality_tokens: Most tokens of that text; None for all.
        repeats: Runs of each measurement after its warm-up; the median counts.
        peer_repeats: The same for `generate`.
        limit_s: Seconds that a measurement may take, its warm-up not counted: a text that would take longer by itself
            is written shorter, and then it runs once. `math.inf` for no limit.

    Raises:
        InvalidOptionError: If a part is not known, or a number is too small.
    """

    parts: tuple[str, ...] = PARTS
    peer: bool = True
    batches: tuple[int, ...] = (1, 2, 4, 8, 16)
    prompt_tokens: int = 30
    new_tokens: int = 128
    peer_new_tokens: int = 32
    lengths: tuple[int, ...] = (30, 512)
    prefill_batches: tuple[int, ...] = (1, 16)
    prefill_tokens: int = 512
    cache_new_tokens: int = 16
    train_batch: int = 2
    train_tokens: int = 256
    rank: int = 8
    window_tokens: int = 512
    quality_tokens: int | None = 4096
    repeats: int = 3
    peer_repeats: int = 1
    limit_s: float = 8.0

    def __post_init__(self) -> None:
        """Check names and numbers."""
        for part in self.parts:
            if part not in PARTS:
                msg = f"part {part!r} is not known{nearest(part, PARTS)}"
                raise InvalidOptionError(msg)
        for name, bound in _LEAST.items():
            if (value := getattr(self, name)) < bound:
                msg = f"{name}={value} is not allowed; it must be at least {bound}."
                raise InvalidOptionError(msg)
        for name in ("batches", "lengths", "prefill_batches"):
            if any(number < 1 for number in getattr(self, name)):
                msg = f"{name}={getattr(self, name)} is not allowed; each number must be at least 1."
                raise InvalidOptionError(msg)
        if self.quality_tokens is not None and self.quality_tokens < 2:
            msg = f"quality_tokens={self.quality_tokens} is not allowed; it must be at least 2, or None for all."
            raise InvalidOptionError(msg)
        if not self.limit_s > 0:
            msg = f"limit_s={self.limit_s} is not allowed; it must be above 0."
            raise InvalidOptionError(msg)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model in one scheme.

    Args:
        label: What its row is called.
        model_id: Folder or repository.
        quantization: A scheme or its name; None takes the checkpoint as it is.
    """

    label: str
    model_id: str
    quantization: Any = None


@dataclass(frozen=True, kw_only=True)
class CallSpeed:
    """One kind of call; medians over the repeats.

    Args:
        runner: `"engine"`, ours as LangChain calls it, or `"generate"`, transformers' own.
        call: `"stream"`, `"abatch"` or `"generate"`.
        batch: Texts at once.
        prompt_tokens: Of each text.
        new_tokens: Of each text, as many as were written.
        asked_tokens: Of each text, as many as were asked for; more than `new_tokens` where that would have taken
            longer than `limit_s`.
        use_cache: Whether keys and values were kept from step to step.
        total_s: From the call to its end.
        runs_s: The same of every repeat.
        rate_tok_s: All new tokens / `total_s`, prefill included.
        prompt_rate_tok_s: All tokens of the prompts / `total_s`.
        first_token_s: From the submission to the first token; None for `generate`, which does not tell.
        peak_bytes: Most memory in use meanwhile, above that before loading.
    """

    runner: str
    call: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    asked_tokens: int
    use_cache: bool
    total_s: float
    runs_s: tuple[float, ...]
    rate_tok_s: float
    prompt_rate_tok_s: float
    first_token_s: float | None
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """The perplexity of a text, and how far it is from that of the unquantized model.

    Args:
        perplexity: `exp(loss_nats)`.
        loss_nats: Mean negative log-likelihood by token.
        tokens: Tokens that were scored.
        loss_increase_nats: `loss_nats` above that of the first row without quantization; None without such a row.
        perplexity_increase_percent: The same of `perplexity`, in percent.
    """

    perplexity: float
    loss_nats: float
    tokens: int
    loss_increase_nats: float | None = None
    perplexity_increase_percent: float | None = None


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """Memory of one scheme, on the device that holds the weights: tensors on a GPU, resident memory on the CPU.

    Args:
        before_bytes: In use before loading, the CUDA context and the libraries' workspaces included.
        weights_bytes: Of all weights, counted.
        read_bytes: Of the weights that each step reads: without the input embedding, unless it is the head's, too.
        loaded_bytes: Above `before_bytes`, after loading.
        loaded_driver_bytes: The same as the driver sees it; None where there is none.
        peak_loading_bytes: Most while loading, above `before_bytes`.
        peak_bytes: Most afterwards, over every part but the training, above `before_bytes`.
    """

    before_bytes: int
    weights_bytes: int
    read_bytes: int
    loaded_bytes: int
    loaded_driver_bytes: int | None
    peak_loading_bytes: int
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something that could not be measured, and why."""

    part: str
    reason: str


def reason_of(error: Exception) -> str:
    """Say in a line why something failed."""
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, ValueError | OSError) and line else f"{type(error).__name__}: {line}".rstrip(": ")


@dataclass(frozen=True, kw_only=True)
class SchemeOverview:
    """All that was measured with one scheme; what could not be is among the failures.

    Args:
        label: What its row is called.
        model_id: Folder or repository.
        scheme: Name of the scheme that holds the weights; None where they could not be loaded.
        kernels: Classes of the quantized layers.
        engine: `"fast"` or `"pipeline"`; None where no part needed it.
        engine_reason: Why this engine, and what of it could not be used.
        graphs: Whether its decode steps are CUDA graphs.
        load_s: Seconds to load the weights.
        memory: What they take.
        limit_tok_s: Tokens/s of one text if a step took only as long as reading the weights.
        prefill: Prompts with one new token, by batch and runner.
        by_batch: Short prompts, by batch and runner.
        by_length: One text at a time, by length and runner.
        by_cache: `generate` with and without KV cache.
        training: A step of training an adapter.
        quality: The perplexity of a text.
        failures: What could not be measured.
    """

    label: str
    model_id: str
    scheme: str | None = None
    kernels: str = ""
    engine: str | None = None
    engine_reason: str = ""
    graphs: bool = False
    load_s: float | None = None
    memory: MemoryUse | None = None
    limit_tok_s: float | None = None
    prefill: tuple[CallSpeed, ...] = ()
    by_batch: tuple[CallSpeed, ...] = ()
    by_length: tuple[CallSpeed, ...] = ()
    by_cache: tuple[CallSpeed, ...] = ()
    training: TrainingStep | None = None
    quality: Quality | None = None
    failures: tuple[Failure, ...] = field(default=())


def with_baseline(rows: Sequence[SchemeOverview]) -> list[SchemeOverview]:
    """Compare the quality of each row with that of the first one without quantization.

    Args:
        rows: What was measured.

    Returns:
        The rows; where there is nothing to compare with, as they were.
    """
    base = next((row.quality for row in rows if row.scheme == "none" and row.quality is not None), None)
    if base is None:
        return list(rows)
    return [row if row.quality is None else replace(row, quality=_above(row.quality, base)) for row in rows]


def _above(quality: Quality, base: Quality) -> Quality:
    increase_nats = quality.loss_nats - base.loss_nats
    return replace(
        quality, loss_increase_nats=increase_nats, perplexity_increase_percent=100 * math.expm1(increase_nats)
    )


def as_document(
    rows: Sequence[SchemeOverview], *, options: OverviewOptions, copy_speed: CopySpeed, **about: Any
) -> dict[str, Any]:
    """Put rows and what they were measured on, with what and how, into one document, ready for JSON.

    Args:
        rows: What was measured.
        options: How.
        copy_speed: The device's.
        **about: What else to say, such as `model` or `device`.
    """
    limit_s = options.limit_s if math.isfinite(options.limit_s) else None  # JSON has no infinity
    document = {
        "kind": "overview",
        **about,
        **describe_machine(str(about.get("device", "cpu"))),
        "options": {**asdict(options), "limit_s": limit_s},
        "copy": asdict(copy_speed),
        "rows": [asdict(row) for row in with_baseline(rows)],
    }
    parsed: dict[str, Any] = json.loads(json.dumps(document))  # as it is when read again
    return parsed
