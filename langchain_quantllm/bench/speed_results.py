"""What a measuring of speed is told and what it gives, and how it is written down.

Owns the options, the results with their units, and the document. Measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from langchain_quantllm.bench.machine import describe_machine
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, pip_install


@dataclass(frozen=True, kw_only=True)
class SpeedOptions:
    """What is measured, and how often.

    Args:
        batches: Requests at once, one measurement for each; 1 is streamed, more are an `abatch`.
        new_tokens: Length of every text that is written, in tokens.
        prompt_tokens: Length of every prompt, in tokens, those that the tokenizer adds included.
        repeats: Runs of each measurement after its warm-up; the median counts.
        peer: Whether langchain-huggingface is measured, too.
        peer_new_tokens: Length of its texts where it takes many requests a few at a time, which takes long.
        shared: Requests whose prompts begin with the same text; 0 leaves this out.
        shared_tokens: Length of that text, in tokens.
        long_prompt_tokens: Length of the prompt whose first token is waited for, in tokens; 0 leaves this out.

    Raises:
        InvalidOptionError: If a number is too small.
        MissingPackageError: If the peer is to be measured and is not installed.
    """

    batches: tuple[int, ...] = (1, 8, 32, 64)
    new_tokens: int = 128
    prompt_tokens: int = 30
    repeats: int = 3
    peer: bool = False
    peer_new_tokens: int = 32
    shared: int = 64
    shared_tokens: int = 1000
    long_prompt_tokens: int = 512

    def __post_init__(self) -> None:
        """Check the numbers, and that the peer is there."""
        least = {"new_tokens": 2, "prompt_tokens": 3, "repeats": 1, "peer_new_tokens": 1, "shared_tokens": 3}
        least |= {"shared": 0, "long_prompt_tokens": 0}
        for name, bound in least.items():
            if (value := getattr(self, name)) < bound:
                msg = f"{name}={value} is not allowed; it must be at least {bound}."
                raise InvalidOptionError(msg)
        if not self.batches or min(self.batches) < 1:
            msg = f"batches={self.batches} is not allowed; give at least one number, each at least 1."
            raise InvalidOptionError(msg)
        if self.peer and not is_installed("langchain_huggingface"):
            command = pip_install("langchain-quantllm[huggingface]")
            msg = (
                f"langchain-huggingface is to be measured and is not installed: {command}; or leave it out: --no-peer."
            )
            raise MissingPackageError(msg)


@dataclass(frozen=True, kw_only=True)
class CopySpeed:
    """How fast the device moves memory: a copy within it, reading and writing `buffer_bytes` each."""

    buffer_bytes: int
    rate_byte_s: float


@dataclass(frozen=True, kw_only=True)
class GenerationSpeed:
    """One way to call our engine through LangChain; medians over the repeats.

    Args:
        call: `"stream"` or `"abatch"`.
        batch: Requests at once.
        prompt_tokens: Of each request.
        new_tokens: Of each request.
        total_s: From the call to its end.
        runs_s: The same of every repeat.
        rate_tok_s: All new tokens / `total_s`, prefill included.
        first_text_s: From the call to the first text that the caller got; None if not streamed.
        first_token_s: From the submission to the first token, as the engine counts it; median of the rows.
        decode_rate_tok_s: New tokens but the first, over the time from the first token to the end of the call. The
            start of that time is the engine's, which leaves out what came before the submission: so it is a little
            too long rather than too short.
        engine_step_s: From a row's first token to its last, by step; median of the rows.
        bare_step_s: The same step alone, as `ContinuousEngine.time_step` measures it; None with another engine.
        bare_position: Position that the bare step was measured at: the mean length of a text while it is written.
        step_ratio: `engine_step_s / bare_step_s`; compares like with like while the engine has room for all rows at
            once (128 on a GPU, 32 on the CPU).
        limit_share: `decode_rate_tok_s` of one request, as a share of `limit_tok_s`; None for more requests.
    """

    call: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    total_s: float
    runs_s: tuple[float, ...]
    rate_tok_s: float
    first_text_s: float | None
    first_token_s: float
    decode_rate_tok_s: float
    engine_step_s: float
    bare_step_s: float | None
    bare_position: int
    step_ratio: float | None
    limit_share: float | None


@dataclass(frozen=True, kw_only=True)
class PrefillSpeed:
    """The wait for the first text of a long prompt, beside the model's own forward of as many tokens.

    Args:
        prompt_tokens: Of either.
        first_text_s: From `llm.stream` to the first text.
        first_token_s: From the submission to the first token, as the engine counts it.
        bare_s: One forward with a new `DynamicCache`, logits of the last token only, argmax, brought to the host.
        ratio: `first_text_s / bare_s`.
    """

    prompt_tokens: int
    first_text_s: float
    first_token_s: float
    bare_s: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class SharedPrefixSpeed:
    """Requests of one new token whose prompts begin with the same text, which was never seen before.

    Args:
        requests: At once, by `abatch`.
        prefix_tokens: Tokens that they share.
        prompt_tokens: Of each request.
        apart_s: Wall time with `prefix_caching=False`.
        shared_s: Wall time with `prefix_caching=True`.
        cached_tokens: Tokens of prompts that were taken over then, over all requests.
        ratio: `apart_s / shared_s`.
    """

    requests: int
    prefix_tokens: int
    prompt_tokens: int
    apart_s: float
    shared_s: float
    cached_tokens: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class PeerSpeed:
    """langchain-huggingface's `HuggingFacePipeline` over the same loaded weights.

    Args:
        call: `"invoke"` or `"batch"`.
        batch: Requests at once.
        batch_size: Its setting: how many of them it runs beside each other.
        new_tokens: Of each request.
        total_s: From the call to its end.
        rate_tok_s: All new tokens / `total_s`.
        our_ratio: Our `rate_tok_s` with as many requests, over this one.
    """

    call: str
    batch: int
    batch_size: int
    new_tokens: int
    total_s: float
    rate_tok_s: float
    our_ratio: float


@dataclass(frozen=True, kw_only=True)
class SchemeSpeed:
    """All that was measured with one scheme.

    Args:
        scheme: Its name.
        engine: `"fast"` or `"pipeline"`.
        engine_reason: Why this engine, and what of it could not be used.
        graphs: Whether its decode steps are CUDA graphs.
        load_s: Seconds to load the weights.
        weights_bytes: Of all weights.
        read_bytes: Of the weights that each step reads: without the input embedding, unless it is the head's, too.
        limit_tok_s: Tokens/s of one request if a step took only as long as reading these; keys and values not counted.
        generation: One for each number of requests.
        prefill: None where the model's context is too short.
        shared_prefix: None where the model's context is too short.
        peer: Empty where it was not asked for.
    """

    scheme: str
    engine: str
    engine_reason: str
    graphs: bool
    load_s: float
    weights_bytes: int
    read_bytes: int
    limit_tok_s: float
    generation: tuple[GenerationSpeed, ...]
    prefill: PrefillSpeed | None
    shared_prefix: SharedPrefixSpeed | None
    peer: tuple[PeerSpeed, ...]


def as_document(rows: Sequence[SchemeSpeed], *, options: SpeedOptions, copy_speed: CopySpeed, **about: Any) -> str:
    """Put rows and what they were measured on, with what and how, into one line of JSON.

    Args:
        rows: What was measured.
        options: How.
        copy_speed: The device's.
        **about: What else to say, such as `model` or `device`.
    """
    return json.dumps(
        {
            **about,
            **describe_machine(str(about.get("device", "cpu"))),
            "options": asdict(options),
            "copy": asdict(copy_speed),
            "rows": [asdict(row) for row in rows],
        }
    )
