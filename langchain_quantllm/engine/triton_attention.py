"""Attention by the Triton kernels, in the blocks themselves."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from langchain_quantllm.engine.attention import Batch, LayerPool
from langchain_quantllm.engine.gather_attention import GatherAttention
from langchain_quantllm.errors import UnsupportedError

_TRIED_TOLERANCE = 0.02
"""Largest relative error in `try_out`: some roundings to 16 bits. A missing one of 16 splits gives 0.25."""

_ROUNDING = 0.05
"""Largest relative error of numbers in 8 bits: fp8's is at most 1/16, and less than half of that over many numbers."""

_BY_GROUPS = GatherAttention()


class TritonAttention:
    """Attends in the blocks, without gathering them, by the Triton kernels; lengths stay on the device."""

    def __init__(self, kernels: Any, devices: Sequence[torch.device]) -> None:
        """Use the module `kernels.attention` on some GPUs."""
        properties = torch.cuda.get_device_properties(devices[0])
        self._kernels = kernels
        self._multiprocessors = properties.multi_processor_count
        self._arrivals = {device: kernels.arrivals(self._multiprocessors, device) for device in devices}
        self._changes_device = len(devices) > 1
        # Before Ampere, Triton multiplies without tensor cores: fast enough for a decode step, too slow for a prompt.
        self._prefills_by = GatherAttention() if properties.major < 8 else None
        self.prefills_on_device = self._prefills_by is None

    def write(self, pool: LayerPool, key: torch.Tensor, value: torch.Tensor, batch: Batch) -> None:
        """Store keys and values; see `Attention.write`."""
        table, slots, positions = self._metadata(batch, key.device)
        with self._on(key.device):
            self._kernels.write_kv(key, value, pool.kv, table, slots, positions, pool.scales)

    def attend(self, pool: LayerPool, query: torch.Tensor, batch: Batch, **scoring: Any) -> torch.Tensor:
        """Attend; see `Attention.attend`."""
        if not batch.decodes and any(span.groups_in(scoring.get("window", 0)) for span in batch.spans):
            return _BY_GROUPS.attend(pool, query, batch, **scoring)  # the kernels know no such groups
        if self._prefills_by is not None and not batch.decodes:
            return self._prefills_by.attend(pool, query, batch, **scoring)
        device = query.device
        table, slots, positions = self._metadata(batch, device)
        options = {"value_dim": pool.value_dim, "scales": pool.scales, **scoring}
        with self._on(device):
            if batch.decodes:
                splits = self._kernels.default_splits(len(slots), pool.kv.shape[2], self._multiprocessors)
                options |= {"splits": splits, "arrivals": self._arrivals[device]}
                return self._kernels.decode_attention(query, pool.kv, table, slots, positions, **options)
            tiles = batch.tiles
            if tiles is None or tiles.device != device:
                tiles = batch.cached((device, "tiles"), lambda: self._tiles(batch).to(device))
            return self._kernels.prefill_attention(query, pool.kv, table, tiles, **options)

    def try_out(self, pool: LayerPool) -> None:
        """Run the kernels of a decode step on one sequence, and compare with PyTorch's attention.

        Args:
            pool: A pool like the engine's, with enough blocks that several programs share a sequence. Written to.

        Raises:
            UnsupportedError: If the results differ.
        """
        (blocks, block_tokens, heads, _), device = pool.kv.shape, pool.kv.device
        made = torch.Generator(device).manual_seed(0)
        shapes = [(blocks * block_tokens, pool.key_dim), (blocks * block_tokens, pool.value_dim), (1, pool.query_dim)]
        key, value, query = (
            torch.randn(1, heads, *shape, generator=made, dtype=torch.float32, device=device).to(pool.dtype)
            for shape in shapes
        )
        table = torch.arange(blocks, dtype=torch.int32, device=device)[None]
        positions = torch.arange(blocks * block_tokens, dtype=torch.int32, device=device)
        written = Batch(table=table, slots=torch.zeros_like(positions), positions=positions, spans=(), decodes=False)
        last = Batch(table=table, slots=written.slots[-1:], positions=positions[-1:], spans=(), decodes=True)
        scale = pool.query_dim**-0.5
        with torch.cuda.device(device):
            self.write(pool, key, value, written)
            if pool.scales is not None:
                key, value = self._rounded(pool, key, value)
            if pool.is_latent:
                key = torch.cat([key, value], -1)
            expected = scaled_dot_product_attention(query.float(), key.float(), value.float(), scale=scale)[:, :, 0]
            for _ in range(2):  # the second call reuses the arrival counts
                attended = self.attend(pool, query, last, scale=scale, window=0, softcap=0.0)[:, 0].float()
                if not (attended - expected).norm() <= _TRIED_TOLERANCE * expected.norm():
                    msg = "its attention gives something else on this device"
                    raise UnsupportedError(msg)

    @staticmethod
    def _rounded(pool: LayerPool, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that a pool in 8 bits holds, if they are close to what was written to it."""
        read = pool.read(torch.arange(len(pool.kv), device=pool.kv.device)).flatten(0, 1).transpose(0, 1)[None]
        found = read[..., : pool.key_dim], read[..., pool.key_dim :]
        for numbers, written in zip(found, (key, value), strict=True):
            if not (numbers.float() - written.float()).norm() <= _ROUNDING * written.float().norm():
                msg = "keys and values in 8 bits are not what was written on this device"
                raise UnsupportedError(msg)
        return found

    def _on(self, device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """Make a device the current one, on which Triton launches, if the layers are on several."""
        return torch.cuda.device(device) if self._changes_device else contextlib.nullcontext()

    def _metadata(self, batch: Batch, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if batch.table.device == device:
            return batch.table, batch.slots, batch.positions
        return (
            batch.cached((device, "table"), lambda: batch.table.to(device)),
            batch.cached((device, "slots"), lambda: batch.slots.to(device)),
            batch.cached((device, "positions"), lambda: batch.positions.to(device)),
        )

    def _tiles(self, batch: Batch) -> torch.Tensor:
        """Cut the spans into tiles; see `kernels.reference.prefill_attention`."""
        size = self._kernels.PREFILL_TILE
        tiles = [
            (span.slot, span.first + at, span.position + at, min(size, span.count - at))
            for span in batch.spans
            for at in range(0, span.count, size)
        ]
        return torch.tensor(tiles, dtype=torch.int32)
