"""Copies between GPUs that the host does not wait for: direct ones, or through pinned memory where GPUs refuse them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class DeviceLinks:
    """Copies tensors between devices, in the order of the devices' current streams.

    Attributes:
        uses_host: Copy through pinned memory between all GPUs, as between those that cannot reach each other.
    """

    def __init__(self) -> None:
        """Open no link yet."""
        self.uses_host = False
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._senders: dict[torch.device, torch.cuda.Stream] = {}
        self._by_host: dict[tuple[torch.device, torch.device], HostLink | None] = {}

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue a copy to a tensor of the same shape and dtype.

        The copy waits for the current streams of both devices, and both wait for the copy.
        """
        link = self._link(source.device, target.device)
        if link is not None:
            link.copy(source, target)
        elif source.device == target.device or source.device.type != "cuda":
            target.copy_(source, non_blocking=True)
        else:
            self._send(source, target)

    def _send(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Copy from a GPU on a stream of its own.

        On the default stream, CUDA lets a copy between GPUs wait for all work of both, and all later work for the copy.
        """
        working = torch.cuda.current_stream(source.device)
        if source.device not in self._senders:
            self._senders[source.device] = torch.cuda.Stream(source.device)
        sender = self._senders[source.device]
        sender.wait_stream(working)
        with torch.cuda.stream(sender):
            target.copy_(source, non_blocking=True)  # PyTorch orders it with the target's current stream
        working.wait_stream(sender)

    @contextlib.contextmanager
    def beside(self, device: torch.device) -> Iterator[torch.cuda.Stream | None]:
        """Receive copies on a GPU beside its other work inside the block: on a stream of its own, the current one.

        Yields:
            The stream; None for other devices, where copies are received at once.
        """
        if device.type != "cuda":
            yield None
            return
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        with torch.cuda.device(device), torch.cuda.stream(self._streams[device]):
            yield self._streams[device]

    def _link(self, source: torch.device, target: torch.device) -> HostLink | None:
        if source.type != "cuda" or target.type != "cuda":
            return None
        if (source, target) not in self._by_host:
            is_direct = source == target or torch.cuda.can_device_access_peer(source, target)
            self._by_host[source, target] = HostLink() if self.uses_host or not is_direct else None
        return self._by_host[source, target]


class HostLink:
    """Copies from one GPU to another through pinned memory."""

    def __init__(self) -> None:
        """Allocate nothing yet."""
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._was_read: torch.cuda.Event | None = None

    def copy(self, source: torch.Tensor, target: torch.Tensor) -> None:
        """Enqueue a copy; see `DeviceLinks.copy`."""
        source = source.contiguous()
        if source.nbytes > len(self._buffer):  # the old one stays until its copies have ended: PyTorch counts them
            self._buffer = torch.empty(source.nbytes, dtype=torch.uint8, pin_memory=True)
        staged = self._buffer[: source.nbytes].view(source.dtype).view(source.shape)
        with torch.cuda.device(source.device):
            stream = torch.cuda.current_stream()
            if self._was_read is not None:
                stream.wait_event(self._was_read)
            staged.copy_(source, non_blocking=True)
            written = torch.cuda.Event()
            written.record(stream)
        with torch.cuda.device(target.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(written)
            target.copy_(staged, non_blocking=True)
            self._was_read = torch.cuda.Event()
            self._was_read.record(stream)
