"""GGUF files of the tiny checkpoints, as llama.cpp's own converter writes them, and its server for one."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors.torch import load_file

from tests.support.checkpoints import SIZES

_SERVE = """
import sys, xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = sys.argv[1], "tiny"
params.n_parallel, params.n_ctx, params.port = 4, 4 * int(sys.argv[2]), 0
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


def write_gguf(source: Path, file: Path) -> None:
    """Write a checkpoint of `make_checkpoint` as a GGUF file."""
    import gguf

    context = json.loads((source / "config.json").read_text(encoding="utf-8"))["max_position_embeddings"]
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_block_count(SIZES["num_hidden_layers"])
    writer.add_context_length(context)
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SIZES["num_attention_heads"])
    writer.add_head_count_kv(SIZES["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(SIZES["vocab_size"])
    tokenizer = json.loads((source / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocab = sorted(tokenizer["vocab"], key=tokenizer["vocab"].__getitem__)
    vocab += [f"<unused{i}>" for i in range(SIZES["vocab_size"] - len(vocab))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(vocab)
    writer.add_token_types([3, 3, *[1] * (len(vocab) - 2)])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in tokenizer["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SIZES["num_hidden_layers"])
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # as llama.cpp orders the rows of rotary heads
            heads = SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            rows = tensor.shape[0] // heads
            tensor = tensor.reshape(heads, 2, rows // 2, -1).swapaxes(1, 2).reshape(tensor.shape)
        found = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(found, tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextlib.contextmanager
def llamacpp_serving(file: Path, *, context: int) -> Iterator[str]:
    """Run llama.cpp's server, which the package xllamacpp brings along, in a process of its own; yields its address."""
    command = [sys.executable, "-c", _SERVE, str(file), str(context)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            address = next((line for line in process.stdout if line.startswith("http")), None)
            assert address is not None, "llama.cpp's server did not start"
            yield address.strip()
        finally:
            process.kill()
