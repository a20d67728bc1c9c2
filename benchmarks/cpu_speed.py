"""New tokens per second on a CPU, beside llama.cpp where llama-cpp-python is installed.

    python -m benchmarks.cpu_speed FOLDER --schemes nf4 int8 none --gguf FILE.gguf

Each engine is a process of its own with `--threads` threads, and they take turns: a round is one short greedy run of
each. Prints, by the number of requests at once, the ratio of the best rates and of the least processor time per token
to the first engine's. On a machine that others use, take `--threads 1` and the processor time: several threads wait
for each other, and for whatever else has their cores. Of `--schemes`, `as-written` is a checkpoint that is quantized
already, `as-written=OTHER` one in another folder, and `nf4+head` has the output head in int8 as well.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

PROMPT = "Number {}. The history of the city begins with"
_Run = Callable[[int, int], None]


def own(folder: str, scheme: str, threads: int) -> _Run:
    """Load a model of this package; returns a function that writes so many tokens for so many requests."""
    import torch

    from langchain_quantllm import QuantizedHuggingFaceLLM

    torch.set_num_threads(threads)
    name, _, head = scheme.partition("+")
    name, _, other = name.partition("=")
    fields: dict[str, Any] = {} if name in ("none", "as-written") else {"quantization": name}
    if head:
        fields["lm_head_dtype"] = "int8"
    llm = QuantizedHuggingFaceLLM(
        model_id=other or folder, device="cpu", engine="fast", ignore_eos=True, temperature=0, progress=False, **fields
    )
    fused = llm.engine_info.fused
    print(
        f"{scheme}: {fused.get('layer', 0)} whole layers, {fused.get('linear', 0)} quantized linear layers", flush=True
    )

    def run(requests: int, tokens: int) -> None:
        llm.batch([PROMPT.format(i) for i in range(requests)], max_new_tokens=tokens)

    return run


def llama_cpp(path: str, threads: int, most_requests: int) -> _Run:
    """Load a GGUF file in llama.cpp; returns such a function, which decodes all requests in one batch."""
    import numpy as np

    lib: Any = importlib.import_module("llama_cpp")

    llama = lib.Llama(path, vocab_only=True, verbose=False)  # its tokenizer
    model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
    given = lib.llama_context_default_params()
    given.n_ctx, given.n_batch, given.n_seq_max = 512 * most_requests, 512, most_requests
    given.n_threads = given.n_threads_batch = threads
    context, vocab_size = lib.llama_init_from_model(model, given), llama.n_vocab()
    batch = lib.llama_batch_init(512, 0, most_requests)

    def decode(rows: Sequence[tuple[int, int, int, bool]]) -> list[int]:
        """Run rows of token, position, sequence, and whether it samples; returns the sampled tokens."""
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, samples) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, samples
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
        if lib.llama_decode(context, batch):
            msg = "llama.cpp could not decode a batch."
            raise RuntimeError(msg)
        found = [lib.llama_get_logits_ith(context, i) for i, row in enumerate(rows) if row[3]]
        return [int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax()) for logits in found]

    def run(requests: int, tokens: int) -> None:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        prompts = [llama.tokenize(PROMPT.format(i).encode()) for i in range(requests)]
        rows = [(t, at, i, at == len(ids) - 1) for i, ids in enumerate(prompts) for at, t in enumerate(ids)]
        last = decode(rows)
        for step in range(tokens - 1):
            last = decode([(token, len(prompts[i]) + step, i, True) for i, token in enumerate(last)])

    return run


def serve(pipe: Connection, make: Callable[..., _Run], arguments: tuple[Any, ...]) -> None:
    """Run what is asked for through a pipe, and answer with seconds and processor seconds."""
    run = make(*arguments)
    run(1, 4)
    pipe.send(None)
    while (asked := pipe.recv()) is not None:
        wall, processor = time.perf_counter(), time.process_time()
        run(*asked)
        pipe.send((time.perf_counter() - wall, time.process_time() - processor))


def main() -> None:
    """Measure, and print a table for each number of requests."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--schemes", nargs="+", default=["nf4"])
    parser.add_argument("--gguf", help="the same model in llama.cpp's format")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(asked.threads)
    made: dict[str, tuple[Callable[..., _Run], tuple[Any, ...]]] = {}
    if asked.gguf is not None:
        made["llama.cpp"] = (llama_cpp, (asked.gguf, asked.threads, max(asked.requests)))
    made |= {scheme: (own, (asked.folder, scheme, asked.threads)) for scheme in asked.schemes}
    spawn = multiprocessing.get_context("spawn")
    pipes: dict[str, Any] = {}
    for name, (make, arguments) in made.items():
        pipes[name], theirs = spawn.Pipe()
        spawn.Process(target=serve, args=(theirs, make, arguments), daemon=True).start()
        pipes[name].recv()
    for requests in asked.requests:
        best = dict.fromkeys(pipes, (float("inf"), float("inf")))
        for _ in range(asked.rounds):
            for name, pipe in pipes.items():
                pipe.send((requests, asked.tokens))
                best[name] = tuple(map(min, best[name], pipe.recv()))
        wall, processor = best[next(iter(best))]
        print(f"\n{requests} requests, {asked.threads} threads: tokens/s | ratio | processor ms a token (ratio)")
        for name, (seconds, used) in best.items():
            count = requests * asked.tokens
            ratios = f"{wall / seconds:.2f} | {1e3 * used / count:.2f} ({processor / used:.2f})"
            print(f"{name} | {count / seconds:.1f} | {ratios} |", flush=True)
    for pipe in pipes.values():
        pipe.send(None)


if __name__ == "__main__":
    main()
