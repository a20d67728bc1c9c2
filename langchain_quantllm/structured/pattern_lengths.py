"""The lengths of the texts that match a regular expression, and expressions narrowed to some lengths."""

from __future__ import annotations

from langchain_quantllm.structured.automaton import Either, Node, Repeat, Sequence
from langchain_quantllm.structured.characters import Characters
from langchain_quantllm.structured.patterns import either


def lengths(node: Node) -> tuple[int, int | None]:
    """Return the fewest and the most characters of a text; None for no bound."""
    if isinstance(node, Characters):
        return 1, 1
    if isinstance(node, Repeat):
        least, most = lengths(node.part)
        return least * node.least, 0 if 0 in (most, node.most) else None if None in (
            most,
            node.most,
        ) else most * node.most  # type: ignore[operator]
    found = [lengths(part) for part in (node.parts if isinstance(node, Sequence) else node.options)]
    if isinstance(node, Sequence):
        return sum(a for a, _ in found), None if any(b is None for _, b in found) else sum(b or 0 for _, b in found)
    return min(a for a, _ in found), None if any(b is None for _, b in found) else max(b or 0 for _, b in found)


def within(node: Node, least: int, most: int | None) -> Node | None:
    """Narrow a tree to texts whose lengths are in bounds, not always to all of them; None if it finds none.

    Args:
        node: The tree.
        least: The fewest characters.
        most: The most; None for no bound.
    """
    shortest, longest = lengths(node)
    if shortest >= least and (most is None or (longest is not None and longest <= most)):
        return node
    if (most is not None and shortest > most) or (longest is not None and longest < least):
        return None
    if isinstance(node, Either):
        options = [found for option in node.options if (found := within(option, least, most)) is not None]
        return either(options) if options else None
    if isinstance(node, Repeat):
        return _repeat_within(node, least, most)
    return _sequence_within(node, least, most) if isinstance(node, Sequence) else None


def _repeat_within(node: Repeat, least: int, most: int | None) -> Node | None:
    """Narrow a repetition: by its count where its parts have one length, else by equal shares of four parts."""
    shortest, longest = lengths(node.part)
    if shortest == longest and shortest:
        count = max(node.least, -(-least // shortest))
        counts = [c for c in (node.most, None if most is None else most // shortest) if c is not None]
        highest = min(counts) if counts else None
        return None if highest is not None and highest < count else Repeat(part=node.part, least=count, most=highest)
    count = node.least or min(4 if node.most is None else node.most, 4)
    part = within(node.part, -(-least // count), None if most is None else most // count)
    if part is None:
        return Repeat(part=node.part, least=0, most=0) if node.least == least == 0 else None
    return Repeat(part=part, least=count if least else node.least, most=count if most is not None else node.most)


def _sequence_within(node: Sequence, least: int, most: int | None) -> Node | None:
    """Narrow a sequence: the parts share the room, and the missing characters, from left to right."""
    found = [lengths(part) for part in node.parts]
    missing = max(0, least - sum(a for a, _ in found))
    room = None if most is None else most - sum(a for a, _ in found)
    parts: list[Node] = []
    for part, (shortest, longest) in zip(node.parts, found, strict=True):
        free = None if longest is None else longest - shortest
        more = missing if free is None else min(missing, free)
        most_here = (
            None
            if room is None
            else shortest + (room - (missing - more) if free is None else min(room - (missing - more), free))
        )
        narrowed = within(part, shortest + more, longest if most_here is None else most_here)
        if narrowed is None:
            return None
        a, b = lengths(narrowed)
        missing = max(0, missing - (a - shortest))
        room = None if room is None or b is None else room - (b - shortest)
        parts.append(narrowed)
    return Sequence(parts=tuple(parts)) if missing == 0 else None
