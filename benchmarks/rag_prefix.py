"""The layout of a prompt with documents: documents first, or the question first, in one run.

    python -m benchmarks.rag_prefix FOLDER --quantization nf4

Asks several questions about the same passages, in both layouts by turns, and prints medians and ratios as one line of
JSON: seconds to the first token, and the share of the prompt's tokens that were found in the KV cache. Times are those
of this machine: only the ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import transformers
from langchain_core.prompts import ChatPromptTemplate

from benchmarks.rag_corpus import Passage, passages
from langchain_quantllm import ChatQuantizedHuggingFace

LAYOUTS = {
    "documents first": "Passages:\n\n{passages}\n\nQuestion: {question}",
    "question first": "Question: {question}\n\nPassages:\n\n{passages}",
}
QUESTIONS = (
    "Which scheme is recommended for most uses?",
    "What takes the least memory?",
    "Which scheme needs calibration data?",
    "On which devices does fp4 run?",
    "What does -double mean?",
    "How is a quantized checkpoint saved?",
    "Which layouts of GPTQ checkpoints load?",
    "What is the perplexity of nf4?",
)


def numbered(chosen: list[Passage]) -> str:
    """Write passages one below the other, with their numbers."""
    return "\n\n".join(f"[{number}] {passage.text}" for number, passage in enumerate(chosen, 1))


def first_token(chat: Any, layout: str, text: str, question: str) -> tuple[float, float, int]:
    """Ask a question.

    Returns:
        Seconds to the first token, the share of the prompt's tokens that were cached, and the prompt's tokens.
    """
    prompt = ChatPromptTemplate.from_messages([("system", "Answer from the passages alone."), ("human", layout)])
    began = time.perf_counter()
    message = (prompt | chat).invoke({"passages": text, "question": question})
    seconds, usage = time.perf_counter() - began, message.usage_metadata
    return seconds, usage["input_token_details"]["cache_read"] / usage["input_tokens"], usage["input_tokens"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--quantization", default="nf4")
    parser.add_argument("--device", default=None)
    parser.add_argument("--passages", type=int, default=5)
    parser.add_argument("--questions", type=int, default=len(QUESTIONS))
    given = parser.parse_args()
    chat = ChatQuantizedHuggingFace(
        model=given.model,
        quantization=given.quantization,
        device=given.device,
        temperature=0,
        max_tokens=1,
        progress=False,
    ).load()
    text = numbered([passage for passage in passages() if passage.source == "schemes.md"][: given.passages])
    first_token(chat, "{question}{passages}", "warm up " * 300, "")
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in LAYOUTS}
    for question in QUESTIONS[: given.questions]:
        for name, layout in LAYOUTS.items():
            found[name].append(first_token(chat, layout, text, question))
    chat.unload()
    shown: dict[str, Any] = {"engine": str(chat.engine_info.name), "threads": torch.get_num_threads()}
    shown |= {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, rows in found.items():
        later = rows[1:]  # the first question computes the passages in both
        shown[name] = {
            "prompt tokens": rows[-1][2],
            "first question, s": round(rows[0][0], 3),
            "later questions, s to the first token": round(statistics.median(row[0] for row in later), 3),
            "cached share": round(statistics.median(row[1] for row in later), 3),
        }
    times = [statistics.median(row[0] for row in found[name][1:]) for name in LAYOUTS]
    shown["question first / documents first, s to the first token"] = round(times[1] / times[0], 2)
    print(json.dumps(shown))


if __name__ == "__main__":
    main()
