"""The pipeline engine: transformers' own `generate`, for any model that a pipeline can hold.

Owns how requests become batches of `generate`, and how its tokens come back one by one. Always correct, for any model;
one batch runs to its end before the next one starts. Knows transformers and tensors; no LangChain and no loading.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import (
    BatchFeature,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.detokenizer import Completion, begin_completions
from langchain_quantllm.engine.failures import request_failure, run_failure
from langchain_quantllm.engine.generate_sampler import RowSampler
from langchain_quantllm.engine.request import EngineInfo, EngineLoad, ModelLimits, Request
from langchain_quantllm.engine.request_checks import check_queue
from langchain_quantllm.engine.stream import Chunk, ChunkStream, TokenLogprob
from langchain_quantllm.engine.worker import UNLOADED, Worker
from langchain_quantllm.errors import GenerationError, NotEnoughMemoryError
from langchain_quantllm.memory import release_heap
from langchain_quantllm.options import INERT

DEFAULT_ROWS = 16
"""Most rows of a batch by default."""

NAN_LOGITS = "the model gave scores that are not numbers (nan); try another dtype, such as bfloat16 or float32."


class GenerateEngine:
    """Runs requests through `generate` of a transformers pipeline's model, in padded batches."""

    def __init__(self, pipeline: Any, reason: str = "asked for", adapters: AdapterSwitch | None = None) -> None:
        """Take a loaded pipeline of a model that generates text.

        Args:
            pipeline: The pipeline; nothing of it is changed, but for the adapter while a batch runs.
            reason: Why this engine was chosen.
            adapters: The adapters that requests name; None if the model runs as it is.
        """
        self._adapters = adapters
        self._pipeline = pipeline
        self._model = pipeline.model
        self._tokenizer = pipeline.tokenizer
        self.info = EngineInfo(name="pipeline", reason=reason)
        self.limits = limits_of(self._model, self._tokenizer)
        self.peak_cache_tokens = 0
        self._running: Sequence[Completion] = ()
        self._worker = Worker(self._run, self._recover)

    @property
    def load(self) -> EngineLoad:
        """Its sequences at this moment. Any thread may ask."""
        return EngineLoad(running=sum(map(_is_open, self._running)), waiting=self._worker.queued)

    def submit(
        self,
        requests: Sequence[Request],
        timeout_s: float | None = None,
        *,
        in_pieces: bool = True,
        max_waiting: int | None = None,
    ) -> ChunkStream:
        """Queue requests and return the stream of their chunks; see `Engine.submit`."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise GenerationError(UNLOADED)
        check_queue(self._worker.queued, max_waiting)
        stream, completions = begin_completions(requests, tokenizer, timeout_s, in_pieces=in_pieces)
        self._worker.submit(completions)
        return stream

    def close(self) -> None:
        """Cancel all requests and release the model."""
        self._worker.close("the model was unloaded while it was generating.")
        self._pipeline = self._model = self._tokenizer = self._adapters = None

    def _run(self, waiting: deque[Completion]) -> None:
        """Run requests that can run together to their end. For what is raised, see `Worker`."""
        batch = _Batch(_take_batch(waiting))
        if not batch.rows:
            return
        self._running = batch.rows
        try:
            if self._adapters is None:
                self._generate(batch)
            else:
                with self._adapters.chosen(batch.first.options.adapter):
                    self._generate(batch)
        except torch.OutOfMemoryError as error:
            raise NotEnoughMemoryError(_out_of_memory(batch.rows)) from error
        finally:
            self._running = ()
            batch.send_last()

    def _recover(self, error: BaseException) -> Exception:
        """Release the memory of a failed batch; returns the error for its requests."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return run_failure(error)

    def _generate(self, batch: _Batch) -> None:
        if _is_whole(batch.first):
            self._generate_whole(batch)
        else:
            self._generate_stepwise(batch)

    def _generate_stepwise(self, batch: _Batch) -> None:
        prompts = [row.request.prompt_ids for row in batch.rows]
        missing = [max(map(len, prompts)) - len(prompt) for prompt in prompts]
        pad = self.limits.pad_token_id
        steps = _Steps(batch, self)
        self._call_generate(
            [[pad] * n + list(prompt) for n, prompt in zip(missing, prompts, strict=True)],
            [[0] * n + [1] * len(prompt) for n, prompt in zip(missing, prompts, strict=True)],
            max(row.request.max_new_tokens for row in batch.rows),
            # Sampling and its penalties are done row by row in _Steps, so `generate` takes the best score.
            {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, **batch.first.options.extra},
            batch.first,
            [_Sample(steps)],
            [_Take(steps)],
        )
        for row in batch.rows:  # ended by an option of transformers' own, such as max_time
            if _is_open(row):
                batch.send(row, row.finish("length"))

    def _generate_whole(self, batch: _Batch) -> None:
        (row,) = batch.rows
        request = row.request
        row.start()
        options: dict[str, Any] = {
            "do_sample": False,
            "repetition_penalty": request.options.repetition_penalty,
            "min_new_tokens": request.max_new_tokens if request.options.ignore_eos else request.min_new_tokens,
            **request.options.extra,
        }
        ids = list(request.prompt_ids)
        output = self._call_generate(
            [ids], [[1] * len(ids)], request.max_new_tokens, options, request, [], [_StopWhenCancelled(row.stream)]
        )
        self.note_cache(output.shape[1] * request.options.extra.get("num_beams", 1))
        for token_id in output[0, len(ids) :].tolist():
            if chunk := row.push(token_id):
                batch.send(row, chunk)
            if row.finish_reason is not None:
                return
        batch.send(row, row.finish("length"))

    def note_cache(self, tokens: int) -> None:
        """Note how many tokens the KV cache of a batch holds, padding included."""
        if not self.peak_cache_tokens:
            release_heap()  # the first forward repacks weights on some CPUs, which takes four times their size
        self.peak_cache_tokens = max(self.peak_cache_tokens, tokens)

    def _call_generate(
        self,
        input_ids: list[list[int]],
        attention_mask: list[list[int]],
        max_new_tokens: int,
        options: Mapping[str, Any],
        request: Request,
        processors: Sequence[LogitsProcessor],
        stopping: Sequence[StoppingCriteria],
    ) -> torch.Tensor:
        config = _CompleteConfig(
            max_new_tokens=max_new_tokens,
            pad_token_id=options.get("pad_token_id", self.limits.pad_token_id),
            eos_token_id=list(request.end_token_ids) or None,
            **{name: value for name, value in options.items() if name != "pad_token_id"},
        )
        device = self._pipeline.device
        media = BatchFeature(dict(request.media or {})).to(device, dtype=self._model.dtype)
        output: torch.Tensor = self._model.generate(
            input_ids=torch.tensor(input_ids, device=device),
            attention_mask=torch.tensor(attention_mask, device=device),
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
            stopping_criteria=StoppingCriteriaList(stopping),
            **media,
        )
        return output


