"""The clients of docs/serve.md, run against a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from langchain_quantllm import QuantizedHuggingFaceLLM
from tests.support.serving import serving

PAGE = Path(__file__).parents[3] / "docs" / "serve.md"
ADDRESS = "http://127.0.0.1:8000"


@pytest.mark.enable_socket
def test_the_clients_of_the_page_work(
    tiny: QuantizedHuggingFaceLLM, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny.pipeline.model.save_pretrained(tmp_path)
    tiny.pipeline.tokenizer.save_pretrained(tmp_path)
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    *openais, ours = blocks
    assert len(openais) == 2
    with serving(tiny, name="qwen") as server:
        for block in openais:
            assert ADDRESS in block
            names: dict[str, Any] = {"__name__": "page"}
            exec(block.replace(ADDRESS, server.url), names)
            assert len(capsys.readouterr().out) > 20
        assert server.outcomes("chat") == {"ok": 3}
        assert server.outcomes("completions") == {"ok": 1}
        assert "http://host:8000" in ours
        for text, used in (("http://host:8000", server.url), ("Qwen/Qwen2.5-7B-Instruct", str(tmp_path))):
            ours = ours.replace(text, used)
        exec(ours, {"__name__": "page"})
        assert capsys.readouterr().out.strip()
