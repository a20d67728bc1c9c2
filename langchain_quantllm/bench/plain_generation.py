"""transformers' own `generate`, called by hand: what there is to compare an engine with.

Owns one call and the check that it wrote as many tokens as asked for. Knows no engine of this package.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from langchain_quantllm.bench.calls import synchronize
from langchain_quantllm.errors import GenerationError


def time_generate(pipeline: Any, prompts: Sequence[str], new_tokens: int, *, use_cache: bool = True) -> float:
    """Write texts greedily with `model.generate`, from text to text.

    Args:
        pipeline: A loaded text-generation pipeline, of which model and tokenizer are used.
        prompts: Texts of the same length in tokens, so that none needs padding.
        new_tokens: Length of each text that is written.
        use_cache: Whether keys and values are kept from step to step.

    Returns:
        Seconds from the call to the decoded texts.

    Raises:
        GenerationError: If other lengths come back than were asked for.
    """
    import torch
    from transformers import GenerationConfig

    model, tokenizer = pipeline.model, pipeline.tokenizer
    device = model.get_input_embeddings().weight.device
    config = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        repetition_penalty=1.0,  # whatever the checkpoint says: one kind of step for all
        use_cache=use_cache,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    synchronize(str(device))
    began = time.perf_counter()
    encoded = tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False).to(device)
    with torch.no_grad():
        written = model.generate(**encoded, generation_config=config)
    tokenizer.batch_decode(written, skip_special_tokens=True)
    total_s = time.perf_counter() - began
    found = tuple(written.shape)
    asked = (len(prompts), encoded["input_ids"].shape[1] + new_tokens)
    if found != asked:
        msg = f"generate gave (texts, tokens) {found} instead of {asked}; its time cannot be compared."
        raise GenerationError(msg)
    return total_s
