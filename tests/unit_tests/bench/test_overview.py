"""The overview of schemes: that it measures the work it says, and that one failure leaves the rest standing."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.bench import training
from langchain_quantllm.bench.calls import Run, repeat, time_generate
from langchain_quantllm.bench.options import BenchOptions
from langchain_quantllm.bench.prompts import Prompts
from langchain_quantllm.bench.quality import perplexity
from langchain_quantllm.bench.records import BenchReport
from langchain_quantllm.bench.runner import run_bench
from langchain_quantllm.bench.subjects import subjects_of
from langchain_quantllm.bench.training import measure_training
from langchain_quantllm.errors import InvalidOptionError, MissingPackageError, UnsupportedError
from langchain_quantllm.schemes import GPTQ
from tests.support.bench import bench, measure

TEXT = "The river rose in the night, and by morning the lower field was a lake. " * 4
SMALL: dict[str, Any] = {
    "batches": (1, 3),
    "prompt_tokens": 6,
    "new_tokens": 5,
    "peer_new_tokens": 3,
    "lengths": (4,),
    "prefill_batches": (2,),
    "prefill_tokens": 24,
    "cache_new_tokens": 3,
    "train_batch": 1,
    "train_tokens": 12,
    "rank": 2,
    "window_tokens": 32,
    "quality_tokens": 64,
    "repeats": 2,
    "peer_repeats": 2,
    "limit_s": math.inf,
}


@pytest.fixture(scope="module")
def measured(tiny: str, tiny_gptq: str) -> tuple[BenchReport, list[str]]:
    return measure(subjects_of({"none": tiny, "nf4": tiny}, {"packed": tiny_gptq}), BenchOptions(**SMALL), text=TEXT)


# What is measured.


def test_every_subject_is_loaded_with_the_fast_engine(measured: tuple[BenchReport, list[str]]) -> None:
    report, lines = measured
    loaded = [(loading.scheme, loading["scheme_name"]) for loading in report.of("loading")]
    assert loaded == [("none", "none"), ("nf4", "nf4"), ("packed", "gptq")]
    assert report.failures == []
    assert [engine["name"] for engine in report.of("engine")] == ["fast"] * 3
    for loading in report.of("loading"):
        assert loading["limit_tok_s"] == pytest.approx(1e9 / loading["read_bytes"])
        assert report.peak_bytes(loading.scheme) >= loading["allocated_bytes"]
        assert sum(line.startswith(f"{loading.scheme}: ") for line in lines) >= 10
    none, nf4, packed = (loading["weights_bytes"] for loading in report.of("loading"))
    assert packed < none
    assert nf4 < none


def test_calls_count_every_token(measured: tuple[BenchReport, list[str]]) -> None:
    report, _ = measured
    for scheme in report.schemes:
        by_batch, prefill, by_length, by_cache = (
            report.of(measurement, scheme) for measurement in ("batches", "prefill", "lengths", "cache")
        )
        shapes = [(c["runner"], c["call"], c["batch"], c["prompt_tokens"], c["new_tokens"]) for c in by_batch]
        assert shapes == [
            ("generate", "generate", 1, 6, 3),
            ("generate", "generate", 3, 6, 3),
            ("engine", "stream", 1, 6, 5),
            ("engine", "abatch", 3, 6, 5),
        ]
        assert [(c["runner"], c["batch"], c["prompt_tokens"], c["new_tokens"]) for c in prefill] == [
            ("generate", 2, 24, 1),
            ("engine", 2, 24, 1),
        ]
        assert [(c["runner"], c["new_tokens"], c["asked_tokens"]) for c in by_length] == [
            ("generate", 4, 4),
            ("engine", 4, 4),
        ]
        assert [(c["call"], c["use_cache"]) for c in by_cache] == [("generate", True), ("generate", False)]
        for call in (*prefill, *by_batch, *by_length, *by_cache):
            assert len(call["runs_s"]) == 2
            assert min(call["runs_s"]) <= call["total_s"] <= max(call["runs_s"])
            assert call["rate_tok_s"] == pytest.approx(call["batch"] * call["new_tokens"] / call["total_s"])
            assert call["prompt_rate_tok_s"] == pytest.approx(call["batch"] * call["prompt_tokens"] / call["total_s"])
            assert (call["first_token_s"] is None) == (call["call"] == "generate")


def test_training_reaches_the_adapter(measured: tuple[BenchReport, list[str]]) -> None:
    steps = measured[0].of("training")
    for step in steps:
        assert (step["targets"], step["rank"], step["batch"], step["tokens"]) == ("q_proj, v_proj", 2, 1, 12)
        assert step["trainable_parameters"] == 2 * 2 * 2 * (256 + 256)  # layers, projections, rank, in and out
        assert step["total_s"] == pytest.approx(sum(step["runs_s"]) / 2)
    # GPTQ is loaded again with a kernel that can train.
    assert [step["kernels"] for step in steps] == ["", "Linear4bit", "TorchLinear"]


def test_quality_is_that_of_a_fresh_model(measured: tuple[BenchReport, list[str]], tiny: str) -> None:
    """Training came before it: nothing of the adapter may be left."""
    none, nf4, _ = measured[0].of("quality")
    for quality in (none, nf4):
        llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization=quality.scheme, device="cpu", progress=False)
        fresh = perplexity(llm.pipeline.model, llm.pipeline.tokenizer, TEXT, window_tokens=32, max_tokens=64)
        llm.unload()
        assert quality["loss_nats"] == fresh.loss_nats
        assert quality["tokens"] == fresh.tokens == 62
    assert (none["loss_increase_nats"], none["perplexity_increase_percent"]) == (0.0, 0.0)
    assert nf4["loss_increase_nats"] == nf4["loss_nats"] - none["loss_nats"] != 0
    assert nf4["perplexity_increase_percent"] == pytest.approx(100 * (nf4["perplexity"] / none["perplexity"] - 1))
    assert none["kl_nats"] is none["agreement"] is None
    low_nats, high_nats = nf4["kl_interval_nats"]
    assert 0 < low_nats <= nf4["kl_nats"] <= high_nats
    assert 0 <= nf4["agreement"] <= 1


def test_measurements_can_be_left_out(tiny: str) -> None:
    options = BenchOptions(**{**SMALL, "measurements": ("lengths",), "peer": False})
    report, _ = measure(subjects_of({"none": tiny}), options, text=TEXT)
    assert [record.measurement for record in report.records] == ["loading", "engine", "lengths", "unloading"]
    assert [call["runner"] for call in report.of("lengths")] == ["engine"]


@pytest.mark.slow
def test_smollm2_in_nf4(smollm2: Path) -> None:
    options = BenchOptions(**{**SMALL, "batches": (1,), "measurements": ("batches", "training", "quality")})
    report, _ = measure(subjects_of({"nf4": str(smollm2)}), options, text=TEXT)
    assert report.failures == []
    [quality], [step] = report.of("quality"), report.of("training")
    assert quality["perplexity"] < 40  # English, to a model of English: the weights are as they were
    assert step["trainable_parameters"] == 30 * 2 * ((576 + 576) + (576 + 192))


# What fails.


def test_one_failure_leaves_the_rest_standing(tiny: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    given = {**SMALL, "measurements": ("batches", "lengths"), "peer": False, "lengths": (4, 2000)}
    subjects = subjects_of({"none": tiny}, {"broken": str(tmp_path)})[::-1]
    report, _ = measure(subjects, BenchOptions(**given))
    assert report.schemes == ["broken", "none"]
    broken, whole = ([r for r in report.records if r.scheme == scheme] for scheme in report.schemes)
    assert [(record.measurement, bool(record.failure)) for record in broken] == [("loading", True)]
    assert [call["new_tokens"] for call in report.of("batches", "none")] == [5, 5]
    assert [call["new_tokens"] for call in report.of("lengths", "none")] == [4]
    [failed] = [record for record in whole if record.failure is not None]
    assert failed.title == "lengths, engine, 2000"
    assert "2006 tokens do not fit into the model's context of 1024" in str(failed.failure)


def test_a_kernel_that_cannot_train_is_told(tiny: str) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="none", device="cpu", progress=False)
    model = llm.pipeline.model
    model.model.layers[0].mlp.SUPPORTS_TRAINING = False
    with pytest.raises(UnsupportedError, match="LlamaMLP cannot train"):
        measure_training(model, device="cpu", batch=1, tokens=4)
    llm.unload()


def test_the_adapter_comes_off_again_after_an_error(tiny: str) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="none", device="cpu", progress=False)
    model = llm.pipeline.model
    names = list(model.state_dict())

    def fail(*_: Any) -> None:
        msg = "as a kernel fails"
        raise RuntimeError(msg)

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="as a kernel fails"):
        measure_training(model, device="cpu", batch=1, tokens=4)
    hook.remove()
    assert list(model.state_dict()) == names
    assert not model.training
    assert all(p.requires_grad for p in model.parameters())
    llm.unload()


def test_missing_peft_is_told(monkeypatch: pytest.MonkeyPatch, tiny: str) -> None:
    monkeypatch.setattr(training, "is_installed", lambda _: False)
    with pytest.raises(MissingPackageError, match=r'pip install "langchain-quantllm\[bench\]"'):
        next(run_bench(subjects_of({"none": tiny}), device="cpu", options=BenchOptions()))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"measurements": ("prefil",)}, "did you mean 'prefill'"),
        ({"batches": (0,)}, r"batches=\(0,\) is not allowed"),
        ({"repeats": 0}, "repeats=0 is not allowed"),
        ({"limit_s": 0}, "limit_s=0 is not allowed"),
        ({"quality_tokens": 1}, "quality_tokens=1 is not allowed"),
    ],
)
def test_options_are_checked(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidOptionError, match=said):
        BenchOptions(**options)


def test_each_label_names_one_subject(tiny: str, tiny_gptq: str) -> None:
    found = subjects_of({"nf4": tiny}, {"mine": tiny_gptq, "plain": tiny}, kernel="torch")
    assert [(s.label, s.quantization) for s in found] == [
        ("nf4", "nf4"),
        ("mine", GPTQ(kernel="torch")),
        ("plain", None),
    ]
    found = subjects_of({"gptq": tiny_gptq, "nf4": tiny}, {"mine": tiny_gptq}, kernel="torch, triton")
    assert [(s.label, s.quantization) for s in found] == [
        ("gptq-torch", GPTQ(kernel="torch")),
        ("gptq-triton", GPTQ(kernel="triton")),
        ("nf4", "nf4"),
        ("mine-torch", GPTQ(kernel="torch")),
        ("mine-triton", GPTQ(kernel="triton")),
    ]
    with pytest.raises(InvalidOptionError, match="'nf4' stands for two rows"):
        subjects_of({"nf4": tiny}, {"nf4": tiny_gptq})
    with pytest.raises(InvalidOptionError, match="'gptq-triton' stands for two rows"):
        subjects_of({"gptq": tiny_gptq}, {"gptq-triton": tiny}, kernel="torch,triton")
    with pytest.raises(InvalidOptionError, match="int9"):
        subjects_of({"int9": tiny})


# Its pieces.


def test_generate_keeps_no_cache_if_told_so(tiny_llm: QuantizedHuggingFaceLLM) -> None:
    lengths: list[int] = []
    model = tiny_llm.pipeline.model
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    prompts = Prompts(tiny_llm.pipeline.tokenizer).draw(2, 7)
    assert time_generate(tiny_llm.pipeline, prompts, 3) > 0
    assert lengths == [7, 1, 1]
    lengths.clear()
    assert time_generate(tiny_llm.pipeline, prompts, 3, use_cache=False) > 0
    hook.remove()
    assert lengths == [7, 8, 9]


def test_long_texts_get_shorter_and_run_once() -> None:
    asked: list[int] = []

    def run(tokens: int) -> Run:
        asked.append(tokens)
        return Run([], 2 + 0.5 * tokens, 0.0)  # as it says: the prompt, and half a second for each token

    found = repeat(run, 100, device="cpu", repeats=3, limit_s=10)
    assert asked == [8, 1, 8, 15]  # the first might have made kernels
    assert (found.new_tokens, found.runs_s) == (15, [9.5])
    asked.clear()
    found = repeat(run, 12, device="cpu", repeats=1, limit_s=8.5)
    assert asked == [8, 1, 8, 12]  # it fits: most of the warm-up was the prompt
    asked.clear()
    found = repeat(run, 4, device="cpu", repeats=3, limit_s=math.inf, warm_ups=2)
    assert asked == [4, 4, 4, 4, 4]
    assert (found.new_tokens, len(found.runs)) == (4, 3)


def test_training_changes_no_random_numbers_of_the_process(tiny: str) -> None:
    llm = QuantizedHuggingFaceLLM(model_id=tiny, quantization="none", device="cpu", progress=False)
    before = perplexity(llm.pipeline.model, llm.pipeline.tokenizer, TEXT)
    measure_training(llm.pipeline.model, device="cpu", batch=1, tokens=8, repeats=1)
    assert perplexity(llm.pipeline.model, llm.pipeline.tokenizer, TEXT) == before
    llm.unload()


# The document and the command.


def test_the_document_says_what_was_measured_and_how(measured: tuple[BenchReport, list[str]]) -> None:
    document = measured[0].to_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["kind"], document["version"]) == ("bench", 2)
    assert document["machine"]["device_name"]
    assert document["options"]["batches"] == [1, 3]
    assert document["options"]["limit_s"] is None
    assert {"torch", "transformers", "bitsandbytes", "gptqmodel", "peft"} <= set(document["machine"]["versions"])
    [nf4] = [r for r in document["records"] if (r["scheme"], r["measurement"]) == ("nf4", "quality")]
    assert nf4["values"]["loss_increase_nats"] != 0


@pytest.mark.slow
def test_bench_gives_an_overview(tmp_path: Path, tiny_gptq: str) -> None:
    words = ("--batches", "1,2", "--new-tokens", 4, "--lengths", 3, "--prefill-batches", 1, "--prefill-tokens", 16)
    more = ("--peer-new-tokens", 2, "--repeats", 1, "--train-batch", 1, "--train-tokens", 8, "--quality-tokens", 64)
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    files = ("--text", text, "--json", tmp_path / "overview.json", "--plots", tmp_path / "figures")
    result = bench(
        "--shape", "tiny", "--schemes", "none", "--checkpoint", f"gptq-4={tiny_gptq}", "--without", "cache",
        *words, *more, *files,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert json.loads((tmp_path / "overview.json").read_text(encoding="utf-8")) == document
    assert list(dict.fromkeys(record["scheme"] for record in document["records"])) == ["none", "gptq-4"]
    assert "cache" not in document["options"]["measurements"]
    assert document["copy"]["rate_byte_s"] > 0
    for said in ("Prefill", "Generation", "Training an adapter", "Quality", "langchain-quantllm", "generate"):
        assert said in result.stdout
    assert "gptq-4: stream, 1 x (30 + 4) tokens" in result.stderr
    names = {file.name for file in (tmp_path / "figures").iterdir()}
    assert names == {"memory.png", "prefill.png", "generation.png", "training.png", "quality.png"}

    again = bench("--from-json", tmp_path / "overview.json", "--plots", tmp_path / "later", "--plot-format", "svg")
    assert again.exit_code == 0, again.output
    assert "Generation" in again.stdout
    assert {file.suffix for file in (tmp_path / "later").iterdir()} == {".svg"}


def test_random_weights_have_no_quality() -> None:
    words = ("--without", "prefill,batches,cache,training", "--lengths", 3, "--no-peer", "--repeats", 1)
    result = bench("--shape", "tiny", "--schemes", "none", *words)
    assert result.exit_code == 0, result.output
    report = BenchReport.from_dict(json.loads(result.stdout.splitlines()[-1]))
    assert report.schemes == ["none"]
    assert report.of("quality") == report.failures == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--without", "trainng"], "did you mean 'training'"),
        (["--checkpoint", "folder"], "write label=FOLDER"),
        (["--memory", "--speed"], "name one of them"),
        (["--text", "/no/such/text"], "--text /no/such/text cannot be read"),
        (["--from-json", "/no/such/file"], "--from-json /no/such/file cannot be read"),
        (["--plots", "figures", "--plot-format", "gif"], "format 'gif' is not allowed"),
    ],
)
def test_errors_are_a_sentence(words: list[str], said: str) -> None:
    result = bench("--shape", "tiny", *words)
    assert result.exit_code == 1
    assert said in result.stderr


def test_a_model_that_no_scheme_loads_is_an_error(tiny: str, tmp_path: Path) -> None:
    words = (tmp_path, "--schemes", "none", "--without", "training")
    result = bench(*words)
    assert result.exit_code == 1
    assert (
        "no scheme could be measured" not in result.stderr
    )  # but that the folder is empty, before anything is measured
    shutil.copy(Path(tiny, "config.json"), tmp_path)  # and no weights
    result = bench(*words)
    assert result.exit_code == 1
    assert "no scheme could be measured; the first: " in result.stderr


def test_torch_is_not_left_without_gradients(measured: tuple[BenchReport, list[str]]) -> None:
    assert torch.is_grad_enabled()
