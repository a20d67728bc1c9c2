"""The speed bench: that it measures the work it says. How fast anything is, no test asserts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench import calls, speed_results
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.random_models import random_checkpoint
from langchain_quantllm.bench.speed import measure_speed
from langchain_quantllm.bench.speed_results import CopySpeed, SchemeSpeed, SpeedOptions, as_document
from langchain_quantllm.cli import app
from langchain_quantllm.errors import GenerationError, InvalidOptionError, MissingPackageError

COPY = CopySpeed(buffer_bytes=1_000, rate_byte_s=1e9)
SMALL: dict[str, Any] = {
    "batches": (1, 3),
    "new_tokens": 5,
    "prompt_tokens": 7,
    "repeats": 2,
    "shared": 3,
    "shared_tokens": 70,
    "long_prompt_tokens": 40,
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(random_checkpoint("tiny", tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="module")
def measured(tiny: str) -> tuple[list[SchemeSpeed], list[str]]:
    lines: list[str] = []
    options = SpeedOptions(**SMALL)
    checkpoints = {"none": tiny, "nf4": tiny}
    return list(measure_speed(checkpoints, device="cpu", options=options, copy_speed=COPY, report=lines.append)), lines


def bench(*words: object) -> Result:
    return CliRunner().invoke(app, ["bench", "--speed", "--device", "cpu", *(str(word) for word in words)])


# Prompts.


def with_begin_token(tokenizer: Any) -> Any:
    """A copy that puts its begin token before every text, as Llama's does."""
    copied = AutoTokenizer.from_pretrained(tokenizer.name_or_path)
    begin = copied.convert_ids_to_tokens(0)
    copied.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{begin}:0 $A:0", pair=None, special_tokens=[(begin, 0)]
    )
    assert copied("a")["input_ids"][0] == 0
    return copied


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


def test_every_scheme_gives_a_row(measured: tuple[list[SchemeSpeed], list[str]]) -> None:
    rows, lines = measured
    assert [row.scheme for row in rows] == ["none", "nf4"]
    for row in rows:
        assert row.engine == "fast"
        assert not row.graphs
        assert row.read_bytes == row.weights_bytes - 512 * 256 * 2  # without the input embedding, in bfloat16
        assert row.limit_tok_s == pytest.approx(1e9 / row.read_bytes)
        assert row.peer == ()
        assert sum(line.startswith(f"{row.scheme}: ") for line in lines) >= 6
    assert rows[1].read_bytes < rows[0].read_bytes


def test_generation_counts_every_token(measured: tuple[list[SchemeSpeed], list[str]]) -> None:
    for row in measured[0]:
        assert [(found.call, found.batch) for found in row.generation] == [("stream", 1), ("abatch", 3)]
        for found in row.generation:
            assert (found.prompt_tokens, found.new_tokens) == (7, 5)
            assert found.rate_tok_s == pytest.approx(found.batch * 5 / found.total_s)
            assert len(found.runs_s) == 2
            assert min(found.runs_s) <= found.total_s <= max(found.runs_s)
            assert 0 < found.first_token_s < found.total_s
            assert found.bare_position == 9
            assert found.bare_step_s is not None
            assert found.step_ratio == pytest.approx(found.engine_step_s / found.bare_step_s)
        one, many = row.generation
        assert one.first_text_s is not None
        assert one.limit_share == pytest.approx(one.decode_rate_tok_s / row.limit_tok_s)
        assert many.first_text_s is many.limit_share is None


def test_prefill_and_shared_prefix(measured: tuple[list[SchemeSpeed], list[str]]) -> None:
    for row in measured[0]:
        assert row.prefill is not None
        assert row.prefill.prompt_tokens == 40
        assert row.prefill.ratio == pytest.approx(row.prefill.first_text_s / row.prefill.bare_s)
        shared = row.shared_prefix
        assert shared is not None
        assert (shared.requests, shared.prefix_tokens, shared.prompt_tokens) == (3, 70, 78)
        assert 0 < shared.cached_tokens <= 2 * 70  # whole pages, by all but the one who computes them
        assert shared.ratio == pytest.approx(shared.apart_s / shared.shared_s)


def test_what_does_not_fit_is_left_out(tiny: str) -> None:
    small = {"batches": (1,), "new_tokens": 2, "repeats": 1, "shared_tokens": 1020, "long_prompt_tokens": 1022}
    lines: list[str] = []
    [row] = measure_speed(
        {"none": tiny}, device="cpu", options=SpeedOptions(**small), copy_speed=COPY, report=lines.append
    )
    assert row.prefill is row.shared_prefix is None
    assert sum("the model has room for" in line for line in lines) == 2


