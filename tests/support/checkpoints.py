"""Tiny random Llama checkpoints with a real tokenizer, a Hub that serves them, and child processes.

Sizes are multiples of 64, which bitsandbytes' 4-bit layers need on CPUs with AVX512-BF16.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

_TEXTS = [
    "The quick brown fox jumps over the lazy dog, and the capital of France is Paris.",
    "Quantized models take less memory than the models that they were made of.",
    "東京は日本の首都です。量子化されたモデルは小さい。",
]
SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
    "initializer_range": 0.3,  # far from uniform logits, so that greedy tokens are no coin tosses
}
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@functools.cache
def make_tokenizer() -> Any:
    """Train a byte-level BPE tokenizer."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=SIZES["vocab_size"],
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_checkpoint(
    folder: Path, *, seed: int = 0, dtype: str = "bfloat16", generation: dict[str, Any] | None = None, **sizes: Any
) -> Path:
    """Write a random Llama and its tokenizer into a folder; return the folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**{**SIZES, **sizes})).to(getattr(torch, dtype))
    model.generation_config.update(**(generation or {}))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def quicken() -> None:
    """Exclude the objects of imported modules from garbage collection, which each load and unload runs."""
    gc.collect()
    gc.freeze()


def spoil_weights(folder: Path) -> Path:
    """Replace the weights by garbage, which cannot be read."""
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        file.write_bytes(b"these are no weights")
    return folder


def edit_json(file: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes a key."""
    content = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    content.update(changes)
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}), encoding="utf-8")


def make_cached(cache: Path, checkpoint: Path, repo: str, *, commit: str = "a" * 40, ref: str = "main") -> Path:
    """Link a checkpoint into a folder with the layout of the Hub's cache; return the folder of the snapshot."""
    root = cache / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / commit
    snapshot.parent.mkdir(parents=True, exist_ok=True)
    snapshot.symlink_to(checkpoint, target_is_directory=True)
    (root / "blobs").mkdir(exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / ref).write_text(commit)
    return snapshot


def run_python(
    code: str, *arguments: object, env: dict[str, str] | None = None, timeout_s: float = 240
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process, which must succeed; `sys.argv[1:]` holds the arguments."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
        env={**os.environ, **(env or {})},
    )
    assert done.returncode == 0, done.stderr
    return done


class FakeHub:
    """A Hub on this machine that serves folders as repositories, and records the requests.

    Use it in a test marked `enable_socket`. `gated` repositories require the token `"hf_open_sesame"`.
    """

    TOKEN = "hf_open_sesame"

    def __init__(self, repos: dict[str, Path], gated: tuple[str, ...] = (), commit: str = "c" * 40) -> None:
        self.repos, self.gated, self.commit = repos, gated, commit
        self.asked: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                hub._answer(self, body=False)

            def do_GET(self) -> None:
                hub._answer(self, body=True)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> FakeHub:
        self._thread.start()
        return self

    @staticmethod
    def point_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Make this process use the server at a URL as the Hub, as HF_ENDPOINT does at the start of a process."""
        import huggingface_hub.constants

        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def __exit__(self, *exc_info: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _answer(self, request: BaseHTTPRequestHandler, *, body: bool) -> None:
        path = unquote(request.path.partition("?")[0])
        self.asked.append(f"{request.command} {path}")
        self.tokens.add(request.headers.get("Authorization"))
        status, headers, content = self._look_up(path, request.headers.get("Authorization"))
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if body:
            request.wfile.write(content)

    def _look_up(self, path: str, authorization: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo, rest = "/".join(parts[:2]), parts[2:]
        if repo not in self.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if repo in self.gated and authorization != f"Bearer {self.TOKEN}":
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if path.startswith("/api/"):
            folder = self.repos[repo]
            paths = sorted(path for path in folder.rglob("*") if path.is_file())
            files = [{"rfilename": path.relative_to(folder).as_posix()} for path in paths]
            if rest[:1] == ["tree"]:
                wanted = [] if rest[2:] else files  # only the whole tree is asked for
                tree = [{"type": "file", "path": f["rfilename"], "oid": "0" * 40, "size": 1} for f in wanted]
                return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
            answer = {"id": repo, "modelId": repo, "sha": self.commit, "siblings": files, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
        if rest[1] not in ("main", "v2", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound", "X-Repo-Commit": self.commit}, b""
        file = self.repos[repo] / "/".join(rest[2:])
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": self.commit}, b""
        content = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": self.commit}, content
