"""The cost of constraints and the gain of shared prefixes, measured in one run of the chat model.

    python -m benchmarks.chat_speed FOLDER --quantization nf4

Alternates rows that write JSON of a schema with the same rows without a constraint: same prompts, same token counts.
Alternates the first text of a chat's fifth answer with prefix caching and without it. With `--shape`, random weights of
that shape replace the folder's, of which only tokenizer and template are used. Prints medians and ratios as one line of
JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage

from langchain_quantllm import ChatQuantizedHuggingFace, QuantizedHuggingFaceLLM
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.random_models import SHAPES
from langchain_quantllm.structured import JSONSchema

SCHEMA = {
    "type": "object",
    "properties": {
        "customer": {"type": "object", "properties": {"name": {"type": "string"}, "city": {"type": "string"}}},
        "status": {"enum": ["new", "paid", "shipped"]},
        "date": {"type": "string", "format": "date"},
        "items": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "sku": {"type": "string"},
                    "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
                    "price": {"type": "number"},
                },
                "required": ["sku", "quantity", "price"],
            },
            "minItems": 20,
        },
    },
    "required": ["customer", "status", "date", "items"],
}
TURNS = 5


def random_model(shape: str, source: Path, folder: Path) -> Path:
    """Write random weights of a shape for the tokenizer of another checkpoint."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    sizes = {**SHAPES[shape], "vocab_size": -(-len(tokenizer) // 64) * 64, "max_position_embeddings": 8192}
    config = transformers.LlamaConfig(**sizes, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16")
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for path in source.iterdir():
        if "tokenizer" in path.name or "template" in path.name:
            shutil.copy(path, folder / path.name)
    return folder


class Rows:
    """Rows of one batch, each with its seed and its number of tokens."""

    def __init__(self, chat: ChatQuantizedHuggingFace, count: int, new_tokens: int) -> None:
        """Make `count` prompts for at most `new_tokens` tokens each."""
        self._chat = chat
        self._prompts = [f"Write down order number {i} of our shop." for i in range(count)]
        self._new_tokens = [new_tokens] * count

    def settle(self, constraint: JSONSchema) -> int:
        """Write once under the constraint, keep the token count of each row, and return their sum."""
        self._new_tokens, _ = self.write(constraint)
        return sum(self._new_tokens)

    def write_s(self, constraint: JSONSchema | None) -> float:
        """Write all rows and return the seconds."""
        tokens, seconds = self.write(constraint)
        if tokens != self._new_tokens:
            raise SystemExit("the rows have written other numbers of tokens than the first time")
        return seconds

    def write(self, constraint: JSONSchema | None) -> tuple[list[int], float]:
        """Write all rows and return their token counts and the seconds."""
        options: dict[str, Any] = {"ignore_eos": True} if constraint is None else {"constraint": constraint}

        async def write_all() -> list[BaseMessage]:
            rows = enumerate(zip(self._prompts, self._new_tokens, strict=True))
            return await asyncio.gather(
                *(self._chat.ainvoke(p, seed=i, max_new_tokens=n, **options) for i, (p, n) in rows)
            )

        began = time.perf_counter()
        answers = asyncio.run(write_all())
        seconds = time.perf_counter() - began
        return [a.usage_metadata["output_tokens"] for a in answers if isinstance(a, AIMessage)], seconds  # type: ignore[index]


def first_text_s(chat: ChatQuantizedHuggingFace, texts: Sequence[str], answer_tokens: int) -> tuple[float, int]:
    """Hold a chat and return the seconds to the first text of its last answer, and its cached tokens."""
    messages: list[BaseMessage] = []
    for text in texts:
        messages.append(HumanMessage(text))
        began, first = time.perf_counter(), 0.0
        whole: Any = None
        for chunk in chat.stream(messages, max_new_tokens=answer_tokens, ignore_eos=True):
            if not first and chunk.content:
                first = time.perf_counter() - began
            whole = chunk if whole is None else whole + chunk
        messages.append(AIMessage(whole.text))
    return first, whole.usage_metadata["input_token_details"]["cache_read"]


def alternate(measures: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """Call all, one after the other: once to warm up and then `repeats` times."""
    found: dict[str, list[Any]] = {name: [] for name in measures}
    for repeat in range(repeats + 1):
        for name, measure in measures.items():
            value = measure()
            if repeat:
                found[name].append(value)
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--turn-tokens", type=int, default=400)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(given.shape, given.model, Path(folder)) if given.shape else given.model
        options = {"model_id": str(model), "quantization": given.quantization, "progress": False, "temperature": 1.0}
        chat = ChatQuantizedHuggingFace(**options).load()
        alone = ChatQuantizedHuggingFace(**options, prefix_caching=False)
        tokenizer = QuantizedHuggingFaceLLM(**options).pipeline.tokenizer
        found: dict[str, Any] = {"engine": chat.engine_info.name, "graphs": chat.engine_info.graphs}
        found |= {"torch": torch.__version__, "transformers": transformers.__version__}
        if torch.cuda.is_available():
            found["device"] = torch.cuda.get_device_name()
        constraint = JSONSchema(json.dumps(SCHEMA))
        for count in (1, given.rows):
            rows = Rows(chat, count, given.new_tokens)
            tokens = rows.settle(constraint)
            times = alternate(
                {"json": partial(rows.write_s, constraint), "free": partial(rows.write_s, None)}, given.repeats
            )
            rates = {name: round(tokens / statistics.median(seconds), 1) for name, seconds in times.items()}
            found[f"{count} rows, tokens/s"] = rates
            found[f"{count} rows, cost"] = round(1 - rates["json"] / rates["free"], 3)
        prompts = Prompts(tokenizer)

        def hold(model: ChatQuantizedHuggingFace) -> tuple[float, int]:
            return first_text_s(model, prompts.draw(TURNS, given.turn_tokens), 32)

        turns = alternate({"shared": partial(hold, chat), "not shared": partial(hold, alone)}, given.repeats)
        medians = {name: statistics.median(s for s, _ in values) for name, values in turns.items()}
        found[f"turn {TURNS}, s"] = {name: round(seconds, 4) for name, seconds in medians.items()}
        found[f"turn {TURNS}, cached tokens"] = {name: values[-1][1] for name, values in turns.items()}
        print(json.dumps(found))


if __name__ == "__main__":
    main()
