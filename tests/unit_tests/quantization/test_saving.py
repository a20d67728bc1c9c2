"""Written checkpoints: disks that are full or read-only, and what is read again before it takes its place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerBase

from langchain_quantllm import GPTQ, merge_adapter, quantize
from langchain_quantllm.errors import OutputError
from langchain_quantllm.quantization import gptq
from langchain_quantllm.quantization.packing import RoundedLinear
from tests.support.adapters import make_adapter
from tests.support.chat_images import ask, chat_of
from tests.support.checkpoints import make_checkpoint
from tests.support.vision import FAMILIES, make_vision_checkpoint
from tests.unit_tests.quantization.test_outputs import tree

SCHEMES = ("nf4", "int8", "gptq", "merge")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    base = make_checkpoint(root / "base", dtype="bfloat16")
    make_adapter(base, root / "sql", seed=1)
    return root


def run(made: Path, scheme: str, output: Path, **options: Any) -> None:
    """Write a checkpoint over an older one."""
    options = {"overwrite": True, "progress": False, "device": "cpu", **options}
    if scheme == "merge":
        merge_adapter(str(made / "base"), str(made / "sql"), output, **options)
    else:
        wanted = GPTQ(bits=4, group_size=32) if scheme == "gptq" else scheme
        quantize(made / "base", wanted, "none" if scheme == "gptq" else None, output, **options)


def old(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text("old")
    return folder


# --- disks ---

_FULL = """
import pathlib, resource, sys
from langchain_quantllm import GPTQ, merge_adapter, quantize
from langchain_quantllm.errors import QuantLLMError
base, adapter, output, scheme, most = sys.argv[1:]
import torch, transformers, peft
resource.setrlimit(resource.RLIMIT_FSIZE, (int(most), int(most)))
options = {"overwrite": True, "progress": False, "device": "cpu"}
try:
    if scheme == "merge":
        merge_adapter(base, adapter, output, **options)
    elif scheme == "gptq":
        quantize(base, GPTQ(bits=4, group_size=32), "none", output, **options)
    else:
        quantize(base, scheme, None, output, **options)
except QuantLLMError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("scheme", "most"),
    # Less than the weights; in the second of GPTQ's less than a block, and in the last of all less than a tokenizer.
    [("nf4", 100_000), ("gptq", 100_000), ("gptq", 10_000), ("merge", 100_000), ("int8", 20_000)],
)
@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs limits of files")
def test_a_disk_that_takes_no_more(made: Path, tmp_path: Path, scheme: str, most: int) -> None:
    pytest.importorskip("peft")
    output = old(tmp_path / "out")
    command = [sys.executable, "-c", _FULL, made / "base", made / "sql", output, scheme, str(most)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"OutputError {output} could not be written: File too large; give"), done.stderr
    assert done.stdout.count("\n") == 1
    found = tree(tmp_path)
    if scheme == "gptq" and most > 50_000:  # the finished blocks are for the next run
        assert {name.partition("/")[0] for name in found} == {"out", "out.partial"}
        assert not [name for name in found if name.endswith("unfinished")]
        run(made, scheme, output)
        found = tree(tmp_path)
        assert {name.partition("/")[0] for name in found} == {"out"}
    else:
        assert found == {"out": "folder", "out/config.json": b"old"}


