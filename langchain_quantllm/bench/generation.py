"""Measurements of generation: calls of an overview, and our engine in depth.

Each function measures one case on a loaded model and returns the values of its record.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from langchain_quantllm.bench.calls import Repeated, Run, abatch, repeat, stream, synchronize, time_generate
from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM

ENGINE, GENERATE = "engine", "generate"
"""The two runners: ours, through LangChain, and transformers'."""

_TAIL_TOKENS = 8
_PREFILL_WARM_UPS, _LEAST_PREFILLS = 2, 15
"""Prefills take some milliseconds, which vary: ours and bare ones by turns, the median of several."""
_STEPS_GPU, _STEPS_CPU = 50, 3


@dataclass(frozen=True, kw_only=True)
class LoadedModel:
    """A loaded model, as measurements take it.

    Args:
        llm: The model, with `ignore_eos=True` and `prefix_caching=False`.
        device: Device of its weights.
        options: The options of the bench.
        prompts: Random prompts for its tokenizer.
        before_bytes: Memory in use before it was loaded.
        report: Called with a line for each finished measurement.
    """

    llm: QuantizedHuggingFaceLLM
    device: str
    options: BenchOptions
    prompts: Prompts
    before_bytes: int
    report: Callable[[str], None]

    @property
    def warm_ups(self) -> int:
        """Calls of our engine before a measurement: with graphs, the second use of a length captures its graph."""
        return 2 if self.llm.engine_info.graphs else 1

    def call(self, batch: int, prompt_tokens: int, new_tokens: int) -> Run:
        """Call our engine once with new prompts: `stream` for one text, `abatch` for more."""
        prompts = self.prompts.draw(batch, prompt_tokens)
        run = stream(self.llm, prompts[0], new_tokens) if batch == 1 else abatch(self.llm, prompts, new_tokens)
        run.check(batch, prompt_tokens, new_tokens)
        return run


# Calls of an overview.


