"""Server-sent events: the parts of a stream of answers, read from bytes that come in any pieces.

Knows no HTTP and no JSON.
Source: https://html.spec.whatwg.org/multipage/server-sent-events.html, "Interpreting an event stream".
"""

from __future__ import annotations

MOST_EVENT_BYTES = 16 << 20
"""Largest event: some thousand times what a token with its alternatives takes."""


class EventReader:
    """Reads the data of events.

    Lines end with a line feed, with or without a carriage return before it. Unlike `str.splitlines`, nothing else ends
    one: JSON may hold U+2028 and the like as themselves.
    """

    def __init__(self) -> None:
        """Begin a stream."""
        self._rest = bytearray()
        self._searched = 0
        self._data: list[bytes] = []
        self._data_bytes = 0

    def push(self, piece: bytes) -> list[str]:
        """Add a piece and return the data of the events that it completes.

        Raises:
            ValueError: If an event is too large, or no UTF-8.
        """
        self._rest += piece
        events: list[str] = []
        begin = 0
        while (end := self._rest.find(b"\n", max(begin, self._searched))) >= 0:
            self._read_line(bytes(self._rest[begin:end]).removesuffix(b"\r"), events)
            begin = end + 1
        del self._rest[:begin]
        self._searched = len(self._rest)
        if len(self._rest) + self._data_bytes > MOST_EVENT_BYTES:
            msg = f"an event has more than {MOST_EVENT_BYTES} bytes"
            raise ValueError(msg)
        return events

    def flush(self) -> list[str]:
        """Return the event that the end of the stream completes, if any: some servers leave out its last line."""
        events: list[str] = []
        if self._rest:
            self._read_line(bytes(self._rest).removesuffix(b"\r"), events)
            self._rest.clear()
        self._read_line(b"", events)
        return events

    def _read_line(self, line: bytes, events: list[str]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data).decode())
                self._data, self._data_bytes = [], 0
            return
        name, _, value = line.partition(b":")
        if name == b"data":  # comments have an empty name; other fields say nothing about answers
            self._data.append(value.removeprefix(b" "))
            self._data_bytes += len(value)
