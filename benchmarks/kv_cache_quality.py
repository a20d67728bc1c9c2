"""Quality of a KV cache in 8 bits: perplexity, agreement of the likeliest tokens, and facts found in a long text.

    python -m benchmarks.kv_cache_quality FOLDER --tokens 2000

The text is read in chunks over blocks of each dtype, as the fast engine reads prompts: every token sees rounded keys
and values, its own too. Windows are as long as the model's context allows, up to `--window`. The divergence is that of
the distributions from those with the cache in the model's dtype, in nats. Then the engine is asked for facts that stand
in a text of `--long` tokens, at several depths. On a CPU, attention by PyTorch reads the same numbers as the kernels.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.quality import evaluation_text
from langchain_quantllm.compat.transformers_models import cache_name
from langchain_quantllm.engine.attention import Batch, PagedForward, Span
from langchain_quantllm.engine.attention_interface import configs_of, paged_attention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.kv_cache import allocate_pools, chosen_factors, stored_shapes
from langchain_quantllm.engine.model_probe import ModelProbe, inspect_model
from langchain_quantllm.memory import CACHE_DTYPES

CHUNK = 256
FACTS = {"harbour": "4817", "lighthouse": "9253", "museum": "6038", "station": "7146"}


class Reader:
    """Reads a text chunk by chunk over new pools of a dtype."""

    def __init__(self, model: Any, probe: ModelProbe, tokens: int, dtype: str) -> None:
        self._model, self._position = model, 0
        self._device = model.get_input_embeddings().weight.device
        blocks = -(-tokens // BLOCK_TOKENS) + 1
        shapes = stored_shapes(probe.shapes, dtype)
        pools = allocate_pools(shapes, blocks, chosen_factors(probe.key_factors, dtype))
        self._pools = dict(zip(probe.layers, pools, strict=True))
        self._table = torch.arange(1, blocks, dtype=torch.int32, device=self._device)[None]

    def read(self, ids: list[int]) -> torch.Tensor:
        """Read the next tokens; returns the logarithms of the probabilities after each, float32."""
        start, self._position = self._position, self._position + len(ids)
        positions = torch.arange(start, self._position, dtype=torch.int32, device=self._device)
        span = Span(slot=0, first=0, position=start, count=len(ids))
        batch = Batch(
            table=self._table, slots=torch.zeros_like(positions), positions=positions, spans=[span], decodes=False
        )
        attention = PagedForward(GatherAttention(), self._pools, batch, by_sdpa=False)
        context = ForwardContext(attention=attention)
        with torch.no_grad(), paged_attention(context, configs_of(self._model)) as cache:
            given = {"input_ids": torch.tensor([ids], device=self._device), "position_ids": positions[None].long()}
            output = self._model(**given, use_cache=True, **{cache_name(self._model): cache})
        return output.logits[0].float().log_softmax(-1)


def measure_text(llm: QuantizedHuggingFaceLLM, tokens: int, window: int) -> dict[str, dict[str, float]]:
    """Compare the dtypes on the evaluation text."""
    model = llm.pipeline.model
    probe = inspect_model(model)
    ids = llm.pipeline.tokenizer(evaluation_text(), add_special_tokens=False, verbose=False)["input_ids"][:tokens]
    window = min(window, model.config.get_text_config().max_position_embeddings)
    sums = {dtype: {"loss": 0.0, "divergence": 0.0, "agree": 0.0} for dtype in CACHE_DTYPES}
    count = 0
    for start in range(0, len(ids) - 1, window):
        part = ids[start : start + window]
        readers = {dtype: Reader(model, probe, len(part), dtype) for dtype in CACHE_DTYPES}
        for at in range(0, len(part), CHUNK):
            chunk, after = part[at : at + CHUNK], part[at + 1 : at + CHUNK + 1]
            count += len(after)
            targets = torch.tensor(after, device=model.get_input_embeddings().weight.device)[:, None]
            own = None
            for dtype, reader in readers.items():
                found = reader.read(chunk)[: len(after)]
                own = found if own is None else own
                total = sums[dtype]
                total["loss"] -= float(found.gather(1, targets).double().sum())
                total["divergence"] += float((own.exp() * (own - found)).double().sum())
                total["agree"] += float((own.argmax(-1) == found.argmax(-1)).sum())
    return {
        dtype: {
            "perplexity": round(math.exp(total["loss"] / count), 4),
            "divergence": round(total["divergence"] / count, 5),
            "agreement": round(total["agree"] / count, 4),
            "tokens": count,
        }
        for dtype, total in sums.items()
    }


def long_text(tokenizer: Any, tokens: int) -> str:
    """Write the evaluation text, with a fact in each part of it."""
    ids = tokenizer(evaluation_text(), add_special_tokens=False, verbose=False)["input_ids"]
    ids = (ids * (tokens // len(ids) + 1))[:tokens]
    part = len(ids) // len(FACTS)
    pieces = []
    for i, (place, number) in enumerate(FACTS.items()):
        piece = tokenizer.decode(ids[i * part : (i + 1) * part])
        half = piece.find(". ", len(piece) // 2) + 1
        pieces += [piece[:half], f" The secret number of the {place} is {number}. ", piece[half:]]
    return "".join(pieces)


def measure_facts(folder: Path, tokens: int, fields: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Ask for each fact, with a cache of each dtype."""
    found: dict[str, dict[str, Any]] = {}
    for dtype in CACHE_DTYPES:
        llm = QuantizedHuggingFaceLLM(
            model_id=str(folder), max_new_tokens=8, temperature=0, kv_cache_dtype=dtype, engine="fast", **fields
        )
        text = long_text(llm.pipeline.tokenizer, tokens)
        answers = [llm.invoke(f"{text}\n\nThe secret number of the {place} is") for place in FACTS]
        right = sum(number in answer for number, answer in zip(FACTS.values(), answers, strict=True))
        found[dtype] = {"right": right, "asked": len(FACTS), "answers": answers}
        print(f"{dtype}: {right} of {len(FACTS)} facts found, {answers}", flush=True)
    return found


def main() -> None:
    """Measure a model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=4000, help="of the text for perplexity; 0 leaves it out")
    parser.add_argument("--window", type=int, default=2000)
    parser.add_argument("--long", type=int, default=2000, help="of the text with facts; 0 leaves it out")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    asked = parser.parse_args()
    fields: dict[str, Any] = {"dtype": asked.dtype, "device": asked.device, "progress": False}
    fields["kv_cache_memory"] = "512MiB"
    result: dict[str, Any] = {"model": asked.folder.name}
    if asked.tokens:
        llm = QuantizedHuggingFaceLLM(model_id=str(asked.folder), **fields)
        result["text"] = measure_text(llm, asked.tokens, asked.window)
        for dtype, measured in result["text"].items():
            print(f"{dtype}: {measured}", flush=True)
    if asked.long:
        result["facts"] = measure_facts(asked.folder, asked.long, fields)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
