"""Checks that a model's logits do not depend on the batch, before any of its text is returned.

The same texts run alone and beside others, in one step and in many, by decode steps and as prompts; all logits must be
equal to the last bit.
"""

from __future__ import annotations

from collections import abc
from collections.abc import Collection
from typing import Any

import torch

from langchain_quantllm.compat.gptqmodel import hides_product
from langchain_quantllm.compat.torch_dispatch import is_compiled
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS, BlockManager
from langchain_quantllm.engine.model_check import run_greedily
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.own_logits import sample_ids
from langchain_quantllm.engine.scheduler import Scheduler
from langchain_quantllm.engine.sequence import bare_sequence
from langchain_quantllm.errors import UnsupportedError

_LENGTHS = (21, 5, 12)
"""Tokens of the texts."""

Run = tuple[list[int], torch.Tensor]
"""The tokens of a text at its end, and the logits that the new ones were sampled from."""

_NEW_TOKENS = 3
_AT_ONCE, _FEW = 1 << 10, 7
"""Most tokens of a step."""


def check_operations(model: Any, replaced: Collection[int]) -> None:
    """Check that `InvariantOps` sees all operations of a model.

    Args:
        model: The model.
        replaced: Ids of the modules whose own forward is never called.

    Raises:
        UnsupportedError: If a module hides its operations.
    """
    for name, module in model.named_modules():
        if is_compiled(module):
            msg = f"{name or 'the model'} is compiled, which hides its operations"
            raise UnsupportedError(msg)
        if id(module) not in replaced and hides_product(module):
            msg = f"{name} is a {type(module).__name__}, whose product may depend on the rest of the batch"
            raise UnsupportedError(msg)


def verify_invariance(runner: ModelRunner, model: Any, *, blocks: int, slots: int, adapter: int = -1) -> None:
    """Run texts through the runner in several ways, and compare their logits bit for bit.

    Args:
        runner: Runs the model.
        model: The model.
        blocks: Blocks of the KV cache, block 0 included; their content is overwritten.
        slots: Maximum number of sequences at once.
        adapter: Number of the LoRA adapter that the texts run with; -1 for none.

    Raises:
        UnsupportedError: If two ways give different logits.
    """

    def run(texts: abc.Sequence[abc.Sequence[int]], budget: int, new_tokens: int = _NEW_TOKENS) -> list[Run]:
        sequences = [bare_sequence(text, new_tokens, adapter=adapter) for text in texts]
        scheduler = Scheduler(BlockManager(blocks), slots=slots, step_tokens=budget, step_tokens_while_decoding=budget)
        logits = run_greedily(runner, sequences, scheduler)
        return [(sequence.ids, torch.stack(logits[sequence])) for sequence in sequences]

    room = (blocks - 1) * BLOCK_TOKENS - _NEW_TOKENS
    texts = [sample_ids(model, count)[:room] for count in _LENGTHS]
    alone = [run([text], _AT_ONCE)[0] for text in texts]
    for copies, budget in ((1, _FEW), (3, _AT_ONCE)):
        for i, (_, logits) in enumerate(run(texts * copies, budget)):
            _check(logits, alone[i % len(texts)][1], f"beside {len(texts) * copies - 1} others")
    ids, logits = alone[0]
    again = run([ids[:end] for end in range(len(ids) - _NEW_TOKENS, len(ids))], _AT_ONCE, 1)
    _check(torch.cat([one for _, one in again]), logits, "with the text so far as its prompt")


def _check(found: torch.Tensor, expected: torch.Tensor, how: str) -> None:
    if not torch.equal(found, expected) and bool(expected.isfinite().all()):
        largest = float((found.float() - expected.float()).abs().max())
        msg = f"its logits {how} differ from those alone, by up to {largest:.2g}"
        raise UnsupportedError(msg)
