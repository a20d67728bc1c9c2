"""The parts that the continuous engine runs a model with, and their rebuilding when the model has changed."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from langchain_quantllm.compat.transformers_attention import attention_name
from langchain_quantllm.compat.transformers_rotary import moving_rope
from langchain_quantllm.engine.adapter_switch import AdapterSwitch, changed_by_hand
from langchain_quantllm.engine.alibi import BiasedAttention
from langchain_quantllm.engine.attention import Attention, LayerPool
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.cuda_graphs import no_graph_reason
from langchain_quantllm.engine.fingerprint import Fingerprint, fingerprint
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.image_check import no_images_reason, verify_images
from langchain_quantllm.engine.image_reader import ImageReader
from langchain_quantllm.engine.indexed_attention import IndexedLayers
from langchain_quantllm.engine.invariance import check_operations, verify_invariance
from langchain_quantllm.engine.invariant_attention import InvariantGatherAttention, InvariantTritonAttention
from langchain_quantllm.engine.kv_cache import (
    LEAST_BLOCKS,
    allocate_pools,
    chosen_factors,
    count_blocks,
    stored_shapes,
)
from langchain_quantllm.engine.latent_attention import LatentLayers
from langchain_quantllm.engine.lora import NO_ADAPTER, LoraStack
from langchain_quantllm.engine.model_check import verify_engine, verify_stages
from langchain_quantllm.engine.model_probe import ModelProbe, inspect_model, unsupported_reason
from langchain_quantllm.engine.model_runner import ModelRunner
from langchain_quantllm.engine.own_attention import OwnAttention
from langchain_quantllm.engine.relative_bias import RelativeBiases
from langchain_quantllm.engine.request import EngineInfo, ModelLimits
from langchain_quantllm.engine.rotary_lengths import RotaryLengths
from langchain_quantllm.engine.stages import Stages
from langchain_quantllm.engine.state_forward import StateModules
from langchain_quantllm.engine.state_pool import LEAST_ROWS, StatePool, count_rows, slots_of, state_bytes
from langchain_quantllm.engine.state_snapshots import StateSnapshots
from langchain_quantllm.engine.state_steps import find_state_steps
from langchain_quantllm.engine.triton_attention import TritonAttention
from langchain_quantllm.errors import NotEnoughMemoryError, UnsupportedError
from langchain_quantllm.kernels.invariant.ops import InvariantOps
from langchain_quantllm.kernels.linear import tuned
from langchain_quantllm.memory import format_bytes, release_heap

_log = logging.getLogger(__name__)

SLOTS_GPU, SLOTS_CPU = 128, 32
"""Maximum number of sequences at once."""

_FEWEST_BLOCKS = 64  # a pool of default size is not halved below this
_MOST_REBUILDS = 3  # while the model changes as its parts are made anew
_TRIED_BLOCKS = 64  # several programs of the attention kernel share a sequence of so many


class EngineParts:
    """A model with its KV pools, attention, adapters, fused steps and runner.

    Attributes:
        limits: The limits of the model's requests.
        probe: The facts of the model's first forward.
        pools: The KV pool of each layer that keeps keys and values.
        states: The states of layers that keep one for each sequence; None if there are none.
        runner: Runs the model.
        adapters: The adapters that sequences choose from; None if the model runs as it is.
        images: Reads the images of prompts; None until `read_images` was called with success.
        adapter_names: Their names; None likewise.
        rotary: The rotary positions that follow from a text's length; None if they do not.
        slots: Maximum number of sequences at once.
        is_gpu: Whether the model lies on a GPU.
        refusal: Why no sequence can run with the model as it is now; None if they can.
    """

    def __init__(
        self,
        model: Any,
        limits: ModelLimits,
        *,
        cache_budget: float | int | None,
        switch: AdapterSwitch | None,
        fusion: Fusion | None,
        no_fusion_reason: str | None,
        batch_invariant: bool = False,
        stages: Stages | None = None,
        no_stages_reason: str | None = None,
        cache_dtype: str = "auto",
        most_tokens: int | None = None,
    ) -> None:
        """Allocate the parts, and check that they give the model's own logits; see `ContinuousEngine`.

        `most_tokens` are the most that the KV cache is made for; None for what `cache_budget` allows.
        """
        if (reason := unsupported_reason(model)) is not None:
            raise UnsupportedError(reason)
        if batch_invariant:
            check_operations(model, frozenset() if fusion is None else fusion.replaced_ids)
        self._model = model
        self._switch = switch
        self._fusion = fusion
        self._stages = stages
        self._batch_invariant = batch_invariant
        self._cache_dtype = cache_dtype
        self._most_tokens = most_tokens
        self._notes = [] if no_fusion_reason is None else [f"no fused steps: {no_fusion_reason}"]
        if no_stages_reason is not None:
            self._notes.append(f"accelerate's hooks move its tensors between devices, by the host: {no_stages_reason}")
        self.limits = limits
        self.pools: list[LayerPool] = []
        self.states: StatePool | None = None
        self._indexed: IndexedLayers | None = None
        self._checked_tokens = 0  # of the longest text that the model was checked with
        self.refusal: str | None = None
        self.adapters: LoraStack | None = None
        self._own, self._relative = OwnAttention(model), RelativeBiases(model)
        self._patched: list[BiasedAttention | OwnAttention | RelativeBiases | StateModules | IndexedLayers]
        self._patched = [BiasedAttention(model), self._own, self._relative]
        self.images: ImageReader | None = None
        self._no_images_reason: str | None = None
        self.rotary: RotaryLengths | None = None
        self.adapter_names = None if switch is None else switch.names
        self.is_gpu = model.get_input_embeddings().weight.device.type != "cpu"
        self.slots = SLOTS_GPU if self.is_gpu else SLOTS_CPU
        try:
            if switch is not None:
                self.adapters = LoraStack(model, switch.names)
            if moving_rope(model.config.get_text_config()) is not None:
                self.rotary = RotaryLengths(model, limits.context_tokens)
            with contextlib.nullcontext() if switch is None else switch.unchanged():
                if stages is not None:
                    verify_stages(model, stages)
                self.probe: ModelProbe = self._own_probe(inspect_model(model, self._own.uncached))
            if self.probe.states:
                if batch_invariant:
                    msg = "its layers keep a state, which is computed in another way alone than in a batch"
                    raise UnsupportedError(msg)
                self._patched.append(StateModules(model))
            if any(shape.index_dim for shape in self.probe.shapes):
                if batch_invariant:
                    msg = "an indexer chooses the tokens that its attention sees, by scores that depend on the batch"
                    raise UnsupportedError(msg)
                self._indexed = IndexedLayers(model)
                self._patched.append(self._indexed)
            self._latents = LatentLayers(model)
            self.probe = replace(self.probe, shapes=self._latents.build(self.probe.layers, self.probe.shapes))
            self._stored = stored_shapes(self.probe.shapes, cache_dtype)
            # Before the parts are made: a change meanwhile is noticed with the first request.
            self._fingerprint = self._current_fingerprint()
            self.runner = self._make_runner(self._choose_attention(), cache_budget)
            release_heap()  # the first forward repacks weights on some CPUs, which takes four times their size
        except torch.OutOfMemoryError as error:
            self.close()
            msg = "the device has no memory left for the engine; free some, or load the model in fewer bits."
            raise NotEnoughMemoryError(msg) from error
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Take the adapters' forwards off the model, and release it and the KV pools; the limits stay readable."""
        for patched in self._patched:
            patched.close()
        self._patched, self._indexed = [], None
        for name in ("_own", "_relative"):
            vars(self).pop(name, None)
        if self.adapters is not None:
            self.adapters.close()
        if self.images is not None:
            self.images.close()
        if self.rotary is not None:
            self.rotary.close()
        if (latents := vars(self).pop("_latents", None)) is not None:
            latents.close()
        self.pools, self.states, self.adapters, self.images, self.rotary = [], None, None, None, None
        self._model = self._switch = self._fusion = self._stages = None
        vars(self).pop("runner", None)

    @contextlib.contextmanager
    def products(self) -> Iterator[None]:
        """Let the model's own forward in this thread multiply as the runner's does; see `Fusion.products`."""
        with contextlib.ExitStack() as entered:
            if self._batch_invariant:
                entered.enter_context(InvariantOps())
            if self._fusion is not None:
                entered.enter_context(self._fusion.products())
            yield

    @property
    def model(self) -> Any:
        """The model."""
        return self._model

    @property
    def info(self) -> EngineInfo:
        """The engine's name, and which of its features cannot be used."""
        notes = list(self._notes)
        if self._stages is not None:
            notes.append(self._stages.note)
        if self.runner.no_graph_reason:
            notes.append(f"decode steps are not CUDA graphs: {self.runner.no_graph_reason}")
        if copied := self._latents.copied_bytes:
            notes.append(f"matrices of its latents are dequantized, in {format_bytes(copied)}")
        if self._indexed is not None:
            notes.append(self._indexed.note(self._checked_tokens))
        kinds = () if self._fusion is None else self._fusion.summary
        fused = {kind.kind: kind.fused for kind in kinds}
        if self.runner.sampler.has_kernel:
            fused["sampling"] = 1
        left = [kind for kind in kinds if kind.left and not kind.fused]
        notes += [f"no {kind.kind} steps are fused: {max(kind.left, key=kind.left.__getitem__)}" for kind in left]
        if self.states is not None:
            notes.append(self.states.prefix_note(self.slots))
            notes += self.states.steps.notes
            fused |= self.states.steps.counts
        if self._no_images_reason is not None:
            notes.append(f"images are read by transformers' own generate: {self._no_images_reason}")
        cache_tokens = self.limits.cache_tokens or 0
        follows_table = fused.get("linear") and not self._batch_invariant
        return EngineInfo(
            name="fast",
            reason="; ".join(["one running batch over KV cache blocks", *notes]),
            graphs=self.runner.captures,
            kv_cache_tokens=cache_tokens,
            kv_cache_bytes=(cache_tokens + BLOCK_TOKENS) * self.token_bytes,
            kv_cache_dtype=self._cache_dtype_name,
            state_bytes=None if self.states is None else sum(state_bytes(self.probe.states, self.states.rows).values()),
            fused=fused,
            batch_invariant=self._batch_invariant,
            tuned=tuned.describe(self._model.get_input_embeddings().weight.device) if follows_table else None,
        )

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all pools."""
        return sum(shape.token_bytes for shape in self._stored)

    @property
    def _cache_dtype_name(self) -> str | None:
        """The dtype of keys and values; None without any."""
        if self._cache_dtype != "auto":
            return self._cache_dtype
        return ", ".join(sorted({str(shape.dtype).removeprefix("torch.") for shape in self._stored})) or None

    @property
    def no_speculation_reason(self) -> str | None:
        """Why a step gives one token to each sequence; None if it can verify several."""
        if self.states is not None:
            return "layers keep a state, which cannot be taken back behind a wrong token"
        if self._stages is not None:
            return "several steps run at once, in stages"
        if self.runner.is_asynchronous and not self.runner.follows:
            return "its steps are not CUDA graphs, so each would wait for the one before"
        return None

    def new_snapshots(self) -> StateSnapshots | None:
        """Return the rows for states at block borders, all free; None if the model keeps no states."""
        if self.states is None:
            return None
        kept = range(self.slots + 1, self.states.rows if self.states.continues else self.slots + 1)
        return StateSnapshots(kept)

    # Building.

    def _own_probe(self, probe: ModelProbe) -> ModelProbe:
        """Add to a probe what attentions that compute their scores by themselves do beside the model's own cache."""
        layers = probe.layers
        return replace(
            probe, shapes=self._own.shapes(layers, probe.shapes), windows=self._own.windows(layers, probe.windows)
        )

    def _choose_attention(self) -> Attention:
        shapes = self.probe.shapes
        devices = {shape.device for shape in shapes} | {state.device for state in self.probe.states}
        if any(device.type != "cuda" for device in devices):
            kinds = {device.type for device in devices} - {"cpu"}
            return self._gathering(f"keys and values are on {', '.join(sorted(kinds))}" if kinds else None)
        if any(max(shape.key_dim, shape.value_dim) > 256 for shape in shapes if not shape.is_latent):
            return self._gathering("heads are larger than 256")
        if any(shape.value_dim > 512 or shape.key_dim > 256 for shape in shapes if shape.is_latent):
            return self._gathering("latents are larger than 512")
        if self._relative.count:
            return self._gathering("each query has its own biases")
        if self._cache_dtype != "auto" and torch.version.hip is not None:
            return self._gathering("the kernels read 8 bits by instructions of NVIDIA's GPUs")
        try:
            from langchain_quantllm.kernels import attention as attention_kernels

            kind = InvariantTritonAttention if self._batch_invariant else TritonAttention
            attention = kind(attention_kernels, sorted(devices, key=str))
            for tried in (shapes[:1], self._stored[:1]):
                for pool in allocate_pools(tried, _TRIED_BLOCKS):
                    attention.try_out(pool)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # not installed, or without a compiler
            return self._gathering(f"Triton cannot be used ({error!r})")
        return attention

    def _gathering(self, reason: str | None) -> Attention:
        """Attend by PyTorch, for a reason, which is None on a CPU.

        Raises:
            UnsupportedError: If there is a reason, and attention must not depend on the batch.
        """
        if not self._batch_invariant:
            if reason is not None:
                self._notes.append(f"attention by gathering blocks: {reason}")
            return GatherAttention()
        if reason is not None:
            msg = f"its attention depends on the batch, as {reason}"
            raise UnsupportedError(msg)
        return InvariantGatherAttention()

    def _make_runner(self, attention: Attention, budget: float | int | None) -> ModelRunner:
        """Allocate the pools and make a verified runner; with half the pool if memory is short."""
        shapes, states = self.probe.shapes, self.probe.states
        rows, continues = 0, self.probe.continues
        if states:
            rows = count_rows(states, budget, most=(1 + continues) * self.slots + 1)
            self.slots = slots_of(rows, most=self.slots, continues=continues)
        context = self.limits.context_tokens
        taken = state_bytes(states, rows)
        blocks = count_blocks(self._stored, budget, sequences=self.slots, context=context, state_bytes=taken)
        if self._most_tokens is not None:
            blocks = min(blocks, max(LEAST_BLOCKS + 1, -(-self._most_tokens // BLOCK_TOKENS) + 1))
        while True:
            self.limits = replace(self.limits, cache_tokens=(blocks - 1) * BLOCK_TOKENS)
            try:
                self.states = StatePool(states, rows, continues=continues) if states else None
                self._find_state_steps()
                if self._cache_dtype != "auto":
                    # First as the model computes: only then is a difference that of rounding. In the same memory.
                    self.pools = allocate_pools(shapes, max(LEAST_BLOCKS, blocks // 4))
                    self._verified_runner(attention, can_capture=False)
                    self.pools = []
                    torch.cuda.empty_cache()
                self.pools = allocate_pools(
                    self._stored, blocks, chosen_factors(self.probe.key_factors, self._cache_dtype)
                )
                rounds_cache = self._cache_dtype != "auto"
                return self._verified_runner(attention, rounds_cache=rounds_cache)
            except (NotEnoughMemoryError, torch.OutOfMemoryError):
                # Memory that is measured as free may be in pieces, or not for this process.
                if budget is not None or blocks < _FEWEST_BLOCKS:
                    raise
            self.pools, self.states = [], None
            torch.cuda.empty_cache()
            blocks //= 2
            if states:
                rows = max(LEAST_ROWS, rows // 2)
                self.slots = slots_of(rows, most=self.slots, continues=continues)

    def _find_state_steps(self) -> None:
        if self.states is None or not self.is_gpu:
            return
        with contextlib.suppress(ImportError):  # without Triton nothing is fused, as is said elsewhere
            from langchain_quantllm.kernels import recurrent

            self.states.steps = find_state_steps(self._model, self.states.tensors, recurrent)

    def _verified_runner(
        self, attention: Attention, *, can_capture: bool = True, rounds_cache: bool = False
    ) -> ModelRunner:
        """Make the runner that gives the model's own logits: by registered attention, or by catching PyTorch's."""
        can_capture &= isinstance(attention, TritonAttention)
        context = self.limits.context_tokens
        cached = (self.limits.cache_tokens or 0) // BLOCK_TOKENS
        cached = min([cached, *(len(pool.kv) - 1 for pool in self.pools)])
        blocks_per_sequence = cached if context is None else min(cached, -(-context // BLOCK_TOKENS))
        most_tokens = min(cached * BLOCK_TOKENS, context or sys.maxsize)
        failure: UnsupportedError | None = None
        for by_sdpa in (False, True):
            if by_sdpa and attention_name(self._model.config) != "sdpa":
                break
            runner = ModelRunner(
                self._model,
                self.pools,
                attention,
                slots=self.slots,
                blocks_per_sequence=max(2, blocks_per_sequence),
                vocab_size=self.probe.vocab_size,
                by_sdpa=by_sdpa,
                can_capture=can_capture,
                layers=self.probe.layers,
                states=self.states,
                no_graph_reason=self._no_graph_reason() if can_capture else None,
                adapters=self.adapters,
                fusion=self._fusion,
                needs_lengths=self.rotary is not None,
                latents=self._latents,
                operations=InvariantOps if self._batch_invariant else contextlib.nullcontext,
                stages=self._stages,
            )
            try:
                self._checked_tokens = verify_engine(
                    runner,
                    self._model,
                    self.probe,
                    self._switch,
                    self._fusion,
                    most_tokens=most_tokens,
                    indexed=self._indexed,
                    rounds_cache=rounds_cache,
                )
                if self._batch_invariant:
                    self._verify_invariance(runner, cached + 1)
            except UnsupportedError as error:
                failure = failure or error
                continue
            return runner
        raise failure or UnsupportedError("its attention cannot be reached")

    def _verify_invariance(self, runner: ModelRunner, blocks: int) -> None:
        if not runner.sampler.has_kernel and self.is_gpu:
            msg = "there is no sampling kernel on this device, and PyTorch's sampling depends on the batch"
            raise UnsupportedError(msg)
        adapter = NO_ADAPTER if self.adapters is None else 0
        verify_invariance(runner, self._model, blocks=blocks, slots=self.slots, adapter=adapter)

    def _no_graph_reason(self) -> str | None:
        if self._indexed is not None:
            return "an indexer chooses the tokens that attention sees, by lengths on the host"
        if self._stages is not None and self.probe.states:
            return "layers on several GPUs keep a state"
        replaced = frozenset() if self._fusion is None else self._fusion.replaced_ids
        return no_graph_reason(self._model, replaced, has_stages=self._stages is not None)

    def read_images(self, processor: Any) -> str | None:
        """Let prompts hold images from now on, if the model gives the same logits for one as by itself.

        Args:
            processor: The model's processor.

        Returns:
            The reason why they cannot; None if they can.
        """
        if self.images is None and self._no_images_reason is None:
            self._no_images_reason = no_images_reason(self._model, processor)
            if self._no_images_reason is None:
                reader = ImageReader(self._model)
                try:
                    verify_images(self.runner, reader, self._model, processor, self.probe, self._switch, self._fusion)
                    self.images = self.runner.image_reader = reader
                except UnsupportedError as error:
                    self._no_images_reason = str(error)
                except torch.OutOfMemoryError:  # there may be more the next time
                    return "the device had no memory left to check it"
                finally:
                    if self.images is None:
                        reader.close()
        return self._no_images_reason

    # Changes.

    def _current_fingerprint(self) -> Fingerprint:
        return fingerprint(self._model, names_adapters=self.adapters is not None)

    def model_changed(self) -> bool:
        """Whether anything of the model has changed since it was last looked at; see `fingerprint`."""
        return self._current_fingerprint() != self._fingerprint

    def rebuild(self) -> None:
        """Find fused steps, graphs and adapters of the changed model; sets `refusal` if its adapters cannot run."""
        for _ in range(_MOST_REBUILDS):
            before = self._current_fingerprint()
            self._rebuild_once()
            # Last, so that all is done again after a failure. Fusing may have moved weights, but changes none.
            self._fingerprint = self._current_fingerprint()
            if self._fingerprint.versions == before.versions:
                break

    def _divide_anew(self, stages: Stages) -> bool:
        """Find the stages of the changed model; sets `refusal` if its layers lie elsewhere, and their blocks do not."""
        # What is patched over the stages comes off before them, or would lie between them and the modules.
        for part in (self.images, self._latents, self.rotary, self.adapters, *reversed(self._patched), self._fusion):
            if part is not None:
                part.close()
        before = stages.layout
        try:
            stages.build()
        except UnsupportedError as error:
            self.refusal = f"the model was changed: {error}"
            return False
        after = stages.layout
        is_same = all(after.get(name, place) == place for name, place in before.items())
        self.refusal = None if is_same else "the model was changed: its layers lie on other devices; load it again"
        return is_same

    def _rebuild_once(self) -> None:
        if self._stages is not None and not self._divide_anew(self._stages):
            return
        if self._fusion is not None:
            try:
                self._fusion.build()
                release_heap()
            except Exception as error:  # memory, say: the model runs without them
                _log.warning("fused steps could not be found anew: %r", error)
        if self.images is not None:
            self.images.begin_anew()
        self._find_state_steps()
        self.runner.model_changed(self._no_graph_reason() if self.runner.can_capture else None)
        for patched in self._patched:
            patched.build()
        if self.images is None:
            self._no_images_reason = None  # found anew with the next image
        has_latents = any(shape.is_latent for shape in self.probe.shapes)  # be their matrices readable now or not
        if self.rotary is not None or has_latents:
            try:
                self.refusal = None
                if self.rotary is not None:
                    self.rotary.build()
                self._latents.build(self.probe.layers, self.probe.shapes)
            except UnsupportedError as error:
                self.refusal = f"the model was changed: {error}"
                return
        if self.adapters is not None:
            self.refusal = changed_by_hand("they could not be taken anew")  # should memory run out here, say
            try:
                self.adapters.build()
                self.refusal = None
            except UnsupportedError as error:
                self.refusal = changed_by_hand(str(error))