def _forbid_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("writers", "merge"):
        monkeypatch.setattr(
            f"langchain_quantllm.quantization.{module}.load", lambda *_: pytest.fail("weights are read")
        )


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_disk_without_room_is_found_out_before_the_work(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    output = old(tmp_path / "out")
    _forbid_loading(monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=32 * 2**20 + 50_000))
    with pytest.raises(OutputError, match=r"needs .* and the disk has .* free; make room"):
        run(made, scheme, output)
    assert tree(tmp_path) == {"out": "folder", "out/config.json": b"old"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_places_that_cannot_be_written_are_found_out_before_the_work(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    _forbid_loading(monkeypatch)
    (tmp_path / "file").write_text("file")
    for output, says in {
        tmp_path / "file" / "out": "a file is in its way|Not a directory",
        tmp_path / "new" / ("n" * 300): "File name too long; give a shorter",
        tmp_path / "new" / ("n" * 245): "File name too long; give a shorter",  # that of the folder beside it
        Path("/proc/out"): "could not be written",
        Path("/sys/out"): "could not be written",
    }.items():
        with pytest.raises(OutputError, match=says):
            run(made, scheme, output)
    assert tree(tmp_path) == {"file": b"file"}


_QUANTIZE = """
import sys
import torch, transformers, bitsandbytes
from langchain_quantllm import quantize
print("begins", flush=True)
quantize(sys.argv[1], sys.argv[2], None, sys.argv[3], overwrite=True, progress=False, device="cpu")
print("ends", flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="needs kill -9")
def test_quantizing_that_is_killed_leaves_a_whole_checkpoint(made: Path, tmp_path: Path) -> None:
    """At moments all over the run; then the next run succeeds, and leaves nothing else."""
    output, kinds = tmp_path / "out", set()
    run(made, "int8", output)
    started = subprocess.Popen([sys.executable, "-c", _QUANTIZE, made / "base", "int8", output], stdout=subprocess.PIPE)
    assert started.stdout is not None
    started.stdout.readline()
    began = time.monotonic()
    started.stdout.readline()
    whole_s = time.monotonic() - began
    assert started.wait() == 0
    for i in range(5):
        scheme = ("nf4", "int8")[i % 2]
        command = [sys.executable, "-c", _QUANTIZE, made / "base", scheme, output]
        child = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
        time.sleep(whole_s * (i + 1) / 6)
        child.kill()
        child.communicate()
        config = json.loads((output / "config.json").read_text())
        is_nf4 = config["quantization_config"]["load_in_4bit"]
        names = load_file(output / "model.safetensors").keys()
        assert any(name.endswith("nf4" if is_nf4 else "SCB") for name in names)
        kinds.add((scheme == "nf4") == is_nf4)
    run(made, "nf4", output)
    assert os.listdir(tmp_path) == ["out"]
    assert False in kinds  # some were killed before their result took its place


# --- what is read again ---


def _flip(part: Path) -> None:
    """Change one bit of a weight."""
    with (part / "model.safetensors").open("r+b") as file:
        file.seek(-1000, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1000, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def _change(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(part: Path) -> None:
        tensors = load_file(part / "model.safetensors")
        change(tensors)
        save_file(tensors, part / "model.safetensors", metadata={"format": "pt"})

    return changed


def _edit(file: str, **values: Any) -> Callable[[Path], None]:
    def edited(part: Path) -> None:
        content = json.loads((part / file).read_text())
        (part / file).write_text(json.dumps({**content, **values}))

    return edited


_NORM = "model.norm.weight"
_BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a bit": (_flip, "the values of '.*' are others"),
    "cut off": (lambda part: os.truncate(part / "model.safetensors", 50_000), "model.safetensors cannot be read again"),
    "gone": (lambda part: (part / "model.safetensors").unlink(), "'.*' is missing|cannot be read"),
    "a tensor less": (_change(lambda tensors: tensors.pop(_NORM)), f"'{_NORM}' is missing"),
    "a tensor more": (_change(lambda tensors: tensors.update(more=torch.ones(1))), "holds 'more'"),
    "a shape": (_change(lambda tensors: tensors.update({_NORM: torch.ones(3)})), f"'{_NORM}' is torch.float32"),
    "a dtype": (_change(lambda tensors: tensors.update({_NORM: tensors[_NORM].double()})), "torch.float64"),
    "no number": (_change(lambda tensors: tensors[_NORM].fill_(float("nan"))), f"values of '{_NORM}'"),
    "the config": (lambda part: (part / "config.json").write_text("{"), "config cannot be read again"),
    "another model": (_edit("config.json", model_type="qwen2"), "config describes another model"),
    "the tokenizer": (lambda part: (part / "tokenizer.json").write_text("{"), "tokenizer cannot be read again"),
    "its template": (lambda part: (part / "chat_template.jinja").write_text("{{ messages }}"), "another chat template"),
    "the sizes": (_edit("config.json", num_hidden_layers=1), "logits differ|cannot be loaded|weights"),
    "the rotary base": (_edit("config.json", rope_parameters={"rope_theta": 9.0, "rope_type": "default"}), "logits"),
}


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Path], Any]], None]:
    """Make something happen to the files after they were written."""

    def breaks(how: Callable[[Path], Any]) -> None:
        real = PreTrainedTokenizerBase.save_pretrained

        def save(self: Any, folder: Any, **options: Any) -> Any:
            done = real(self, folder, **options)
            how(Path(folder))
            return done

        monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", save)

    return breaks


@pytest.mark.parametrize("how", _BROKEN)
@pytest.mark.parametrize("scheme", ["nf4", pytest.param("merge", marks=pytest.mark.slow)])
def test_what_was_written_wrongly_never_takes_its_place(
    made: Path, tmp_path: Path, breaking: Callable[[Any], None], scheme: str, how: str
) -> None:
    output = old(tmp_path / "out")
    change, says = _BROKEN[how]
    breaking(change)
    with pytest.raises(OutputError, match=f"not what was to be written: .*({says})"):
        run(made, scheme, output)
    assert tree(tmp_path) == {"out": "folder", "out/config.json": b"old"}


@pytest.mark.parametrize("how", ["a bit", "a tensor less", "the config"])
@pytest.mark.parametrize("scheme", ["gptq", pytest.param("int8", marks=pytest.mark.slow)])
def test_in_other_schemes(made: Path, tmp_path: Path, breaking: Callable[[Any], None], scheme: str, how: str) -> None:
    output = old(tmp_path / "out")
    change, says = _BROKEN[how]
    breaking(change)
    with pytest.raises(OutputError, match=says):
        run(made, scheme, output)
    found = tree(tmp_path)
    assert {name: content for name, content in found.items() if not name.startswith("out.partial")} == {
        "out": "folder",
        "out/config.json": b"old",
    }
    assert ("out.partial/block-0001.safetensors" in found) == (scheme == "gptq")


def test_packed_weights_that_stand_for_others(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks were computed with other weights than the packed ones stand for."""
    real = RoundedLinear.pack
    monkeypatch.setattr(
        RoundedLinear, "pack", lambda self: {k: t * 2 if k == "scales" else t for k, t in real(self).items()}
    )
    with pytest.raises(OutputError, match="the packed weights of 'model.layers.* stand for others"):
        run(made, "gptq", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert gptq._SAMPLED_ROWS == 32


def test_shards_and_their_index(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("langchain_quantllm.quantization.writers.SHARD", "50KB")
    run(made, "nf4", tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    assert len(json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]) > 20


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    base = make_checkpoint(tmp_path / "tied", tie_word_embeddings=True)
    done = quantize(base, "nf4", None, tmp_path / "out", device="cpu", progress=False)
    names = load_file(done.folder / "model.safetensors").keys()
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names


@pytest.mark.parametrize("family", [*FAMILIES])
def test_models_that_read_images_are_written_with_their_processor(tmp_path: Path, family: str) -> None:
    """Also where the processor's part for videos could not be loaded."""
    plain = make_vision_checkpoint(tmp_path / "plain", family)
    done = quantize(plain, "nf4", None, tmp_path / "out", device="cpu", progress=False)
    one, two = (chat_of(folder, quantization="nf4" if folder == plain else None) for folder in (plain, done.folder))
    assert one.invoke([ask(0)]).content == two.invoke([ask(0)]).content
    one.unload()
    two.unload()
