"""The model of the soak: a tiny checkpoint with adapters, its references, and changes while requests come.

The checkpoint has a token without numbers, `BAD`, which is its end token as well: a text may end with it, and a prompt
that holds it must fail by itself. References are plain models of the same weights, one for each adapter, that no engine
touches; they are changed as the soaked model is.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from benchmarks.oracle import Oracle
from langchain_quantllm import QuantizedHuggingFaceLLM
from langchain_quantllm.options import BASE_ADAPTER
from tests.support.adapters import Reference, add_adapter, delete_adapter, make_adapter, quietly
from tests.support.models import tiny_model, wait_for_rest, wait_until

CONTEXT_TOKENS = 256
CACHE_TOKENS = 320
"""Room for little more than one sequence of full length: sequences wait, and are preempted."""

BAD = 256
"""The token without numbers; the tokenizer has the 256 bytes before it."""

ADAPTERS = ("one", "two")
_TOKEN_BYTES = 2 * 2 * 32 * 4  # two layers, keys and values of one head of 32 in float32


def byte_tokenizer() -> Any:
    """Make a tokenizer with a token for every byte."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_checkpoint(folder: Path, seed: int) -> None:
    """Write the checkpoint and its adapters."""
    tokenizer = byte_tokenizer()
    model = tiny_model(BAD + 1, seed=seed, context_tokens=CONTEXT_TOKENS)
    model.generation_config.eos_token_id = BAD
    with torch.no_grad():
        model.get_input_embeddings().weight[BAD] = torch.nan
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    for i, name in enumerate(ADAPTERS):
        make_adapter(folder / "base", folder / name, seed=seed + i, scale=2.0)


class SoakModel:
    """The soaked model with its oracles, and a lock under which it is changed while no checked request runs."""

    def __init__(self, folder: Path, engine: str, seed: int) -> None:
        """Load everything from a folder of `make_checkpoint`, for one of the engines or for both."""
        both = {"fast": ["fast"], "pipeline": ["pipeline"], "both": ["fast", "pipeline"]}[engine]
        first = QuantizedHuggingFaceLLM(
            model_id=str(folder / "base"),
            adapters={name: str(folder / name) for name in ADAPTERS},
            dtype="float32",
            kv_cache_memory=CACHE_TOKENS * _TOKEN_BYTES,
            max_new_tokens=20,
            progress=False,
        )
        self.llms = [first.model_copy(update={"engine": name}) for name in both]
        reference = Reference(folder / "base")
        self._references = {
            BASE_ADAPTER: reference.model(None), **{name: reference.model(folder / name) for name in ADAPTERS}
        }  # fmt: skip
        self.oracles = {name: Oracle(model) for name, model in self._references.items()}
        self._random = random.Random(seed)
        self._turn = threading.Condition()
        self._callers = 0
        self._is_changing = False
        self.load()

    @property
    def model(self) -> Any:
        """The soaked model."""
        return self.llms[0].pipeline.model

    def load(self) -> None:
        """Load it if it is not loaded; every engine is made and used once."""
        for llm in self.llms:
            llm.invoke("warm", max_new_tokens=3, repetition_penalty=1.2, adapter=ADAPTERS[0])

    def engines(self) -> list[Any]:
        """Return the engines."""
        return [llm._engine() for llm in self.llms]

    # Turns: any number of callers, or one change.

    @contextlib.contextmanager
    def calling(self) -> Iterator[None]:
        """Hold the model as it is during a call."""
        self.begin_call()
        try:
            yield
        finally:
            self.end_call()

    def begin_call(self) -> None:
        """Wait until no change runs or waits."""
        with self._turn:
            self._turn.wait_for(lambda: not self._is_changing)
            self._callers += 1

    def end_call(self) -> None:
        """Let a change go on that waits for this call."""
        with self._turn:
            self._callers -= 1
            self._turn.notify_all()

    @contextlib.contextmanager
    def changing(self) -> Iterator[None]:
        """Wait for the end of all calls, and hold up others."""
        with self._turn:
            self._turn.wait_for(lambda: not self._is_changing)
            self._is_changing = True
            self._turn.wait_for(lambda: not self._callers)
        try:
            yield
        finally:
            with self._turn:
                self._is_changing = False
                self._turn.notify_all()

    def wait_for_rest(self) -> None:
        """Wait until the fast engine holds nothing; checks that its books are right."""
        for engine in self.engines():
            if hasattr(engine, "_scheduler"):
                wait_until(lambda e=engine: not e._scheduler.sequences and not e._worker.queued, 60.0)
                engine._scheduler.check_integrity()
                assert engine._blocks.held == 0
        wait_for_rest(60.0)  # else a thread may still hold the tensors of its last step

    # Changes; call them in a block of `changing`.

    @contextlib.contextmanager
    def changed_weights(self) -> Iterator[None]:
        """Change weights in place inside the block, those of the references too."""
        factor = self._random.choice([-1.0, 0.5])
        changed = [self.model, *self._references.values()]
        weights = [model.get_output_embeddings().weight for model in changed]
        with torch.no_grad():
            for weight in weights:
                weight.mul_(factor)
        try:
            yield
        finally:
            with torch.no_grad():
                for weight in weights:
                    weight.mul_(1 / factor)

    @contextlib.contextmanager
    def attached_adapter(self) -> Iterator[None]:
        """Attach an adapter by hand inside the block, and take it off; calls choose theirs, so it changes no text."""
        with quietly():
            import peft

            config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = self.model
        add_adapter(model, config, "by_hand")
        try:
            yield
        finally:
            delete_adapter(model, "by_hand")
