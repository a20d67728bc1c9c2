"""The calls of an overview: prompts in, texts out, through our engine and through transformers' own `generate`.

Owns prompts, calls and what is reported of them. Knows no scheme and no other part of an overview.
"""

from __future__ import annotations

from collections.abc import Callable

from langchain_quantllm.bench.calls import Run, abatch, stream
from langchain_quantllm.bench.overview_results import CallSpeed, OverviewOptions
from langchain_quantllm.bench.plain_generation import time_generate
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.timing import repeat
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM

ENGINE, GENERATE = "engine", "generate"
"""The two runners: ours, through LangChain, and transformers'."""


class Calls:
    """Measures calls on one loaded model."""

    def __init__(
        self,
        llm: QuantizedHuggingFaceLLM,
        *,
        device: str,
        options: OverviewOptions,
        before_bytes: int,
        report: Callable[[str], None],
    ) -> None:
        """Take a loaded model.

        Args:
            llm: The model, with `ignore_eos=True` and `prefix_caching=False`.
            device: Where its weights are.
            options: What is measured.
            before_bytes: Memory in use before it was loaded.
            report: Called with a line for each finished measurement.
        """
        self._llm = llm
        self._device = device
        self._options = options
        self._before_bytes = before_bytes
        self._report = report
        self._prompts = Prompts(llm.pipeline.tokenizer)

    def prefill(self, runner: str, batch: int) -> CallSpeed:
        """Measure long prompts with one new token each."""
        return self._measure(runner, batch, self._options.prefill_tokens, 1)

    def by_batch(self, runner: str, batch: int) -> CallSpeed:
        """Measure texts side by side."""
        options = self._options
        new_tokens = options.new_tokens if runner == ENGINE else options.peer_new_tokens
        return self._measure(runner, batch, options.prompt_tokens, new_tokens)

    def by_length(self, runner: str, new_tokens: int) -> CallSpeed:
        """Measure one text of a length."""
        return self._measure(runner, 1, self._options.prompt_tokens, new_tokens)

    def by_cache(self, use_cache: bool) -> CallSpeed:
        """Measure `generate` with or without KV cache."""
        options = self._options
        return self._measure(GENERATE, 1, options.prompt_tokens, options.cache_new_tokens, use_cache=use_cache)

    def _measure(
        self, runner: str, batch: int, prompt_tokens: int, new_tokens: int, *, use_cache: bool = True
    ) -> CallSpeed:
        """Measure one call.

        Raises:
            InvalidOptionError: If it does not fit into the model's context.
            GenerationError: If other lengths come back than were asked for.
        """
        self._check_context(prompt_tokens + new_tokens)
        options = self._options
        repeats, warm_ups = options.peer_repeats, 1
        if runner == ENGINE:
            repeats, warm_ups = options.repeats, 2 if self._llm.engine_info.graphs else 1

        def run(tokens: int) -> Run:
            prompts = self._prompts.draw(batch, prompt_tokens)
            if runner == GENERATE:
                total_s = time_generate(self._llm.pipeline, prompts, tokens, use_cache=use_cache)
                return Run([], total_s, total_s)
            made = stream(self._llm, prompts[0], tokens) if batch == 1 else abatch(self._llm, prompts, tokens)
            made.check(batch, prompt_tokens, tokens)
            return made

        done = repeat(run, new_tokens, device=self._device, repeats=repeats, limit_s=options.limit_s, warm_ups=warm_ups)
        middle = sorted(done.runs, key=lambda r: r.total_s)[len(done.runs) // 2]
        found = CallSpeed(
            runner=runner,
            call=GENERATE if runner == GENERATE else "stream" if batch == 1 else "abatch",
            batch=batch,
            prompt_tokens=prompt_tokens,
            new_tokens=done.new_tokens,
            asked_tokens=new_tokens,
            use_cache=use_cache,
            total_s=done.total_s,
            runs_s=done.runs_s,
            rate_tok_s=batch * done.new_tokens / done.total_s,
            prompt_rate_tok_s=batch * prompt_tokens / done.total_s,
            first_token_s=middle.first_token_s if middle.infos else None,
            peak_bytes=done.peak_bytes - self._before_bytes,
        )
        self._report(_line(found))
        return found

    def _check_context(self, tokens: int) -> None:
        config = self._llm.pipeline.model.config.get_text_config()
        context_tokens = getattr(config, "max_position_embeddings", None)
        if context_tokens is not None and tokens > context_tokens:
            msg = f"{tokens} tokens do not fit into the model's context of {context_tokens}."
            raise InvalidOptionError(msg)


def _line(found: CallSpeed) -> str:
    cache = "" if found.use_cache else " without KV cache"
    size = f"{found.batch} x ({found.prompt_tokens} + {found.new_tokens}) tokens"
    rate = f"{found.rate_tok_s:.1f} new and {found.prompt_rate_tok_s:.1f} prompt tokens/s"
    return f"{found.call}{cache}, {size}: {found.total_s:.3f} s, {rate}"
