"""The progress bar of a long call over texts, pictures or pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

BAR_DELAY_S = 5.0
"""Seconds after which a progress bar appears, unless it is asked for."""


@contextlib.contextmanager
def progress_bar(
    count: int, *, title: str, unit: str, show: bool | None, default: bool
) -> Iterator[Callable[[int], None] | None]:
    """Show a progress bar inside the block.

    Args:
        count: Number of items.
        title: Stands before the bar.
        unit: Name of an item.
        show: Show it always or never; None shows it after `BAR_DELAY_S`, if `default` says so.
        default: Whether it is shown where `show` is None.

    Yields:
        A function that is told the number of further items that are done, from any thread; None without a bar.
    """
    if not (default if show is None else show):
        yield None
        return
    from tqdm.auto import tqdm  # type: ignore[import-untyped]

    with tqdm(total=count, desc=title, unit=f" {unit}", delay=BAR_DELAY_S if show is None else 0.0) as bar:
        yield bar.update
