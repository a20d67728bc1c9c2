"""The command that tries every architecture of transformers, on some of each kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.architectures import Finding, examine, record, table
from tests.support.selection import slow_but

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ("llama", "qwen3_moe", "gpt_oss", "deepseek_v3", "qwen3_5_text", "lfm2", "bloom", "phi3", "gemma4_text")


@pytest.mark.parametrize("name", slow_but(["qwen3_moe"], FAST))
def test_an_architecture_writes_what_generate_writes(name: str) -> None:
    found = examine(name, reads_images=False)
    assert (found.engine, found.wrong, found.not_tried) == ("fast", [], "")
    assert "norm" in found.fused or name == "bloom"
    assert 0.5 < found.quantized["nf4"] <= 1


def test_a_model_that_transformers_cannot_build_is_not_tried_and_says_why() -> None:
    found = examine("blt", reads_images=False)  # its embeddings of hashes are too large
    assert found.engine == ""
    assert "parameters" in found.not_tried


def test_the_table_names_each_architecture_once_and_counts_the_fast_ones() -> None:
    text = table(
        [
            Finding(model_type="a", engine="fast", fused={"norm": 2}, quantized={"int8": 1.0, "nf4": 0.5}),
            Finding(model_type="b", engine="pipeline", reason="it looks | ahead"),
            Finding(model_type="c", not_tried="an encoder-decoder"),
            Finding(model_type="d", reads_images=True, engine="fast"),
        ]
    )
    assert "1 of 2 run on the fast engine" in text
    assert "| a | fast | - | norm | 100% | 50% |" in text
    assert "| b | pipeline | it looks \\| ahead | - | - | - |" in text
    assert "- c: an encoder-decoder" in text
    assert "1 of 1 run on the fast engine" in text


def test_recording_replaces_the_section_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import architectures

    page = tmp_path / "page.md"
    page.write_text(f"before\n{architectures._BEGIN}\nold\n{architectures._END}\nafter\n", encoding="utf-8")
    monkeypatch.setattr(architectures, "PAGE", page)
    record("new")
    assert page.read_text(encoding="utf-8") == (
        f"before\n{architectures._BEGIN}\n\nnew\n\n{architectures._END}\nafter\n"
    )
