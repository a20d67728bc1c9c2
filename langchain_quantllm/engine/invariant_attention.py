"""Attention whose result for a token does not depend on the batch, or on how its text was cut into steps, bit for bit.

A query is computed in the same place of a tile of the same shape, whether its token came in a prompt or alone.
"""

from __future__ import annotations

from typing import Any

import torch

from langchain_quantllm.engine.attention import Batch, GatherAttention, LayerPool, Span, TritonAttention
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.invariant.attention import KEYS, QUERIES, attend_in_tiles
from langchain_quantllm.kernels.invariant.ops import paused


class InvariantGatherAttention(GatherAttention):
    """Gathers the blocks of one sequence after the other, and attends in tiles, in float32."""

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        out = query.new_empty(1, query.shape[2], query.shape[1], pool.value_dim)
        options = {"scale": scale, "window": window, "softcap": softcap}
        with paused():
            for i, span in enumerate(batch.spans):
                first = i if batch.decodes else span.first
                keys, values = self._gather(pool, batch, span)
                queries = query[0, :, first : first + span.count].float()
                attended = attend_in_tiles(queries, keys, values, span.position, **options)
                out[0, first : first + span.count] = attended.transpose(0, 1)
        return out

    @staticmethod
    def _gather(pool: LayerPool, batch: Batch, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather keys and values of shape `(kv_heads, tokens, dim)`, float32, padded with zeros to whole tiles."""
        length = span.position + span.count
        blocks = batch.table[span.slot, : -(-length // BLOCK_TOKENS)].long()
        gathered = pool.kv.index_select(0, blocks.to(pool.kv.device)).flatten(0, 1)[:length].transpose(0, 1)
        padded = -(-length // KEYS) * KEYS
        tensors = []
        for part in gathered.split([pool.key_dim, pool.value_dim], -1):
            tensor = torch.zeros(part.shape[0], padded, part.shape[2], device=part.device)
            tensor[:, :length] = part
            tensors.append(tensor)
        return tensors[0], tensors[1]


class InvariantTritonAttention(TritonAttention):
    """Attends by the kernel for prompts, with tiles of one query in a decode step."""

    def __init__(self, kernels: Any, devices: Any) -> None:
        """Use the module `kernels.attention` on some GPUs.

        Raises:
            UnsupportedError: If they have no kernel for prompts.
        """
        super().__init__(kernels, devices)
        if not self.prefills_on_device:
            msg = "Triton has no fast attention for prompts before compute capability 8.0"
            raise UnsupportedError(msg)

    def attend(
        self, pool: LayerPool, query: torch.Tensor, batch: Batch, *, scale: float, window: int, softcap: float
    ) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        device = query.device
        table, slots, positions = self._metadata(batch, device)
        tiles = batch.tiles
        if tiles is None or tiles.device != device:
            tiles = batch.on_device.get((device, "tiles"))
        if tiles is None:
            if batch.decodes:
                places = torch.arange(len(slots), dtype=torch.int32, device=device)
                tiles = torch.stack([slots, places, positions, torch.ones_like(places)], 1)
            else:
                tiles = self._tiles(batch).to(device)
            batch.on_device[device, "tiles"] = tiles
        with self._on(device):
            attended: torch.Tensor = self._kernels.prefill_attention(
                query, pool.kv, table, tiles,
                value_dim=pool.value_dim, scale=scale, window=window, softcap=softcap, masks_all=True,
            )  # fmt: skip
        return attended


__all__ = ["QUERIES", "InvariantGatherAttention", "InvariantTritonAttention"]
