"""Attention whose result for a token does not depend on the batch, or on how its text was cut into steps, bit for bit.

A query is computed in the same place of a tile of the same shape, whether its token came in a prompt or alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from langchain_quantllm.engine.attention import Batch, LayerPool, Span
from langchain_quantllm.engine.block_manager import BLOCK_TOKENS
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.engine.triton_attention import TritonAttention
from langchain_quantllm.errors import UnsupportedError
from langchain_quantllm.kernels.invariant.attention import KEYS, attend_in_tiles
from langchain_quantllm.kernels.invariant.ops import paused


class InvariantGatherAttention(GatherAttention):
    """Gathers the blocks of sequences of similar length, and attends in tiles, sequence by sequence, in float32."""

    def attend(self, pool: LayerPool, query: torch.Tensor, batch: Batch, **scoring: Any) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        out = query.new_empty(1, query.shape[2], query.shape[1], pool.value_dim)
        with paused():
            asked = query[0].float()
            firsts = range(len(batch.spans)) if batch.decodes else [span.first for span in batch.spans]
            for spans in _alike(batch.spans):
                keys, values = self._gather(pool, batch, [batch.spans[i] for i in spans])
                for i, key, value in zip(spans, keys, values, strict=True):
                    span, first = batch.spans[i], firsts[i]
                    queries = asked[:, first : first + span.count]
                    attended = attend_in_tiles(queries, key, value, span.position, **scoring)
                    out[0, first : first + span.count] = attended.transpose(0, 1)
        return out

    @staticmethod
    def _gather(pool: LayerPool, batch: Batch, spans: Sequence[Span]) -> tuple[torch.Tensor, torch.Tensor]:
        """Gather keys and values of shape `(spans, kv_heads, tokens, dim)`, float32.

        They are padded to whole tiles with zeros.
        """
        device, key = pool.kv.device, ("blocks", spans[0].slot, len(spans))
        ids = batch.on_device.get((device, key))
        if ids is None:
            lengths = torch.tensor([-(-(span.position + span.count) // BLOCK_TOKENS) for span in spans])
            width = -(-int(lengths.max()) * BLOCK_TOKENS // KEYS) * KEYS // BLOCK_TOKENS
            table = batch.table[torch.tensor([span.slot for span in spans]), :width]
            table = torch.nn.functional.pad(table, (0, width - table.shape[1]))
            ids = torch.where(torch.arange(width) < lengths[:, None], table, 0).long().flatten().to(device)
            batch.on_device[device, key] = ids
        gathered = pool.read(ids).view(len(spans), -1, *pool.kv.shape[2:])
        for i, span in enumerate(spans):  # what another sequence has left there may be NaN
            gathered[i, span.position + span.count :] = 0
        gathered = gathered.transpose(1, 2)
        keys, values = gathered[..., : pool.query_dim], gathered[..., pool.key_dim :]
        contiguous = {"dtype": torch.float32, "memory_format": torch.contiguous_format, "copy": True}
        return keys.to(**contiguous), values.to(**contiguous)


def _alike(spans: Sequence[Span]) -> list[list[int]]:
    """Group the indices of spans that are gathered together: short ones of similar length."""
    groups: dict[int, list[int]] = {}
    for i, span in enumerate(spans):
        length = span.position + span.count
        groups.setdefault(-(-length // KEYS) if span.count == 1 else -1 - i, []).append(i)
    return list(groups.values())


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

    def attend(self, pool: LayerPool, query: torch.Tensor, batch: Batch, **scoring: Any) -> torch.Tensor:
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
                query, pool.kv, table, tiles, value_dim=pool.value_dim, scales=pool.scales, masks_all=True, **scoring
            )
        return attended