def test_texts_that_do_not_fit_are_an_error(tiny: str) -> None:
    options = SpeedOptions(prompt_tokens=1000, new_tokens=128)
    with pytest.raises(InvalidOptionError, match="do not fit into the 1024 tokens"):
        next(measure_speed({"none": tiny}, device="cpu", options=options, copy_speed=COPY))
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="none", device="cpu", progress=False)
    assert not llm.is_loaded  # an error leaves no weights behind


def test_other_lengths_than_asked_for_are_an_error() -> None:
    info = {"usage_metadata": {"input_tokens": 7, "output_tokens": 4, "input_token_details": {"cache_read": 0}}}
    run = calls.Run([info, info], 1.0, 1.0)
    run.check(2, 7, 4)
    with pytest.raises(GenerationError, match="2 rows of .* instead of 3"):
        run.check(3, 7, 4)
    with pytest.raises(GenerationError, match="cannot be compared"):
        run.check(2, 7, 5)
    cached = {"usage_metadata": {**info["usage_metadata"], "input_token_details": {"cache_read": 5}}}
    with pytest.raises(GenerationError, match="10 tokens of prompts were not computed"):
        calls.Run([cached, cached], 1.0, 1.0).check(2, 7, 4)


# The peer.


def test_the_peer_over_the_same_weights(tiny: str) -> None:
    pytest.importorskip("langchain_huggingface")
    options = SpeedOptions(
        batches=(1, 5), new_tokens=4, prompt_tokens=6, repeats=1, peer=True, peer_new_tokens=2, shared=0,
        long_prompt_tokens=0,
    )  # fmt: skip
    [row] = measure_speed({"none": tiny}, device="cpu", options=options, copy_speed=COPY)
    assert row.prefill is row.shared_prefix is None
    found = [(p.call, p.batch, p.batch_size, p.new_tokens) for p in row.peer]
    assert found == [("invoke", 1, 1, 4), ("batch", 5, 4, 2), ("batch", 5, 5, 4)]
    ours = {found.batch: found.rate_tok_s for found in row.generation}
    for p in row.peer:
        assert p.rate_tok_s == pytest.approx(p.batch * p.new_tokens / p.total_s)
        assert p.our_ratio == pytest.approx(ours[p.batch] / p.rate_tok_s)


def test_a_missing_peer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed_results, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[huggingface\]"'):
        SpeedOptions(peer=True)
    SpeedOptions(peer=False)
    result = bench("--shape", "tiny", "--peer")
    assert result.exit_code == 1
    assert "--no-peer" in result.stderr


# The document and the command.


def test_the_document_says_what_was_measured_and_how(
    measured: tuple[list[SchemeSpeed], list[str]],
) -> None:
    text = as_document(
        measured[0], options=SpeedOptions(**SMALL), copy_speed=COPY, model=None, shape="tiny", device="cpu"
    )
    assert "\n" not in text
    document = json.loads(text)
    assert document["shape"] == "tiny"
    assert document["device_name"]
    assert document["options"]["batches"] == [1, 3]
    assert document["copy"]["rate_byte_s"] == 1e9
    assert {"python", "cuda", "torch", "transformers", "langchain-core", "bitsandbytes"} <= set(document["versions"])
    assert document["rows"][1]["generation"][1]["call"] == "abatch"


def test_bench_measures_speed(tmp_path: Path) -> None:
    words = ("--batches", "1,2", "--new-tokens", 4, "--repeats", 1, "--shared", 2, "--shared-tokens", 40)
    result = bench("--shape", "tiny", "--schemes", "none", "--no-peer", "--long-prompt-tokens", 20, *words)
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert document["options"] == {
        "batches": [1, 2], "new_tokens": 4, "prompt_tokens": 30, "repeats": 1, "peer": False, "peer_new_tokens": 32,
        "shared": 2, "shared_tokens": 40, "long_prompt_tokens": 20,
    }  # fmt: skip
    [row] = document["rows"]
    assert [found["batch"] for found in row["generation"]] == [1, 2]
    assert document["copy"]["rate_byte_s"] > 0
    assert "first text" in result.stdout
    assert "none: abatch of 2: " in result.stderr


def test_what_was_measured_survives_a_scheme_that_cannot_be(tiny: str, tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    sizes = ["--batches", 1, "--prompt-tokens", 8, "--new-tokens", 2, "--repeats", 1, "--shared", 0, "--no-peer"]
    result = bench(tiny, "--schemes", "none,gptq", *sizes, "--json", file)
    assert result.exit_code == 0, result.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert [row["scheme"] for row in document["rows"]] == ["none"]
    assert [failure["scheme"] for failure in document["failures"]] == ["gptq"]


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
    result = bench("--shape", "tiny", "--no-peer", *words)
    assert result.exit_code == 1
    assert said in result.stderr
