"""The command serve, in a process of its own."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.checkpoints import make_checkpoint


@pytest.mark.slow
@pytest.mark.enable_socket
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)])
def test_serve_answers_until_a_signal_ends_it(tmp_path: Path, number: signal.Signals, code: int) -> None:
    folder = make_checkpoint(tmp_path / "tiny", max_position_embeddings=4096)
    words = [sys.executable, "-m", "langchain_quantllm.cli", "serve", str(folder), "-q", "none", "--port", "0"]
    environment = {**os.environ, "QUANTLLM_API_KEY": "s3cret"}
    with subprocess.Popen([*words, "--device", "cpu"], stderr=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stderr is not None
        try:
            said = next((line for line in process.stderr if "serving on" in line), "")
            [url] = re.findall(r"http://[\d.]+:\d+", said)
            with httpx.Client(base_url=url, headers={"authorization": "Bearer s3cret"}, timeout=60) as client:
                assert [card["id"] for card in client.get("/v1/models").json()["data"]] == ["tiny"]
                assert httpx.get(f"{url}/v1/models").status_code == 401
                body = {"prompt": "The", "max_tokens": 4000, "ignore_eos": True, "stream": True}
                with client.stream("POST", "/v1/completions", json=body) as response:
                    lines = response.iter_lines()
                    assert next(lines).startswith("data: ")
                    process.send_signal(number)
                    list(lines)  # ends, by the last token or by the server
            assert process.wait(60) == code
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()
