"""Tasks of lm-evaluation-harness over a loaded model: `HarnessModel` is its interface, `run_tasks` runs them.

Log-likelihoods come from the model's own forward with the products of the fast engine's kernels, texts from the engine.
Nothing here knows the package lm-eval, apart from `run_tasks`.

Source: the interface is `lm_eval.api.model.LM`, and texts become tokens as in its `HFLM`.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from langchain_quantllm.bench.harness_tasks import TaskFiles
from langchain_quantllm.bench.intervals import Interval, ratio, share
from langchain_quantllm.bench.likelihood import Score, score_continuations
from langchain_quantllm.engine.continuous import ContinuousEngine
from langchain_quantllm.errors import InvalidOptionError, UnsupportedError
from langchain_quantllm.llms import QuantizedHuggingFaceLLM

_NEW_TOKENS = 256
"""Length of texts for tasks that name none, as in HFLM."""

_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""Names of a text's length in tasks; the first one counts."""

_OPTIONS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "do_sample")
_NORMAL_95 = 1.96


@contextlib.contextmanager
def engine_products(llm: QuantizedHuggingFaceLLM) -> Iterator[None]:
    """Let calls of a loaded model itself multiply by its engine's kernels, as requests do.

    Args:
        llm: A model of this process; with the pipeline engine, its layers multiply in either case.
    """
    engine = llm._engine()
    with engine.products() if isinstance(engine, ContinuousEngine) else contextlib.nullcontext():
        yield


class HarnessModel:
    """A loaded model as lm-evaluation-harness asks it. Requests are its `Instance`s: `args` holds the arguments."""

    def __init__(self, llm: QuantizedHuggingFaceLLM, *, report: Callable[[str], None] = lambda _: None) -> None:
        """Take a model, which is loaded if it is not.

        Args:
            llm: The model; its own options of generation count where a task has none.
            report: Called with a line for each finished kind of requests.
        """
        super().__init__()
        self._llm, self._report = llm, report
        self._model, self._tokenizer = llm.pipeline.model, llm.pipeline.tokenizer
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self._prefix_id = eos if bos is None else bos
        config = self._model.config.get_text_config()
        self._most_tokens: int | None = getattr(config, "max_position_embeddings", None)

    @property
    def max_length(self) -> int | None:
        """Tokens of the model's context; None if it has no limit."""
        return self._most_tokens

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer."""
        return str(self._tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the chat template's text; empty if there is none, or it is not asked for."""
        return str(self._tokenizer.chat_template or "") if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Render the messages of a task by the model's chat template.

        Raises:
            UnsupportedError: If it has none.
        """
        if not self._tokenizer.chat_template:
            msg = f"{self.tokenizer_name} has no chat template; run its tasks without --chat."
            raise UnsupportedError(msg)
        ends = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return str(self._tokenizer.apply_chat_template(chat_history, tokenize=False, **ends))

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return, for each `(context, continuation)`, the log-likelihood in nats, and whether it is the greedy text."""
        pairs = [self._encode_pair(*request.args) for request in requests]
        self._report(f"scoring {len(pairs)} continuations")
        return [(score.nats, score.is_greedy) for score in self._score(pairs)]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log-likelihood of each `(text,)` in nats, in windows as long as the model's context."""
        windows: list[tuple[list[int], list[int]]] = []
        counts = []
        for request in requests:
            own = list(self._windows(self._encode(request.args[0])))
            windows += own
            counts.append(len(own))
        self._report(f"scoring {len(requests)} texts")
        scores = iter(self._score(windows))
        return [math.fsum(next(scores).nats for _ in range(count)) for count in counts]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return the text of each `(context, options)` up to one of the strings `until`, all of an option set at once.

        Contexts that leave no room lose their beginning.
        """
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
        texts: dict[int, str] = {}
        for options, members in groups.items():
            self._report(f"writing {len(members)} texts")
            given = self._options(json.loads(options))
            found = self._llm.generate([requests[i].args[0] for i in members], **given)
            texts |= {i: row[0].text for i, row in zip(members, found.generations, strict=True)}
        return [texts[i] for i in range(len(requests))]

    def _options(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Translate a task's options of generation."""
        until = asked.get("until") or []
        length = next((asked[name] for name in _LENGTHS if asked.get(name) is not None), _NEW_TOKENS)
        options = {name: asked[name] for name in _OPTIONS if asked.get(name) is not None}
        if not options.pop("do_sample", options.get("temperature", 0) > 0):
            options = {**options, "temperature": 0.0}
        stop = [until] if isinstance(until, str) else list(until)
        return {**options, "stop": stop or None, "max_new_tokens": int(length), "truncation": "left"}

    def _score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[Score]:
        with engine_products(self._llm):
            return score_continuations(self._model, pairs, most_tokens=self._most_tokens)

    def _encode(self, text: str, *, special: bool = True) -> list[int]:
        """Encode a text; a begin token that it has already is not doubled."""
        begins = text.startswith(self._tokenizer.decode(self._prefix_id))
        return list(self._tokenizer.encode(text, add_special_tokens=special and not begins))

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Encode both as one text, and cut it; blanks at the context's end belong to the continuation."""
        if not context:
            ids = self._encode(continuation, special=False)
            return ([self._prefix_id], ids) if ids[0] != self._prefix_id else (ids[:1], ids[1:])
        blanks = len(context) - len(context.rstrip())
        if blanks:
            context, continuation = context[:-blanks], context[-blanks:] + continuation
        whole, before = self._encode(context + continuation), self._encode(context)
        # Where both share their last token, the harness's own model has nothing to score, and fails.
        return before, whole[len(before) :] or self._encode(continuation, special=False)

    def _windows(self, ids: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """Cut a text into contexts and continuations: each token is scored once, the last ones in a full window."""
        most = self._most_tokens or max(1, len(ids))
        for start in range(0, len(ids), most):
            end = min(start + most, len(ids))
            before = [self._prefix_id] if start == 0 else ids[max(0, end - most - 1) : start]
            yield before, ids[start:end]


def run_tasks(
    llm: QuantizedHuggingFaceLLM,
    files: TaskFiles,
    *,
    limit: int | None = None,
    chat: bool = False,
    report: Callable[[str], None] = lambda _: None,
) -> dict[tuple[str, str, str], dict[str, Any]]:
    """Run tasks of lm-evaluation-harness over a model.

    Args:
        llm: The model.
        files: The tasks.
        limit: Most questions of a task; None for all.
        chat: Whether questions are put as a chat's message, few-shot examples as its turns.
        report: Called with a line for each finished kind of requests.

    Returns:
        The values of each `(task, metric, filter)`: `value`, `interval` (of 95%, or None), `higher_is_better`,
        `questions`, and `scores`, those of each question where they are numbers.
    """
    import lm_eval  # type: ignore[import-not-found,import-untyped,unused-ignore]
    from lm_eval.api.model import LM  # type: ignore[import-not-found,import-untyped,unused-ignore]

    class Adapted(HarnessModel, LM):  # type: ignore[misc,unused-ignore]
        """The model under the harness's own base class."""

    tasks = files.load()
    found = lm_eval.evaluate(
        lm=Adapted(llm, report=report),
        task_dict=tasks,
        limit=limit,
        apply_chat_template=chat,
        fewshot_as_multiturn=chat,
        log_samples=True,
    )
    return {
        (task, *key.split(",", 1)): _values(found, task, key)
        for task in tasks["tasks"]
        for key, value in found["results"][task].items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float)
    }


