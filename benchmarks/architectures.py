"""Every architecture of transformers that writes text, as a tiny random model: which engine runs it, and how.

    python -m benchmarks.architectures                      # all, about ten minutes on two cores
    python -m benchmarks.architectures qwen3_moe gpt_oss    # some, by the type of their config
    python -m benchmarks.architectures --record             # writes the table of docs/compatibility.md

Each model's greedy texts by the fast engine are compared with those of transformers' `generate`, in float32: alone, in
a batch with prompts that begin alike, and in a KV cache that is too small for all of them. Exits with 1 if one differs.
"""

from __future__ import annotations

import argparse
import gc
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from benchmarks.soak_model import byte_tokenizer
from benchmarks.tiny_models import is_decoder_only, tiny_model
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.request import plan_requests
from langchain_quantllm.errors import NotEnoughMemoryError, PromptTooLongError, first_line
from langchain_quantllm.kernels import reference
from langchain_quantllm.kernels.linear import reference as linear_reference
from langchain_quantllm.memory.estimate import estimate_config
from langchain_quantllm.options import GenerationOptions

PAGE = Path(__file__).parents[1] / "docs/compatibility.md"
_BEGIN = "<!-- architectures: written by python -m benchmarks.architectures --record -->"
_END = "<!-- end of architectures -->"

NEW_TOKENS = 16
_POOL_BLOCKS = 8  # of a KV cache that the prompts do not fit in together
_MOST_DOUBLINGS = 12  # of it, until one sequence and its states fit
SCHEMES = ("int8", "nf4")


