"""The checks of `bench --quality`: their questions, how answers are judged, and the whole command."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from langchain_core.messages import AIMessage

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench.answers import (
    _has_right_call,
    _has_valid_calls,
    _is_valid_text,
    call_questions,
    check_data,
    measure_outputs,
    output_questions,
)
from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.records import BenchReport, Record
from langchain_quantllm.bench.retrieval import DEPTHS, long_texts, measure_retrieval
from langchain_quantllm.compat.packages import is_installed
from langchain_quantllm.errors import InvalidOptionError
from tests.support.bench import bench, report_of

WEATHER = next(question for question in call_questions() if question.name == "get_weather")
OSLO = {"city": "Oslo", "unit": "celsius"}


def answer(*calls: tuple[str, dict[str, Any]], **fields: Any) -> AIMessage:
    tool_calls = [{"name": name, "args": args, "id": str(i)} for i, (name, args) in enumerate(calls)]
    return AIMessage("", tool_calls=tool_calls, **fields)


def test_every_question_has_a_right_answer_that_is_valid() -> None:
    for question in call_questions():
        assert _has_right_call(answer((question.name, dict(question.arguments))), question)
        assert len({tool["name"] for tool in question.tools}) == 3
        assert "{" not in question.text
    for tool in check_data()["tools"]:
        Draft202012Validator.check_schema(tool["parameters"])
    for output in output_questions():
        Draft202012Validator.check_schema(output.schema)
        assert "{" not in output.text


def test_any_first_questions_ask_for_all_kinds() -> None:
    assert len({question.name for question in call_questions()[:8]}) == 8
    assert len({question.schema["title"] for question in output_questions()[:6]}) == 6
    assert len({question.text for question in call_questions()}) == len(call_questions()) == 48


@pytest.mark.parametrize(
    ("message", "is_valid", "is_right"),
    [
        (answer(("get_weather", OSLO)), True, True),
        (answer(("get_weather", {**OSLO, "city": "oslo."})), True, True),
        (answer(("get_weather", {**OSLO, "city": "Rome"})), True, False),
        (answer(("get_weather", OSLO), ("get_weather", OSLO)), True, False),
        (answer(("get_weather", {"city": "Oslo"})), False, False),
        (answer(("get_weather", {**OSLO, "unit": "kelvin"})), False, False),
        (answer(("weather", OSLO)), False, False),
        (answer(), False, False),
        (
            answer(
                ("get_weather", OSLO),
                invalid_tool_calls=[{"name": "get_weather", "args": "{", "id": "9", "error": "no JSON"}],
            ),
            False,
            False,
        ),
    ],
)
def test_calls_are_judged_by_the_schemas_of_the_offered_tools(
    message: AIMessage, is_valid: bool, is_right: bool
) -> None:
    assert (_has_valid_calls(message, WEATHER), _has_right_call(message, WEATHER)) == (is_valid, is_right)


@pytest.mark.parametrize(
    ("text", "is_valid"),
    [
        ('{"name": "Ada", "age": 36, "mood": "glad"}', True),
        ('```json\n{"name": "Ada", "age": 36, "mood": "glad"}\n```', True),
        ('{"name": "Ada", "age": -1, "mood": "glad"}', False),
        ('{"name": "Ada", "age": 36}', False),
        ("Ada is 36.", False),
    ],
)
def test_texts_are_judged_by_the_schema(text: str, is_valid: bool) -> None:
    assert _is_valid_text(text, output_questions()[0].schema) == is_valid


def test_long_texts_hold_their_facts_at_their_depths(tokenizer: Any) -> None:
    first, second = long_texts(tokenizer, 640, 2)
    assert first != second
    for text, facts in (first, second):
        assert len({place for place, _ in facts}) == len(facts) == len(DEPTHS)
        places = [text.index(f"The secret number of the {place} is {number}.") / len(text) for place, number in facts]
        for place, depth in zip(places, DEPTHS, strict=True):
            assert abs(place - depth) < 0.15
        question = f"\n\nThe secret number of the {facts[0][0]} is"
        assert 560 <= len(tokenizer(text + question)["input_ids"]) <= 640


def test_a_text_beyond_the_models_context_is_told(tiny_llm: QuantizedHuggingFaceLLM) -> None:
    with pytest.raises(InvalidOptionError, match="prompts of 100000 tokens do not fit into"):
        measure_retrieval(tiny_llm, 100_000, 5)


@pytest.mark.slow
def test_a_model_that_reads_code_finds_facts_nearby(qwen_coder: Path) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=str(qwen_coder), device="cpu", temperature=0, progress=False)
    [(case, values)] = measure_retrieval(llm, 400, 10)
    llm.unload()
    assert case == {"tokens": 400}
    assert values["value"] >= 0.8
    assert sum(values["by_depth"]) / len(DEPTHS) == pytest.approx(values["value"])


@pytest.mark.slow
@pytest.mark.skipif(not is_installed("xgrammar"), reason="needs xgrammar")
def test_a_model_of_two_layers_writes_valid_json_only_where_it_must(short_smollm2: Path) -> None:
    fields = {"model_id": str(short_smollm2), "device": "cpu", "temperature": 0, "progress": False}
    fields["kv_cache_memory"] = "256MiB"
    questions = output_questions()[:2]
    [(free, without)], [(held, with_masks)] = (measure_outputs(fields, questions, m) for m in ("free", "constrained"))
    assert (free["mode"], held["mode"]) == ("free", "constrained")
    assert without["scores"] == [0.0] * 2
    assert with_masks["scores"] == [1.0] * 2
    assert with_masks["interval"][0] < 0.6  # two questions prove little


def test_shares_are_compared_with_16_bits_by_question() -> None:
    def check(scheme: str, scores: list[float]) -> list[Record]:
        loading = Record(scheme=scheme, measurement="loading", values={"scheme_name": scheme})
        values = {"value": sum(scores) / len(scores), "scores": scores}
        return [loading, Record(scheme=scheme, measurement="json", case={"mode": "free"}, values=values)]

    records = [*check("nf4", [1.0, 0.0, 0.0, 1.0]), *check("none", [1.0, 1.0, 0.0, 1.0])]
    nf4, none = report_of(records, BenchOptions()).of("json")
    assert nf4["difference"] == -0.25
    assert nf4["difference_interval"][0] < -0.25 < nf4["difference_interval"][1]
    assert "difference" not in none.values
    [other] = report_of([*records[:2], *check("none", [1.0])], BenchOptions()).of("json", "nf4")
    assert "difference" not in other.values  # other questions


def measured(folder: Path, file: Path, *words: object) -> tuple[BenchReport, str]:
    """Run the command in 16 bits and int8; returns its report, and what it shows in one line."""
    sizes = ("--questions", 2, "--quality-tokens", 256, "--retrieval-tokens", 320)
    result = bench(folder, "--quality", "--schemes", "none,int8", *sizes, *words, "--json", file)
    assert result.exit_code == 0, result.output
    report = BenchReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    assert not report.failures
    return report, re.sub(r"\s+", " ", result.stdout)


def test_predictions_are_measured_by_the_layers_and_by_the_engine(short_smollm2: Path, tmp_path: Path) -> None:
    report, shown = measured(short_smollm2, tmp_path / "out.json", "--without", "tool_calls,json")
    by_layers, by_engine = report.of("predictions", "int8")
    assert (by_layers["by"], by_engine["by"]) == ("layers", "engine")
    # The same weights: bitsandbytes' layers round activations as well.
    assert 0 < by_engine["kl_nats"] < by_layers["kl_nats"]
    for found in report.of("predictions"):
        assert found["low"] < found["perplexity"] < found["high"]
    [facts] = report.of("retrieval", "int8")
    assert facts["questions"] == 5
    assert len(facts["difference_interval"]) == 2
    for text in ("predictions of a text", "the layers", "the engine", "facts in 320 tokens"):
        assert text in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--quality", "--speed"), "--speed and --quality are 2 benches"),
        (("--tasks", "folder"), "belongs to --quality"),
        (("--quality", "--without", "predictionz"), "did you mean 'predictions'"),
        (("--quality", "--questions", 0), "questions=0 is not allowed"),
        (("--quality", "--retrieval-tokens", "512,100"), "each number must be at least 320"),
        (("--quality", "--task-questions", -1), "task_questions=-1 is not allowed"),
    ],
)
def test_what_is_not_allowed_is_told_before_loading(words: tuple[object, ...], said: str, tiny: str) -> None:
    result = bench(tiny, *words)
    assert result.exit_code == 1
    assert said in re.sub(r"\s+", " ", result.stderr)
    assert "loaded" not in result.stderr
