"""The trial of a model: two texts through the engine's own way, before anything is written for anybody.

Owns which steps are tried. What the model should have given, and how far apart the two may lie, is
`support`'s to say.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from langchain_quantllm.engine.adapter_switch import AdapterSwitch
from langchain_quantllm.engine.attention import without_gradients
from langchain_quantllm.engine.block_manager import BlockManager
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.model_check import LONG, SHORT, Probe, compare, sample_ids
from langchain_quantllm.engine.model_runner import Chance, Runner
from langchain_quantllm.engine.request import Request
from langchain_quantllm.engine.scheduler import Prefill, RowState, Scheduler
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.options import BASE_ADAPTER, GenerationOptions

_PAGES, _NEW_TOKENS = 6, 3


@without_gradients
def try_out(
    runner: Runner, model: Any, probe: Probe, switch: AdapterSwitch | None = None, fusion: Fusion | None = None
) -> None:
    """Run two texts through the runner, in pieces and side by side, and compare with the model itself.

    Args:
        runner: Drives the model.
        model: The model.
        probe: What its first forward told.
        switch: Its adapters, of which each text takes another one; None where the model runs as it is.
        fusion: Its fused steps, some of which were found to be more exact than the model's own; None likewise.

    Raises:
        UnsupportedError: If the model cannot be driven this way, or gives something else.
    """
    scheduler = Scheduler(BlockManager(_PAGES), slots=2, prefill_tokens=LONG - 6, prefill_tokens_beside=LONG - 6)
    texts = [sample_ids(model, count) for count in (LONG, SHORT)]
    names = [None, None] if switch is None else [*switch.names, BASE_ADAPTER][:2]
    numbers = [-1 if switch is None or name not in switch.names else switch.names.index(name) for name in names]
    rows = [RowState(ids, _NEW_TOKENS, adapter=i) for ids, i in zip(texts, numbers, strict=True)]
    logits: dict[RowState, list[torch.Tensor]] = {row: [] for row in rows}
    for row in rows:
        scheduler.add(row)
    try:
        while (plan := scheduler.plan()) is not None:
            if isinstance(plan, Prefill):
                drawing = [piece.row for piece in plan.pieces if piece.is_last]
                launched = runner.prefill(plan.pieces, [Chance()] * len(drawing))
                if drawing:
                    requests = [_greedy(row) for row in drawing]
                    runner.sampler.set([row.slot for row in drawing], requests, [row.ids for row in drawing])
            else:
                drawing = plan.rows
                launched = runner.decode(plan.rows, plan.positions, [Chance()] * len(drawing))
            if not drawing:
                continue
            ids, _ = runner.draw(launched, 0).wait()
            for i, row in enumerate(drawing):
                logits[row].append(launched.logits[i].clone())
                scheduler.push(row, max(0, ids[i]))
    except (UnsupportedError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        msg = f"its own code fails over pages: {error!r}"
        raise UnsupportedError(msg) from error
    windows = [runner.windows.get(i) for i in range(len(probe.shapes))]
    if None in windows:
        msg = "its attention is none that can be replaced"
        raise UnsupportedError(msg)
    if windows != probe.windows:
        msg = f"its attention sees windows of {windows} tokens, and its cache keeps {probe.windows}"
        raise UnsupportedError(msg)
    for row, name in zip(rows, names, strict=True):
        with contextlib.ExitStack() as chosen:
            if switch is not None:
                chosen.enter_context(switch.chosen(name))
            if fusion is not None:
                chosen.enter_context(fusion.exact())
            compare(model, [row.ids[:-1]], [torch.stack(logits[row])])


def _greedy(row: RowState) -> Request:
    return Request(
        prompt_ids=tuple(row.ids),
        max_new_tokens=row.max_new_tokens,
        min_new_tokens=0,
        options=GenerationOptions(),
        sample_index=0,
        seed=0,
        eos_token_ids=(),
    )
