"""Comparison of two models: the same prompts, greedily, and where their texts diverge."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
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
from langchain_quantllm.loading.estimate import estimate_memory
from langchain_quantllm.loading.spec import LoadSpec
from langchain_quantllm.schemes import GPTQ, SCHEMES, scheme_from, scheme_hint

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "What is 17 times 23? Show each step.",
    "Translate into French: The library opens at nine.",
    "Write a Python function that reverses the words of a sentence.",
    "日本で一番高い山は何ですか。",
)
"""Default prompts: knowledge, arithmetic, translation, code, Japanese."""

_ALTERNATIVES = 20
_TEMPLATE_TOKENS = 1024  # more than a chat template adds to a message


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer of one model to one prompt.

    Args:
        text: The text.
        tokens: Its tokens, each as text.
        finish_reason: `"stop"` or `"length"`.
        rate_tok_s: Tokens per second after the first; None for a single token.
    """

    text: str
    tokens: tuple[str, ...]
    finish_reason: str
    rate_tok_s: float | None


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
class Divergence:
    """The first place where two answers differ.

    Args:
        tokens: Tokens before it, which are the same.
        chosen_a: The token of the first model there; None where its text had ended.
        chosen_b: The token of the second model there; None where its text had ended.
        gap_a_nats: How much likelier, in log probability, the first model found its own token than the other's; None
            where it does not have the other's among its likeliest.
        gap_b_nats: How much likelier the second model found its own.
    """

    tokens: int
    chosen_a: str | None
    chosen_b: str | None
    gap_a_nats: float | None
    gap_b_nats: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One prompt and the answers of both models.

    Args:
        prompt: The prompt.
        model_a: The first model.
        model_b: The second model.
        a: Answer of the first.
        b: Answer of the second.
        divergence: Where the answers diverge; None where they agree to the end.
    """

    prompt: str
    model_a: ComparedModel
    model_b: ComparedModel
    a: Answer
    b: Answer
    divergence: Divergence | None

    @property
    def agree(self) -> bool:
        """Whether both answers are the same."""
        return self.divergence is None

    @property
    def common_text(self) -> str:
        """The beginning that both texts share."""
        pairs = zip(self.a.text, self.b.text, strict=False)
        return "".join(x for x, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def compare(
    a: str,
    b: str,
    prompts: Sequence[str] = PROMPTS,
    *,
    model: str | None = None,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str = "auto",
    kernel: str = "auto",
    chat: bool = True,
    report: Callable[[str], None] = lambda _: None,
    answered: Callable[[ComparedModel, list[Answer]], None] = lambda *_: None,
) -> list[Comparison]:
    """Let two models answer the same prompts greedily, and find where their answers diverge.

    One of them is in memory at a time. Prompts run one by one, so that the shape of a batch changes nothing.

    Args:
        a: A scheme of `model`, a folder or repository, or either of these with a scheme, as `FOLDER:nf4`.
        b: The other model, named in the same way.
        prompts: Prompts for both.
        model: Folder or repository of a model that is named by a scheme alone.
        max_new_tokens: Most tokens of an answer.
        device: Such as `"cuda:0"`; None takes the first GPU, else the CPU.
        dtype: Dtype of the weights that are not quantized.
        kernel: Kernel for GPTQ.
        chat: Ask as a chat's first message where the model has a chat template, instead of continuing the prompt.
        report: Called with a line for each finished step.
        answered: Called with each model and its answers, in the order of the prompts, as soon as it has them all.

    Returns:
        A comparison for each prompt.

    Raises:
        InvalidOptionError: If a model's name, a prompt or a number is not allowed.
        QuantLLMError: If one of the models cannot be loaded.
    """
    prompts = _checked(prompts)
    common = {"device": device, "dtype": dtype, "max_new_tokens": max_new_tokens}
    tokens = max_new_tokens + max(len(prompt.encode()) for prompt in prompts) + _TEMPLATE_TOKENS
    llms = [_make_llm(name, model, kernel, tokens, common) for name in (a, b)]  # raises before anything is loaded
    found = []
    for label, llm in zip((a, b), llms, strict=True):
        found.append(_answer_all(label, llm, prompts, chat=chat, report=report))
        answered(found[-1][0], [_answer(generation) for generation in found[-1][2]])
    (model_a, vocabulary_a, answers_a), (model_b, vocabulary_b, answers_b) = found
    by = "token_id" if vocabulary_a == vocabulary_b else "token"
    return [
        Comparison(
            prompt=prompt,
            model_a=model_a,
            model_b=model_b,
            a=_answer(x),
            b=_answer(y),
            divergence=_find_divergence(_logprobs(x), _logprobs(y), by=by),
        )
        for prompt, x, y in zip(prompts, answers_a, answers_b, strict=True)
    ]


def as_document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Put comparisons into one document, ready for JSON.

    Args:
        comparisons: The result of `compare`, at least one.
    """
    rows = [asdict(found) for found in comparisons]
    for row in rows:
        del row["model_a"], row["model_b"]
    return {
        "kind": "comparison",
        "a": asdict(comparisons[0].model_a),
        "b": asdict(comparisons[0].model_b),
        "agreeing": sum(found.agree for found in comparisons),
        "rows": rows,
    }


