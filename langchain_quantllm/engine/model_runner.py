"""The model runner: one step on the device, the forward over packed tokens and the sampling of the next ones.

Owns the tensors of a step: the block table, the sequences' last tokens, the graphs. Reads slots, positions and blocks
of sequences; no text, no stop strings and no queue.
"""

from __future__ import annotations

import contextlib
import functools
from collections import abc
from dataclasses import replace
from typing import Any, TypeVar, cast

import torch

from langchain_quantllm.compat.transformers_attention import WritingCache
from langchain_quantllm.compat.transformers_models import cache_name, forward_parameters
from langchain_quantllm.compat.transformers_states import passing_for_own
from langchain_quantllm.compat.transformers_vision import has_rope_index
from langchain_quantllm.engine import staging
from langchain_quantllm.engine.adapter_choice import AdapterChoice
from langchain_quantllm.engine.attention import Attention, Batch, LayerPool, PagedForward, Span
from langchain_quantllm.engine.attention_interface import configs_of, paged_attention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.block_table import BlockTable
from langchain_quantllm.engine.cuda_graphs import StepGraph, WaitFinder
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.fusion.sampling import find_sampling_kernel
from langchain_quantllm.engine.image_overlay import ImageOverlay
from langchain_quantllm.engine.image_reader import ImageReader
from langchain_quantllm.engine.latent_attention import LatentLayers
from langchain_quantllm.engine.lora import LoraStack
from langchain_quantllm.engine.named_logits import HeadInput
from langchain_quantllm.engine.prefill_graphs import Pack, PrefillGraphs, last_tokens
from langchain_quantllm.engine.sampler import MASKS, BatchSampler, PendingTokens, log_probabilities
from langchain_quantllm.engine.sequence import SamplingInput, Sequence
from langchain_quantllm.engine.speculation.verified_rows import VerifiedRow, sampling_inputs
from langchain_quantllm.engine.speculation.verify_steps import PendingVerification, VerifySteps
from langchain_quantllm.engine.stage_graphs import PlacedGraph, StagedGraph, StagePools
from langchain_quantllm.engine.stage_inputs import StageInputs
from langchain_quantllm.engine.stages import StageRun, Stages, StrayFinder, TriedRun, at_stage
from langchain_quantllm.engine.staging import PendingForward, StagingBuffers, step_inputs
from langchain_quantllm.engine.state_forward import StateForward
from langchain_quantllm.engine.state_pool import StatePool
from langchain_quantllm.engine.step import PrefillChunk, Step
from langchain_quantllm.kernels.reference import PREFILL_TILE

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Batch sizes that have a decode graph; smaller batches are padded."""

_MOST_ROWS = _BUCKETS[-1]
_ON_DEVICE = -1  # stands for the last token of a decoding sequence


_Method = TypeVar("_Method", bound=abc.Callable[..., Any])


def _on_device(method: _Method) -> _Method:
    """Run a method of the runner without gradients, and with its GPU as the current one, which Triton launches on."""
    is_sampling = method.__name__.startswith("sample")

    @functools.wraps(method)
    def run(self: ModelRunner, *args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), at_stage(self._sampling_device if is_sampling else self.device):
            return method(self, *args, **kwargs)

    return cast("_Method", run)


def reported_tokens(sequences: abc.Iterable[Sequence]) -> list[int]:
    """List all tokens whose log probabilities requests of some sequences report, in order of their ids."""
    return sorted({i for sequence in sequences for i in sequence.request.reported_ids})


class ModelRunner:
    """Runs a model over KV blocks. Used by one thread at a time."""

    def __init__(
        self,
        model: torch.nn.Module,
        pools: abc.Sequence[LayerPool],
        attention: Attention,
        *,
        slots: int,
        blocks_per_sequence: int,
        vocab_size: int,
        by_sdpa: bool,
        can_capture: bool,
        layers: abc.Sequence[int] | None = None,
        states: StatePool | None = None,
        no_graph_reason: str | None = None,
        adapters: LoraStack | None = None,
        fusion: Fusion | None = None,
        needs_lengths: bool = False,
        latents: LatentLayers | None = None,
        operations: abc.Callable[[], Any] = contextlib.nullcontext,
        stages: Stages | None = None,
    ) -> None:
        """Allocate the tables.

        Args:
            model: A causal language model of transformers; nothing of it is changed.
            pools: The KV pool of each layer that keeps keys and values.
            attention: Reads and writes them.
            slots: Maximum number of sequences at once.
            blocks_per_sequence: Most blocks of one sequence.
            vocab_size: Width of the model's logits.
            by_sdpa: Whether the model calls PyTorch's attention itself.
            can_capture: Whether this device and attention allow CUDA graphs.
            layers: Numbers of the layers that keep keys and values; None for all.
            states: The states of layers that keep some; None if there are none.
            no_graph_reason: Why this model's steps cannot be graphs, as far as is known.
            adapters: The adapters that sequences choose from; None if the model runs as it is.
            fusion: The model's fused steps; None if its modules run as they are.
            needs_lengths: Whether rotary frequencies follow from the lengths of texts.
            latents: The layers that cache latents; None if none do.
            operations: Makes the context in which the model and the sampler run.
            stages: The stages of a model on several devices; None if it lies on one.
        """
        self._model = model
        self._pools = dict(zip(range(len(pools)) if layers is None else layers, pools, strict=True))
        self._states = states
        self._attention = attention
        self._by_sdpa = by_sdpa
        self._needs_lengths, self._latents = needs_lengths, latents
        self._adapters, self._fusion, self._operations = adapters, fusion, operations
        self.device = model.get_input_embeddings().weight.device
        self.is_asynchronous = self.device.type == "cuda"
        self._sampling_device = self.device if stages is None else stages.last.device
        self.can_capture = can_capture
        is_plain = fusion is None and operations is contextlib.nullcontext
        with at_stage(self._sampling_device):
            kernels = None if is_plain else find_sampling_kernel(vocab_size, self._sampling_device)
        self.sampler = BatchSampler(slots, vocab_size, self._sampling_device, kernels=kernels)
        self._padding_slot = slots
        self._is_inside = False  # of an eager step, between two layers
        self._head_input: HeadInput | None = None  # of the step that runs, if its requests name tokens
        self.image_reader: ImageReader | None = None
        """Reads the images of prompts; None if there are none."""
        self._has_rope_index = has_rope_index(model)
        self._kept: list[int] = []  # tokens of the last eager step whose logits were asked for
        self._table = BlockTable(slots + 1, blocks_per_sequence, self.device)
        self._stages = None if stages is None else StageInputs(stages, self._table, self.sampler, StagePools())
        self._run_of_stages: StageRun | None = None  # while a step is tried out, or captured
        self._ones = torch.ones(_MOST_ROWS, dtype=torch.long, device=self.device)
        self._vocab_size = vocab_size
        self._mask_words = -(-vocab_size // 32)
        self._keeps_logits, self._cache_name = "logits_to_keep" in forward_parameters(model), cache_name(model)
        self.windows: dict[int, int] = {}  # of each layer that attended in the last eager forward; 0 for none
        self.counting: set[int] = set()  # layers that counted positions in it
        self.choosing: set[int] = set()  # layers that attended to chosen tokens in it
        self.no_graph_reason = no_graph_reason  # or found in a capture
        self._prefill_graphs: PrefillGraphs | None = None
        if can_capture:
            self._inputs = torch.zeros(staging.LINES, _MOST_ROWS, dtype=torch.int32, device=self.device)
            self._staging = StagingBuffers(staging.LINES, _MOST_ROWS)
            self._mask = torch.zeros(_MOST_ROWS, self._mask_words, dtype=torch.int32, device=self._sampling_device)
            if self._sampling_device != self.device:
                self._sampling_inputs = torch.zeros_like(self._inputs, device=self._sampling_device)
                self._sampling_staging = StagingBuffers(staging.LINES, _MOST_ROWS)
            if (
                stages is None
                and states is None
                and attention.prefills_on_device
                and blocks_per_sequence * BLOCK_TOKENS >= PREFILL_TILE
            ):
                self._prefill_graphs = PrefillGraphs(self._forward_pack, self.device)
        self._mask_staging: StagingBuffers | None = None
        self.verify_steps = VerifySteps(
            self._forward_verified,
            self._table.blocks,
            self.sampler,
            mask_words=self._mask_words,
            operations=operations,
        )
        self._decode_graphs: dict[int, StepGraph | StagedGraph] = {}
        self._sampling_graphs: dict[tuple[int, int, int], StepGraph | PlacedGraph] = {}
        self.drop_graphs()

    def twin(
        self, pools: abc.Sequence[LayerPool], states: StatePool | None, *, slots: int, blocks_per_sequence: int
    ) -> ModelRunner:
        """Make a runner of the same model, with pools and tables of its own and without graphs, for a check."""
        return ModelRunner(
            self._model,
            pools,
            self._attention,
            slots=slots,
            blocks_per_sequence=blocks_per_sequence,
            vocab_size=self._vocab_size,
            by_sdpa=self._by_sdpa,
            can_capture=False,
            layers=list(self._pools),
            states=states,
            adapters=self._adapters,
            fusion=self._fusion,
            needs_lengths=self._needs_lengths,
            latents=self._latents,
            operations=self._operations,
            stages=None if self._stages is None else self._stages.stages,
        )

    @property
    def captures(self) -> bool:
        """Whether steps become CUDA graphs."""
        return self.can_capture and self.no_graph_reason is None

    @property
    def follows(self) -> bool:
        """Whether a step may run while the result of the proposals before it is not known."""
        return self.captures and self.verify_steps.no_graph_reason is None

    @property
    def steps_at_once(self) -> int:
        """How many steps run at the same time, each in another stage; 1 for a model on one device."""
        return self._stages.steps_at_once if self._stages is not None and self.captures else 1

    def model_changed(self, no_graph_reason: str | None) -> None:
        """Begin anew with a model whose modules or weights have changed.

        Args:
            no_graph_reason: Why its steps cannot be graphs, as far as is known now.
        """
        self.no_graph_reason = no_graph_reason
        if self._prefill_graphs is not None:
            self._prefill_graphs.no_graph_reason = None
        self.drop_graphs()

    def synchronize(self) -> None:
        """Wait for the work of all devices."""
        if self._stages is not None:
            self._stages.synchronize()
        elif self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def drop_graphs(self) -> None:
        """Drop all graphs, as after a failure, and look for the model's configs anew."""
        if self._decode_graphs:
            self.synchronize()  # none of them may still run
        self._decode_graphs.clear()
        self._sampling_graphs.clear()
        self.verify_steps.clear()
        if self._prefill_graphs is not None:
            self._prefill_graphs.clear()
        if self._stages is not None:
            self._stages.pools.clear()
        elif self.captures:
            self._memory = torch.cuda.graph_pool_handle()  # the pool before was freed with its last graph
        self._configs = [] if self._by_sdpa else configs_of(self._model)
        self._cache_kind = passing_for_own(WritingCache, self._model)

    def enter(self, sequences: abc.Sequence[Sequence]) -> None:
        """Enter sequences, at least one, with all their blocks, as before a step that only decodes."""
        self._table.enter(sequences)
        if self._stages is not None:
            self._stages.enter(sequences)

    @_on_device
    def run(
        self, step: Step, sampling: abc.Sequence[SamplingInput], on_layer: abc.Callable[[int], None] | None = None
    ) -> PendingForward:
        """Run a step without proposals.

        Args:
            step: The step.
            sampling: One for each of its sequences that a token is sampled for.
            on_layer: Called with each layer's number before the layer attends, and may run decode steps of other
                sequences by graphs that are captured already; then the step itself is none. Only for steps of prompts.
        """
        if not step.chunks:
            return self._decode(step, sampling)
        self._table.enter_step(step)
        if self._stages is not None:
            self._stages.enter_step(step)
        logits = None
        sampled, named_logits = step.sampled, None
        named = reported_tokens(sampled)
        self._head_input = HeadInput(self._model) if named else None
        images = None
        if self.image_reader is not None:
            images = self.image_reader.overlay(step.chunks, len(step.decoding))
        positions = self._rope_positions(step)
        may_replay = self._prefill_graphs is not None and self.captures and not step.decoding and on_layer is None
        may_replay &= images is None and positions is None
        if self._prefill_graphs is not None and may_replay and not named:
            logits = self._prefill_graphs.run(step.chunks, self._padding_slot, self._memory)
        if logits is None:
            self._is_inside = on_layer is not None
            try:
                logits = self._run_eagerly(step, on_layer, images, positions)
            finally:
                self._is_inside = False
            if self._head_input is not None:
                named_logits = self._head_input.logits(named, self._kept, logits)
        inputs = step_inputs(sampled, [0] * len(sampled), [0] * len(sampled), sampling)
        # The copy does not wait for the forward: sampling is enqueued while it runs.
        inputs = inputs.to(self._sampling_device, non_blocking=True)
        return PendingForward(sampled, sampling, logits, inputs, starting=step.starting, named_logits=named_logits)

    @_on_device
    def verify(self, step: Step) -> PendingVerification:
        """Run a step with proposals."""
        return self.verify_steps.run(step, self._memory if self.captures else None)

    # Steps with chunks of prompts: all tokens packed behind each other, those of decoding sequences first.

    def _run_eagerly(
        self,
        step: Step,
        on_layer: abc.Callable[[int], None] | None = None,
        overlay: ImageOverlay | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if self._stages is not None:
            self._stages.await_tokens(sequence.slot for sequence in step.decoding)
        spans, parts = [], []
        for first, (sequence, position) in enumerate(zip(step.decoding, step.positions, strict=True)):
            spans.append(Span(slot=sequence.slot, first=first, position=position, count=1))
        if spans:
            slots = [sequence.slot for sequence in step.decoding]
            parts.append(torch.tensor([[_ON_DEVICE] * len(slots), step.positions, slots], dtype=torch.int32))
        first = len(spans)
        for chunk in step.chunks:
            slot, count = chunk.sequence.slot, chunk.count
            images = chunk.sequence.images
            span = Span(slot=slot, first=first, position=chunk.start, count=count)
            if images is not None and (groups := images.groups(chunk.start, count)):
                span = replace(span, groups=groups, groups_need_window=images.groups_need_window)
            spans.append(span)
            positions = torch.arange(chunk.start, chunk.start + count, dtype=torch.int32)
            ids = torch.tensor(chunk.ids, dtype=torch.int32)
            parts.append(torch.stack([ids, positions, torch.full_like(ids, slot)]))
            first += count
        packed = torch.cat(parts, 1).to(self.device, non_blocking=True)
        batch = Batch(table=self._table.blocks, slots=packed[2], positions=packed[1], spans=spans, decodes=False)
        # The last tokens of decoding sequences may not be known to the host yet.
        ids = torch.where(packed[0] == _ON_DEVICE, self._last_ids[packed[2].long()], packed[0])
        keep = [*range(len(step.decoding)), *last_tokens(step.chunks, len(step.decoding))]
        self._kept = keep
        return self._forward(ids, batch, keep or [0], position_ids, on_layer, overlay, step.chunks)

    def _rope_positions(self, step: Step) -> torch.Tensor | None:
        """Compute the positions of a step's tokens, of shape `(3, tokens)`; None if they are those in the sequences."""
        runs = [*step.decoding, *(chunk.sequence for chunk in step.chunks)]
        if not self._has_rope_index or all(sequence.images is None for sequence in runs):
            return None
        spans = [(s, position, 1) for s, position in zip(step.decoding, step.positions, strict=True)]
        spans += [(chunk.sequence, chunk.start, chunk.count) for chunk in step.chunks]
        return torch.cat([s.rope_positions(at, count) for s, at, count in spans], 1).long().to(self.device)

    def _forward_pack(self, pack: Pack) -> torch.Tensor:
        batch = Batch(
            table=self._table.blocks,
            slots=pack.slots,
            positions=pack.positions,
            spans=(),
            decodes=False,
            tiles=pack.tiles,
        )
        return self._forward(pack.ids.long(), batch, pack.kept.long())

    def _forward_verified(self, ids: torch.Tensor, batch: Batch) -> torch.Tensor:
        positions = batch.positions.long()
        if self._has_rope_index:
            positions = positions + self._table.position_deltas[batch.slots.long()]
        return self._forward(ids, batch, None, positions)

    # Steps that only decode.

    def _decode(self, step: Step, sampling: abc.Sequence[SamplingInput]) -> PendingForward:
        sequences, positions = step.decoding, step.positions
        if self._stages is not None:
            self._stages.await_tokens(sequence.slot for sequence in sequences)
        blocks = [s.blocks[position // BLOCK_TOKENS] for s, position in zip(sequences, positions, strict=True)]
        inputs = step_inputs(sequences, positions, blocks, sampling)
        bucket = self._bucket(len(sequences))
        if bucket is None or not self.captures:
            inputs = inputs.to(self.device)
            spans = [Span(slot=s.slot, first=0, position=p, count=1) for s, p in zip(sequences, positions, strict=True)]
            logits = self._decode_step(inputs, spans)
            return PendingForward(sequences, sampling, logits, inputs.to(self._sampling_device, non_blocking=True))
        self._stage(inputs, bucket)
        graph = self._decode_graphs.get(bucket)
        if graph is None:
            graph = self._capture_decode(bucket)
            if graph is None:
                return self._decode(step, sampling)
        inputs = self._inputs if self._sampling_device == self.device else self._sampling_inputs
        return PendingForward(sequences, sampling, graph.replay(), inputs[:, :bucket], is_graph=True)

    def can_replay(self, rows: int) -> bool:
        """Whether a decode step of so many sequences is captured already."""
        return self.captures and any(bucket >= rows for bucket in self._decode_graphs)

    def _bucket(self, rows: int) -> int | None:
        """Choose the batch size of a decode graph; inside of another step, only one that is captured."""
        buckets = self._decode_graphs if self._is_inside else _BUCKETS
        return min((bucket for bucket in buckets if bucket >= rows), default=None)

    def _stage(self, inputs: torch.Tensor, bucket: int) -> None:
        """Copy a step's inputs, padded, to the tensor that its graph reads."""
        staged = self._staging.next()
        staged[:, :bucket] = 0
        staged[staging.SLOT, :bucket] = self._padding_slot
        staged[:, : inputs.shape[1]] = inputs
        self._inputs.copy_(staged, non_blocking=True)
        self._staging.copied()
        if self._sampling_device != self.device:
            copied = self._sampling_staging.next()
            copied.copy_(staged)
            with at_stage(self._sampling_device):
                self._sampling_inputs.copy_(copied, non_blocking=True)
                self._sampling_staging.copied()

    @property
    def _last_ids(self) -> torch.Tensor:
        """The last token of each slot, on the device of the input embeddings."""
        return self.sampler.last_ids if self._stages is None else self._stages.last_ids

    def _decode_step(self, inputs: torch.Tensor, spans: abc.Sequence[Span] = ()) -> torch.Tensor:
        at, position_ids, block_index = inputs[: staging.BLOCK_INDEX + 1].long()
        if self._has_rope_index:
            position_ids = position_ids + self._table.position_deltas[at]
        self._table.blocks[at, block_index] = inputs[staging.BLOCK]
        batch = Batch(
            table=self._table.blocks,
            slots=inputs[staging.SLOT],
            positions=inputs[staging.POSITION],
            spans=spans,
            decodes=True,
            new_blocks=None if self._stages is None else inputs[staging.BLOCK],
        )
        return self._forward(self._last_ids[at], batch, None, position_ids)

    def _capture_decode(self, bucket: int) -> StepGraph | StagedGraph | None:
        inputs = self._inputs[:, :bucket]
        kept = inputs.clone()
        inputs.zero_()
        inputs[staging.SLOT] = self._padding_slot
        try:
            run = None if self._stages is None else TriedRun(self._stages.stages)
            body = functools.partial(self._decode_step, inputs)
            with WaitFinder() if run is None else StrayFinder(run) as finder:
                self._decode_in(run, body)
            if finder.found is not None:
                self.no_graph_reason = f"{finder.found} makes the host wait"
                return None
            graph: StepGraph | StagedGraph
            if self._stages is None or run is None:
                graph = StepGraph(body, self.device, self._memory)
            else:
                graph = StagedGraph(functools.partial(self._decode_in, body=body), run, self._stages.pools)
                if graph.output.device != self._sampling_device:
                    self.no_graph_reason = f"its logits are on {graph.output.device}, and not where its head is"
                    return None
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.no_graph_reason = f"capturing failed with {error!r}"
            return None
        finally:
            inputs.copy_(kept)
        self._decode_graphs[bucket] = graph
        return graph

    def _decode_in(self, run: StageRun | None, body: abc.Callable[[], torch.Tensor]) -> torch.Tensor:
        """Run a step in given stages; None if there are none."""
        self._run_of_stages = run
        try:
            return body()
        finally:
            self._run_of_stages = None

    # The forward.

    def _forward(
        self,
        ids: torch.Tensor,
        batch: Batch,
        keep: list[int] | torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
        on_layer: abc.Callable[[int], None] | None = None,
        images: ImageOverlay | None = None,
        chunks: abc.Sequence[PrefillChunk] = (),
    ) -> torch.Tensor:
        """Run packed tokens of shape `(tokens,)`; returns logits of shape `(tokens kept, vocab)`."""
        if position_ids is None:
            position_ids = batch.positions.long()
        forward = PagedForward(self._attention, self._pools, batch, by_sdpa=self._by_sdpa, on_layer=on_layer)
        steps = {} if self._fusion is None else self._fusion.steps
        adapters = self._adapter_choice(batch, keep)
        states = None if self._states is None else StateForward(self._states, batch, adapters, on_layer, chunks)
        context = ForwardContext(
            attention=forward,
            states=states,
            steps=steps,
            adapters=adapters,
            images=images,
            text_lengths=self._text_lengths(batch) if self._needs_lengths else None,
            absorptions={} if self._latents is None else self._latents.absorptions,
        )
        run = None
        if self._stages is not None:
            run = self._stages.lead(self._run_of_stages or self._stages.stages.begin(), context, batch)
            context.stages = run
        # A mask of four dimensions is taken as it is: none has to be made for an attention that ignores it, and layers
        # with a state do not look for padding in it, which would wait for the device.
        seen = self._ones[: len(ids)] if len(ids) <= len(self._ones) else torch.ones_like(ids)
        mask = seen[None, None, None] if self._by_sdpa or states is not None else seen[None]
        # A list: a tensor would be copied to the device of the first layer, and is needed on that of the last.
        options = {"logits_to_keep": keep} if keep is not None and self._keeps_logits else {}
        records = contextlib.nullcontext() if self._head_input is None else self._head_input.recording(context)
        with paged_attention(context, self._configs) as cache, self._operations(), records:
            cache.__class__ = self._cache_kind
            output = self._model(
                input_ids=ids[None],
                attention_mask=mask,
                position_ids=position_ids.unsqueeze(-2),
                use_cache=True,
                **{self._cache_name: cache},
                **options,
            )
        if states is not None:
            states.commit()
        self.windows, self.counting, self.choosing = forward.windows, forward.counting, forward.choosing
        logits: torch.Tensor = output.logits[0]
        logits = logits[keep] if keep is not None and not self._keeps_logits else logits
        if run is not None:
            run.finish()
        return logits

    def _adapter_choice(self, batch: Batch, keep: list[int] | torch.Tensor | None) -> AdapterChoice | None:
        """Choose the adapter of each token by its sequence; `keep` are the tokens that reach the output head."""
        if self._adapters is None:
            return None
        of_tokens = self._table.adapters[batch.slots.long()]
        sees_all = keep is None or not self._keeps_logits
        return self._adapters.choice(of_tokens, of_tokens if sees_all else of_tokens[keep])

    def _text_lengths(self, batch: Batch) -> torch.Tensor:
        """Compute the length that decides on each token's rotary frequencies, of shape `(tokens,)`."""
        return torch.maximum(self._table.prompt_lengths[batch.slots.long()], batch.positions + 1)

    # Sampling.

    def blank_masks(self, rows: int) -> torch.Tensor:
        """Return masks that allow all tokens: of shape `(rows, ceil(vocab / 32))`, int32, on the CPU."""
        if not self.is_asynchronous:
            return torch.full((rows, self._mask_words), -1, dtype=torch.int32)
        if self._mask_staging is None:
            self._mask_staging = StagingBuffers(max(self._padding_slot, _MOST_ROWS), self._mask_words)
        return self._mask_staging.next()[:rows].fill_(-1)

    @_on_device
    def sample(
        self,
        forward: PendingForward,
        *,
        mask: torch.Tensor | None = None,
        alternatives: int | None = None,
    ) -> PendingTokens:
        """Sample the next tokens after a forward.

        Args:
            forward: The forward.
            mask: Allowed tokens of each sequence as bits, made from `blank_masks`; needed if any sequence has a mask.
            alternatives: How many of the likeliest tokens to report, beside those that requests name; None for no log
                probabilities.
        """
        rows = len(forward.sequences)
        needs = forward.needs
        if placed := [s for s in forward.starting if s.slot >= 0]:
            self.sampler.set([s.slot for s in placed], [s.request for s in placed], [s.ids for s in placed])
        if forward.is_graph:
            if mask is not None:
                self._mask[:rows].copy_(mask, non_blocking=True)
            ids = self._sampling_graph(forward, needs).replay()[:rows]
        else:
            on_device = None if mask is None else mask.to(self._sampling_device, non_blocking=True)
            ids = self._sampling_step(forward.logits.to(self._sampling_device), forward.inputs, needs, on_device)
        if self._stages is not None:
            self._stages.return_tokens(forward.inputs[staging.SLOT], [s.slot for s in forward.sequences])
        if mask is not None and self._mask_staging is not None:
            self._mask_staging.copied()
        logprobs = None
        if alternatives is not None:
            with self._operations():
                logits = forward.logits[:rows].to(self._sampling_device)
                reported_ids = reported_tokens(forward.sequences)
                logprobs = log_probabilities(logits, ids, alternatives, reported_ids, forward.named_logits)
        return PendingTokens(forward.sequences, ids, logprobs)

    @_on_device
    def sample_verified(
        self,
        pending: PendingVerification,
        rows: abc.Sequence[VerifiedRow],
        *,
        mask: torch.Tensor | None = None,
        alternatives: int | None = None,
    ) -> PendingTokens:
        """Draw the next tokens after the forward of a verify step; see `sample`.

        Args:
            pending: The forward.
            rows: Its rows.
            mask: Allowed tokens at each draw.
            alternatives: See `sample`.
        """
        inputs, needs = sampling_inputs(rows)
        ids = self.verify_steps.sample(pending, inputs, needs, mask, self._memory if self.captures else None)
        if mask is not None and self._mask_staging is not None:
            self._mask_staging.copied()
        logprobs = None
        if alternatives is not None:
            with self._operations():
                reported_ids = reported_tokens(pending.sequences)
                logprobs = log_probabilities(pending.logits[: len(ids)], ids, alternatives, reported_ids)
        return PendingTokens(pending.sequences, ids, logprobs, rows)

    def _sampling_step(
        self, logits: torch.Tensor, inputs: torch.Tensor, needs: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        uniforms = inputs[staging.UNIFORM].view(torch.float32)
        with self._operations():
            return self.sampler.sample(logits, inputs[staging.SLOT], uniforms, inputs[staging.MAY_NOT_END], needs, mask)

    def _sampling_graph(self, forward: PendingForward, needs: int) -> StepGraph | PlacedGraph:
        bucket = forward.inputs.shape[1]
        key = (bucket, needs, self.sampler.version)
        if key not in self._sampling_graphs:
            mask = self._mask[:bucket] if needs & MASKS else None
            kept = forward.inputs.clone()
            forward.inputs[staging.SLOT] = self._padding_slot  # the first run must not touch the sequences

            def body() -> torch.Tensor:
                return self._sampling_step(forward.logits, forward.inputs, needs, mask)

            body()
            if self._stages is None:
                self._sampling_graphs[key] = StepGraph(body, self.device, self._memory)
            else:
                self._sampling_graphs[key] = PlacedGraph(body, self._stages.stages.last, self._stages.pools)
            forward.inputs.copy_(kept)
        return self._sampling_graphs[key]