def measure_call(
    loaded: LoadedModel, runner: str, batch: int, prompt_tokens: int, new_tokens: int, *, use_cache: bool = True
) -> dict[str, Any]:
    """Measure one kind of call, bounded by `limit_s`.

    Args:
        loaded: The model.
        runner: `ENGINE` or `GENERATE`.
        batch: Texts at once.
        prompt_tokens: Length of each prompt.
        new_tokens: Length of each text.
        use_cache: Whether `generate` keeps keys and values from step to step.

    Returns:
        `call`, `"stream"`, `"abatch"` or `"generate"`; `batch`; `prompt_tokens`; `new_tokens` as many as were written;
        `asked_tokens`, more than these where they would have taken longer than `limit_s`; `use_cache`; `total_s` from
        the call to its end, and `runs_s` of every repeat; `rate_tok_s`, all new tokens / `total_s`, prefill included;
        `prompt_rate_tok_s`, all tokens of the prompts / `total_s`; `first_token_s` from the submission to the first
        token, None for `generate`; `peak_bytes`, the most memory in use meanwhile, above that before loading.

    Raises:
        InvalidOptionError: If the call does not fit into the model's context.
        GenerationError: If other lengths come back than were asked for.
    """
    _check_context(loaded.llm.pipeline.model, prompt_tokens + new_tokens)
    options = loaded.options
    is_ours = runner == ENGINE

    def run(tokens: int) -> Run:
        if is_ours:
            return loaded.call(batch, prompt_tokens, tokens)
        prompts = loaded.prompts.draw(batch, prompt_tokens)
        total_s = time_generate(loaded.llm.pipeline, prompts, tokens, use_cache=use_cache)
        return Run([], total_s, total_s)

    done = repeat(
        run,
        new_tokens,
        repeats=options.repeats if is_ours else options.peer_repeats,
        warm_ups=loaded.warm_ups if is_ours else 1,
        limit_s=options.limit_s,
        device=loaded.device,
    )
    middle = sorted(done.runs, key=lambda r: r.total_s)[len(done.runs) // 2]
    values = {
        **_call_values(done, batch, prompt_tokens),
        "call": runner if not is_ours else "stream" if batch == 1 else "abatch",
        "asked_tokens": new_tokens,
        "use_cache": use_cache,
        "first_token_s": middle.first_token_s if middle.infos else None,
        "peak_bytes": None if done.peak_bytes is None else done.peak_bytes - loaded.before_bytes,
    }
    cache = "" if use_cache else " without KV cache"
    size = f"{batch} x ({prompt_tokens} + {done.new_tokens}) tokens"
    rate = f"{values['rate_tok_s']:.1f} new and {values['prompt_rate_tok_s']:.1f} prompt tokens/s"
    loaded.report(f"{values['call']}{cache}, {size}: {done.total_s:.3f} s, {rate}")
    return values


def _check_context(model: Any, tokens: int) -> None:
    context_tokens = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context_tokens is not None and tokens > context_tokens:
        msg = f"{tokens} tokens do not fit into the model's context of {context_tokens}."
        raise InvalidOptionError(msg)


def _call_values(done: Repeated, batch: int, prompt_tokens: int) -> dict[str, Any]:
    return {
        "batch": batch,
        "prompt_tokens": prompt_tokens,
        "new_tokens": done.new_tokens,
        "total_s": done.total_s,
        "runs_s": done.runs_s,
        "rate_tok_s": batch * done.new_tokens / done.total_s,
        "prompt_rate_tok_s": batch * prompt_tokens / done.total_s,
    }


# Our engine in depth.


def most_tokens(llm: QuantizedHuggingFaceLLM) -> int:
    """Most tokens of a prompt and its text, by the context and the KV cache."""
    limits = llm._engine().limits
    return min((n for n in (limits.context_tokens, limits.cache_tokens) if n is not None), default=sys.maxsize)


def time_bare_step(loaded: LoadedModel, batch: int) -> float | None:
    """Time a step of the engine alone, at the mean length of a text; None if the engine has none of so many."""
    engine: Any = loaded.llm._engine()
    if not hasattr(engine, "time_step"):
        return None
    options = loaded.options
    steps = _STEPS_CPU if loaded.device == "cpu" else _STEPS_GPU
    times = [engine.time_step(batch, _mean_position(options), steps) for _ in range(options.repeats)]
    if None in times:
        return None
    step_s: float = statistics.median(times)
    loaded.report(f"bare step of {batch}: {1e3 * step_s:.2f} ms, {batch / step_s:.1f} tokens/s")
    return step_s


def _mean_position(options: BenchOptions) -> int:
    """Mean length of a text while it is written, in tokens."""
    return options.prompt_tokens + options.new_tokens // 2


def measure_generation(
    loaded: LoadedModel, batch: int, *, bare_step_s: float | None, limit_tok_s: float | None
) -> dict[str, Any]:
    """Measure our engine through LangChain, with the time of its steps.

    Args:
        loaded: The model.
        batch: Requests at once.
        bare_step_s: `time_bare_step` of as many.
        limit_tok_s: Tokens/s of one request if a step took only as long as reading the weights.

    Returns:
        Medians over the repeats. As `measure_call` gives them: `call`, `batch`, `prompt_tokens`, `new_tokens`,
        `total_s`, `runs_s`, `rate_tok_s`, `prompt_rate_tok_s`, `first_token_s`. Beside these `first_text_s`, from the
        call to the first text, None if not streamed; `decode_rate_tok_s`, new tokens but the first, over the time from
        the first token to the end of the call (the first token's time is the engine's, counted from the submission,
        which makes this time a little too long rather than too short); `engine_step_s`, from a text's first token
        to its last, by step; `bare_step_s`, the same step alone, and `bare_position`, where that was measured;
        `step_ratio`, `engine_step_s / bare_step_s`, which compares like with like while the engine has room for all
        requests at once (128 on a GPU, 32 on the CPU); `limit_share`, `decode_rate_tok_s` of one request as a share of
        `limit_tok_s`, None for more requests.
    """
    options, new_tokens = loaded.options, loaded.options.new_tokens
    run = partial(loaded.call, batch, options.prompt_tokens)
    warm_ups = loaded.warm_ups
    done = repeat(run, new_tokens, repeats=options.repeats, warm_ups=warm_ups, warm_up_tokens=new_tokens)
    runs = done.runs
    step_s = statistics.median(run.step_s for run in runs)
    decode_rate_tok_s = statistics.median(batch * (new_tokens - 1) / (run.total_s - run.first_token_s) for run in runs)
    values = {
        **_call_values(done, batch, options.prompt_tokens),
        "call": "stream" if batch == 1 else "abatch",
        "first_text_s": statistics.median(run.first_text_s for run in runs) if batch == 1 else None,
        "first_token_s": statistics.median(run.first_token_s for run in runs),
        "decode_rate_tok_s": decode_rate_tok_s,
        "engine_step_s": step_s,
        "bare_step_s": bare_step_s,
        "bare_position": _mean_position(options),
        "step_ratio": None if bare_step_s is None else step_s / bare_step_s,
        "limit_share": decode_rate_tok_s / limit_tok_s if batch == 1 and limit_tok_s else None,
    }
    loaded.report(
        f"{values['call']} of {batch}: {values['rate_tok_s']:.1f} tokens/s, first token after "
        f"{values['first_token_s']:.3f} s, a step in {1e3 * step_s:.2f} ms"
    )
    return values


def measure_long_prompt(loaded: LoadedModel) -> dict[str, Any] | None:
    """Measure the wait for the first text of a long prompt, beside the model's own forward of as many tokens.

    Returns:
        `prompt_tokens`; `first_text_s`, from `llm.stream` to the first text; `first_token_s`, from the submission to
        the first token, as the engine counts it; `bare_s`, one forward with a new `DynamicCache`, logits of the last
        token only, argmax, brought to the host; `ratio`, `first_text_s / bare_s`. None where the prompt has no room.
    """
    tokens = loaded.options.long_prompt_tokens
    new_tokens = 4  # as in a longer text, the next step is on its way when the first token comes
    if not tokens or tokens + new_tokens > (room := most_tokens(loaded.llm)):
        loaded.report(f"no prompt of {tokens} tokens" + (f": the model has room for {room}" if tokens else ""))
        return None
    runs, bare_s = [], []
    for i in range(_PREFILL_WARM_UPS + max(loaded.options.repeats, _LEAST_PREFILLS)):
        run = loaded.call(1, tokens, new_tokens)
        bare = _time_bare_prefill(loaded, loaded.prompts.draw(1, tokens)[0])
        if i >= _PREFILL_WARM_UPS:
            runs.append(run)
            bare_s.append(bare)
    values = {
        "prompt_tokens": tokens,
        "first_text_s": statistics.median(run.first_text_s for run in runs),
        "first_token_s": statistics.median(run.first_token_s for run in runs),
        "bare_s": statistics.median(bare_s),
    }
    values["ratio"] = values["first_text_s"] / values["bare_s"]
    first_s, alone_s = values["first_text_s"], values["bare_s"]
    loaded.report(f"{tokens} tokens: first text after {first_s:.4f} s, bare prefill {alone_s:.4f} s")
    return values


def _time_bare_prefill(loaded: LoadedModel, prompt: Any) -> float:
    import torch
    from transformers import DynamicCache

    from langchain_quantllm.compat.transformers_models import cache_name, forward_parameters

    model = loaded.llm.pipeline.model
    keep = {"logits_to_keep": 1} if "logits_to_keep" in forward_parameters(model) else {}
    ids = torch.tensor([loaded.llm.pipeline.tokenizer(prompt)["input_ids"]], device=loaded.device)
    cache = {cache_name(model): DynamicCache(config=model.config)}
    synchronize(loaded.device)
    began = time.perf_counter()
    with torch.no_grad():
        output = model(input_ids=ids, use_cache=True, **cache, **keep)
        output.logits[:, -1].argmax(-1).item()  # which waits for the device
    return time.perf_counter() - began


def measure_shared_prefix(loaded: LoadedModel, sharing: QuantizedHuggingFaceLLM) -> dict[str, Any] | None:
    """Measure requests of one new token whose prompts begin with the same text, which was never seen before.

    Args:
        loaded: The model.
        sharing: The same model over the same weights, with `prefix_caching=True`.

    Returns:
        `requests` at once, by `abatch`; `prefix_tokens` that they share; `prompt_tokens` of each; `apart_s` and
        `shared_s`, the wall time without and with prefix caching; `cached_tokens`, tokens of prompts that were taken
        over then, over all requests; `ratio`, `apart_s / shared_s`. None where the prompts have no room.
    """
    options = loaded.options
    tokens = options.shared_tokens + _TAIL_TOKENS
    if not options.shared or tokens + 1 > (room := most_tokens(loaded.llm)):
        why = f": the model has room for {room}" if options.shared else ""
        loaded.report(f"no shared prefix of {options.shared_tokens} tokens{why}")
        return None

    def run_all(llm: QuantizedHuggingFaceLLM) -> list[Run]:
        runs = []
        for _ in range(options.repeats + 1):
            prompts = loaded.prompts.draw_sharing(options.shared, options.shared_tokens, tokens)
            run = abatch(llm, prompts, 1)
            run.check(options.shared, tokens, 1, may_be_cached=llm.prefix_caching)
            runs.append(run)
        return runs[1:]

    apart, shared = run_all(loaded.llm), run_all(sharing)
    apart_s = statistics.median(run.total_s for run in apart)
    shared_s = statistics.median(run.total_s for run in shared)
    loaded.report(
        f"{options.shared} requests that share {options.shared_tokens} tokens: {apart_s:.3f} s apart, "
        f"{shared_s:.3f} s shared"
    )
    return {
        "requests": options.shared,
        "prefix_tokens": options.shared_tokens,
        "prompt_tokens": tokens,
        "apart_s": apart_s,
        "shared_s": shared_s,
        "cached_tokens": round(statistics.median(run.cached_tokens for run in shared)),
        "ratio": apart_s / shared_s,
    }
