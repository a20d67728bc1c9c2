"""Comparison of two models: the same prompts, greedily, where their texts diverge, and which is nearer to 16 bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from langchain_core.outputs import Generation

from langchain_quantllm.bench.compared_model import (
    ComparedModel,
    ModelAnswers,
    answer_all,
    logprobs_of,
    make_llm,
    vocabulary_of,
)
from langchain_quantllm.bench.nearness import Nearness, ReferenceReader, mean_kl
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM
from langchain_quantllm.schemes import Unquantized

PROMPTS = (
    "Why is the sky blue? Answer in two sentences.",
    "What is 17 times 23? Show each step.",
    "Translate into French: The library opens at nine.",
    "Write a Python function that reverses the words of a sentence.",
    "日本で一番高い山は何ですか。",
)
"""Default prompts: knowledge, arithmetic, translation, code, Japanese."""

_SHOWN = 60
"""Characters on either side of a divergence."""

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
class Divergence:
    """The first place where two answers differ.

    Args:
        tokens: Tokens before it, which are the same.
        chosen_a: The token of the first model there; None where its text had ended.
        chosen_b: The token of the second model there; None where its text had ended.
        gap_a_nats: How much likelier, in log probability, the first model found its own token than the other's; None
            where it does not have the other's among its likeliest.
        gap_b_nats: How much likelier the second model found its own.
        before: The end of the text that both share.
        after_a: The text of the first model from there on, its beginning.
        after_b: The text of the second model from there on, its beginning.
        reference_gap_nats: How much likelier the reference finds the first model's token than the second's; None
            without a reference, and where a text had ended.
        reference_choice: The reference's likeliest token there; None likewise.
    """

    tokens: int
    chosen_a: str | None
    chosen_b: str | None
    gap_a_nats: float | None
    gap_b_nats: float | None
    before: str
    after_a: str
    after_b: str
    reference_gap_nats: float | None = None
    reference_choice: str | None = None


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
        reference: Name of the reference; None without one.
        near_a: The first answer, as the reference sees it; None without one.
        near_b: The second answer likewise.
    """

    prompt: str
    model_a: ComparedModel
    model_b: ComparedModel
    a: Answer
    b: Answer
    divergence: Divergence | None
    reference: str | None = None
    near_a: Nearness | None = None
    near_b: Nearness | None = None

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
    reference: str | None = None,
    max_new_tokens: int = 64,
    device: str | None = None,
    dtype: str = "auto",
    kernel: str = "auto",
    chat: bool = True,
    report: Callable[[str], None] = lambda _: None,
    answered: Callable[[ComparedModel, list[Answer]], None] = lambda *_: None,
) -> list[Comparison]:
    """Let two models answer the same prompts greedily, and find where their answers diverge.

    One of them is in memory at a time. Prompts run one by one, so that the shape of a batch changes nothing. If one of
    the two is not quantized, it is answered last and then reads both answers, as the reference.

    Args:
        a: A scheme of `model`, a folder or repository, or either of these with a scheme, as `FOLDER:nf4`.
        b: The other model, named in the same way.
        prompts: Prompts for both.
        model: Folder or repository of a model that is named by a scheme alone.
        reference: A third model that reads the answers, named in the same way, such as `"none"`; it needs the same
            vocabulary. None takes the one of the two that is not quantized; without one, nothing is read.
        max_new_tokens: Most tokens of an answer.
        device: Such as `"cuda:0"`; None takes the first GPU, else the CPU.
        dtype: Dtype of the weights that are not quantized.
        kernel: Kernel for GPTQ.
        chat: Ask as a chat's first message where the model has a chat template, instead of continuing the prompt.
        report: Called with a line for each finished step.
        answered: Called with each model and its answers, in the order of the prompts, as soon as it has them all; the
            reference comes last.

    Returns:
        A comparison for each prompt.

    Raises:
        InvalidOptionError: If a model's name, a prompt or a number is not allowed.
        QuantLLMError: If one of the models cannot be loaded.
    """
    prompts = _checked(prompts)
    common = {"device": device, "dtype": dtype, "max_new_tokens": max_new_tokens}
    tokens = max_new_tokens + max(len(prompt.encode()) for prompt in prompts) + _TEMPLATE_TOKENS
    # Raises before anything is loaded.
    llms = [make_llm(name, model, kernel, tokens, common) for name in (a, b)]
    labels = [a, b]
    if reference is not None and reference not in labels:
        llms.append(make_llm(reference, model, kernel, tokens, common))
        labels.append(reference)
    reads = labels.index(reference) if reference is not None else _unquantized(llms)
    found: dict[int, ModelAnswers] = {}
    views: list[_View] = []
    for i in sorted(range(len(llms)), key=lambda i: i == reads):

        def read(llm: QuantizedHuggingFaceLLM, own: ModelAnswers | None, i: int = i) -> None:
            if i == reads:
                both = [own if own is not None and j == i else found[j] for j in (0, 1)]
                views.extend(_read_all(labels[i], llm, both, report))

        answers = answer_all(labels[i], llms[i], prompts if i < 2 else [], chat=chat, report=report, then=read)
        if answers is not None:
            found[i] = answers
            answered(answers.model, [_answer(generation) for generation in answers.generations])
    x, y = found[0], found[1]
    by = "token_id" if x.vocabulary == y.vocabulary else "token"
    return [
        _compared(prompt, (x, y), n, by, views[n] if views else None, labels[reads] if views and reads >= 0 else None)
        for n, prompt in enumerate(prompts)
    ]


