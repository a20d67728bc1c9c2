"""The plain engine: transformers' own `generate`, for any model that a pipeline can hold.

Owns how requests become batches of `generate` and how its tokens come back one by one.
Always correct, for any model; one batch runs to its end before the next one starts. Knows
transformers and tensors; LangChain and loading are none of its business.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
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
from langchain_quantllm.engine.detokenizer import Decode, Row
from langchain_quantllm.engine.generate_sampler import RowSampler
from langchain_quantllm.engine.request import Chunk, EngineInfo, ModelLimits, Request, TokenLogprob
from langchain_quantllm.engine.stream import ChunkStream
from langchain_quantllm.engine.worker import UNLOADED, Worker
from langchain_quantllm.errors import GenerationError, NotEnoughMemoryError
from langchain_quantllm.memory import release_heap
from langchain_quantllm.options import INERT

_WHOLE = ("num_beams", "prompt_lookup_num_tokens")
"""Options under which `generate` does not go token by token, so that the text comes whole."""

DEFAULT_ROWS = 16
"""Most rows of a batch where nobody says."""

NO_NUMBERS = "the model gave scores that are no numbers (nan); try another dtype, such as bfloat16 or float32."

_Waiting = deque[tuple[Row, ChunkStream]]


class GenerateEngine:
    """Runs requests through `generate` of a transformers pipeline's model, in padded batches."""

    def __init__(self, pipeline: Any, reason: str = "asked for", adapters: AdapterSwitch | None = None) -> None:
        """Serve a loaded pipeline of a model that generates text.

        Args:
            pipeline: The pipeline; nothing of it is changed, but for the adapter while a batch runs.
            reason: Why this engine.
            adapters: The adapters that requests name; None where the model runs as it is.
        """
        self._adapters = adapters
        self._pipeline = pipeline
        self._model = pipeline.model
        self._tokenizer = pipeline.tokenizer
        self._info = EngineInfo(name="pipeline", reason=reason)
        self._limits = limits_of(self._model, self._tokenizer)
        self._peak_cache_tokens = 0
        self._worker = Worker(self._run)

    @property
    def info(self) -> EngineInfo:
        """Which engine this is."""
        return self._info

    @property
    def limits(self) -> ModelLimits:
        """What the model can be asked for."""
        return self._limits

    @property
    def peak_cache_tokens(self) -> int:
        """Most tokens, over all rows and their padding, that the KV cache has held at once."""
        return self._peak_cache_tokens

    def submit(
        self, requests: Sequence[Request], timeout_s: float | None = None, *, in_pieces: bool = True
    ) -> ChunkStream:
        """Queue rows and return the stream of their chunks; see `Engine.submit`."""
        tokenizer = self._tokenizer
        if tokenizer is None:
            raise GenerationError(UNLOADED)
        stream = ChunkStream(len(requests), timeout_s)
        rows = [
            Row(request, i, decoder_of(tokenizer, request), in_pieces=in_pieces) for i, request in enumerate(requests)
        ]
        self._worker.submit(rows, stream)
        return stream

    def close(self) -> None:
        """Cancel what runs and let go of the model."""
        self._worker.close("the model was unloaded while it was generating.")
        self._pipeline = self._model = self._tokenizer = self._adapters = None

    def _run(self, waiting: _Waiting) -> None:
        """Take the rows that can run together off the queue and run them to their end."""
        batch = _take_batch(waiting)
        if not batch:
            return
        switch = self._adapters
        try:
            if switch is None:
                self._generate(batch)
            else:
                last = _LastChunk(len(batch))
                try:
                    with switch.chosen(batch[0][0].request.options.adapter):
                        self._generate([(row, last.holding(stream)) for row, stream in batch])
                finally:
                    last.release()
        except torch.OutOfMemoryError as error:
            self._fail(batch, NotEnoughMemoryError(_out_of_memory(batch)), error)
        except GenerationError as error:
            self._fail(batch, error, error.__cause__)
        except Exception as error:
            self._fail(batch, GenerationError(f"the model failed while generating: {error!r}"), error)

    def _fail(self, batch: list[tuple[Row, ChunkStream]], report: Exception, cause: BaseException | None) -> None:
        for stream in {id(stream): stream for row, stream in batch if row.finish_reason is None}.values():
            failure = type(report)(*report.args)  # one of its own for each reader's traceback
            failure.__cause__ = cause
            stream.fail(failure)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _generate(self, batch: list[tuple[Row, ChunkStream]]) -> None:
        if _is_whole(batch[0][0].request):
            self._generate_whole(*batch[0])
        else:
            self._generate_stepwise(batch)

    def _generate_stepwise(self, batch: list[tuple[Row, ChunkStream]]) -> None:
        longest = max(len(row.request.prompt_ids) for row, _ in batch)
        pad = self._limits.pad_token_id
        padded = [[pad] * (longest - len(r.request.prompt_ids)) + list(r.request.prompt_ids) for r, _ in batch]
        mask = [[0] * (longest - len(r.request.prompt_ids)) + [1] * len(r.request.prompt_ids) for r, _ in batch]
        steps = _Steps(batch, self._note_cache)
        first = batch[0][0].request
        self._call_generate(
            padded,
            mask,
            max(row.request.max_new_tokens for row, _ in batch),
            # Sampling and its penalties are done row by row in _Steps, so `generate` takes the best score.
            {"do_sample": False, "repetition_penalty": 1.0, "num_beams": 1, **first.options.extra},
            first,
            [_Draw(steps)],
            [_Take(steps)],
        )
        for row, stream in batch:  # ended by an option of transformers' own, such as max_time
            if row.finish_reason is None and not stream.cancelled:
                stream.put(row.finish("length"))

    def _generate_whole(self, row: Row, stream: ChunkStream) -> None:
        request = row.request
        row.start()
        options: dict[str, Any] = {
            "do_sample": False,
            "repetition_penalty": request.options.repetition_penalty,
            "min_new_tokens": request.max_new_tokens if request.options.ignore_eos else request.min_new_tokens,
            **request.options.extra,
        }
        ids = [list(request.prompt_ids)]
        output = self._call_generate(
            ids, [[1] * len(ids[0])], request.max_new_tokens, options, request, [], [_StopWhenCancelled(stream)]
        )
        self._note_cache(output.shape[1] * request.options.extra.get("num_beams", 1))
        chunks: list[Chunk] = []
        for token_id in output[0, len(ids[0]) :].tolist():
            if chunk := row.push(token_id):
                chunks.append(chunk)
            if row.finish_reason is not None:
                break
        else:
            chunks.append(row.finish("length"))
        for chunk in chunks:
            stream.put(chunk)

    def _note_cache(self, tokens: int) -> None:
        if not self._peak_cache_tokens:
            release_heap()  # the first forward repacks weights on some CPUs, by way of four times their size
        self._peak_cache_tokens = max(self._peak_cache_tokens, tokens)

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
            pad_token_id=options.get("pad_token_id", self._limits.pad_token_id),
            eos_token_id=list(request.eos_token_ids + request.stop_token_ids) or None,
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


