"""Intervals of 95% for means and shares, so that differences between schemes mean something.

Values that belong together are resampled together: neighbouring tokens of a text in blocks, and the same question under
two schemes as a pair.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_RESAMPLES = 2000
_NORMAL_95 = 1.959964  # quantile 0.975 of the normal distribution


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with the interval of 95%.

    Args:
        mean: The mean.
        low: Lower end.
        high: Upper end.
    """

    mean: float
    low: float
    high: float


def bootstrap(values: torch.Tensor, block: int = 1) -> Interval:
    """Bootstrap the mean of values; the same each time.

    Source: Kuensch, The jackknife and the bootstrap for general stationary observations, Ann. Statist. 17 (1989);
    blocks do not overlap here.

    Args:
        values: Of shape `(count,)`, float64, in their order.
        block: Neighbours that are resampled together.
    """
    parts = values.split(block)
    return ratio([float(part.sum()) for part in parts], [len(part) for part in parts])


def ratio(sums: Sequence[float], counts: Sequence[float]) -> Interval:
    """Bootstrap the sum of sums over the sum of counts; the same each time.

    Args:
        sums: Of each part that is resampled, at least one.
        counts: Of each part.
    """
    import torch

    tops, bottoms = (torch.tensor(numbers, dtype=torch.float64) for numbers in (sums, counts))
    chosen = torch.randint(len(tops), (_RESAMPLES, len(tops)), generator=torch.Generator().manual_seed(0))
    means = tops[chosen].sum(1) / bottoms[chosen].sum(1)
    low, high = means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean=float(tops.sum() / bottoms.sum()), low=low, high=high)


def share(hits: Sequence[bool]) -> Interval:
    """Return the share of hits with Wilson's interval, which holds for few questions and for shares of 0 and 1 as well.

    Source: Wilson, Probable inference, the law of succession, and statistical inference, JASA 22 (1927).

    Args:
        hits: One for each question, at least one.
    """
    count, mean, z2 = len(hits), sum(hits) / len(hits), _NORMAL_95**2
    center = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = _NORMAL_95 * math.sqrt(mean * (1 - mean) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Interval(mean=mean, low=max(0.0, min(mean, center - half)), high=min(1.0, max(mean, center + half)))


def difference(values: Sequence[float], base: Sequence[float]) -> Interval:
    """Bootstrap the mean difference of the same questions under two schemes.

    Args:
        values: One for each question, at least one.
        base: Those of the other scheme, in the same order.
    """
    import torch

    return bootstrap(torch.tensor(values, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64))