def prompts() -> list[list[int]]:
    """Make prompts of token ids: shorter and longer than a block, two that begin alike."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(20, 480, (60,), generator=generator).tolist()
    return [ids[:37], [*ids[:33], *ids[50:56]], ids[40:45], ids[20:36]]


@dataclass
class Finding:
    """What became of an architecture.

    Args:
        model_type: The type of its config.
        reads_images: Whether it is tried as a model that reads images, with texts alone.
        is_decoder_only: See `tiny_models.is_decoder_only`.
        not_tried: Why there is no model to try; empty if there is one.
        engine: "fast" or "pipeline".
        reason: Why it is not fast.
        notes: What its steps do without.
        wrong: The trials with other tokens than those of `generate`.
        fused: Fused steps by kind.
        quantized: Share of the parameters that each scheme quantizes, without embeddings.
    """

    model_type: str
    reads_images: bool = False
    is_decoder_only: bool = True
    not_tried: str = ""
    engine: str = ""
    reason: str = ""
    notes: str = ""
    wrong: list[str] = field(default_factory=list)
    fused: dict[str, int] = field(default_factory=dict)
    quantized: dict[str, float] = field(default_factory=dict)
    quantized_note: str = ""


def examine(model_type: str, *, reads_images: bool) -> Finding:
    """Try an architecture."""
    found = Finding(model_type=model_type, reads_images=reads_images)
    try:
        found.is_decoder_only = is_decoder_only(model_type)
        model = tiny_model(model_type, images=reads_images)
        if getattr(model.config, "is_encoder_decoder", False):
            found.not_tried = "an encoder-decoder"
            return found
        expected = [_generated(model, ids) for ids in prompts()]
    except Exception as error:
        found.not_tried = f"transformers: {type(error).__name__}: {first_line(error)}"
        return found
    try:
        _examine_engine(found, model, expected)
    except Exception as error:
        found.wrong.append(f"{type(error).__name__}: {first_line(error)}")
    _examine_fusion(found, model)
    _examine_schemes(found, model)
    return found


def _generated(model: Any, ids: Sequence[int]) -> list[int]:
    given = torch.tensor([list(ids)])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        written = model.generate(given, attention_mask=torch.ones_like(given), **options)
    return [int(i) for i in written[0, len(ids) :]]


def _examine_engine(found: Finding, model: Any, expected: Sequence[Sequence[int]]) -> None:
    tokenizer = byte_tokenizer()
    llm = _llm(model, tokenizer)
    try:
        info = llm.engine_info
        found.engine = info.name
        if info.name != "fast":
            found.reason = info.reason.partition("cannot drive this model: ")[2] or info.reason
            return
        found.notes = info.reason.partition("; ")[2]
        token_bytes = info.kv_cache_bytes // (info.kv_cache_tokens + BLOCK_TOKENS)
        if _texts(llm, prompts()[:1]) != list(expected[:1]):
            found.wrong.append("alone")
        if _texts(llm, prompts()) != list(expected):
            found.wrong.append("in a batch")
        if _texts(llm, prompts()[1:2]) != list(expected[1:2]):
            found.wrong.append("with a known beginning")
    finally:
        llm.unload()
    size = _POOL_BLOCKS * BLOCK_TOKENS * max(1, token_bytes)
    if not any(_fits(found, model, size << doublings, expected) for doublings in range(_MOST_DOUBLINGS)):
        found.wrong.append("no small KV cache holds a sequence")


def _fits(found: Finding, model: Any, size: int, expected: Sequence[Sequence[int]]) -> bool:
    """Try a KV cache of so many bytes; False if they hold less than one sequence."""
    llm = _llm(model, byte_tokenizer(), kv_cache_memory=size)
    try:
        if _texts(llm, prompts()) != list(expected):
            found.wrong.append("in a small KV cache")
    except (NotEnoughMemoryError, PromptTooLongError):
        return False
    finally:
        llm.unload()
    return True


def _llm(model: Any, tokenizer: Any, **fields: Any) -> QuantizedHuggingFaceLLM:
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    return QuantizedHuggingFaceLLM(pipeline=pipeline, **fields)


def _texts(llm: QuantizedHuggingFaceLLM, given: Iterable[Sequence[int]]) -> list[list[int]]:
    """Continue prompts in one batch."""
    options = GenerationOptions(max_new_tokens=NEW_TOKENS, eos_token_id=())
    engine = llm._engine(options)
    requests = [plan_requests(ids, options, engine.limits, shares_prefix=True)[0] for ids in given]
    texts: list[list[int]] = [[] for _ in requests]
    with engine.submit(requests) as stream:
        for chunk in stream:
            texts[chunk.row] += chunk.token_ids
    return texts


def _examine_fusion(found: Finding, model: Any) -> None:
    fusion = Fusion(model, kernels=reference, linear_kernels=linear_reference)
    found.fused = {kind.kind: kind.fused for kind in fusion.summary if kind.fused}
    fusion.close()


def _examine_schemes(found: Finding, model: Any) -> None:
    """Compute which share of the weights each scheme quantizes, of those that are no embedding and no output head."""
    ends = {id(p) for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None
            for p in module.parameters()}  # fmt: skip
    rest = [p for p in model.parameters() if id(p) not in ends]
    weights = sum(p.numel() for p in rest if p.dim() > 1)
    try:
        plain, *others = (estimate_config(model.config, name, dtype="bfloat16").weights for name in ("none", *SCHEMES))
    except Exception as error:
        found.quantized_note = first_line(error)
        return
    for scheme, in_scheme in zip(SCHEMES, others, strict=True):
        # Experts are a kind of their own, quantized or not.
        experts = plain.experts_bytes if in_scheme.experts_bytes < plain.experts_bytes else 0
        smaller = plain.unquantized_bytes - in_scheme.unquantized_bytes + experts
        found.quantized[scheme] = smaller / 2 / max(1, weights)


def _line(found: Finding) -> str:
    shares = [f"{found.quantized[s]:.0%}" if s in found.quantized else "-" for s in SCHEMES]
    note = (found.reason or found.notes or "-").replace("|", "\\|").replace("<", "&lt;")
    return f"| {' | '.join([found.model_type, found.engine, note, ', '.join(found.fused) or '-', *shares])} |"


def table(findings: Sequence[Finding]) -> str:
    """Write the findings as Markdown."""
    tried = [f for f in findings if not f.not_tried]
    sections = {
        "Decoder-only language models": [f for f in tried if not f.reads_images and f.is_decoder_only],
        "Encoders that decode, and decoders of encoder-decoders": [
            f for f in tried if not f.reads_images and not f.is_decoder_only
        ],
        "Models that read images, with texts alone": [f for f in tried if f.reads_images],
    }
    lines = []
    for title, mine in sections.items():
        fast = sum(f.engine == "fast" for f in mine)
        lines += [f"### {title}", "", f"{fast} of {len(mine)} run on the fast engine.", ""]
        columns = ("type", "engine", "why not fast, or what its steps do without", "fused", *SCHEMES)
        lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [_line(found) for found in sorted(mine, key=lambda f: f.model_type)]
        lines.append("")
    untried = [f for f in findings if f.not_tried]
    lines += ["Not tried:", ""]
    reasons: dict[str, list[str]] = {}
    for found in untried:
        reasons.setdefault(found.not_tried.replace("<", "&lt;"), []).append(found.model_type)
    lines += [f"- {', '.join(sorted(set(types)))}: {reason}" for reason, types in sorted(reasons.items())]
    return "\n".join(lines)


def record(text: str) -> None:
    """Write the table into its page anew."""
    document = PAGE.read_text(encoding="utf-8")
    before, after = document.split(_BEGIN)[0], document.split(_END)[1]
    PAGE.write_text(f"{before}{_BEGIN}\n\n{text}\n\n{_END}{after}", encoding="utf-8")


def main() -> None:
    """Examine architectures, and print or record them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", help="types of configs; without any, all")
    parser.add_argument("--record", action="store_true", help=f"write the table of {PAGE.name}")
    given = parser.parse_args()
    if given.record and given.types:
        parser.error("--record writes the table of all types; name none.")
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    findings = []
    for names, reads_images in (
        (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, False),
        (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, True),
    ):
        for model_type in names:
            if given.types and model_type not in given.types:
                continue
            found = examine(model_type, reads_images=reads_images)
            print(found, flush=True)
            findings.append(found)
            gc.collect()
    tried = [f for f in findings if not f.not_tried]
    fast = [f for f in tried if f.engine == "fast"]
    wrong = [f for f in findings if f.wrong]
    print(f"{len(findings)} architectures, {len(tried)} tried, {len(fast)} fast, {len(wrong)} wrong")
    print(Counter(re.sub(r"[0-9.]+|'[^']*'", "…", f.reason) for f in tried if f.reason).most_common())
    if given.record:
        record(table(findings))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