def decoder_of(tokenizer: Any, request: Request) -> Decode:
    """Give what turns a request's token ids into text."""
    skip = request.options.skip_special_tokens

    def decode(ids: list[int]) -> str:
        return str(tokenizer.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    return decode


class _LastChunk:
    """The last chunk of a batch, held back until the model has its own adapter again.

    Who has got an answer, and then uses the model without the engine, is to find it as it was.
    """

    def __init__(self, rows: int) -> None:
        self._open_rows = rows
        self._held: tuple[ChunkStream, Chunk] | None = None

    def holding(self, stream: ChunkStream) -> Any:
        """Give what stands in for a row's stream while the row runs."""
        return _HeldStream(self, stream)

    def put(self, stream: ChunkStream, chunk: Chunk) -> None:
        """Hand a chunk on, unless it is the last one of the last row."""
        self._open_rows -= chunk.finish_reason is not None
        if self._open_rows:
            stream.put(chunk)
        else:
            self._held = stream, chunk

    def release(self) -> None:
        """Hand on what was held back."""
        if self._held is not None:
            stream, chunk = self._held
            stream.put(chunk)


class _HeldStream:
    def __init__(self, last: _LastChunk, stream: ChunkStream) -> None:
        self._last, self._stream = last, stream
        self.fail, self.close = stream.fail, stream.close

    @property
    def cancelled(self) -> bool:
        return self._stream.cancelled

    def put(self, chunk: Chunk) -> None:
        self._last.put(self._stream, chunk)


class _Steps:
    """The rows of one `generate`: draws each one's token, then takes it in."""

    def __init__(self, batch: list[tuple[Row, ChunkStream]], note_cache: Callable[[int], None]) -> None:
        self._batch = batch
        self._note_cache = note_cache
        self._samplers = [RowSampler(row.request) for row, _ in batch]
        self._logprobs: list[TokenLogprob | None] = [None] * len(batch)
        # Plain greedy rows need nothing but the best score, which `generate` takes by itself.
        self._plain = all(_is_plain(row.request) for row, _ in batch)
        for row, _ in batch:
            row.start()

    def draw(self, scores: torch.Tensor) -> torch.Tensor:
        """Give scores, of shape `(rows, vocab)`, whose best are the tokens drawn."""
        for (_, stream), is_bad in zip(self._batch, scores.isnan().any(-1).tolist(), strict=True):
            if is_bad and not stream.cancelled:  # the other rows know nothing of it
                stream.fail(GenerationError(NO_NUMBERS))
        if self._plain:
            return scores
        chosen = torch.full_like(scores, -torch.inf)
        for i, (row, stream) in enumerate(self._batch):
            token_id = 0
            if row.finish_reason is None and not stream.cancelled:
                token_id, self._logprobs[i] = self._samplers[i].sample(scores[i], row.token_ids)
                if self._samplers[i].ended:
                    stream.put(row.finish("stop"))
            chosen[i, token_id] = 0.0
        return chosen

    def take(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Take in the last token of each row, of ids of shape `(rows, length)`, and say which rows are done."""
        self._note_cache(input_ids.numel())
        token_ids = input_ids[:, -1].tolist()
        for (row, stream), token_id, logprob in zip(self._batch, token_ids, self._logprobs, strict=True):
            if row.finish_reason is None and not stream.cancelled and (chunk := row.push(token_id, logprob)):
                stream.put(chunk)
        done = [row.finish_reason is not None or stream.cancelled for row, stream in self._batch]
        return torch.tensor(done, device=input_ids.device)


class _CompleteConfig(GenerationConfig):  # type: ignore[misc]  # transformers is not typed
    """A generation config whose unset fields stay unset: the checkpoint's are in the request already.

    `generate` would fill them in from the model, stop strings and all.
    Source: GenerationMixin._prepare_generation_config in transformers/generation/utils.py.
    """

    def update(self, defaults_only: bool = False, allow_custom_entries: bool = False, **kwargs: Any) -> Any:
        """Take what is given, but not the model's own config, which comes with both flags set."""
        if defaults_only and allow_custom_entries:
            return {}
        return super().update(defaults_only=defaults_only, allow_custom_entries=allow_custom_entries, **kwargs)


class _Draw(LogitsProcessor):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._steps.draw(scores)


class _Take(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, steps: _Steps) -> None:
        self._steps = steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return self._steps.take(input_ids)


class _StopWhenCancelled(StoppingCriteria):  # type: ignore[misc]  # transformers is not typed
    def __init__(self, stream: ChunkStream) -> None:
        self._stream = stream

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self._stream.cancelled, device=input_ids.device)


def _is_whole(request: Request) -> bool:
    return any(name in request.options.extra for name in _WHOLE)


def _is_alone(request: Request) -> bool:
    """Whether a row runs by itself: images of two rows lie in one tensor, in a way that each family has for itself."""
    return _is_whole(request) or request.media is not None


def _is_plain(request: Request) -> bool:
    o = request.options
    needs_more = o.do_sample or o.ignore_eos or request.min_new_tokens or o.logprobs is not None or request.mask
    return not needs_more and o.repetition_penalty == 1.0


_BLIND = INERT | {"use_cache", "max_time", "remove_invalid_values"}
"""Options of `generate` that look at no row's tokens or length."""


def _group(request: Request) -> tuple[Any, ...]:
    """What rows must have in common to run in one `generate`.

    Most of transformers' own options see the padding of shorter prompts, so rows with any of
    them run with rows of their own lengths only, and come out as they would alone.
    """
    extra = request.options.extra
    lengths = (len(request.prompt_ids), request.max_new_tokens) if extra.keys() - _BLIND else ()
    adapter = request.options.adapter
    return adapter, repr(sorted(extra.items())), request.eos_token_ids, request.stop_token_ids, lengths


def _take_batch(waiting: _Waiting) -> list[tuple[Row, ChunkStream]]:
    batch: list[tuple[Row, ChunkStream]] = []
    passed: list[tuple[Row, ChunkStream]] = []
    while waiting:
        row, stream = waiting.popleft()
        if stream.cancelled:
            continue
        if not batch or (
            _group(row.request) == _group(batch[0][0].request)
            and len(batch) < min(row.request.max_rows or DEFAULT_ROWS, batch[0][0].request.max_rows or DEFAULT_ROWS)
            and not _is_alone(row.request)
            and not _is_alone(batch[0][0].request)
        ):
            batch.append((row, stream))
        else:
            passed.append((row, stream))
    waiting.extendleft(reversed(passed))
    return batch


def _out_of_memory(batch: list[tuple[Row, ChunkStream]]) -> str:
    tokens = max(len(row.request.prompt_ids) + row.request.max_new_tokens for row, _ in batch)
    return (
        f"the device ran out of memory with {len(batch)} rows of up to {tokens} tokens; lower batch_size, "
        "max_new_tokens or the prompt's length, or load the model in fewer bits."
    )


def limits_of(model: Any, tokenizer: Any) -> ModelLimits:
    """Read off a model and its tokenizer what can be asked for."""
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
