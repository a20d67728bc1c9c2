"""A step of a model with stages as graphs: one for each stage, captured in one forward, and copies between them.

A CUDA graph holds the work of one device. Where the forward goes on in the next stage, the capture of one graph ends
and that of the next begins. What later stages read of earlier ones is known when the whole forward is captured; then
each border gets a parcel: a graph that packs those tensors on one device, one copy, and a graph that unpacks them on
the other. Nothing of a replay waits for the host.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from langchain_quantllm.engine.cuda_graphs import captured, one_capture
from langchain_quantllm.engine.device_links import DeviceLinks
from langchain_quantllm.engine.stages import Place, StageRun, TriedRun, at_stage

_ALIGNED_BYTES = 16
"""Tensors in a parcel begin at multiples of this."""


class Graph(Protocol):
    """Captured work of one device."""

    def replay(self) -> None:
        """Enqueue the work."""
        ...


Capture = Callable[[torch.device, Any], contextlib.AbstractContextManager[Graph]]
"""Captures what is enqueued inside its block on a device, in a memory pool; see `cuda_graphs.captured`."""


class StagePools:
    """The memory pools of a model's graphs: one for each place, as stages may work at the same time."""

    def __init__(self, capture: Capture = captured) -> None:
        """Make no pool yet; graphs are captured by `capture`."""
        self.capture = capture
        self._pools: dict[Place, Any] = {}

    def of(self, place: Place) -> Any:
        """Return the pool of a place."""
        if place not in self._pools:
            self._pools[place] = torch.cuda.graph_pool_handle() if place.device.type == "cuda" else None
        return self._pools[place]

    def clear(self) -> None:
        """Forget all pools, which are freed with their last graph."""
        self._pools.clear()


class PlacedGraph:
    """A captured computation at one place, with an output, such as sampling."""

    def __init__(self, body: Callable[[], torch.Tensor], place: Place, pools: StagePools) -> None:
        """Capture it.

        Args:
            body: Enqueues the work and returns its output; was run before.
            place: Where.
            pools: The memory pools.
        """
        with one_capture, at_stage(place.device), pools.capture(place.device, pools.of(place)) as graph:
            self.output = body()
        self._graph = graph

    def replay(self) -> torch.Tensor:
        """Run it, and return the tensor of its output."""
        self._graph.replay()
        return self.output


class StagedGraph:
    """A captured step of a model with stages: a replay computes from the current values of the same tensors."""

    def __init__(self, body: Callable[[StageRun], torch.Tensor], tried: TriedRun, pools: StagePools) -> None:
        """Capture a step.

        Args:
            body: Runs the step's forward in the given stages, and returns its output.
            tried: The same forward, run before, so that every kernel is compiled.
            pools: The memory pools.
        """
        recorder = _Recorder(tried, pools)
        with one_capture:
            try:
                self.output = recorder.run(body)
            finally:
                recorder.abort()
            self._parts = recorder.parts
            for before, part in zip(self._parts, self._parts[1:], strict=False):
                part.parcel = Parcel(part.moves, (before.place, part.place), pools, tried.stages.links)

    def replay(self) -> torch.Tensor:
        """Run the step, and return the tensor of its output."""
        for part in self._parts:
            if part.parcel is not None:
                part.parcel.send()
            part.graph.replay()
        return self.output


@dataclass
class _Part:
    """One stage of a step: its place, its graph, and the tensors of the stage before with their copies."""

    place: Place
    graph: Graph
    moves: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    parcel: Parcel | None = None


class _Recorder(StageRun):
    """A forward whose stages are captured."""

    def __init__(self, tried: TriedRun, pools: StagePools) -> None:
        super().__init__(tried.stages)
        self._targets = iter(tried.targets)
        self.parts: list[_Part] = []
        self._pools = pools
        self._open = contextlib.ExitStack()

    def run(self, body: Callable[[StageRun], torch.Tensor]) -> torch.Tensor:
        """Capture a forward, all stages of it."""
        with at_stage(self.place.device):
            self._arrive()
            output = body(self)
            self._leave()
        return output

    def abort(self) -> None:
        """End the capture of a stage that has failed."""
        with contextlib.suppress(RuntimeError):  # the failure itself says more
            self._open.__exit__(RuntimeError, RuntimeError("the capture has failed"), None)

    def _arrive(self) -> None:
        device = self.place.device
        self._open.enter_context(at_stage(device))
        graph = self._open.enter_context(self._pools.capture(device, self._pools.of(self.place)))
        self.parts.append(_Part(self.place, graph))

    def _leave(self) -> None:
        self._open.close()

    def _copy(self, source: torch.Tensor) -> torch.Tensor:
        if source.device.type != self.place.device.type:
            msg = f"a tensor on {source.device} is copied to {self.place.device} in every step"
            raise RuntimeError(msg)
        target = next(self._targets, None)
        wanted = (source.shape, source.dtype, self.place.device)
        if target is None or (target.shape, target.dtype, target.device) != wanted:
            msg = "a forward reads other tensors of earlier stages than the one before it"
            raise RuntimeError(msg)
        self.parts[-1].moves.append((source, target))  # to be copied between two replays
        return target


class Parcel:
    """Tensors that one stage reads of the one before, sent in one copy."""

    def __init__(
        self,
        moves: Sequence[tuple[torch.Tensor, torch.Tensor]],
        places: tuple[Place, Place],
        pools: StagePools,
        links: DeviceLinks,
    ) -> None:
        """Capture packing and unpacking, under `cuda_graphs.one_capture`.

        Args:
            moves: Tensors of one stage, and tensors of the next one that get their values.
            places: The two places.
            pools: The memory pools.
            links: Copies between devices.
        """
        self._links = links
        self._unpacked: torch.cuda.Event | None = None
        self._kept = list(moves)
        sizes = [-(-source.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES for source, _ in moves]
        self._boxes = [torch.zeros(sum(sizes), dtype=torch.uint8, device=place.device) for place in places]
        self._graphs: list[Graph] = []
        for side, (place, box) in enumerate(zip(places, self._boxes, strict=True)):
            views = [
                box[end - size : end - size + source.nbytes].view(source.dtype).view(source.shape)
                for end, size, (source, _) in zip(_ends(sizes), sizes, moves, strict=True)
            ]
            with at_stage(place.device), pools.capture(place.device, pools.of(place)) as graph:
                for view, move in zip(views, moves, strict=True):
                    pair = (view, move[0]) if side == 0 else (move[1], view)
                    pair[0].copy_(pair[1])
            self._graphs.append(graph)

    def send(self) -> None:
        """Enqueue packing, the copy and unpacking."""
        (pack, unpack), (sent, received) = self._graphs, self._boxes
        pack.replay()
        if sent.device == received.device:
            self._links.copy(sent, received)
            unpack.replay()
            return
        # Beside the next stage's work, which may still be on the step before, and has unpacked that at its beginning.
        with self._links.beside(received.device) as stream:
            assert stream is not None
            if self._unpacked is not None:
                stream.wait_event(self._unpacked)
            self._links.copy(sent, received)
            arrived = torch.cuda.Event()
            arrived.record(stream)
        working = torch.cuda.current_stream(received.device)
        working.wait_event(arrived)
        unpack.replay()
        self._unpacked = torch.cuda.Event()
        self._unpacked.record(working)


def _ends(sizes: Sequence[int]) -> list[int]:
    ends, end = [], 0
    for size in sizes:
        end += size
        ends.append(end)
    return ends