class _Batch:
    """The completions of one `generate`. Sends their chunks; the last one when the model has its own adapter again.

    A caller that has its answer, and then uses the model without the engine, must find it as it was.
    """

    def __init__(self, rows: list[Completion]) -> None:
        self.rows = rows
        self._last: tuple[Completion, Chunk] | None = None

    @property
    def first(self) -> Request:
        return self.rows[0].request

    def send(self, row: Completion, chunk: Chunk) -> None:
        """Put a chunk into its stream, unless it is the last one of the last row."""
        if all(row.finish_reason is not None or row.stream.cancelled for row in self.rows):
            self._last = row, chunk
        else:
            row.stream.put(chunk)

    def send_last(self) -> None:
        """Put the last chunk into its stream."""
        if self._last is not None:
            row, chunk = self._last
            row.stream.put(chunk)


class _Steps:
    """The steps of one `generate`: samples each row's token, then appends it."""

    def __init__(self, batch: _Batch, engine: GenerateEngine) -> None:
        self._batch = batch
        self._engine = engine
        self._samplers: list[RowSampler | None] = [None] * len(batch.rows)
        self._logprobs: list[TokenLogprob | None] = [None] * len(batch.rows)
        # Plain greedy rows need the best score only, which `generate` takes by itself.
        self._plain = all(_is_plain(row.request) for row in batch.rows)
        for i, row in enumerate(batch.rows):
            row.start()
            with _fails_alone(row):
                self._samplers[i] = RowSampler(row.request)

    def sample(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores, of shape `(rows, vocab)`, whose best are the sampled tokens."""
        for row, is_nan in zip(self._batch.rows, scores.isnan().any(-1).tolist(), strict=True):
            if is_nan and _is_open(row):  # the other rows go on
                row.stream.fail(GenerationError(NAN_LOGITS))
        if self._plain:
            return scores
        chosen = torch.full_like(scores, -torch.inf)
        for i, row in enumerate(self._batch.rows):
            token_id = 0
            sampler = self._samplers[i]
            if sampler is not None and _is_open(row):
                with _fails_alone(row):
                    token_id, self._logprobs[i] = sampler.sample(scores[i], row.token_ids)
                    if sampler.ended:
                        self._batch.send(row, row.finish("stop"))
            chosen[i, token_id] = 0.0
        return chosen

    def take(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Append the last token of each row, of ids of shape `(rows, length)`; returns which rows have ended."""
        self._engine.note_cache(input_ids.numel())
        rows = self._batch.rows
        for row, token_id, logprob in zip(rows, input_ids[:, -1].tolist(), self._logprobs, strict=True):
            if _is_open(row):
                with _fails_alone(row):
                    if chunk := row.push(token_id, logprob):
                        self._batch.send(row, chunk)
        ended = [row.finish_reason is not None or row.stream.should_stop() for row in rows]
        return torch.tensor(ended, device=input_ids.device)


def _is_open(row: Completion) -> bool:
    return row.finish_reason is None and not row.stream.cancelled


@contextlib.contextmanager
def _fails_alone(row: Completion) -> Iterator[None]:
    """Fail a row with what its own mask or tokenizer raises; the other rows go on."""
    try:
        yield
    except BaseException as error:
        row.stream.fail(request_failure(error))


class _CompleteConfig(GenerationConfig):  # type: ignore[misc]  # transformers is not typed
    """A generation config whose unset fields stay unset: the request has the checkpoint's values already.

    `generate` would fill them in from the model, with its stop strings.
    Source: GenerationMixin._prepare_generation_config in transformers/generation/utils.py.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        """Update all but from the model's own config, which comes with both flags set."""
        if defaults_only and allow_custom_entries:
            return {}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs)


