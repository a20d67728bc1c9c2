"""The peer of our engine: langchain-huggingface's `HuggingFacePipeline` over the same loaded weights."""

from __future__ import annotations

import copy
import time
from typing import Any

from langchain_quantllm.bench.calls import synchronize
from langchain_quantllm.bench.generation import LoadedModel
from langchain_quantllm.errors import GenerationError

PEER_BATCH = 4
"""Source: `DEFAULT_BATCH_SIZE` of langchain_huggingface/llms/huggingface_pipeline.py, which `from_model_id` also gives
to the pipeline inside."""

_WARM_UP_TOKENS = 8


def peer_cases(batches: tuple[int, ...]) -> list[tuple[int, int]]:
    """Requests at once and batch size of each case: the peer's own batch size, and all requests at once."""
    return [(batch, size) for batch in batches for size in dict.fromkeys((min(batch, PEER_BATCH), batch))]


def make_peer_pipeline(loaded: LoadedModel) -> Any:
    """Copy a model's pipeline for the peer, and check that its options make it write as many tokens as asked for.

    Batches need a padding token, which the peer's `from_model_id` sets in the same way. Its texts do not tell their
    length in tokens, so that the check is made once.

    Raises:
        GenerationError: If the pipeline writes another length.
    """
    pipeline = copy.copy(loaded.llm.pipeline)
    if pipeline.tokenizer.pad_token_id is None:
        pipeline.tokenizer = copy.deepcopy(pipeline.tokenizer)
        pipeline.tokenizer.pad_token = pipeline.tokenizer.eos_token
    prompt_tokens = loaded.options.prompt_tokens
    prompt = loaded.prompts.draw(1, prompt_tokens)[0]
    given = pipeline(prompt, return_tensors=True, **_options(_WARM_UP_TOKENS))
    found = len(given[0]["generated_token_ids"]) - prompt_tokens
    if found != _WARM_UP_TOKENS:
        msg = f"HuggingFacePipeline's pipeline wrote {found} tokens instead of {_WARM_UP_TOKENS}."
        raise GenerationError(msg)
    return pipeline


def measure_peer(
    loaded: LoadedModel, pipeline: Any, batch: int, batch_size: int, our_rate_tok_s: float | None
) -> dict[str, Any]:
    """Measure the peer once, after a warm-up.

    Args:
        loaded: The model.
        pipeline: Its pipeline, as `make_peer_pipeline` gives it.
        batch: Requests at once.
        batch_size: The peer's setting: how many of them it runs beside each other.
        our_rate_tok_s: Our rate with as many requests; None where it could not be measured.

    Returns:
        `call`, `"invoke"` or `"batch"`; `new_tokens` of each request; `total_s` from the call to its end;
        `rate_tok_s`, all new tokens / `total_s`; `our_ratio`, our rate over this one.
    """
    options = loaded.options
    is_few = batch_size < batch
    new_tokens = min(options.new_tokens, options.peer_new_tokens) if is_few else options.new_tokens
    _time_peer(loaded, pipeline, min(batch, 2 * batch_size), batch_size, _WARM_UP_TOKENS)
    total_s = _time_peer(loaded, pipeline, batch, batch_size, new_tokens)
    rate_tok_s = batch * new_tokens / total_s
    loaded.report(f"HuggingFacePipeline, {batch} by {batch_size}: {rate_tok_s:.1f} tokens/s")
    return {
        "call": "invoke" if batch == 1 else "batch",
        "new_tokens": new_tokens,
        "total_s": total_s,
        "rate_tok_s": rate_tok_s,
        "our_ratio": None if our_rate_tok_s is None else our_rate_tok_s / rate_tok_s,
    }


def _time_peer(loaded: LoadedModel, pipeline: Any, batch: int, batch_size: int, new_tokens: int) -> float:
    """Seconds of one call."""
    from langchain_huggingface import HuggingFacePipeline

    peer = HuggingFacePipeline(pipeline=pipeline, batch_size=batch_size)
    # It takes options of the pipeline at the call alone; from_model_id gives its pipeline the batch size, too.
    kwargs = {**_options(new_tokens), "return_full_text": False, "batch_size": batch_size}
    prompts = loaded.prompts.draw(batch, loaded.options.prompt_tokens)
    synchronize(loaded.device)
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


def _options(new_tokens: int) -> dict[str, Any]:
    return {
        "max_new_tokens": new_tokens,
        "min_new_tokens": new_tokens,
        "do_sample": False,
        "repetition_penalty": 1.0,
    }
