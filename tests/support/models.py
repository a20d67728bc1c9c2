"""Small real models built in code, and the count of a model's forwards.

Sizes are multiples of 64, as bitsandbytes' CPU kernels need them.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE

from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.engine import worker
from langchain_quantllm.engine.forward_context import current_context
from langchain_quantllm.errors import UnsupportedError

TINY = {
    "llama": (transformers.LlamaConfig, {"num_key_value_heads": 1}),
    "qwen2": (transformers.Qwen2Config, {"num_key_value_heads": 1}),
    "mistral": (transformers.MistralConfig, {"num_key_value_heads": 1, "sliding_window": 16}),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
}
"""Families of `tiny_model`: rotary or not, grouped heads, a sliding window, biases."""


def tiny_model(vocab_size: int, family: str = "llama", *, seed: int = 0, context_tokens: int = 8192) -> Any:
    """Make a random two-layer model whose likeliest tokens change from step to step.

    The weights are wide, so that the best two logits lie far further apart than float32 rounds.
    """
    config_class, options = TINY[family]
    config = config_class(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=context_tokens,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def scripted_model(vocab_size: int, script: Sequence[int], prompt_tokens: int, *, context_tokens: int = 256) -> Any:
    """Make a real GPT-2 that writes a given sequence of ids after a prompt of a given length.

    Its position embedding is the identity, its blocks add nothing, and its head has a 1 at the next token of each
    position, so that its text depends on the position only. After the script it writes token 0.
    """
    config = transformers.GPT2Config(
        vocab_size=vocab_size,
        n_positions=context_tokens,
        n_embd=context_tokens,
        n_layer=1,
        n_head=2,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        model.transformer.wte.weight.zero_()
        model.transformer.wpe.weight.copy_(torch.eye(context_tokens))
        for block in model.transformer.h:
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for i in range(context_tokens):
            at = i - (prompt_tokens - 1)
            model.lm_head.weight[script[at] if 0 <= at < len(script) else 0, i] = 1.0
    return model


def byte_fallback_tokenizer() -> Any:
    """Make a tokenizer like those of SentencePiece: `▁` for spaces, one token per byte for unknown characters."""
    letters = [*"▁abcdefghijklmnopqrstuvwxyz,.!", "▁the", "▁cat", "こ", "に", "日", "本"]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    # With these merges, each of the two words above is encoded as one token.
    merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("c", "a"), ("ca", "t"), ("▁", "cat")]
    pieces += ["th", "the", "ca", "cat"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def pipeline_of(model: Any, tokenizer: Any) -> Any:
    """Make a text-generation pipeline, as a user does."""
    return transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)


def llm_of(model: Any, tokenizer: Any, **fields: Any) -> QuantizedHuggingFaceLLM:
    """Make an LLM over a model built in code."""
    return QuantizedHuggingFaceLLM(pipeline=pipeline_of(model, tokenizer), **fields)


@dataclass
class Forwards:
    """The forwards of a model: rows and new tokens of each, in order."""

    shapes: list[tuple[int, int]] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.shapes)

    @property
    def rows(self) -> list[int]:
        return [rows for rows, _ in self.shapes]

    @property
    def prefills(self) -> list[tuple[int, int]]:
        """The forwards of prompts, with more than one token per row."""
        return [shape for shape in self.shapes if shape[1] > 1]

    def wait_for(self, count: int, timeout_s: float = 20.0) -> None:
        """Wait for this number of forwards."""
        wait_until(lambda: self.count >= count, timeout_s)

    def settle(self, timeout_s: float = 20.0) -> int:
        """Wait until no engine has work left; return the number of forwards."""
        wait_for_rest(timeout_s)
        return self.count


def wait_until(is_true: Callable[[], Any], timeout_s: float = 10.0) -> None:
    """Wait for a condition."""
    deadline = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline, f"not so within {timeout_s} s"
        time.sleep(0.002)


def wait_for_rest(timeout_s: float = 20.0) -> None:
    """Wait until the thread of every engine sleeps and nothing is queued; a call returns a little earlier."""
    wait_until(lambda: all(map(_is_at_rest, list(worker._workers))), timeout_s)


def _is_at_rest(one: worker.Worker) -> bool:
    if one._waiting:  # checked first: the thread takes rows off the queue after it wakes up
        return False
    thread = one._thread
    if thread is None or thread.has_ended:  # another thread may have got its number
        return True
    frame = sys._current_frames().get(thread.ident or 0)
    codes = set()
    while frame is not None:
        codes.add(frame.f_code)
        frame = frame.f_back
    return not codes or worker.Worker._gather.__code__ in codes


@contextlib.contextmanager
def forwards(llm: QuantizedHuggingFaceLLM, before: Callable[[int], None] | None = None) -> Iterator[Forwards]:
    """Count the forwards of an LLM's model; `before` is called with the number of each forward, from 1."""
    seen = Forwards()

    def note(module: Any, args: Any, kwargs: Any) -> None:
        context = current_context()
        if context is not None and context.record is not None:
            return  # the hook changes the model, so that fused steps are found anew
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        seen.shapes.append(tuple(ids.shape))
        if before is not None:
            before(seen.count)

    with contextlib.suppress(UnsupportedError):
        _ = llm.engine_info  # the making of an engine runs some forwards
    handle = llm.load().pipeline.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def slowly(seconds: float = 0.01) -> Callable[[int], None]:
    """Delay every forward, so that a test can act between two."""
    return lambda number: time.sleep(seconds)


def fail_at(number: int, error: Exception) -> Callable[[int], None]:
    """Raise an error in one forward."""

    def before(count: int) -> None:
        if count == number:
            raise error

    return before


def greedy_text(llm: QuantizedHuggingFaceLLM, prompt: str, **options: Any) -> str:
    """Complete a prompt greedily with transformers' `generate`, the reference."""
    model, tokenizer = llm.load().pipeline.model, llm.pipeline.tokenizer
    inputs = tokenizer(prompt, return_tensors="pt")
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 12, **options}
    output = model.generate(inputs["input_ids"], attention_mask=inputs["attention_mask"], **options)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
