"""lm-evaluation-harness and datasets without the network.

Uses what they do not promise: that `datasets` counts loads of local files on a server unless its config says not to,
and the registry of lm-eval's metrics, beyond which it looks for a metric on the Hub.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

_OFFLINE = {"HF_HUB_OFFLINE": True, "HF_UPDATE_DOWNLOAD_COUNTS": False}


@contextlib.contextmanager
def offline_datasets() -> Iterator[None]:
    """Keep `datasets` off the network inside the block."""
    from datasets import config

    before = {name: getattr(config, name) for name in _OFFLINE}
    try:
        for name, value in _OFFLINE.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def knows_metric(name: str) -> bool:
    """Whether lm-eval has a metric of this name itself."""
    from lm_eval.api import registry  # type: ignore[import-not-found,import-untyped,unused-ignore]

    known: Any = registry.metric_registry
    return name in known
