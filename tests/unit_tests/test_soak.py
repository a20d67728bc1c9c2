"""A short soak of the fast engine; the long one is `python -m tests.soak`."""

from __future__ import annotations

from tests.soak import left_behind, soak


def test_hundreds_of_requests_of_every_kind_leave_nothing_behind() -> None:
    found = soak(400, seed=1)
    assert left_behind(found) == []
    assert sum(found["ended"].values()) == 400
    assert {"cancelled", "plain", "sampled", "several", "stopped", "turn"} <= found["ended"].keys()
