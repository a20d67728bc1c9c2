"""The fast engine against the plain model: random rows over many tiny models of all families, token by token.

    python -m benchmarks.stress --models 96 --rows 8000

Each model has a random shape (grouped heads, windows, soft caps, vocabularies). Its rows run together in rounds, each
with other budgets of a step, slots and KV blocks, so that prompts are cut into chunks, share beginnings and are
preempted, neighbours are cancelled, and further turns find the blocks of answers. Each row's greedy tokens are compared
with one forward of a copy of the model over prompt and answer; see `oracle`. Prints a table, and exits with 1 if any
token is wrong or a model is refused. With `--device cuda` the same runs with CUDA graphs and kernels.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers

from benchmarks.oracle import TOLERANCE, Oracle, Verdict
from benchmarks.soak_model import byte_tokenizer
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.options import GenerationOptions
from tests.support.families import CONTEXT, FAST, Family, family_model
from tests.support.models import wait_for_rest
from tests.support.state_families import STATE_RECIPES

ROWS_OF_A_ROUND = 28


@dataclass
class Count:
    """The rows of a family and what happened to them."""

    models: int = 0
    rows: int = 0
    cancelled: int = 0
    shared: int = 0
    preempted: int = 0
    verdict: Verdict = field(default_factory=Verdict)

    def add(self, other: Count) -> None:
        """Add another count to this one."""
        for name in ("models", "rows", "cancelled", "shared", "preempted"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.verdict.add(other.verdict)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A request: cancelled after so many chunks, unless that is None."""

    prompt_ids: Sequence[int]
    new_tokens: int
    priority: int = 0
    shares: bool = True
    cancelled_after: int | None = None


def random_shape(family: Family, rng: random.Random) -> Family:
    """Give a family another size, as far as its config has such options that do not follow from each other."""
    given = dict(family.options)
    if is_of_one_size(family):
        return replace(
            family, options={**given, "vocab_size": rng.choice([97, 320, 500, 1031])}, seed=rng.randrange(1000)
        )
    shapes: dict[str, Any] = {"vocab_size": rng.choice([97, 320, 500, 1031])}
    is_free = not {"head_dim", "word_embed_proj_dim", "n_ctx"} & given.keys()
    hidden, heads = rng.choice([(64, 4), (64, 2), (128, 4), (96, 6), (192, 4)])
    if is_free and "n_embd" in given:
        shapes |= {"n_embd": hidden, "n_head": heads}
    elif is_free and given.get("num_attention_heads") == 4 and given["hidden_size"] == 64:
        shapes |= {"hidden_size": hidden, "num_attention_heads": heads}
    heads = shapes.get("num_attention_heads", given.get("num_attention_heads", heads))
    for name in ("num_key_value_heads", "num_kv_heads"):
        if name in given and (given[name] or 0) > 1:
            shapes[name] = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    if not {"layer_types", "max_window_layers", "no_rope_layer_interval"} & given.keys():
        shapes |= {name: rng.choice([1, 2, 3]) for name in ("num_hidden_layers", "n_layer") if name in given}
    if given.get("sliding_window"):
        shapes["sliding_window"] = rng.choice([5, 16, 24, 33, 64])
    if "attn_logit_softcapping" in given:
        shapes |= {"attn_logit_softcapping": rng.choice([2.0, 5.0, 20.0])}
    return replace(family, options={**given, **shapes}, seed=rng.randrange(1000))


def is_of_one_size(family: Family) -> bool:
    """Whether the sizes of a family follow from each other, as with states and latents."""
    with_states = family.config.removesuffix("Config") in {name for name, _ in STATE_RECIPES.values()}
    return with_states or "kv_lora_rank" in family.options


def _has_length_factors(family: Family) -> bool:
    return "short_factor" in (family.options.get("rope_parameters") or ())


