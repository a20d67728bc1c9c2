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

HELD_LOADING = """
import sys
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.cli import app

load = QuantizedHuggingFaceLLM.load

def held(llm):
    print("loading", file=sys.stderr, flush=True)
    sys.stdin.read()
    return load(llm)

QuantizedHuggingFaceLLM.load = held
app()
"""
"""The command line, whose models are loaded as soon as the standard input ends."""


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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
def test_ctrl_c_while_the_model_is_loaded_says_what_it_waits_for(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    words = [sys.executable, "-c", HELD_LOADING, "serve", str(folder), "-q", "none", "--port", "0", "--device", "cpu"]
    pipes = {"stdin": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(words, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            assert any(line == "loading\n" for line in process.stderr)
            process.send_signal(signal.SIGINT)
            assert any("the model is still being loaded" in line for line in process.stderr)
            process.stdin.close()
            assert process.wait(60) == 130
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.enable_socket
def test_weights_that_are_damaged_end_serve_with_a_sentence(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    for file in folder.glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:1000])
    words = [sys.executable, "-m", "langchain_quantllm.cli", "serve", str(folder), "-q", "none", "--port", "0"]
    made = subprocess.run([*words, "--device", "cpu"], capture_output=True, text=True, timeout=120, check=False)
    assert made.returncode == 1
    assert "is damaged" in made.stderr
    assert "Traceback" not in made.stderr
