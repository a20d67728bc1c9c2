"""Perplexity of tiny mixtures and hybrids in each scheme; they are trained here, as no package ships small real ones.

    python -m benchmarks.trained_quality                      # all kinds: some minutes on one core
    python -m benchmarks.trained_quality qwen3_moe --steps 300

A model of some half a million weights learns bytes of the calibration text. It is measured on the evaluation text by
its own modules, and on the beginning of that text, token by token, by the fast engine as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.soak_model import byte_tokenizer
from langchain_quantllm import GPTQ, Calibration, QuantizedHuggingFaceLLM, quantize
from langchain_quantllm.bench.quality import Reference, evaluation_text, perplexity
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.options import GenerationOptions
from langchain_quantllm.quantization.calibration import read_texts

_COMMON = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "num_experts_per_tok": 2,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_EXPERTS = {"num_experts": 8, "moe_intermediate_size": 64}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeConfig", _EXPERTS),
    "gpt_oss": ("GptOssConfig", {"num_local_experts": 8, "sliding_window": 64}),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 64,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
}
"""A mixture, one with attention sinks whose experts are stored in mxfp4, and a hybrid that is a mixture as well."""

SCHEMES = ("none", "int8", "nf4", "fp4", "gptq")
STEPS = 800
_ROWS, _TOKENS = 8, 128  # of a step of the training
_LEARNING_RATE, _WARMUP = 3e-3, 20


def schemes_of(kind: str) -> tuple[str, ...]:
    """Return the schemes that a kind is measured in."""
    return (*SCHEMES, "mxfp4") if kind == "gpt_oss" else SCHEMES


def train(kind: str, folder: Path, *, steps: int = STEPS, seed: int = 0) -> Path:
    """Train a model on bytes, and write it in bfloat16; returns the folder.

    Args:
        kind: One of `KINDS`.
        folder: Where to write model and tokenizer.
        steps: Steps of 1,024 tokens; 800 take about a minute on one core.
        seed: Of the first weights and of the order of the text.
    """
    tokenizer = byte_tokenizer()
    name, options = KINDS[kind]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            getattr(transformers, name)(**{**_COMMON, **options}), dtype=torch.float32
        )
        ids = torch.tensor(tokenizer("\n".join(_texts()))["input_ids"])
        optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
        model.train()
        for step in range(steps):
            for group in optimizer.param_groups:
                decay = 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = _LEARNING_RATE * min(1.0, (step + 1) / _WARMUP) * (0.05 + 0.95 * decay)
            starts = torch.randint(len(ids) - _TOKENS - 1, (_ROWS,)).tolist()
            rows = torch.stack([ids[at : at + _TOKENS] for at in starts])
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    model.generation_config = transformers.GenerationConfig(eos_token_id=None)
    model.eval().to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _texts() -> list[str]:
    return [text for text in read_texts(Calibration()) if isinstance(text, str)]


def in_scheme(folder: Path, scheme: str, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Load a trained model in a scheme; GPTQ and mxfp4 are written beside it first."""
    quantization: Any = None if scheme == "none" else scheme
    if scheme in ("gptq", "mxfp4"):
        target = folder.with_name(f"{folder.name}-{scheme}")
        given: Any = GPTQ(bits=4, group_size=32) if scheme == "gptq" else scheme
        if not target.exists():
            quantize(folder, given, output=target, progress=False, device="cpu")
        folder, quantization = target, GPTQ(kernel="torch") if scheme == "gptq" else None
    options = {"dtype": "bfloat16", "device": "cpu", "progress": False, **fields}
    return QuantizedHuggingFaceLLM(model_id=str(folder), quantization=quantization, **options)


def reference_of(llm: QuantizedHuggingFaceLLM, *, tokens: int) -> Reference:
    """Keep the predictions of a loaded model, the one in 16 bits, by its own modules."""
    pipeline = llm.pipeline
    return Reference(pipeline.model, pipeline.tokenizer, evaluation_text(), window_tokens=256, max_tokens=tokens)


def own_perplexity(llm: QuantizedHuggingFaceLLM, *, tokens: int) -> float:
    """Measure the perplexity of the evaluation text by the model's own modules."""
    pipeline = llm.pipeline
    return perplexity(
        pipeline.model, pipeline.tokenizer, evaluation_text(), window_tokens=256, max_tokens=tokens
    ).perplexity


def engine_perplexity(llm: QuantizedHuggingFaceLLM, *, tokens: int, window_tokens: int = 256) -> float:
    """Measure the same through the engine: each token's log probability after those before it in its window."""
    ids = llm.pipeline.tokenizer(evaluation_text(), add_special_tokens=False)["input_ids"][:tokens]
    losses = [
        -logprob for at in range(0, len(ids), window_tokens) for logprob in _logprobs(llm, ids[at : at + window_tokens])
    ]
    return math.exp(sum(losses) / len(losses))


def _logprobs(llm: QuantizedHuggingFaceLLM, ids: Sequence[int]) -> Iterator[float]:
    """Yield the log probability of each token of a text but the first one."""
    options = GenerationOptions(max_new_tokens=1, logprobs=0, eos_token_id=())
    engine = llm._engine(options)
    requests = [
        dataclasses.replace(request, reported_ids=(ids[i],))
        for i in range(1, len(ids))
        for request in plan_requests(ids[:i], options, engine.limits, shares_prefix=True)
    ]
    found: dict[int, float] = {}
    with engine.submit(requests) as stream:
        for chunk in stream:
            for token in chunk.logprobs:
                found[chunk.row] = token.top[0][1]
    yield from (found[row] for row in range(len(requests)))


def main() -> None:
    """Train and measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kinds", nargs="*", metavar="KIND", help=f"of {', '.join(KINDS)}; all without")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--tokens", type=int, default=16384, help="of the text that is measured")
    parser.add_argument("--engine-tokens", type=int, default=512, help="of them by the engine, one request for each")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print("| model | scheme | perplexity | divergence, nats | its beginning | its beginning, fast engine |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as place:
        for kind in asked.kinds or KINDS:
            folder = train(kind, Path(place, kind), steps=asked.steps, seed=asked.seed)
            reference = None
            for scheme in schemes_of(kind):
                llm = in_scheme(folder, scheme, engine="fast")
                reference = reference or reference_of(llm, tokens=asked.tokens)
                distance = reference.distance(llm.pipeline.model)
                figures = [distance.perplexity.perplexity, distance.kl_nats.mean]
                figures += [measure(llm, tokens=asked.engine_tokens) for measure in (own_perplexity, engine_perplexity)]
                print(f"| {kind} | {scheme} | " + " | ".join(f"{figure:.4g}" for figure in figures) + " |", flush=True)
                llm.unload()


if __name__ == "__main__":
    main()
