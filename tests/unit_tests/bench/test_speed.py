"""The speed bench: that it measures the work it says. How fast anything is, no test asserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.testing import Result

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench import calls, options
from langchain_quantllm.bench.options import SPEED, BenchOptions
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.records import BenchReport
from langchain_quantllm.bench.subjects import subjects_of
from langchain_quantllm.errors import GenerationError, InvalidOptionError, MissingPackageError
from tests.support.bench import bench, measure, with_begin_token

SMALL: dict[str, Any] = {
    "measurements": SPEED,
    "peer": False,
    "batches": (1, 3),
    "new_tokens": 5,
    "prompt_tokens": 7,
    "repeats": 2,
    "shared": 3,
    "shared_tokens": 70,
    "long_prompt_tokens": 40,
}


@pytest.fixture(scope="module")
def measured(tiny: str) -> tuple[BenchReport, list[str]]:
    return measure(subjects_of({"none": tiny, "nf4": tiny}), BenchOptions(**SMALL))


def bench_speed(*words: object) -> Result:
    return bench("--speed", *words)


# Prompts.


@pytest.fixture(params=["bytes", "words", "begin token"])
def any_tokenizer(request: pytest.FixtureRequest, tiny: str, tokenizer: Any) -> Any:
    if request.param == "bytes":
        return AutoTokenizer.from_pretrained(tiny)
    return tokenizer if request.param == "words" else with_begin_token(tokenizer)


@pytest.mark.parametrize("tokens", [3, 30, 512])
def test_prompts_have_their_length_and_are_distinct(any_tokenizer: Any, tokens: int) -> None:
    prompts = Prompts(any_tokenizer)
    given = prompts.draw(20, tokens) + prompts.draw(20, tokens)
    assert len(set(given)) == 40
    assert {len(any_tokenizer(text)["input_ids"]) for text in given} == {tokens}


def test_prompts_share_a_prefix_within_a_draw_only(any_tokenizer: Any) -> None:
    prompts = Prompts(any_tokenizer)
    first, second = ([any_tokenizer(text)["input_ids"] for text in prompts.draw_sharing(10, 50, 58)] for _ in range(2))
    for ids in (first, second):
        assert {len(i) for i in ids} == {58}
        assert len({tuple(i[:50]) for i in ids}) == 1
        assert len({tuple(i) for i in ids}) == 10
    begins = 2 if any_tokenizer("")["input_ids"] else 1  # more than the begin token, of which there is one
    assert first[0][: 15 + begins] != second[0][: 15 + begins]


def test_prompts_are_repeatable(tokenizer: Any) -> None:
    assert Prompts(tokenizer, seed=3).draw(4, 12) == Prompts(tokenizer, seed=3).draw(4, 12)


def test_there_are_only_so_many_prompts(tiny: str) -> None:
    with pytest.raises(InvalidOptionError, match="no prompts of exactly 1 tokens"):
        Prompts(AutoTokenizer.from_pretrained(tiny)).draw(500, 1)


# Measuring.


def test_every_scheme_is_loaded_with_the_fast_engine(measured: tuple[BenchReport, list[str]]) -> None:
    report, lines = measured
    assert report.schemes == ["none", "nf4"]
    assert report.failures == []
    for scheme in report.schemes:
        engine, loading = report.first("engine", scheme), report.first("loading", scheme)
        assert engine is not None
        assert loading is not None
        assert engine["name"] == "fast"
        assert not engine["graphs"]
        unread_bytes = 512 * 256 * 2  # the input embedding, in bfloat16
        assert loading["read_bytes"] == loading["weights_bytes"] - unread_bytes
        assert loading["limit_tok_s"] == pytest.approx(1e9 / loading["read_bytes"])
        assert report.of("peer") == []
        assert sum(line.startswith(f"{scheme}: ") for line in lines) >= 6
    none, nf4 = report.of("loading")
    assert nf4["read_bytes"] < none["read_bytes"]


def test_generation_counts_every_token(measured: tuple[BenchReport, list[str]]) -> None:
    report, _ = measured
    for scheme in report.schemes:
        one, many = report.of("generation", scheme)
        assert [(found["call"], found["batch"]) for found in (one, many)] == [("stream", 1), ("abatch", 3)]
        for found in (one, many):
            assert (found["prompt_tokens"], found["new_tokens"]) == (7, 5)
            assert found["rate_tok_s"] == pytest.approx(found["batch"] * 5 / found["total_s"])
            assert len(found["runs_s"]) == 2
            assert min(found["runs_s"]) <= found["total_s"] <= max(found["runs_s"])
            assert 0 < found["first_token_s"] < found["total_s"]
            assert found["bare_position"] == 9
            assert found["bare_step_s"] is not None
            assert found["step_ratio"] == pytest.approx(found["engine_step_s"] / found["bare_step_s"])
        assert one["first_text_s"] is not None
        [loading] = report.of("loading", scheme)
        assert one["limit_share"] == pytest.approx(one["decode_rate_tok_s"] / loading["limit_tok_s"])
        assert many["first_text_s"] is many["limit_share"] is None


def test_long_prompt_and_shared_prefix(measured: tuple[BenchReport, list[str]]) -> None:
    report, _ = measured
    assert len(report.of("long_prompt")) == len(report.of("shared_prefix")) == 2
    for long in report.of("long_prompt"):
        assert long["prompt_tokens"] == 40
        assert long["ratio"] == pytest.approx(long["first_text_s"] / long["bare_s"])
    for shared in report.of("shared_prefix"):
        assert (shared["requests"], shared["prefix_tokens"], shared["prompt_tokens"]) == (3, 70, 78)
        assert 0 < shared["cached_tokens"] <= 2 * 70  # whole blocks, by all requests but the one that computes them
        assert shared["ratio"] == pytest.approx(shared["apart_s"] / shared["shared_s"])


def test_what_does_not_fit_is_left_out(tiny: str) -> None:
    small = {"batches": (1,), "new_tokens": 2, "repeats": 1, "shared_tokens": 1020, "long_prompt_tokens": 1022}
    report, lines = measure(subjects_of({"none": tiny}), BenchOptions(measurements=SPEED, peer=False, **small))
    assert report.of("long_prompt") == report.of("shared_prefix") == report.failures == []
    assert sum("the model has room for" in line for line in lines) == 2


def test_texts_that_do_not_fit_are_a_failure(tiny: str) -> None:
    given = BenchOptions(measurements=SPEED, peer=False, prompt_tokens=1000, new_tokens=128)
    report, _ = measure(subjects_of({"none": tiny}), given)
    [failure] = report.failures
    assert failure.measurement == "generation"
    assert "do not fit into the 1024 tokens" in str(failure.failure)
    assert not {*SPEED} & {record.measurement for record in report.records if record.failure is None}
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="none", device="cpu", progress=False)
    assert not llm.is_loaded  # a failure leaves no weights behind


def test_other_lengths_than_asked_for_are_an_error() -> None:
    info = {"usage_metadata": {"input_tokens": 7, "output_tokens": 4, "input_token_details": {"cache_read": 0}}}
    run = calls.Run([info, info], 1.0, 1.0)
    run.check(2, 7, 4)
    with pytest.raises(GenerationError, match="2 texts of .* instead of 3"):
        run.check(3, 7, 4)
    with pytest.raises(GenerationError, match="cannot be compared"):
        run.check(2, 7, 5)
    cached = {"usage_metadata": {**info["usage_metadata"], "input_token_details": {"cache_read": 5}}}
    with pytest.raises(GenerationError, match="10 tokens of prompts were not computed"):
        calls.Run([cached, cached], 1.0, 1.0).check(2, 7, 4)


# The peer.


def test_the_peer_over_the_same_weights(tiny: str) -> None:
    pytest.importorskip("langchain_huggingface")
    small = BenchOptions(
        measurements=SPEED, peer=True, batches=(1, 5), new_tokens=4, prompt_tokens=6, repeats=1, peer_new_tokens=2,
        shared=0, long_prompt_tokens=0,
    )  # fmt: skip
    report, _ = measure(subjects_of({"none": tiny}), small)
    assert report.of("long_prompt") == report.of("shared_prefix") == report.failures == []
    peers = report.of("peer")
    found = [(p["call"], p["batch"], p["batch_size"], p["new_tokens"]) for p in peers]
    assert found == [("invoke", 1, 1, 4), ("batch", 5, 4, 2), ("batch", 5, 5, 4)]
    ours = {found["batch"]: found["rate_tok_s"] for found in report.of("generation")}
    for p in peers:
        assert p["rate_tok_s"] == pytest.approx(p["batch"] * p["new_tokens"] / p["total_s"])
        assert p["our_ratio"] == pytest.approx(ours[p["batch"]] / p["rate_tok_s"])


def test_a_missing_peer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[huggingface\]"'):
        BenchOptions(measurements=SPEED, peer=True)
    BenchOptions(measurements=SPEED, peer=False)
    result = bench_speed("--shape", "tiny", "--peer")
    assert result.exit_code == 1
    assert "--no-peer" in result.stderr


# The document and the command.


def test_the_document_says_what_was_measured_and_how(measured: tuple[BenchReport, list[str]]) -> None:
    document = json.loads(json.dumps(measured[0].to_dict()))
    assert document["shape"] == "tiny"
    assert document["machine"]["device_name"]
    assert document["options"]["batches"] == [1, 3]
    assert document["copy"]["rate_byte_s"] == 1e9
    packages = {"python", "cuda", "torch", "transformers", "langchain-core", "bitsandbytes"}
    assert packages <= set(document["machine"]["versions"])
    calls_made = [r["values"]["call"] for r in document["records"] if r["measurement"] == "generation"]
    assert calls_made == ["stream", "abatch", "stream", "abatch"]


def test_bench_measures_speed() -> None:
    words = ("--batches", "1,2", "--new-tokens", 4, "--repeats", 1, "--shared", 2, "--shared-tokens", 40)
    result = bench_speed("--shape", "tiny", "--schemes", "none", "--no-peer", "--long-prompt-tokens", 20, *words)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    given = {
        "measurements": [*SPEED], "batches": [1, 2], "new_tokens": 4, "prompt_tokens": 30, "repeats": 1, "peer": False,
        "peer_new_tokens": 32, "shared": 2, "shared_tokens": 40, "long_prompt_tokens": 20,
    }  # fmt: skip
    assert {name: document["options"][name] for name in given} == given
    assert {record["scheme"] for record in document["records"]} == {"none"}
    assert [r["case"]["batch"] for r in document["records"] if r["measurement"] == "generation"] == [1, 2]
    assert document["copy"]["rate_byte_s"] > 0
    assert "first text" in result.stdout
    assert "none: abatch of 2: " in result.stderr


def test_what_was_measured_survives_a_scheme_that_cannot_be(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    sizes = ["--batches", 1, "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--shared", 0, "--no-peer"]
    result = bench_speed(tiny, "--schemes", "none,gptq", *sizes, "--json", file)
    assert result.exit_code == 0, result.output
    report = BenchReport.from_dict(json.loads(file.read_text(encoding="utf-8")))
    assert [record.scheme for record in report.of("generation")] == ["none"]
    assert [record.scheme for record in report.failures] == ["gptq"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batches", "1,x"], "--batches '1,x' is not allowed"),
        (["--batches", "0"], "batches=(0,) is not allowed"),
        (["--new-tokens", "1"], "new_tokens=1 is not allowed; it must be at least 2"),
        (["--repeats", "0"], "repeats=0 is not allowed"),
    ],
)
def test_errors_are_a_sentence(words: list[str], said: str) -> None:
    result = bench_speed("--shape", "tiny", "--no-peer", *words)
    assert result.exit_code == 1
    assert said in result.stderr
