"""Timing a decode step by itself."""

from __future__ import annotations

import contextlib
import time

import torch

from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.sequence import SamplingInput, bare_sequence
from langchain_quantllm.engine.staging import PendingForward
from langchain_quantllm.engine.step import Step


def time_step(runner: ModelRunner, rows: int, position: int, repeats: int) -> float:
    """Time decode steps that are launched back to back, without the host's other work.

    Args:
        runner: The model runner, which runs nothing else meanwhile.
        rows: Sequences of the step, each with blocks of its own, which are overwritten.
        position: Their position.
        repeats: Steps to time.

    Returns:
        Seconds per step, forward and greedy sampling.
    """
    width = position // BLOCK_TOKENS + 1
    blocks = min([pool.kv.shape[0] - 1 for pool in runner._pools.values()], default=width)
    sequences = [bare_sequence([0], 1) for _ in range(rows)]
    for i, sequence in enumerate(sequences):
        sequence.slot, sequence.blocks = i, [1 + (i * width + j) % blocks for j in range(width)]

    def launch() -> PendingForward:
        return runner.run(Step(sequences, [position] * rows, []), [SamplingInput()] * rows)

    is_gpu = runner.device.type == "cuda"
    with torch.no_grad(), torch.cuda.device(runner.device) if is_gpu else contextlib.nullcontext():
        runner.enter(sequences)
        runner.sampler.last_ids[:rows] = torch.arange(rows, device=runner.sampler.last_ids.device)  # texts that differ
        runner.sample(launch()).wait()
        forward = launch()
        tokens = runner.sample(forward)
        tokens.wait()
        began = time.perf_counter()
        if forward.is_graph:
            graphs = (runner._decode_graphs[forward.inputs.shape[1]], runner._sampling_graph(forward, 0))
            for _ in range(repeats):
                for graph in graphs:
                    graph.replay()
            runner.synchronize()
        else:
            for _ in range(repeats):
                tokens = runner.sample(launch())
            tokens.wait()
        return (time.perf_counter() - began) / repeats
