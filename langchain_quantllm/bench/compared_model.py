"""One model of a comparison: its name, and its greedy answers to prompts, one by one.

Knows nothing of the other model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from langchain_core.outputs import Generation

from langchain_quantllm.compat.library_logging import without_torchao
from langchain_quantllm.compat.packages import check_packages
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.loading.checkpoint import find_checkpoint
from langchain_quantllm.loading.choices import reconcile
from langchain_quantllm.loading.devices import release_memory
from langchain_quantllm.loading.inputs import token_ids
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.memory import estimate_memory
from langchain_quantllm.schemes import GPTQ, SCHEMES, scheme_from, scheme_hint

_ALTERNATIVES = 20
"""Likeliest tokens that are reported in each place."""


@dataclass(frozen=True, kw_only=True)
class ComparedModel:
    """One of the two models.

    Args:
        label: The name that the caller used.
        model_id: Folder or repository.
        scheme: Name of the scheme that holds its weights.
        weights_bytes: Bytes of its weights.
        used_bytes: Memory in use on its device after the answers, KV cache included, above that before loading.
    """

    label: str
    model_id: str
    scheme: str
    weights_bytes: int
    used_bytes: int


@dataclass(frozen=True, kw_only=True)
class ModelAnswers:
    """All answers of one model, with a hash of its vocabulary and the token ids of its prompts."""

    model: ComparedModel
    vocabulary: int
    prompt_ids: list[list[int]]
    generations: list[Generation]


def make_llm(name: str, model: str | None, kernel: str, tokens: int, common: dict[str, Any]) -> QuantizedHuggingFaceLLM:
    """Make the LLM of a model's name; its weights are loaded later.

    Args:
        name: A scheme of `model`, a folder or repository, or `FOLDER:scheme`.
        model: Folder or repository of a model that is named by a scheme alone.
        kernel: Kernel for GPTQ.
        tokens: Tokens that its KV cache holds.
        common: Further fields; those that are None are left out.

    Raises:
        QuantLLMError: If the model is not there, or cannot have the scheme.
    """
    model_id, scheme_name = _read_name(name, model)
    scheme = GPTQ(kernel=kernel) if scheme_name == "gptq" else scheme_from(scheme_name)
    spec = LoadSpec(model_id=model_id, scheme=scheme)
    check_packages(scheme)
    with without_torchao():
        reconcile(spec, find_checkpoint(spec))  # raises where the model is not there, or cannot have the scheme
    return QuantizedHuggingFaceLLM(
        model_id=model_id,
        quantization=scheme,
        prefix_caching=False,
        progress=False,
        temperature=0,
        repetition_penalty=1.0,
        logprobs=_ALTERNATIVES,
        kv_cache_memory=_pool_bytes(model_id, tokens),
        **{name: value for name, value in common.items() if value is not None},
    )


def _read_name(name: str, model: str | None) -> tuple[str, str | None]:
    """Read a name as model and scheme; without a scheme the checkpoint is taken as it is."""
    if name in SCHEMES:
        if model is None:
            msg = f"{name!r} is a scheme; say of which model: model=, or write FOLDER:{name}."
            raise InvalidOptionError(msg)
        return model, name
    if Path(name).exists():
        return name, None
    folder, _, scheme = name.rpartition(":")
    if folder and scheme in SCHEMES:
        return folder, scheme
    if "/" not in name or folder:
        msg = f"{name!r} is neither a scheme nor a folder, nor one of each as FOLDER:nf4{scheme_hint(scheme)}"
        raise InvalidOptionError(msg)
    return name, None


def _pool_bytes(model_id: str, tokens: int) -> int | None:
    """Bytes of the KV cache for one text of so many tokens: by itself it would take a share of the device."""
    try:
        with without_torchao():
            return estimate_memory(model_id).kv_cache_bytes(tokens)
    except (UnsupportedError, OSError, ValueError):  # where it matters, loading fails with a reason
        return None


def answer_all(
    label: str,
    llm: QuantizedHuggingFaceLLM,
    prompts: Sequence[str],
    *,
    chat: bool,
    report: Callable[[str], None],
    then: Callable[[QuantizedHuggingFaceLLM, ModelAnswers | None], None],
) -> ModelAnswers | None:
    """Load one model, let it answer, and unload it.

    Args:
        label: Its name in reports.
        llm: The model.
        prompts: The prompts; without any, it only loads.
        chat: Ask as a chat's first message where it has a chat template.
        report: Called with a line for each finished step.
        then: Called with the loaded model and its answers.

    Returns:
        The answers; None without prompts.
    """
    release_memory()
    found = None
    try:
        llm.load()
        report(f"{label}: loaded; {llm.memory_report().summary()}")
        if prompts:
            tokenizer = llm.pipeline.tokenizer
            llm.invoke(prompts[0], max_new_tokens=2)  # starts threads and loads kernels, so that no rate holds that
            texts = [_as_message(tokenizer, p) if chat and tokenizer.chat_template else p for p in prompts]
            answers = [llm.generate([text]).generations[0][0] for text in texts]
            found = ModelAnswers(
                model=_describe(label, llm),
                vocabulary=vocabulary_of(llm),
                prompt_ids=[token_ids(llm._loaded(), text) for text in texts],
                generations=answers,
            )
            report(f"{label}: answered {len(answers)} prompts")
        then(llm, found)
    finally:
        llm.unload()
    return found


def vocabulary_of(llm: QuantizedHuggingFaceLLM) -> int:
    """Return a hash of a loaded model's vocabulary, for this process."""
    return hash(frozenset(llm.pipeline.tokenizer.get_vocab().items()))


def _describe(label: str, llm: QuantizedHuggingFaceLLM) -> ComparedModel:
    found = llm.memory_report()
    before, after = found.before, found.after_generating or found.after_loading
    used_bytes = found.weights.total_bytes
    if before is not None and after is not None:
        readings = [(before.reading(device), after.reading(device)) for device in found.devices]
        used_bytes = sum(y.used_bytes - x.used_bytes for x, y in readings if x is not None and y is not None)
    return ComparedModel(
        label=label,
        model_id=llm.model_id,
        scheme=found.scheme_name,
        weights_bytes=found.weights.total_bytes,
        used_bytes=used_bytes,
    )


def _as_message(tokenizer: Any, prompt: str) -> str:
    message = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))


def logprobs_of(generation: Generation) -> list[dict[str, Any]]:
    """Return the tokens of an answer, each with its log probability and the likeliest ones in its place."""
    info = generation.generation_info or {}
    entries: list[dict[str, Any]] = info.get("logprobs", {}).get("content", [])
    return entries
