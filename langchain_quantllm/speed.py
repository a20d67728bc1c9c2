"""Measuring how fast texts are written: what the device allows, what we reach, and what a peer reaches.

Owns what is measured, in which order and with which prompts: ceilings first, then the bare step, then calls as
LangChain's users make them, then langchain-huggingface over the same weights. Prints nothing; the command line does.
"""

from __future__ import annotations

import asyncio
import copy
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from typing import Any

from langchain_core.callbacks import BaseCallbackHandler

from langchain_quantllm.errors import GenerationError, InvalidOptionError, MissingPackageError, pip_install
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.memory import take_snapshot
from langchain_quantllm.packages import is_installed
from langchain_quantllm.placement import release_memory
from langchain_quantllm.schemes import GPTQ

PEER_BATCH = 4
"""Source: `DEFAULT_BATCH_SIZE` of langchain_huggingface/llms/huggingface_pipeline.py, which `from_model_id` also gives
to the pipeline inside."""

_TAIL_TOKENS = 8
_PEER_WARM_UP_TOKENS = 8
_STEPS_GPU, _STEPS_CPU = 50, 3
_COPIES = 10
_TRIES = 500
_CANDIDATES = 4096
_WORDS = 64
_PACKAGES = (
    "langchain-quantllm",
    "langchain-core",
    "langchain-huggingface",
    "transformers",
    "torch",
    "triton",
    "bitsandbytes",
    "gptqmodel",
)


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
        bare_step_s: The same step alone, as `FastEngine.time_step` measures it; None with another engine.
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


class Prompts:
    """Random texts of exact lengths in tokens, none of them given twice."""

    def __init__(self, tokenizer: Any, seed: int = 0) -> None:
        """Find tokens that stay what they are between others: whole words, or, where there are few, characters."""
        self._tokenizer = tokenizer
        self._random = random.Random(seed)  # noqa: S311  (no secrets here)
        self._given: set[str] = set()
        self._added_tokens = len(self._encode(""))
        ids = self._random.sample(range(len(tokenizer)), min(_CANDIDATES, len(tokenizer)))
        stable = [i for i in ids if self._is_stable(i)]
        words = [i for i in stable if self._is_word(i)]
        self._pool = words if len(words) >= _WORDS else stable
        if len(self._pool) < 2:
            msg = f"{type(tokenizer).__name__} has no tokens that stay the same when their text is encoded again."
            raise InvalidOptionError(msg)

    def draw(self, count: int, tokens: int) -> list[str]:
        """Make prompts.

        Args:
            count: How many.
            tokens: Length of each, tokens that the tokenizer adds included.
        """
        return [self._draw([], tokens) for _ in range(count)]

    def draw_sharing(self, count: int, shared_tokens: int, tokens: int) -> list[str]:
        """Make prompts of `tokens` tokens of which the first `shared_tokens` are the same in all, and no others."""
        for _ in range(_TRIES):
            head = self._choose(shared_tokens - self._added_tokens)
            texts = [self._draw(head, tokens) for _ in range(count)]
            if len({tuple(self._encode(text)[:shared_tokens]) for text in texts}) == 1:
                return texts
        raise InvalidOptionError(_no_prompts(shared_tokens))

    def _draw(self, head: list[int], tokens: int) -> str:
        """Continue a beginning with random tokens up to a length."""
        missing = most = tokens - self._added_tokens - len(head)
        for _ in range(_TRIES):
            text = self._decode([*head, *self._choose(missing)])
            surplus = len(self._encode(text)) - tokens
            if not surplus and text not in self._given:
                self._given.add(text)
                return text
            missing = min(2 * most, max(1, missing - surplus))
        raise InvalidOptionError(_no_prompts(tokens))

    def _choose(self, count: int) -> list[int]:
        return self._random.choices(self._pool, k=count)

    def _encode(self, text: str, *, bare: bool = False) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=not bare, verbose=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return str(text)

    def _is_stable(self, token_id: int) -> bool:
        text = self._decode([token_id])
        twice = [token_id, token_id]
        return text.isprintable() and bool(text.strip()) and self._encode(self._decode(twice), bare=True) == twice

    def _is_word(self, token_id: int) -> bool:
        words = self._decode([token_id, token_id]).split()
        return len(words) == 2 and words[0].isalpha()


