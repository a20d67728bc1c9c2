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
def test_the_clients_of_the_page_work(tiny: QuantizedHuggingFaceLLM, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"^```py\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    with serving(tiny, name="qwen") as server:
        for block in blocks:
            assert ADDRESS in block
            names: dict[str, Any] = {"__name__": "page"}
            exec(block.replace(ADDRESS, server.url), names)
            assert len(capsys.readouterr().out) > 20
        assert server.outcomes("chat") == {"ok": 3}
        assert server.outcomes("completions") == {"ok": 1}
