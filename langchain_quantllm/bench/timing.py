"""Repeating a call until its time can be trusted, within a bound.

Owns the warm-up, how many runs there are, how long a text may get, and the peak of memory meanwhile. Knows no model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass

from langchain_quantllm.bench.calls import Run
from langchain_quantllm.memory import track_memory

_WARM_UP_TOKENS = 8
_LEAST_STEP_S = 1e-6
_LOOK_S = 0.05
"""Seconds between two looks at the resident memory: rare enough not to be felt in a step."""


@dataclass(frozen=True, kw_only=True)
class Repeated:
    """The runs of one call.

    Args:
        runs: Each run, without the warm-up.
        new_tokens: Length of each text in them.
        peak_bytes: Most memory in use on the device meanwhile, as the process counts it.
    """

    runs: tuple[Run, ...]
    new_tokens: int
    peak_bytes: int

    @property
    def runs_s(self) -> tuple[float, ...]:
        """Seconds of each run."""
        return tuple(run.total_s for run in self.runs)

    @property
    def total_s(self) -> float:
        """Median of the runs, in seconds."""
        return statistics.median(self.runs_s)


def repeat(
    run: Callable[[int], Run],
    new_tokens: int,
    *,
    device: str,
    repeats: int,
    limit_s: float = math.inf,
    warm_ups: int = 1,
) -> Repeated:
    """Warm up with short texts, then run a call several times.

    Args:
        run: Makes one call with texts of so many new tokens.
        new_tokens: How many are asked for.
        device: Whose memory is looked at.
        repeats: Most runs.
        limit_s: No further run is begun after so many seconds, and a text that would take longer by itself is
            written shorter; by the time that the last warm-up took for a token.
        warm_ups: How many there are; 2 where the second use of a length captures its graph.

    Returns:
        At least one run.
    """
    few_tokens = min(new_tokens, _WARM_UP_TOKENS)
    with track_memory([device], interval_s=_LOOK_S) as tracked:
        tokens = new_tokens
        warm_up_s = [run(few_tokens).total_s for _ in range(warm_ups)][-1]
        if warm_up_s / few_tokens * new_tokens > limit_s and new_tokens > 1:
            # Perhaps it was making kernels, and most of it may have been the prompt: look closer.
            first_s = run(1).total_s
            step_s = max(_LEAST_STEP_S, (run(few_tokens).total_s - first_s) / max(1, few_tokens - 1))
            tokens = min(new_tokens, max(few_tokens, int((limit_s - first_s) / step_s)))
        runs = [run(tokens)]
        while len(runs) < repeats and sum(r.total_s for r in runs) + runs[-1].total_s < limit_s:
            runs.append(run(tokens))
    return Repeated(runs=tuple(runs), new_tokens=tokens, peak_bytes=tracked.peak[device])