def _checked(prompts: str | Sequence[str]) -> list[str]:
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given or not all(isinstance(prompt, str) and prompt for prompt in given):
        msg = "prompts must hold at least one text, and no empty ones."
        raise InvalidOptionError(msg)
    return given


# The two models.


def _make_llm(
    name: str, model: str | None, kernel: str, tokens: int, common: dict[str, Any]
) -> QuantizedHuggingFaceLLM:
    """Make the LLM of a model's name, with a KV cache for so many tokens; its weights are loaded later."""
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


def _answer_all(
    label: str, llm: QuantizedHuggingFaceLLM, prompts: Sequence[str], *, chat: bool, report: Callable[[str], None]
) -> tuple[ComparedModel, int, list[Generation]]:
    """Load one model, let it answer, and unload it; also returns a hash of its vocabulary."""
    release_memory()
    try:
        llm.load()
        report(f"{label}: loaded; {llm.memory_report().summary()}")
        tokenizer = llm.pipeline.tokenizer
        vocabulary = hash(frozenset(tokenizer.get_vocab().items()))
        llm.invoke(prompts[0], max_new_tokens=2)  # starts threads and loads kernels, so that no rate holds that
        answers = []
        for prompt in prompts:
            text = _as_message(tokenizer, prompt) if chat and tokenizer.chat_template else prompt
            answers.append(llm.generate([text]).generations[0][0])
        found = _describe(label, llm)
        report(f"{label}: answered {len(answers)} prompts")
    finally:
        llm.unload()
    return found, vocabulary, answers


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


# Their answers.


def _logprobs(generation: Generation) -> list[dict[str, Any]]:
    info = generation.generation_info or {}
    entries: list[dict[str, Any]] = info.get("logprobs", {}).get("content", [])
    return entries


def _answer(generation: Generation) -> Answer:
    info = generation.generation_info or {}
    return Answer(
        text=generation.text,
        tokens=tuple(entry["token"] for entry in _logprobs(generation)),
        finish_reason=info["finish_reason"],
        rate_tok_s=info["timing"]["rate_tok_s"],
    )


def _find_divergence(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], *, by: str) -> Divergence | None:
    """Find the first place where two sequences of tokens differ; one that ends sooner differs where it ends."""
    pairs = itertools.zip_longest(a, b)
    place = next((i for i, (x, y) in enumerate(pairs) if x is None or y is None or x[by] != y[by]), None)
    if place is None:
        return None
    x, y = (tokens[place] if place < len(tokens) else None for tokens in (a, b))
    return Divergence(
        tokens=place,
        chosen_a=None if x is None else x["token"],
        chosen_b=None if y is None else y["token"],
        gap_a_nats=_gap(x, y, by),
        gap_b_nats=_gap(y, x, by),
    )


def _gap(own: dict[str, Any] | None, other: dict[str, Any] | None, by: str) -> float | None:
    """How much likelier a token was than another one, in nats; None where the latter is not among the likeliest."""
    if own is None or other is None:
        return None
    found = next((entry["logprob"] for entry in own["top_logprobs"] if entry[by] == other[by]), None)
    return None if found is None else float(own["logprob"] - found)
