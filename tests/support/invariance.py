"""The logits that an engine samples from, request by request."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.request import Request
from tests.support.engine import ask


@contextlib.contextmanager
def recorded_logits(llm: QuantizedHuggingFaceLLM) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Record the logits before each sampled token, by the request's id."""
    engine: Any = llm._engine()
    runner, found = engine._runner, {}
    sample = runner.sample

    def record(forward: Any, **options: Any) -> Any:
        for i, sequence in enumerate(forward.sequences):
            found.setdefault(id(sequence.request), []).append(forward.logits[i].clone())
        return sample(forward, **options)

    runner.sample = record
    try:
        yield found
    finally:
        del runner.sample


def logits_of_requests(llm: QuantizedHuggingFaceLLM, requests: Sequence[Request]) -> list[torch.Tensor]:
    """Run requests of one submission; returns the logits of each, of shape `(tokens, vocab)`."""
    with recorded_logits(llm) as found:
        answers = ask(llm, requests)
    assert [len(answer.token_ids) for answer in answers] == [len(found[id(request)]) for request in requests]
    return [torch.stack(found[id(request)]) for request in requests]
