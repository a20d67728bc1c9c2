"""An encoder in several schemes: quality, memory and documents per second, beside sentence-transformers alone.

    python -m benchmarks.rag_speed FOLDER --schemes none int8 nf4 --device cpu

Embeds the passages of benchmarks/rag_corpus.py, and finds the answers to its questions by their vectors. Prints one
line of JSON for each scheme, and one for sentence-transformers in 16 bits with the same number of texts in a batch, in
one process. Times are those of this machine: only the ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers

from benchmarks.rag_corpus import Passage, Question, hit_rate, passages, questions
from langchain_quantllm import QuantizedHuggingFaceEmbeddings

Vectors = Any


def rate_per_s(embed: Callable[[list[str]], Vectors], texts: list[str], repeats: int) -> float:
    """Return the median of the texts per second of several runs; the first is to warm up."""
    rates = []
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        embed(texts)
        if repeat:
            rates.append(len(texts) / (time.perf_counter() - began))
    return statistics.median(rates)


def quality(documents: Vectors, queries: Vectors, chosen: list[Passage], asked: list[Question]) -> dict[str, float]:
    """Return the hit rates of the passages with the most similar vectors."""
    order = np.argsort(-(queries @ documents.T), axis=1)
    found = [[chosen[place] for place in row] for row in order]
    return {f"hit rate at {k}": round(hit_rate(asked, found, k), 3) for k in (1, 3, 10)}


def cosines(vectors: Vectors, exact: Vectors) -> tuple[float, float]:
    """Return the smallest and the mean cosine of vectors to others of the same texts."""
    products = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    return float(products.min()), float(products.mean())


def measure(name: str, weight_bytes: int, embed: Callable[[list[str]], Vectors], given: Any, state: Any) -> None:
    """Measure one way of embedding, and print its line."""
    chosen, asked, exact = state
    texts = [passage.text for passage in chosen]
    vectors = np.asarray(embed(texts), dtype=np.float32)
    queries = np.asarray(embed([question.text for question in asked]), dtype=np.float32)
    if not exact:
        exact.append(vectors)  # the first is float32
    least, mean = cosines(vectors, exact[0])
    line = {"name": name, "weights, MB": round(weight_bytes / 1e6, 1)}
    line |= quality(vectors, queries, chosen, asked)
    line |= {"least cosine to float32": round(least, 4), "mean cosine": round(mean, 4)}
    line["documents/s"] = round(rate_per_s(embed, texts[: given.texts], given.repeats), 1)
    print(json.dumps(line), flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--schemes", nargs="+", default=["none", "int8", "nf4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32, help="Texts of a batch, for both libraries.")
    parser.add_argument("--texts", type=int, default=64, help="Texts of a timed run.")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    print(
        json.dumps(
            {
                "device": given.device if given.device == "cpu" else torch.cuda.get_device_name(given.device),
                "threads": torch.get_num_threads(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "sentence-transformers": sentence_transformers.__version__,
            }
        ),
        flush=True,
    )
    state = (passages(), questions(), [])
    for scheme, dtype in [("none", "float32"), *((scheme, "bfloat16") for scheme in given.schemes)]:
        embeddings = QuantizedHuggingFaceEmbeddings(
            model_name=given.model,
            quantization=scheme,
            dtype=dtype,
            device=given.device,
            batch_size=given.batch,
            max_batch_tokens=1 << 20,
            progress=False,
            query_prompt="",
        ).load()
        name = f"{scheme}, {dtype}" if scheme == "none" else scheme
        size = embeddings.memory_report().to_dict()["weights"]["total_bytes"]
        measure(name, size, embeddings.embed_documents, given, state)
        embeddings.unload()
    model = sentence_transformers.SentenceTransformer(
        given.model, device=given.device, model_kwargs={"dtype": torch.bfloat16}
    )
    size = sum(parameter.nbytes for parameter in model.parameters())

    def encode(texts: list[str]) -> Vectors:
        return model.encode(texts, batch_size=given.batch, normalize_embeddings=False).astype(np.float32)

    measure("sentence-transformers, bfloat16", size, encode, given, state)


if __name__ == "__main__":
    main()