def _no_prompts(tokens: int) -> str:
    return f"no prompts of exactly {tokens} tokens were found in {_TRIES} tries; ask for another length."


def measure_copy(device: str) -> CopySpeed:
    """Measure the device's memory: a large copy within it, bytes read and written over seconds."""
    import torch

    is_cpu = device.startswith("cpu")
    buffer_bytes = 2**28 if is_cpu else 2**31
    if device.startswith("cuda"):
        buffer_bytes = min(buffer_bytes, torch.cuda.mem_get_info(device)[0] // 8)
    source = torch.ones(buffer_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times_s = []
    for _ in range(4):  # the first is the warm-up
        _synchronize(device)
        began = time.perf_counter()
        for _ in range(1 if is_cpu else _COPIES):
            target.copy_(source)
        _synchronize(device)
        times_s.append((time.perf_counter() - began) / (1 if is_cpu else _COPIES))
    del source, target
    release_memory()
    return CopySpeed(buffer_bytes=buffer_bytes, rate_byte_s=2 * buffer_bytes / statistics.median(times_s[1:]))


def _synchronize(device: str) -> None:
    import torch

    if not device.startswith("cpu"):
        torch.accelerator.synchronize(device)


def measure_speed(
    checkpoints: dict[str, str],
    *,
    device: str,
    options: SpeedOptions,
    copy_speed: CopySpeed,
    dtype: str = "auto",
    kernel: str = "auto",
    report: Callable[[str], None] = lambda _: None,
) -> Iterator[SchemeSpeed]:
    """Load a model in one scheme after another and measure how fast it writes.

    Args:
        checkpoints: Folder or repository for each scheme's name; `"gptq"` needs one of its own.
        device: Device for the weights, such as `"cuda:0"`.
        options: What is measured.
        copy_speed: The device's, for the limits.
        dtype: Dtype of what is not quantized.
        kernel: Kernel for GPTQ.
        report: Called with a line for each finished part.

    Yields:
        A row for each scheme; its weights are unloaded by then.

    Raises:
        InvalidOptionError: If prompt and text do not fit into the model's context.
        GenerationError: If a text has another length than was asked for.
    """
    for name, folder in checkpoints.items():
        release_memory()
        fields: dict[str, Any] = {
            "model_id": folder,
            "quantization": GPTQ(kernel=kernel) if name == "gptq" else name,
            "device": device,
            "dtype": dtype,
            "progress": False,
            "do_sample": False,
            "repetition_penalty": 1.0,  # whatever the checkpoint says: one kind of step for all
            "ignore_eos": True,
        }
        yield _measure_scheme(name, fields, options, copy_speed, report)
        release_memory()


def _measure_scheme(
    name: str,
    fields: dict[str, Any],
    options: SpeedOptions,
    copy_speed: CopySpeed,
    report: Callable[[str], None],
) -> SchemeSpeed:
    """Load, measure and unload one model."""
    llm = QuantizedHuggingFaceLLM(**fields, prefix_caching=False)
    sharing = QuantizedHuggingFaceLLM(**fields, prefix_caching=True)  # over the same weights
    began = time.perf_counter()
    llm.load()
    load_s = time.perf_counter() - began
    try:
        return _Bench(name, llm, sharing, options, lambda line: report(f"{name}: {line}")).measure(copy_speed, load_s)
    finally:
        llm.unload()


class _Bench:
    """The measurements of one loaded model."""

    def __init__(
        self,
        scheme: str,
        llm: QuantizedHuggingFaceLLM,
        sharing: QuantizedHuggingFaceLLM,
        options: SpeedOptions,
        report: Callable[[str], None],
    ) -> None:
        self._scheme = scheme
        self._llm = llm
        self._sharing = sharing
        self._options = options
        self._report = report
        self._engine: Any = llm._engine()
        self._model = llm.pipeline.model
        self._device = str(self._model.get_input_embeddings().weight.device)
        self._prompts = Prompts(llm.pipeline.tokenizer)
        bounds = (self._engine.limits.context_tokens, self._engine.limits.cache_tokens)
        self._most_tokens = min((n for n in bounds if n is not None), default=sys.maxsize)

    def measure(self, copy_speed: CopySpeed, load_s: float) -> SchemeSpeed:
        options = self._options
        if options.prompt_tokens + options.new_tokens > self._most_tokens:
            msg = (
                f"prompt_tokens={options.prompt_tokens} and new_tokens={options.new_tokens} do not fit into the "
                f"{self._most_tokens} tokens of the model's context or the KV cache; ask for fewer."
            )
            raise InvalidOptionError(msg)
        weights_bytes = self._llm.memory_report().weights.total_bytes
        read_bytes = weights_bytes - _unread_bytes(self._model)
        limit_tok_s = copy_speed.rate_byte_s / read_bytes
        info = self._engine.info
        self._report(f"loaded in {load_s:.1f} s, {info.name} engine; at most {limit_tok_s:.1f} tokens/s by bandwidth")
        self._stream(self._prompts.draw(1, options.prompt_tokens)[0], 2)  # starts threads and loads kernels
        bare_steps = {batch: self._time_bare_step(batch) for batch in options.batches}
        generation = tuple(self._measure_generation(batch, bare_steps[batch], limit_tok_s) for batch in options.batches)
        prefill = self._measure_prefill()
        shared_prefix = self._measure_shared_prefix()
        return SchemeSpeed(
            scheme=self._scheme,
            engine=info.name,
            engine_reason=self._engine.info.reason,
            graphs=self._engine.info.graphs,
            load_s=load_s,
            weights_bytes=weights_bytes,
            read_bytes=read_bytes,
            limit_tok_s=limit_tok_s,
            generation=generation,
            prefill=prefill,
            shared_prefix=shared_prefix,
            peer=tuple(self._measure_peer({g.batch: g.rate_tok_s for g in generation})) if options.peer else (),
        )

    # The bare step.

    @property
    def _position(self) -> int:
        """Mean length of a text while it is written, in tokens."""
        return self._options.prompt_tokens + self._options.new_tokens // 2

    def _time_bare_step(self, batch: int) -> float | None:
        if not hasattr(self._engine, "time_step"):
            return None
        steps = _STEPS_CPU if self._device == "cpu" else _STEPS_GPU
        repeats = range(self._options.repeats)
        step_s: float = statistics.median(self._engine.time_step(batch, self._position, steps) for _ in repeats)
        self._report(f"bare step of {batch}: {1e3 * step_s:.2f} ms, {batch / step_s:.1f} tokens/s")
        return step_s

    # Our engine, as LangChain's users call it.

    def _measure_generation(self, batch: int, bare_step_s: float | None, limit_tok_s: float) -> GenerationSpeed:
        options = self._options
        new_tokens = options.new_tokens
        runs = []
        for _ in range(options.repeats + 1):  # the first is the warm-up, which captures graphs
            prompts = self._prompts.draw(batch, options.prompt_tokens)
            run = self._stream(prompts[0], new_tokens) if batch == 1 else self._abatch(self._llm, prompts, new_tokens)
            run.check(batch, options.prompt_tokens, new_tokens)
            runs.append(run)
        del runs[0]
        total_s = statistics.median(run.total_s for run in runs)
        engine_step_s = statistics.median(run.step_s for run in runs)
        decode_rate_tok_s = statistics.median(
            batch * (new_tokens - 1) / (run.total_s - run.first_token_s) for run in runs
        )
        found = GenerationSpeed(
            call="stream" if batch == 1 else "abatch",
            batch=batch,
            prompt_tokens=options.prompt_tokens,
            new_tokens=new_tokens,
            total_s=total_s,
            runs_s=tuple(run.total_s for run in runs),
            rate_tok_s=batch * new_tokens / total_s,
            first_text_s=statistics.median(run.first_text_s for run in runs) if batch == 1 else None,
            first_token_s=statistics.median(run.first_token_s for run in runs),
            decode_rate_tok_s=decode_rate_tok_s,
            engine_step_s=engine_step_s,
            bare_step_s=bare_step_s,
            bare_position=self._position,
            step_ratio=None if bare_step_s is None else engine_step_s / bare_step_s,
            limit_share=decode_rate_tok_s / limit_tok_s if batch == 1 else None,
        )
        self._report(
            f"{found.call} of {batch}: {found.rate_tok_s:.1f} tokens/s, first token after "
            f"{found.first_token_s:.3f} s, a step in {1e3 * engine_step_s:.2f} ms"
        )
        return found

    def _stream(self, prompt: str, new_tokens: int) -> _Run:
        notes = _Notes()
        first_text_s = None
        began = time.perf_counter()
        for text in self._llm.stream(prompt, {"callbacks": [notes]}, max_new_tokens=new_tokens):
            if text and first_text_s is None:
                first_text_s = time.perf_counter() - began
        total_s = time.perf_counter() - began
        return _Run(notes.infos, total_s, total_s if first_text_s is None else first_text_s)

    def _abatch(self, llm: QuantizedHuggingFaceLLM, prompts: list[Any], new_tokens: int) -> _Run:
        notes = _Notes()
        began = time.perf_counter()
        asyncio.run(llm.abatch(prompts, {"callbacks": [notes]}, max_new_tokens=new_tokens))
        total_s = time.perf_counter() - began
        return _Run(notes.infos, total_s, total_s)

    # The first token of a long prompt.

    def _measure_prefill(self) -> PrefillSpeed | None:
        tokens = self._options.long_prompt_tokens
        new_tokens = 4  # as in a longer text, the next step is on its way when the first token comes
        if not tokens or tokens + new_tokens > self._most_tokens:
            self._report(f"no prefill of {tokens} tokens: the model has room for {self._most_tokens}")
            return None
        runs = []
        for prompt in self._prompts.draw(self._options.repeats + 1, tokens):
            run = self._stream(prompt, new_tokens)
            run.check(1, tokens, new_tokens)
            runs.append(run)
        bare_s = self._time_bare_prefill(tokens)
        first_text_s = statistics.median(run.first_text_s for run in runs[1:])
        self._report(f"{tokens} tokens: first text after {first_text_s:.4f} s, bare prefill {bare_s:.4f} s")
        return PrefillSpeed(
            prompt_tokens=tokens,
            first_text_s=first_text_s,
            first_token_s=statistics.median(run.first_token_s for run in runs[1:]),
            bare_s=bare_s,
            ratio=first_text_s / bare_s,
        )

    def _time_bare_prefill(self, tokens: int) -> float:
        import inspect

        import torch
        from transformers import DynamicCache

        model = self._model
        keep = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        tokenizer = self._llm.pipeline.tokenizer
        times_s = []
        for prompt in self._prompts.draw(self._options.repeats + 1, tokens):
            ids = torch.tensor([tokenizer(prompt)["input_ids"]], device=self._device)
            _synchronize(self._device)
            began = time.perf_counter()
            with torch.no_grad():
                output = model(input_ids=ids, past_key_values=DynamicCache(config=model.config), use_cache=True, **keep)
                output.logits[:, -1].argmax(-1).item()  # which waits for the device
            times_s.append(time.perf_counter() - began)
        return statistics.median(times_s[1:])

    # Prompts that begin alike.

    def _measure_shared_prefix(self) -> SharedPrefixSpeed | None:
        options = self._options
        tokens = options.shared_tokens + _TAIL_TOKENS
        if not options.shared or tokens + 1 > self._most_tokens:
            self._report(f"no shared prefix of {options.shared_tokens} tokens: the model has room for less, or 0 asked")
            return None
        apart = self._run_shared(self._llm, tokens)
        shared = self._run_shared(self._sharing, tokens)
        apart_s = statistics.median(run.total_s for run in apart)
        shared_s = statistics.median(run.total_s for run in shared)
        self._report(
            f"{options.shared} requests that share {options.shared_tokens} tokens: {apart_s:.3f} s apart, "
            f"{shared_s:.3f} s shared"
        )
        return SharedPrefixSpeed(
            requests=options.shared,
            prefix_tokens=options.shared_tokens,
            prompt_tokens=tokens,
            apart_s=apart_s,
            shared_s=shared_s,
            cached_tokens=round(statistics.median(run.cached_tokens for run in shared)),
            ratio=apart_s / shared_s,
        )

    def _run_shared(self, llm: QuantizedHuggingFaceLLM, tokens: int) -> list[_Run]:
        options = self._options
        runs = []
        for _ in range(options.repeats + 1):
            prompts = self._prompts.draw_sharing(options.shared, options.shared_tokens, tokens)
            run = self._abatch(llm, prompts, 1)
            run.check(options.shared, tokens, 1, may_be_cached=llm.prefix_caching)
            runs.append(run)
        return runs[1:]

    # The peer.

    def _measure_peer(self, our_rates: dict[int, float]) -> Iterator[PeerSpeed]:
        options = self._options
        pipeline = _peer_pipeline(self._llm.pipeline)
        self._check_peer_length(pipeline)
        for batch in options.batches:
            for batch_size in dict.fromkeys((min(batch, PEER_BATCH), batch)):
                few = batch_size < batch
                new_tokens = min(options.new_tokens, options.peer_new_tokens) if few else options.new_tokens
                self._run_peer(pipeline, min(batch, 2 * batch_size), batch_size, _PEER_WARM_UP_TOKENS)
                total_s = self._run_peer(pipeline, batch, batch_size, new_tokens)
                rate_tok_s = batch * new_tokens / total_s
                self._report(f"HuggingFacePipeline, {batch} by {batch_size}: {rate_tok_s:.1f} tokens/s")
                yield PeerSpeed(
                    call="invoke" if batch == 1 else "batch",
                    batch=batch,
                    batch_size=batch_size,
                    new_tokens=new_tokens,
                    total_s=total_s,
                    rate_tok_s=rate_tok_s,
                    our_ratio=our_rates[batch] / rate_tok_s,
                )

    def _run_peer(self, pipeline: Any, batch: int, batch_size: int, new_tokens: int) -> float:
        """Give the seconds of one call."""
        from langchain_huggingface import HuggingFacePipeline

        peer = HuggingFacePipeline(pipeline=pipeline, batch_size=batch_size)
        # It takes options of the pipeline at the call alone; from_model_id gives its pipeline the batch size, too.
        kwargs = {**_peer_options(new_tokens), "return_full_text": False, "batch_size": batch_size}
        prompts = self._prompts.draw(batch, self._options.prompt_tokens)
        _synchronize(self._device)
        began = time.perf_counter()
        if batch == 1:
            texts = [peer.invoke(prompts[0], pipeline_kwargs=kwargs)]
        else:
            texts = peer.batch(prompts, pipeline_kwargs=kwargs)
        total_s = time.perf_counter() - began
        if len(texts) != batch:
            msg = f"HuggingFacePipeline gave {len(texts)} texts for {batch} prompts."
            raise GenerationError(msg)
        return total_s

    def _check_peer_length(self, pipeline: Any) -> None:
        """Check that its options make it write as many tokens as asked for: its texts do not tell."""
        prompt = self._prompts.draw(1, self._options.prompt_tokens)[0]
        given = pipeline(prompt, return_tensors=True, **_peer_options(_PEER_WARM_UP_TOKENS))
        found = len(given[0]["generated_token_ids"]) - self._options.prompt_tokens
        if found != _PEER_WARM_UP_TOKENS:
            msg = f"HuggingFacePipeline's pipeline wrote {found} tokens instead of {_PEER_WARM_UP_TOKENS}."
            raise GenerationError(msg)


class _Notes(BaseCallbackHandler):
    """Keeps usage and timing of every finished row."""

    run_inline = True  # not in a thread: the call that is measured waits for it

    def __init__(self) -> None:
        self.infos: list[dict[str, Any]] = []

    def on_llm_end(self, response: Any, **_: Any) -> None:
        """Note what came with a row."""
        self.infos.append(response.generations[0][0].generation_info or {})


@dataclass(frozen=True)
class _Run:
    """One call: what its rows reported, its wall time, and when its first text came."""

    infos: list[dict[str, Any]]
    total_s: float
    first_text_s: float

    @property
    def first_token_s(self) -> float:
        return statistics.median(float(info["timing"]["first_token_s"]) for info in self.infos)

    @property
    def step_s(self) -> float:
        steps_s: list[float] = []
        for info in self.infos:
            decoding_s = info["timing"]["total_s"] - info["timing"]["first_token_s"]
            steps_s.append(decoding_s / (info["usage_metadata"]["output_tokens"] - 1))
        return statistics.median(steps_s)

    @property
    def cached_tokens(self) -> int:
        return sum(info["usage_metadata"]["input_token_details"]["cache_read"] for info in self.infos)

    def check(self, batch: int, prompt_tokens: int, new_tokens: int, *, may_be_cached: bool = False) -> None:
        """Check that the work was what was asked for.

        Raises:
            GenerationError: If it was not, so that the time would mean nothing.
        """
        usages = [info["usage_metadata"] for info in self.infos]
        found = sorted({(usage["input_tokens"], usage["output_tokens"]) for usage in usages})
        if len(usages) != batch or found != [(prompt_tokens, new_tokens)]:
            msg = (
                f"{len(usages)} rows of (prompt, new) tokens {found} came back instead of {batch} of "
                f"{(prompt_tokens, new_tokens)}; their time cannot be compared."
            )
            raise GenerationError(msg)
        if self.cached_tokens and not may_be_cached:
            msg = f"{self.cached_tokens} tokens of prompts were not computed although prefix caching is off."
            raise GenerationError(msg)


def _unread_bytes(model: Any) -> int:
    """Bytes of the input embedding, of which a step reads some rows only; 0 where it is the output head, too."""
    embedding = model.get_input_embeddings().weight
    head = getattr(model.get_output_embeddings(), "weight", None)  # a packed one has none
    is_tied = head is not None and head.data_ptr() == embedding.data_ptr()
    return 0 if is_tied else int(embedding.nbytes)


def _peer_pipeline(pipeline: Any) -> Any:
    """Copy a pipeline for the peer: batches need a padding token, which its `from_model_id` sets like this."""
    pipeline = copy.copy(pipeline)
    if pipeline.tokenizer.pad_token_id is None:
        pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
        pipeline.tokenizer.pad_token = pipeline.tokenizer.eos_token
    return pipeline


def _peer_options(new_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "repetition_penalty": 1.0,
    }


def as_document(rows: Sequence[SchemeSpeed], *, options: SpeedOptions, copy_speed: CopySpeed, **about: Any) -> str:
    """Put rows and what they were measured on, with what and how, into one line of JSON.

    Args:
        rows: What was measured.
        options: How.
        copy_speed: The device's.
        **about: What else to say, such as `model` or `device`.
    """
    import torch

    device = str(about.get("device", "cpu"))
    reading = take_snapshot([device]).reading(device)
    versions: dict[str, str | None] = {"python": sys.version.split()[0], "cuda": torch.version.cuda}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return json.dumps(
        {
            **about,
            "device_name": None if reading is None else reading.name,
            "options": asdict(options),
            "versions": versions,
            "copy": asdict(copy_speed),
            "rows": [asdict(row) for row in rows],
        }
    )
