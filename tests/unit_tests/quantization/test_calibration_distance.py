"""How far a calibration is from the use: alike it is 1, and a warning names what is far before the work starts."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from langchain_quantllm import GPTQ, Calibration, quantize
from langchain_quantllm.errors import InvalidOptionError
from langchain_quantllm.quantization.calibration_distance import FAR, calibration_distance
from langchain_quantllm.quantization.decoder_layers import find_layout
from tests.support import families
from tests.support.checkpoints import make_tokenizer
from tests.support.quantization import TEXTS


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    family = families.FAST["llama-grouped"]
    options = {**family.options, "vocab_size": 512, "num_hidden_layers": 2, "intermediate_size": 192}
    families.family_model(families.Family(config=family.config, options=options, gain=0.1)).half().save_pretrained(
        folder
    )
    make_tokenizer().save_pretrained(folder)
    return folder


def run(plain: Path, output: Path, **options: Any) -> Any:
    calibration = Calibration(source=TEXTS * 8, tokens=64)
    return quantize(plain, GPTQ(bits=4, group_size=32), calibration, output, progress=False, device="cpu", **options)


def test_use_like_the_calibration_is_at_1_and_other_tokens_are_farther(plain: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(plain)
    generator = torch.Generator().manual_seed(0)

    def drawn(low: int, high: int) -> list[list[int]]:
        found: list[list[int]] = torch.randint(low, high, (8, 64), generator=generator).tolist()
        return found

    def distance(use: list[list[int]]) -> float:
        return calibration_distance(model, find_layout(model), drawn(5, 25), use, "cpu")

    alike, half, other = distance(drawn(5, 25)), distance(drawn(5, 45)), distance(drawn(300, 500))
    assert 0.9 < alike < 1.1
    assert alike < half < other
    assert other > FAR


def test_a_calibration_that_is_far_is_warned_of_with_its_distance(
    plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="langchain_quantllm"):
        near = run(plain, tmp_path / "near", for_texts=TEXTS * 8)
    assert near.calibration_distance < FAR
    assert not caplog.records
    digits = tmp_path / "digits.txt"
    digits.write_text("0123456789 " * 60)
    with caplog.at_level(logging.WARNING, logger="langchain_quantllm"):
        far = run(plain, tmp_path / "far", for_texts=digits)
    [warning] = [record.getMessage() for record in caplog.records]
    assert far.calibration_distance > FAR
    assert f"{far.calibration_distance:.2f} times as far" in warning
    assert "Calibration(source=[('digits.txt', 0.7), ('built-in', 0.3)])" in warning


def test_wrong_samples_of_the_use_are_refused_before_weights_are_read(plain: Path, tmp_path: Path) -> None:
    torn = shutil.copytree(plain, tmp_path / "torn")
    (torn / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(InvalidOptionError, match=r"use.txt cannot be read"):
        run(torn, tmp_path / "out", for_texts=str(tmp_path / "use.txt"))
    with pytest.raises(InvalidOptionError, match="for_texts: the calibration has .* tokens; give at least"):
        run(torn, tmp_path / "out", for_texts=["One."])
    with pytest.raises(InvalidOptionError, match="for_texts: row 1 of the calibration has no column 'text'"):
        run(torn, tmp_path / "out", for_texts=[{"body": "a text"}])
    with pytest.raises(InvalidOptionError, match="for_texts: calibration='5' of type int cannot be read"):
        run(torn, tmp_path / "out", for_texts=5)
    with pytest.raises(InvalidOptionError, match="for_texts='none' is no sample"):
        run(plain, tmp_path / "out", for_texts="none")
    with pytest.raises(InvalidOptionError, match="for_texts is compared with the text of the calibration"):
        quantize(plain, GPTQ(bits=4), "none", tmp_path / "out", for_texts=TEXTS, device="cpu")
    with pytest.raises(InvalidOptionError, match="for_texts is for GPTQ"):
        quantize(plain, "int8", output=tmp_path / "out", for_texts=TEXTS)