def as_document(comparisons: Sequence[Comparison]) -> dict[str, Any]:
    """Put comparisons into one document, ready for JSON.

    Args:
        comparisons: The result of `compare`, at least one.
    """
    rows = [asdict(found) for found in comparisons]
    for row in rows:
        for name in ("model_a", "model_b", "reference"):
            del row[name]
    near = [[one for found in comparisons if (one := getattr(found, f"near_{x}")) is not None] for x in "ab"]
    return {
        "kind": "comparison",
        "a": asdict(comparisons[0].model_a),
        "b": asdict(comparisons[0].model_b),
        "agreeing": sum(found.agree for found in comparisons),
        "reference": comparisons[0].reference,
        "kl_nats": [asdict(mean_kl(found)) if found else None for found in near],
        "rows": rows,
    }


def _checked(prompts: str | Sequence[str]) -> list[str]:
    given = [prompts] if isinstance(prompts, str) else list(prompts)
    if not given or not all(isinstance(prompt, str) and prompt for prompt in given):
        msg = "prompts must hold at least one text, and no empty ones."
        raise InvalidOptionError(msg)
    return given


_View = tuple[Nearness | None, Nearness | None, float | None, str | None]
"""How the reference sees a pair of answers: each, and the gap and its own choice where they diverge."""


def _unquantized(llms: Sequence[QuantizedHuggingFaceLLM]) -> int:
    """Number of the only model without quantization; -1 if there is none, or several."""
    found = [i for i, llm in enumerate(llms) if isinstance(llm.scheme, Unquantized)]
    return found[0] if len(found) == 1 else -1


def _read_all(
    label: str, llm: QuantizedHuggingFaceLLM, both: Sequence[ModelAnswers], report: Callable[[str], None]
) -> list[_View]:
    """Let the reference read the answers of both models; nothing if its vocabulary is another one."""
    if {answers.vocabulary for answers in both} != {vocabulary_of(llm)}:
        report(f"{label}: its vocabulary is not that of both models, so it cannot say which is nearer to it")
        return []
    reader = ReferenceReader(llm.pipeline.model, llm.pipeline.tokenizer)
    views: list[_View] = []
    for n in range(len(both[0].generations)):
        entries = [logprobs_of(answers.generations[n]) for answers in both]
        prompts = [answers.prompt_ids[n] for answers in both]
        near = [reader.read(*pair) for pair in zip(prompts, entries, strict=True)]
        place, gap = _place(*entries, by="token_id"), None
        choices = [
            view.choices for view in near if view is not None and place is not None and len(view.choices) > place
        ]
        choice = choices[0][place] if choices and place is not None else None
        if place is not None and min(len(row) for row in entries) > place:
            ids = [entry["token_id"] for entry in entries[0][:place]]
            gap = reader.gap_nats(prompts[0], ids, *(row[place]["token_id"] for row in entries))
        views.append((near[0], near[1], gap, choice))
    report(f"{label}: read the answers of both")
    return views


def _answer(generation: Generation) -> Answer:
    info = generation.generation_info or {}
    return Answer(
        text=generation.text,
        tokens=tuple(entry["token"] for entry in logprobs_of(generation)),
        finish_reason=info["finish_reason"],
        rate_tok_s=info["timing"]["rate_tok_s"],
    )


def _compared(
    prompt: str, both: tuple[ModelAnswers, ModelAnswers], n: int, by: str, view: _View | None, reference: str | None
) -> Comparison:
    near_a, near_b, gap, choice = view or (None, None, None, None)
    x, y = (answers.generations[n] for answers in both)
    divergence = _find_divergence(logprobs_of(x), logprobs_of(y), by=by)
    if divergence is not None:
        divergence = replace(divergence, reference_gap_nats=gap, reference_choice=choice)
    return Comparison(
        prompt=prompt,
        model_a=both[0].model,
        model_b=both[1].model,
        a=_answer(x),
        b=_answer(y),
        divergence=divergence,
        reference=reference,
        near_a=near_a,
        near_b=near_b,
    )


def _place(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], *, by: str) -> int | None:
    """Find the first place where two sequences of tokens differ; one that ends sooner differs where it ends."""
    pairs = itertools.zip_longest(a, b)
    return next((i for i, (x, y) in enumerate(pairs) if x is None or y is None or x[by] != y[by]), None)


def _find_divergence(a: Sequence[dict[str, Any]], b: Sequence[dict[str, Any]], *, by: str) -> Divergence | None:
    """Describe the first place where two sequences of tokens differ."""
    place = _place(a, b, by=by)
    if place is None:
        return None
    x, y = (tokens[place] if place < len(tokens) else None for tokens in (a, b))
    after_a, after_b = ("".join(entry["token"] for entry in tokens[place:])[:_SHOWN] for tokens in (a, b))
    return Divergence(
        tokens=place,
        chosen_a=None if x is None else x["token"],
        chosen_b=None if y is None else y["token"],
        gap_a_nats=_gap(x, y, by),
        gap_b_nats=_gap(y, x, by),
        before="".join(entry["token"] for entry in a[:place])[-_SHOWN:],
        after_a=after_a,
        after_b=after_b,
    )


def _gap(own: dict[str, Any] | None, other: dict[str, Any] | None, by: str) -> float | None:
    """How much likelier a token was than another one, in nats; None where the latter is not among the likeliest."""
    if own is None or other is None:
        return None
    found = next((entry["logprob"] for entry in own["top_logprobs"] if entry[by] == other[by]), None)
    return None if found is None else float(own["logprob"] - found)
