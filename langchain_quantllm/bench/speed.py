"""Measuring how fast texts are written: what the device allows, what we reach, and what a peer reaches.

Owns what is measured, in which order and with which prompts: ceilings first, then the bare step, then calls as
LangChain's users make them, then langchain-huggingface over the same weights. Prints nothing; the command line does.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

from langchain_quantllm.bench.calls import Run, abatch, stream, synchronize
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.speed_results import (
    CopySpeed,
    GenerationSpeed,
    PeerSpeed,
    PrefillSpeed,
    SchemeSpeed,
    SharedPrefixSpeed,
    SpeedOptions,
)
from langchain_quantllm.errors import GenerationError, InvalidOptionError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.schemes import GPTQ

PEER_BATCH = 4
"""Source: `DEFAULT_BATCH_SIZE` of langchain_huggingface/llms/huggingface_pipeline.py, which `from_model_id` also gives
to the pipeline inside."""

_TAIL_TOKENS = 8
_PEER_WARM_UP_TOKENS = 8
_PREFILL_WARM_UPS, _LEAST_PREFILLS = 2, 15
"""Prefills take some milliseconds, which vary: ours and bare ones by turns, the median of several."""
_STEPS_GPU, _STEPS_CPU = 50, 3
_COPIES = 10


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
        synchronize(device)
        began = time.perf_counter()
        for _ in range(1 if is_cpu else _COPIES):
            target.copy_(source)
        synchronize(device)
        times_s.append((time.perf_counter() - began) / (1 if is_cpu else _COPIES))
    del source, target
    release_memory()
    return CopySpeed(buffer_bytes=buffer_bytes, rate_byte_s=2 * buffer_bytes / statistics.median(times_s[1:]))


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
        read_bytes = weights_bytes - unread_bytes(self._model)
        limit_tok_s = copy_speed.rate_byte_s / read_bytes
        info = self._engine.info
        self._report(f"loaded in {load_s:.1f} s, {info.name} engine; at most {limit_tok_s:.1f} tokens/s by bandwidth")
        stream(self._llm, self._prompts.draw(1, options.prompt_tokens)[0], 2)  # starts threads and loads kernels
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
        warm_ups = 2 if self._engine.info.graphs else 1  # the graph of a prompt is captured when its length comes again
        for _ in range(warm_ups + options.repeats):
            prompts = self._prompts.draw(batch, options.prompt_tokens)
            run = stream(self._llm, prompts[0], new_tokens) if batch == 1 else abatch(self._llm, prompts, new_tokens)
            run.check(batch, options.prompt_tokens, new_tokens)
            runs.append(run)
        del runs[:warm_ups]
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

    # The first token of a long prompt.

    def _measure_prefill(self) -> PrefillSpeed | None:
        tokens = self._options.long_prompt_tokens
        new_tokens = 4  # as in a longer text, the next step is on its way when the first token comes
        if not tokens or tokens + new_tokens > self._most_tokens:
            self._report(f"no prefill of {tokens} tokens: the model has room for {self._most_tokens}")
            return None
        texts_s, tokens_s, bare_s = [], [], []
        for i in range(_PREFILL_WARM_UPS + max(self._options.repeats, _LEAST_PREFILLS)):
            run = stream(self._llm, self._prompts.draw(1, tokens)[0], new_tokens)
            run.check(1, tokens, new_tokens)
            bare = self._time_bare_prefill(self._prompts.draw(1, tokens)[0])
            if i >= _PREFILL_WARM_UPS:
                texts_s.append(run.first_text_s)
                tokens_s.append(run.first_token_s)
                bare_s.append(bare)
        found = PrefillSpeed(
            prompt_tokens=tokens,
            first_text_s=statistics.median(texts_s),
            first_token_s=statistics.median(tokens_s),
            bare_s=statistics.median(bare_s),
            ratio=statistics.median(texts_s) / statistics.median(bare_s),
        )
        self._report(f"{tokens} tokens: first text after {found.first_text_s:.4f} s, bare prefill {found.bare_s:.4f} s")
        return found

    def _time_bare_prefill(self, prompt: Any) -> float:
        import torch
        from transformers import DynamicCache

        from langchain_quantllm.compat.transformers_models import cache_name, forward_parameters

        model = self._model
        keep = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
        ids = torch.tensor([self._llm.pipeline.tokenizer(prompt)["input_ids"]], device=self._device)
        cache = {cache_name(model): DynamicCache(config=model.config)}
        synchronize(self._device)
        began = time.perf_counter()
        with torch.no_grad():
            output = model(input_ids=ids, use_cache=True, **cache, **keep)
            output.logits[:, -1].argmax(-1).item()  # which waits for the device
        return time.perf_counter() - began

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

    def _run_shared(self, llm: QuantizedHuggingFaceLLM, tokens: int) -> list[Run]:
        options = self._options
        runs = []
        for _ in range(options.repeats + 1):
            prompts = self._prompts.draw_sharing(options.shared, options.shared_tokens, tokens)
            run = abatch(llm, prompts, 1)
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
        synchronize(self._device)
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


def unread_bytes(model: Any) -> int:
    """Give the bytes of the input embedding, of which a step reads some rows only; 0 where it is the head's, too."""
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
