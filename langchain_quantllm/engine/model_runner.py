"""Running one step on the device: forward over packed tokens, and the drawing of the next ones.

Owns the tensors that a step reads and writes: the page table, the rows' last tokens, the graphs.
Knows rows as numbers, positions and pages; no text, no stop strings, no queue.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch

from langchain_quantllm.compat.transformers_models import cache_name, forward_parameters
from langchain_quantllm.engine.attention import (
    Attention,
    Batch,
    Forward,
    LayerPool,
    Span,
    configs_of,
    driving,
)
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.cuda_graphs import StepGraph, WaitFinder
from langchain_quantllm.engine.fusion.fuse import Fusion
from langchain_quantllm.engine.fusion.sampling import find_drawing
from langchain_quantllm.engine.lora import NO_ADAPTER, LoraStack
from langchain_quantllm.engine.prefill_graphs import Pack, PrefillGraphs, Run
from langchain_quantllm.engine.sampler import MASKS, BatchSampler, log_probabilities
from langchain_quantllm.engine.scheduler import Piece, RowState
from langchain_quantllm.kernels.attention_reference import PREFILL_BLOCK

_BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
"""Row counts for which there is a graph; fewer rows are filled up."""

_LINES = 6
_SLOT, _POSITION, _PAGE_INDEX, _PAGE, _UNIFORM, _MAY_NOT_END = range(_LINES)
"""Lines of what is brought to the device for each row of a step; `_PAGE_INDEX` is where in its row the page is."""

_LARGEST_UNIFORM = 1 - 2**-24  # below 1 in float32, too


@dataclass(frozen=True, kw_only=True)
class Chance:
    """What the drawing of one row's token takes from outside.

    Args:
        uniform: A number in [0, 1).
        may_end: Whether the row's end tokens may be drawn.
    """

    uniform: float = 0.0
    may_end: bool = True


@dataclass
class Launched:
    """A forward on its way: the logits of the rows that draw a token, and what their drawing needs."""

    logits: torch.Tensor
    inputs: torch.Tensor
    rows: int
    is_graph: bool = False
    is_prefill: bool = False


class Drawn:
    """Tokens on their way to the host."""

    def __init__(self, ids: torch.Tensor, logprobs: tuple[torch.Tensor, ...] | None) -> None:
        """Begin to bring them over."""
        self._ids = ids.to("cpu", non_blocking=True)
        self._logprobs = None if logprobs is None else [t.to("cpu", non_blocking=True) for t in logprobs]
        self._event: Any = None
        if ids.device.type == "cuda":
            self._event = torch.cuda.Event(blocking=True)
            self._event.record(torch.cuda.current_stream(ids.device))
        elif ids.device.type != "cpu":
            torch.accelerator.synchronize(ids.device)

    def wait(self) -> tuple[list[int], list[tuple[float, list[int], list[float]]] | None]:
        """Wait for them.

        Returns:
            A token id for each row, below 0 where there is none (see `BatchSampler.draw`); and, if asked for, each
            one's log probability with the ids and log probabilities of the likeliest tokens.
        """
        if self._event is not None:
            self._event.synchronize()
        if self._logprobs is None:
            return self._ids.tolist(), None
        chosen, best_ids, best = (t.tolist() for t in self._logprobs)
        return self._ids.tolist(), list(zip(chosen, best_ids, best, strict=True))


_Method = TypeVar("_Method", bound=Callable[..., Any])


def _on_device(method: _Method) -> _Method:
    """Run a method of the runner without gradients, and with its GPU as the current one, as Triton wants it."""

    @functools.wraps(method)
    def run(self: Runner, *args: Any, **kwargs: Any) -> Any:
        on_device = torch.cuda.device(self.device) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.no_grad(), on_device:
            return method(self, *args, **kwargs)

    return cast("_Method", run)


class Runner:
    """Drives a model over pages. Used by one thread at a time."""

    def __init__(
        self,
        model: torch.nn.Module,
        pools: Sequence[LayerPool],
        attention: Attention,
        *,
        slots: int,
        pages_per_row: int,
        vocab_size: int,
        by_sdpa: bool,
        can_capture: bool,
        why_no_graphs: str | None = None,
        adapters: LoraStack | None = None,
        fusion: Fusion | None = None,
    ) -> None:
        """Make the tables.

        Args:
            model: A causal language model of transformers; nothing of it is changed.
            pools: The KV pool of each layer.
            attention: Reads and writes them.
            slots: Most rows at once.
            pages_per_row: Most pages of one row.
            vocab_size: Width of the model's logits.
            by_sdpa: Whether the model calls PyTorch's attention itself.
            can_capture: Whether there are CUDA graphs where this runs.
            why_no_graphs: What is known against steps of this model being such.
            adapters: What rows choose their adapters from; None where the model runs as it is.
            fusion: The model's fused steps; None where its modules run as they are.
        """
        self._model = model
        self._pools = pools
        self._attention = attention
        self._by_sdpa = by_sdpa
        self._adapters = adapters
        self._fusion = fusion
        self.device = model.get_input_embeddings().weight.device
        self.is_asynchronous = self.device.type == "cuda"
        self.can_capture = can_capture
        drawing = None if fusion is None else find_drawing(vocab_size, self.device)
        self.sampler = BatchSampler(slots, vocab_size, self.device, drawing=drawing)
        self._padding_slot = slots
        self._table = torch.zeros(slots + 1, pages_per_row, dtype=torch.int32, device=self.device)
        self._row_adapters = torch.full((slots + 1,), NO_ADAPTER, dtype=torch.int32, device=self.device)
        self._ones = torch.ones(_BUCKETS[-1], dtype=torch.long, device=self.device)
        self._mask_words = -(-vocab_size // 32)
        self._keeps_logits = "logits_to_keep" in forward_parameters(model)
        self._cache_name = cache_name(model)
        self.windows: dict[int, int] = {}
        """Window of each layer that attended in the last forward that was no replay; 0 for none."""
        self.why_no_graphs = why_no_graphs
        """What is against graphs: known from the start or after a change, or found when one was captured."""
        if can_capture:
            most = _BUCKETS[-1]
            self._inputs = torch.zeros(_LINES, most, dtype=torch.int32, device=self.device)
            self._staged = [torch.zeros(_LINES, most, dtype=torch.int32, pin_memory=True) for _ in range(4)]
            self._mask = torch.zeros(most, self._mask_words, dtype=torch.int32, device=self.device)
        self._prefill_graphs: PrefillGraphs | None = None
        if can_capture and attention.prefills_on_device and pages_per_row * BLOCK_TOKENS >= PREFILL_BLOCK:
            self._prefill_graphs = PrefillGraphs(self._forward_pack, self.device)
        self._steps = 0
        self._staged_masks: list[torch.Tensor] = []
        self._masked_steps = 0
        self._graphs: dict[int, StepGraph] = {}
        self._draw_graphs: dict[tuple[int, int, int], StepGraph] = {}
        self.refresh()

    @property
    def captures(self) -> bool:
        """Whether steps become CUDA graphs."""
        return self.can_capture and self.why_no_graphs is None

    def take_changes(self, why_no_graphs: str | None) -> None:
        """Begin anew with a model whose modules or weights have changed.

        Args:
            why_no_graphs: What is known now against its steps being graphs.
        """
        self.why_no_graphs = why_no_graphs
        if self._prefill_graphs is not None:
            self._prefill_graphs.why_not = None
        self.refresh()

    def refresh(self) -> None:
        """Forget what was captured, as after a failure."""
        if self._graphs:
            torch.cuda.synchronize(self.device)  # none of them may still run
        self._graphs.clear()
        self._draw_graphs.clear()
        if self._prefill_graphs is not None:
            self._prefill_graphs.clear()
        if self.captures:
            self._memory = torch.cuda.graph_pool_handle()  # the one before went with its last graph
        self._configs = [] if self._by_sdpa else configs_of(self._model)

    @_on_device
    def wipe(self, pages: Sequence[int]) -> None:
        """Fill pages of all layers with zeros."""
        for pool in self._pools:
            pool.kv[torch.tensor(pages, dtype=torch.long, device=pool.kv.device)] = 0

    # Prefill.

    @_on_device
    def prefill(self, pieces: Sequence[Piece], chances: Sequence[Chance]) -> Launched:
        """Run pieces of prompts, packed behind each other.

        Args:
            pieces: Which tokens of which rows.
            chances: One for each piece that is its row's last.
        """
        self._set_pages([piece.row for piece in pieces])
        runs = [
            Run(
                slot=piece.row.slot,
                position=piece.start,
                ids=piece.row.ids[piece.start : piece.start + piece.count],
                is_last=piece.is_last,
            )
            for piece in pieces
        ]
        logits = None
        if self._prefill_graphs is not None and self.captures:
            logits = self._prefill_graphs.run(runs, self._padding_slot, self._memory)
        if logits is None:
            logits = self._prefill_eagerly(runs)
        drawing = [piece.row for piece in pieces if piece.is_last]
        inputs = self._lines_of(drawing, [0] * len(drawing), [0] * len(drawing), chances)
        # Nothing here waits for the forward: what draws from it is on its way while it runs.
        inputs = inputs.to(self.device, non_blocking=True)
        return Launched(logits=logits, inputs=inputs, rows=len(drawing), is_prefill=True)

    def _prefill_eagerly(self, runs: Sequence[Run]) -> torch.Tensor:
        spans, lines, last = [], [], []
        first = 0
        for run in runs:
            count = len(run.ids)
            spans.append(Span(slot=run.slot, first=first, position=run.position, count=count))
            positions = range(run.position, run.position + count)
            lines.append(torch.tensor([list(run.ids), list(positions), [run.slot] * count], dtype=torch.int32))
            first += count
            if run.is_last:
                last.append(first - 1)
        packed = torch.cat(lines, 1).to(self.device, non_blocking=True)
        batch = Batch(table=self._table, slots=packed[2], positions=packed[1], spans=spans, decodes=False)
        return self._forward(packed[0].long(), batch, last or [0])

    def _forward_pack(self, pack: Pack) -> torch.Tensor:
        batch = Batch(
            table=self._table, slots=pack.slots, positions=pack.positions, spans=(), decodes=False, blocks=pack.blocks
        )
        return self._forward(pack.ids.long(), batch, pack.kept.long())

    def _set_pages(self, rows: Sequence[RowState]) -> None:
        width = max(len(row.pages) for row in rows)
        pages = torch.tensor([row.pages + [0] * (width - len(row.pages)) for row in rows], dtype=torch.int32)
        slots = torch.tensor([row.slot for row in rows]).to(self.device, non_blocking=True)
        self._table[slots, :width] = pages.to(self.device, non_blocking=True)
        if self._adapters is not None:
            numbers = torch.tensor([row.adapter for row in rows], dtype=torch.int32)
            self._row_adapters[slots] = numbers.to(self.device, non_blocking=True)

    # Decode.

    @_on_device
    def decode(self, rows: Sequence[RowState], positions: Sequence[int], chances: Sequence[Chance]) -> Launched:
        """Run each row's last token, which lies on the device.

        Args:
            rows: The rows.
            positions: Position of that token in each.
            chances: One for each row.
        """
        pages = [row.pages[position // BLOCK_TOKENS] for row, position in zip(rows, positions, strict=True)]
        inputs = self._lines_of(rows, positions, pages, chances)
        count = len(rows)
        bucket = next((b for b in _BUCKETS if b >= count), None)
        if bucket is None or not self.captures:
            inputs = inputs.to(self.device)
            spans = [Span(slot=r.slot, first=0, position=p, count=1) for r, p in zip(rows, positions, strict=True)]
            logits = self._decode_step(inputs, spans)
            return Launched(logits=logits, inputs=inputs, rows=count)
        self._bring(inputs, bucket)
        graph = self._graphs.get(bucket)
        if graph is None:
            graph = self._capture_decode(bucket)
            if graph is None:
                return self.decode(rows, positions, chances)
        return Launched(logits=graph.replay(), inputs=self._inputs[:, :bucket], rows=count, is_graph=True)

    def _lines_of(
        self,
        rows: Sequence[RowState],
        positions: Sequence[int],
        pages: Sequence[int],
        chances: Sequence[Chance],
    ) -> torch.Tensor:
        lines = torch.tensor(
            [
                [row.slot for row in rows],
                list(positions),
                [position // BLOCK_TOKENS for position in positions],
                list(pages),
                [0] * len(rows),
                [not chance.may_end for chance in chances],
            ],
            dtype=torch.int32,
        )
        uniforms = torch.tensor([min(chance.uniform, _LARGEST_UNIFORM) for chance in chances], dtype=torch.float32)
        lines[_UNIFORM] = uniforms.view(torch.int32)
        return lines

    def _bring(self, inputs: torch.Tensor, bucket: int) -> None:
        """Put a step's inputs where its graph reads them."""
        staged = self._staged[self._steps % len(self._staged)]  # more than there are steps on their way
        self._steps += 1
        staged[:, :bucket] = 0
        staged[_SLOT, :bucket] = self._padding_slot
        staged[:, : inputs.shape[1]] = inputs
        self._inputs.copy_(staged, non_blocking=True)

    def _decode_step(self, inputs: torch.Tensor, spans: Sequence[Span] = ()) -> torch.Tensor:
        at, position_ids, page_index = inputs[: _PAGE_INDEX + 1].long()
        self._table[at, page_index] = inputs[_PAGE]
        batch = Batch(table=self._table, slots=inputs[_SLOT], positions=inputs[_POSITION], spans=spans, decodes=True)
        return self._forward(self.sampler.last_ids[at], batch, None, position_ids)

    def _capture_decode(self, bucket: int) -> StepGraph | None:
        inputs = self._inputs[:, :bucket]
        kept = inputs.clone()
        inputs.zero_()
        inputs[_SLOT] = self._padding_slot
        try:
            with WaitFinder() as finder:
                self._decode_step(inputs)
            if finder.found is not None:
                self.why_no_graphs = f"{finder.found} makes the host wait"
                return None
            graph = StepGraph(lambda: self._decode_step(inputs), self.device, self._memory)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.why_no_graphs = f"capturing failed with {error!r}"
            return None
        finally:
            inputs.copy_(kept)
        self._graphs[bucket] = graph
        return graph

    # Both.

    def _forward(
        self,
        ids: torch.Tensor,
        batch: Batch,
        keep: list[int] | torch.Tensor | None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run packed tokens of shape `(tokens,)`; gives logits of shape `(tokens kept, vocab)`."""
        if position_ids is None:
            position_ids = batch.positions.long()
        forward = Forward(self._attention, self._pools, batch, by_sdpa=self._by_sdpa)
        # A mask of four dimensions is taken as it is: none has to be made for an attention that ignores it.
        seen = self._ones[: len(ids)] if len(ids) <= len(self._ones) else torch.ones_like(ids)
        mask = seen[None, None, None] if self._by_sdpa else seen[None]
        # A list, as a tensor would be brought to the device of the first layer, when it is needed on that of the last.
        options = {"logits_to_keep": keep} if keep is not None and self._keeps_logits else {}
        fused = contextlib.nullcontext() if self._fusion is None else self._fusion.applied()
        with driving(forward, self._configs) as cache, self._adapting(batch, keep), fused:
            output = self._model(
                input_ids=ids[None],
                attention_mask=mask,
                position_ids=position_ids[None],
                use_cache=True,
                **{self._cache_name: cache},
                **options,
            )
        self.windows = forward.windows
        logits: torch.Tensor = output.logits[0]
        return logits[keep] if keep is not None and not self._keeps_logits else logits

    def _adapting(self, batch: Batch, keep: list[int] | torch.Tensor | None) -> contextlib.AbstractContextManager[None]:
        """Let each token's row run with its adapter; `keep` names the tokens that reach the output head."""
        if self._adapters is None:
            return contextlib.nullcontext()
        of_tokens = self._row_adapters[batch.slots.long()]
        sees_all = keep is None or not self._keeps_logits
        return self._adapters.applied(of_tokens, of_tokens if sees_all else of_tokens[keep])

    def blank_masks(self, rows: int) -> torch.Tensor:
        """Give masks that allow all, for a step's rows to narrow: `(rows, ceil(vocab / 32))`, int32, on the CPU."""
        if not self.is_asynchronous:
            return torch.full((rows, self._mask_words), -1, dtype=torch.int32)
        if not self._staged_masks or rows > len(self._staged_masks[0]):
            size = (max(rows, _BUCKETS[-1]), self._mask_words)
            self._staged_masks = [torch.empty(size, dtype=torch.int32, pin_memory=True) for _ in range(4)]
        staged = self._staged_masks[self._masked_steps % len(self._staged_masks)]  # more than there are on their way
        self._masked_steps += 1
        return staged[:rows].fill_(-1)

    @_on_device
    def draw(
        self, launched: Launched, need: int, *, mask: torch.Tensor | None = None, alternatives: int | None = None
    ) -> Drawn:
        """Draw the tokens of a launched forward.

        Args:
            launched: The forward.
            need: Flags of `batch_sampler`, added up over its rows.
            mask: Allowed tokens of each row as bits, as `blank_masks` gives them.
            alternatives: How many of the likeliest tokens to report; None for no log probabilities.
        """
        rows = launched.rows
        if launched.is_graph:
            if mask is not None:
                self._mask[:rows].copy_(mask, non_blocking=True)
            ids = self._draw_graph(launched, need).replay()[:rows]
        else:
            on_device = None if mask is None else mask.to(self.device, non_blocking=True)
            ids = self._draw_step(launched.logits.to(self.device), launched.inputs, need, on_device)
        logprobs = None
        if alternatives is not None:
            logprobs = log_probabilities(launched.logits[:rows].to(self.device), ids, alternatives)
        return Drawn(ids, logprobs)

    @_on_device
    def time_step(self, rows: int, position: int, repeats: int) -> float:
        """Time the decode step by itself: back to back, with nothing of the host's in between but its launch.

        Args:
            rows: Rows of the step, each on pages of its own; what these hold is overwritten.
            position: Where in their texts they are.
            repeats: Steps to time.

        Returns:
            Seconds per step, forward and greedy drawing.
        """
        width, pages = position // BLOCK_TOKENS + 1, self._pools[0].kv.shape[0] - 1
        states = [RowState([0], 1) for _ in range(rows)]
        for i, state in enumerate(states):
            state.slot, state.pages = i, [1 + (i * width + j) % pages for j in range(width)]
        self._set_pages(states)

        def step() -> Drawn:
            return self.draw(self.decode(states, [position] * rows, [Chance()] * rows), 0)

        step().wait()
        launched = self.decode(states, [position] * rows, [Chance()] * rows)
        graphs = (self._graphs[launched.inputs.shape[1]], self._draw_graph(launched, 0)) if launched.is_graph else ()
        drawn = self.draw(launched, 0)
        drawn.wait()
        began = time.perf_counter()
        for _ in range(repeats):
            if graphs:
                for graph in graphs:
                    graph.replay()
            else:
                drawn = step()
        if graphs:
            torch.cuda.synchronize(self.device)
        else:
            drawn.wait()
        return (time.perf_counter() - began) / repeats

    def _draw_step(
        self, logits: torch.Tensor, inputs: torch.Tensor, need: int, mask: torch.Tensor | None
    ) -> torch.Tensor:
        uniforms = inputs[_UNIFORM].view(torch.float32)
        return self.sampler.draw(logits, inputs[_SLOT], uniforms, inputs[_MAY_NOT_END], need, mask)

    def _draw_graph(self, launched: Launched, need: int) -> StepGraph:
        bucket = launched.inputs.shape[1]
        key = (bucket, need, self.sampler.version)
        if key not in self._draw_graphs:
            mask = self._mask[:bucket] if need & MASKS else None
            kept = launched.inputs.clone()
            launched.inputs[_SLOT] = self._padding_slot  # the first run is not to touch the rows

            def body() -> torch.Tensor:
                return self._draw_step(launched.logits, launched.inputs, need, mask)

            body()
            self._draw_graphs[key] = StepGraph(body, self.device, self._memory)
            launched.inputs.copy_(kept)
        return self._draw_graphs[key]