class _Sample(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._steps.sample(scores)


class _Take(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return self._steps.take(input_ids)


class _StopWhenCancelled(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, stream: ChunkStream) -> None:
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stream.should_stop(), device=input_ids.device)


def _is_whole(request: Request) -> bool:
    """Whether `generate` does not go token by token, so that the text comes whole."""
    return "num_beams" in request.options.extra


def _is_alone(request: Request) -> bool:
    """Whether a request runs by itself: each family has its own way to put images of two rows into one tensor."""
    return _is_whole(request) or request.media is not None


def _is_plain(request: Request) -> bool:
    o = request.options
    needs_more = o.do_sample or o.ignore_eos or request.min_new_tokens or o.logprobs is not None or request.mask
    return not needs_more and o.repetition_penalty == 1.0


_BLIND = INERT | {"use_cache", "max_time", "remove_invalid_values"}
"""Options of `generate` that do not depend on a row's tokens or length."""


def _group(request: Request) -> tuple[Any, ...]:
    """The key that requests must share to run in one `generate`.

    Most of transformers' own options see the padding of shorter prompts, so requests with any of them run with those
    of equal lengths only, and get the text that they would get alone.
    """
    extra = request.options.extra
    lengths = (len(request.prompt_ids), request.max_new_tokens) if extra.keys() - _BLIND else ()
    adapter = request.options.adapter
    return adapter, repr(sorted(extra.items())), request.eos_token_ids, request.stop_token_ids, lengths


def _take_batch(waiting: deque[Completion]) -> list[Completion]:
    """Take the first request of the lowest priority number off the queue, and those that can run with it."""
    batch: list[Completion] = []
    passed: list[Completion] = []
    rows = [waiting.popleft() for _ in range(len(waiting))]
    for row in sorted(rows, key=lambda row: row.request.options.priority):
        if row.stream.should_stop():
            continue
        requests = [row.request] if not batch else [row.request, batch[0].request]
        if not batch or (
            len(set(map(_group, requests))) == 1
            and len(batch) < min(request.max_rows or DEFAULT_ROWS for request in requests)
            and not any(map(_is_alone, requests))
        ):
            batch.append(row)
        else:
            passed.append(row)
    waiting.extendleft(reversed(passed))
    return batch


def _out_of_memory(batch: list[Completion]) -> str:
    tokens = max(len(row.request.prompt_ids) + row.request.max_new_tokens for row in batch)
    return (
        f"the device ran out of memory with {len(batch)} rows of up to {tokens} tokens; lower batch_size, "
        "max_new_tokens or the prompt's length, or load the model in fewer bits."
    )


def limits_of(model: Any, tokenizer: Any) -> ModelLimits:
    """Read the limits of requests off a model and its tokenizer."""
    config = model.config.get_text_config()
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else () if eos is None else (eos,)
    pads = (tokenizer.pad_token_id, model.generation_config.pad_token_id, *eos_ids, 0)
    return ModelLimits(
        context_tokens=getattr(config, "max_position_embeddings", None),
        vocab_size=model.get_input_embeddings().weight.shape[0],
        eos_token_ids=eos_ids,
        pad_token_id=next(p for p in pads if p is not None),
    )
