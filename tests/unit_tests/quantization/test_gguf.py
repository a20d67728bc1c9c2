"""GGUF files: what is converted, what is refused, and files of strangers."""

from __future__ import annotations

import random
import re
import shlex
import struct
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.errors import (
    CheckpointError,
    InvalidOptionError,
    MissingPackageError,
    ModelNotFoundError,
    QuantLLMError,
)
from langchain_quantllm.quantization.gguf import convert_gguf
from tests.support.checkpoints import SIZES, make_checkpoint
from tests.support.gguf_files import write_gguf


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file with a space in its name, and the checkpoint that it was made from."""
    pytest.importorskip("gguf")
    folder = tmp_path_factory.mktemp("gguf")
    source = make_checkpoint(folder / "source", dtype="float32")
    file = folder / "my tiny.gguf"
    write_gguf(source, file)
    return file, source


def test_the_command_that_the_error_names_converts_a_gguf_file(gguf_file: tuple[Path, Path]) -> None:
    file, source = gguf_file
    with pytest.raises(ModelNotFoundError) as caught:
        QuantizedHuggingFaceLLM(model_id=str(file)).load()
    command = re.search(r"once: (langchain-quantllm convert .+?) \(it needs", str(caught.value))
    assert command is not None
    program, *rest = shlex.split(command[1])
    assert program == "langchain-quantllm"
    convert = [sys.executable, "-m", "langchain_quantllm.cli", *rest]
    done = subprocess.run(convert, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr
    llm = QuantizedHuggingFaceLLM(model_id=rest[-1], max_new_tokens=6, progress=False, dtype="float32")
    expected = {k: v.to(torch.bfloat16) for k, v in load_file(source / "model.safetensors").items()}
    found = llm.load().pipeline.model.state_dict()
    assert all(torch.equal(found[name].to(torch.bfloat16), weight) for name, weight in expected.items())
    assert llm.pipeline.tokenizer("the lazy dog")["input_ids"]


def test_nothing_is_left_of_a_conversion_that_fails(
    gguf_file: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoTokenizer, PreTrainedTokenizerBase

    file, _ = gguf_file
    with pytest.raises(QuantLLMError, match="could not be written"):
        convert_gguf(file, file / "out", progress=False)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedTokenizerBase, "save_pretrained", fail)
        with pytest.raises(QuantLLMError, match="No space left"):
            convert_gguf(file, tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == []

    def lack(*_: Any, **__: Any) -> None:
        raise ImportError("\nit needs the tiktoken library\nand so on")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lack)
    with pytest.raises(MissingPackageError, match="tiktoken library.*pip install sentencepiece tiktoken"):
        convert_gguf(file, tmp_path / "out", progress=False)


def test_files_that_cannot_be_converted_are_reported(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF, or so it says")
    with pytest.raises(CheckpointError, match=r"transformers cannot read .*broken\.gguf"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path / "out", progress=False)
    with pytest.raises(InvalidOptionError, match="not empty"):
        convert_gguf(tmp_path / "broken.gguf", tmp_path, progress=False)
    with pytest.raises(ModelNotFoundError, match="there is no file"):
        convert_gguf(tmp_path / "none.gguf", tmp_path / "out", progress=False)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "langchain_quantllm.cli",
            "convert",
            str(tmp_path / "none.gguf"),
            str(tmp_path / "out"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no file")


def header_field(data: bytes, name: str) -> int:
    """Return the place of a 32-bit number in a GGUF file's header."""
    return data.index(name.encode()) + len(name) + 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("llama.block_count", 3),
        ("llama.block_count", 10**9),
        ("llama.embedding_length", 2**31 - 8),
        ("llama.feed_forward_length", SIZES["intermediate_size"] + 8),
        ("llama.feed_forward_length", 2**31 - 8),
        ("llama.attention.head_count", 1),
    ],
)
def test_a_file_without_the_weights_that_it_describes_is_refused(
    gguf_file: tuple[Path, Path], name: str, value: int, tmp_path: Path
) -> None:
    """transformers initializes them at random and goes on; nothing is allocated for them here."""
    data = bytearray(gguf_file[0].read_bytes())
    struct.pack_into("<I", data, header_field(bytes(data), name), value)
    (tmp_path / "m.gguf").write_bytes(data)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=r"m\.gguf"):
        convert_gguf(tmp_path / "m.gguf", tmp_path / "out", progress=False)
    assert time.monotonic() - began < 30
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_a_stranger_s_file_is_converted_or_refused(gguf_file: tuple[Path, Path], tmp_path: Path, count: int) -> None:
    data = gguf_file[0].read_bytes()
    file, rng, seen = tmp_path / "m.gguf", random.Random(count), Counter[str]()
    for i in range(count):
        file.write_bytes(changed(data, rng))
        try:
            convert_gguf(file, tmp_path / f"out{i}", progress=False)
            seen["converted"] += 1
        except QuantLLMError as error:
            seen[type(error).__name__] += 1
    assert sum(seen.values()) == count
    assert seen["CheckpointError"] > count / 5, seen
    assert seen["converted"], seen


def changed(data: bytes, rng: random.Random) -> bytes:
    """Change bytes of a GGUF file's header at random, or cut the file off."""
    head = rng.choice([1500, data.index(b"token_embd")])  # all of it is mostly the tokenizer's
    new = bytearray(data)
    at = rng.randrange(head)
    match rng.choice(["byte", "bytes", "long", "int", "cut"]):
        case "byte":
            new[at] = rng.randrange(256)
        case "bytes":
            for _ in range(rng.randrange(2, 12)):
                new[rng.randrange(head)] = rng.randrange(256)
        case "long":
            struct.pack_into("<Q", new, at, rng.choice([0, 1, 2**31, 2**32, 2**40, 2**63, 2**64 - 1]))
        case "int":
            struct.pack_into("<I", new, at, rng.choice([0, 1, 8, 9, 12, 2**31, 2**32 - 1, rng.randrange(20)]))
        case "cut":
            new = new[: rng.randrange(len(new))]
    return bytes(new)