def random_rows(rng: random.Random, count: int, vocab_size: int, most_tokens: int) -> list[Row]:
    """Make the rows of a round, each of at most `most_tokens`: short and long, some with beginnings in common."""

    def ids(number: int) -> list[int]:
        return [rng.randrange(vocab_size) for _ in range(number)]

    beginnings = [ids(rng.randrange(16, 80)) for _ in range(3)]
    rows = []
    for _ in range(count):
        new_tokens = min(rng.choice([1, 2, 17, 40, 80, rng.randrange(1, 100)]), most_tokens // 2)
        prompt_ids = ids(rng.choice([1, 15, 16, 17, rng.randrange(1, 100), rng.randrange(1, 300)]))
        if rng.random() < 0.4:
            prompt_ids = rng.choice(beginnings)[: rng.randrange(8, 80)] + prompt_ids[:40]
        prompt_ids = prompt_ids[: most_tokens - new_tokens]
        beyond = (len(prompt_ids) + new_tokens) % BLOCK_TOKENS
        if rng.random() < 0.4 and beyond < len(prompt_ids):  # the answer ends with its block
            prompt_ids = prompt_ids[: len(prompt_ids) - beyond]
        rows.append(
            Row(
                prompt_ids=prompt_ids,
                new_tokens=new_tokens,
                priority=rng.choice([0, 0, 0, 0, -1, 1]),
                shares=rng.random() < 0.8,
                cancelled_after=rng.randrange(6) if rng.random() < 0.1 else None,
            )
        )
    return rows


def next_turn(row: Row, token_ids: Sequence[int], most_tokens: int, rng: random.Random) -> Row:
    """Make the row that goes on after another one's prompt and answer, which it finds in blocks."""
    new_tokens = min(rng.randrange(1, 40), most_tokens // 2)
    prompt_ids = [*row.prompt_ids, *token_ids, row.prompt_ids[0]]
    return Row(prompt_ids=prompt_ids[: most_tokens - new_tokens], new_tokens=new_tokens)


def set_sizes(engine: Any, rng: random.Random) -> int:
    """Give an idle engine other budgets, slots and blocks; returns the most tokens of a row."""
    alone = rng.choice([16, 40, 128, 512])
    engine._step_tokens = (alone, min(alone, rng.choice([8, 16, 48, 128])))
    engine._parts.slots = rng.choice([2, 4, 8, 16, 32, 32])
    blocks = rng.choice([8, 10, 14, 20, 40, 200])
    engine.limits = replace(engine.limits, cache_tokens=blocks * BLOCK_TOKENS)
    engine._reset_cache()
    return min(CONTEXT, blocks * BLOCK_TOKENS) - 1


def run_round(llm: QuantizedHuggingFaceLLM, oracle: Oracle, rng: random.Random, count: int) -> Count:
    """Run the rows of a round together, and check them."""
    engine: Any = llm._engine()
    wait_for_rest()
    most = set_sizes(engine, rng)
    vocab_size = min(engine.limits.vocab_size, engine._parts.probe.vocab_size)
    rows = random_rows(rng, count - count // 4, vocab_size, most)
    first = rng.randrange(1, len(rows) + 1)
    streams = [iter(_submit(engine, row)) for row in rows[:first]]
    started = [next(streams[0], None)]  # the rest comes while these run
    streams += [iter(_submit(engine, row)) for row in rows[first:]]
    found = Count(rows=count)
    for i, row in enumerate(rows):  # which grow
        token_ids: list[int] = []
        for number, chunk in enumerate(_with_first(started if i == 0 else [], streams[i])):
            if row.cancelled_after is not None and number >= row.cancelled_after:
                break
            token_ids += chunk.token_ids
            if chunk.usage is not None:
                found.shared += chunk.usage.cached_tokens > 0
        streams[i].close()
        found.cancelled += row.cancelled_after is not None and len(token_ids) < row.new_tokens
        verdict = oracle.check_greedy(row.prompt_ids, token_ids)
        if row.cancelled_after is None and len(token_ids) != row.new_tokens:
            verdict.faults.append(f"{len(token_ids)} tokens in place of {row.new_tokens}")
        found.verdict.add(verdict)
        if len(rows) < count and (i == len(rows) - 1 or rng.random() < 0.4):
            rows.append(next_turn(row, token_ids, most, rng))
            streams.append(iter(_submit(engine, rows[-1])))
    found.preempted = engine._scheduler.preempted
    return found


def _submit(engine: Any, row: Row) -> Iterator[Any]:
    options = GenerationOptions(max_new_tokens=row.new_tokens, eos_token_id=(), priority=row.priority)
    stream = engine.submit(plan_requests(row.prompt_ids, options, engine.limits, shares_prefix=row.shares))

    def read() -> Iterator[Any]:
        with stream:
            yield from stream

    return read()


def _with_first(started: Sequence[Any], rest: Iterator[Any]) -> Iterator[Any]:
    yield from (chunk for chunk in started if chunk is not None)
    yield from rest


def run_model(name: str, number: int, rows: int, *, device: str, seed: int) -> Count:
    """Run all rows of one model.

    Args:
        name: Its family.
        number: Its number, which its shape and rows follow from.
        rows: How many.
        device: Its device.
        seed: Seed of everything.
    """
    rng = random.Random(f"{seed}:{number}")
    model = family_model(random_shape(FAST[name], rng)).to(device)
    oracle = Oracle(copy.deepcopy(model))
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=byte_tokenizer(), device=model.device)
    llm = QuantizedHuggingFaceLLM(pipeline=pipeline, engine="fast")
    found = Count(models=1)
    try:
        if device != "cpu" and not llm.engine_info.graphs:
            print(f"{name}, model {number}: {llm.engine_info.reason}", file=sys.stderr)
        while rows > 0:
            found.add(run_round(llm, oracle, rng, min(rows, ROWS_OF_A_ROUND)))
            rows -= ROWS_OF_A_ROUND
    finally:
        llm.unload()
    found.verdict.faults = [f"{name}, model {number}: {fault}" for fault in found.verdict.faults]
    return found


def stress(models: int, rows: int, *, device: str = "cpu", seed: int = 0) -> dict[str, Count]:
    """Run the stress.

    Args:
        models: How many models; families take turns.
        rows: How many rows, all models together.
        device: `"cpu"` or `"cuda"`.
        seed: Seed of every random choice.

    Returns:
        The counts of each family.
    """
    # The oracle rotates a whole text by its last length, where `generate` goes by that of each step.
    order = [name for name, family in FAST.items() if not _has_length_factors(family)]
    random.Random(seed).shuffle(order)
    counts: dict[str, Count] = {}
    for number in range(models):
        name = order[number % len(order)]
        share = rows * (number + 1) // models - rows * number // models
        try:
            found = run_model(name, number, share, device=device, seed=seed)
        except Exception as error:
            found = Count(models=1)
            found.verdict.faults.append(f"{name}, model {number}: {type(error).__name__}: {error}")
        counts.setdefault(name, Count()).add(found)
    return counts


def table(counts: Mapping[str, Count]) -> str:
    """Format the counts as a table of Markdown."""
    total = Count()
    for count in counts.values():
        total.add(count)
    lines = ["| family | models | rows | tokens | ties | wrong | cancelled | with shared blocks | preemptions |"]
    lines.append("|---" * 9 + "|")
    for name, c in [*sorted(counts.items()), ("all", total)]:
        v = c.verdict
        cells = (name, c.models, c.rows, v.tokens, v.ties, len(v.faults), c.cancelled, c.shared, c.preempted)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=96)
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.monotonic()
    counts = stress(given.models, given.rows, device=given.device, seed=given.seed)
    print(table(counts))
    where = torch.cuda.get_device_name() if given.device == "cuda" else "CPU"
    print(f"{time.monotonic() - began:.0f} s on {where}, torch {torch.__version__}; ties: up to {TOLERANCE:g} apart")
    faults = [fault for count in counts.values() for fault in count.verdict.faults]
    kinds = Counter(fault.split(":")[0] for fault in faults)
    sys.exit("\n".join([f"{len(faults)} wrong in {len(kinds)} models:", *faults[:20]]) if faults else 0)


if __name__ == "__main__":
    main()
