"""What a step of a model with stages needs on each device: the block table, the tokens' places, adapters, token ids.

The host enters prompts into the block tables of all stages. Everything else comes from the first stage with the hidden
states, so that a stage may work on one step while the one before it is at the next.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch

from langchain_quantllm.engine.attention import Batch
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.block_table import BlockTable
from langchain_quantllm.engine.forward_context import ForwardContext
from langchain_quantllm.engine.sampler import BatchSampler
from langchain_quantllm.engine.sequence import Sequence as EngineSequence
from langchain_quantllm.engine.stage_graphs import StagePools
from langchain_quantllm.engine.stages import Place, StageRun, Stages
from langchain_quantllm.engine.step import Step


class StageInputs:
    """The inputs of later stages, and the way of sampled tokens back to the first one.

    Attributes:
        stages: The model's stages.
        pools: The memory pools of its graphs.
        last_ids: The last token of each slot on the first stage's device; see `BatchSampler.last_ids`.
    """

    def __init__(self, stages: Stages, table: BlockTable, sampler: BatchSampler, pools: StagePools) -> None:
        """Allocate the tables.

        Args:
            stages: The model's stages.
            table: The block table of the first stage.
            sampler: Samples on the device of the last one.
            pools: Memory pools for graphs.
        """
        self.stages, self.pools = stages, pools
        slots, blocks = table.blocks.shape
        self._tables: dict[Place, BlockTable] = {
            place: BlockTable(slots, blocks, place.device) for place in stages.places if place != stages.first
        }
        self._sampler = sampler
        self._arrivals: dict[int, torch.cuda.Event] = {}  # of the last token of each slot
        self._first_table = table
        is_apart = sampler.last_ids.device != stages.first.device
        self.last_ids = sampler.last_ids.to(stages.first.device) if is_apart else sampler.last_ids

    def enter_step(self, step: Step) -> None:
        """Enter the blocks that a step of prompts reads and writes into the tables of later stages."""
        for table in self._tables.values():
            table.enter_step(step)

    def enter(self, sequences: Sequence[EngineSequence]) -> None:
        """Enter sequences with all their blocks into the tables of later stages."""
        for table in self._tables.values():
            table.enter(sequences)

    def lead(self, run: StageRun, context: ForwardContext, batch: Batch) -> StageRun:
        """Let a forward take its inputs along from stage to stage; returns it."""
        run.on_stage = functools.partial(self._enter, run, context, batch)
        return run

    def _enter(self, run: StageRun, context: ForwardContext, batch: Batch) -> None:
        """Give the layers of a stage the inputs on its device."""
        table = self._tables.get(run.place, self._first_table)
        slots, positions = run.bring(batch.slots), run.bring(batch.positions)
        if batch.new_blocks is not None:
            table.blocks[slots.long(), (positions // BLOCK_TOKENS).long()] = run.bring(batch.new_blocks)
        moved = replace(batch, table=table.blocks, slots=slots, positions=positions, tiles=None, on_device={})
        if context.attention is not None:
            context.attention.go_on(moved)
        if context.text_lengths is not None:
            context.text_lengths = run.bring(context.text_lengths)
        if context.adapters is not None:
            # What is brought along is the first stage's: this stage's copies are none that later ones know.
            tokens, head = context.adapters.of_tokens, context.adapters.of_head
            context.adapters = replace(context.adapters, of_tokens=run.bring(tokens), of_head=run.bring(head), masks={})

    @property
    def steps_at_once(self) -> int:
        """How many steps run at the same time: as many as there are devices with stages of their own."""
        return len({place.device for place in self.stages.places})

    def return_tokens(self, at: torch.Tensor, slots: Iterable[int]) -> None:
        """Copy the last tokens of some slots from the last stage's device to the first one's.

        That goes on beside the first stage's work on other steps.

        Args:
            at: The slots on the last stage's device, with padding, of shape `(rows,)`, int32.
            slots: The slots.
        """
        if self.last_ids is self._sampler.last_ids:
            return
        at = at.long()
        sent = torch.stack([at, self._sampler.last_ids[at]])
        links, first = self.stages.links, self.stages.first.device
        with links.beside(first) as stream:
            given = torch.empty_like(sent, device=first)
            links.copy(sent, given)
            self.last_ids[given[0]] = given[1]
            if stream is not None:
                arrived = torch.cuda.Event()
                arrived.record(stream)
                self._arrivals |= dict.fromkeys(slots, arrived)

    def await_tokens(self, slots: Iterable[int]) -> None:
        """Let the first stage's next work wait for the last tokens of some slots."""
        if not self._arrivals:
            return
        arrived = [self._arrivals.pop(slot, None) for slot in slots]
        stream = torch.cuda.current_stream(self.stages.first.device)
        for event in dict.fromkeys(arrived):
            if event is not None:
                stream.wait_event(event)

    def synchronize(self) -> None:
        """Wait for the work of all devices."""
        for device in {place.device for place in self.stages.places}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
