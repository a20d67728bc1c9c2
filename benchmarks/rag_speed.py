"""An encoder in several schemes: quality, memory and documents per second, beside sentence-transformers alone.

    python -m benchmarks.rag_speed FOLDER --schemes none int8 nf4 --device cpu

Embeds the passages of benchmarks/rag_corpus.py, and finds the answers to its questions by their vectors. Prints a line
of JSON for each scheme, and one for sentence-transformers in 16 bits with the same number of texts in a batch. All are
loaded at once and timed by turns. Times are those of this machine: only the ratios mean something elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import sentence_transformers
import torch
import transformers

from benchmarks.rag_corpus import Passage, Question, hit_rate, passages, questions
from langchain_quantllm import QuantizedHuggingFaceEmbeddings

Vectors = Any
Embed = Callable[[list[str]], Vectors]


def rates_per_s(ways: Mapping[str, Embed], texts: list[str], repeats: int) -> dict[str, float]:
    """Return the medians of the texts per second, of runs by turns; the first turn is to warm up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(repeats + 1):
        for name, embed in ways.items():
            began = time.perf_counter()
            embed(texts)
            if repeat:
                rates[name].append(len(texts) / (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in rates.items()}


def quality(documents: Vectors, queries: Vectors, chosen: list[Passage], asked: list[Question]) -> dict[str, float]:
    """Return the hit rates of the passages with the most similar vectors."""
    order = np.argsort(-(queries @ documents.T), axis=1)
    found = [[chosen[place] for place in row] for row in order]
    return {f"hit rate at {k}": round(hit_rate(asked, found, k), 3) for k in (1, 3, 10)}


def cosines(vectors: Vectors, exact: Vectors) -> tuple[float, float]:
    """Return the smallest and the mean cosine of vectors to others of the same texts."""
    products = (vectors * exact).sum(1) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    return float(products.min()), float(products.mean())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--schemes", nargs="+", default=["none", "int8", "nf4"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32, help="Texts of a batch, for both libraries.")
    parser.add_argument("--texts", type=int, default=64, help="Texts of a timed run.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--speed-only", action="store_true", help="Leave out the quality.")
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
    ways: dict[str, Embed] = {}
    bytes_of: dict[str, int] = {}
    for scheme, dtype in [("none", "float32"), *((scheme, "bfloat16") for scheme in given.schemes)]:
        embeddings = QuantizedHuggingFaceEmbeddings(
            model_name=given.model,
            quantization=scheme,
            dtype=dtype,
            device=given.device,
            batch_size=given.batch,
            max_batch_tokens=1 << 20,
            progress=False,
        ).load()
        name = f"{scheme}, {dtype}" if scheme == "none" else scheme
        ways[name] = embeddings.embed_documents
        bytes_of[name] = embeddings.memory_report().to_dict()["weights"]["total_bytes"]
    model = sentence_transformers.SentenceTransformer(
        given.model, device=given.device, model_kwargs={"dtype": torch.bfloat16}
    )
    name = "sentence-transformers, bfloat16"
    ways[name] = lambda texts: model.encode(texts, batch_size=given.batch)
    bytes_of[name] = sum(parameter.nbytes for parameter in model.parameters())

    chosen, asked = passages(), questions()
    texts = [passage.text for passage in chosen]
    rates = rates_per_s(ways, texts[: given.texts], given.repeats)
    reference = next((rate for name, rate in rates.items() if name == "none, bfloat16"), rates["none, float32"])
    exact: Vectors = None
    for name, embed in ways.items():
        line: dict[str, Any] = {"name": name, "weights, MB": round(bytes_of[name] / 1e6, 1)}
        line |= {"documents/s": round(rates[name], 1), "against 16 bits": round(rates[name] / reference, 2)}
        if not given.speed_only:
            vectors = np.asarray(embed(texts), dtype=np.float32)
            queries = np.asarray(embed([question.text for question in asked]), dtype=np.float32)
            exact = vectors if exact is None else exact  # the first is float32
            least, mean = cosines(vectors, exact)
            line |= quality(vectors, queries, chosen, asked)
            line |= {"least cosine to float32": round(least, 4), "mean cosine": round(mean, 4)}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