def _values(found: Mapping[str, Any], task: str, key: str) -> dict[str, Any]:
    metric, kind = key.split(",", 1)
    results, samples = found["results"][task], found["samples"][task]
    scores = [sample.get(metric) for sample in samples if sample["filter"] == kind]
    numbers = [float(score) for score in scores if isinstance(score, int | float)]
    value, error = float(results[key]), results.get(f"{metric}_stderr,{kind}")
    is_mean = len(numbers) == len(scores) > 0 and math.isclose(value, sum(numbers) / len(numbers), abs_tol=1e-9)
    interval: Interval | None
    if is_mean and set(numbers) <= {0.0, 1.0}:
        interval = share([score == 1 for score in numbers])
    elif isinstance(error, int | float) and math.isfinite(error):
        interval = Interval(mean=value, low=value - _NORMAL_95 * error, high=value + _NORMAL_95 * error)
    else:
        interval = _interval_of_ratio(scores, value)
    return {
        "value": value,
        "interval": None if interval is None else [interval.low, interval.high],
        "higher_is_better": found["higher_is_better"].get(task, {}).get(metric),
        "questions": found["n-samples"][task]["effective"],
        "scores": numbers if is_mean else None,
    }


def _interval_of_ratio(scores: Sequence[Any], value: float) -> Interval | None:
    """Bootstrap over texts what is computed of the quotient of two sums: log-likelihoods, and words or bytes."""
    if not scores or not all(isinstance(score, tuple | list) and len(score) == 2 for score in scores):
        return None
    nats, counts = zip(*scores, strict=True)
    found = ratio(nats, counts)
    for of_ratio in (lambda r: math.exp(-r), lambda r: -r / math.log(2)):  # perplexity by word or byte; bits by byte
        if math.isclose(of_ratio(found.mean), value, rel_tol=1e-6):
            return Interval(mean=value, low=of_ratio(found.high), high=of_ratio(found.low))
    return None


def check_limit(limit: int | None) -> None:
    """Check the number of questions.

    Raises:
        InvalidOptionError: If it is below 1.
    """
    if limit is not None and limit < 1:
        msg = f"limit={limit} is not allowed; it must be at least 1, or None for all questions."
        raise InvalidOptionError(msg)
