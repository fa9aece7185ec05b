"""What of a policy's wishes may be done, for whatever it wishes."""

from __future__ import annotations

import numpy as np
import pytest
from fleetcast.control.deployment import safety
from fleetcast.control.deployment.safety import SafetyOptions, guard
from hypothesis import given
from hypothesis import strategies as st

LEAST, MOST = np.full(4, 1), np.full(4, 20)


def decide(before, proposed, reactive, **options) -> tuple[list[int], list[list[str]]]:
    before, proposed, reactive = (np.array(one) for one in (before, proposed, reactive))
    size = len(before)
    found, reasons = guard(SafetyOptions(**options), before, proposed, reactive, LEAST[:size], MOST[:size])
    return found.tolist(), reasons


@pytest.mark.parametrize(
    ("why", "before", "proposed", "reactive", "expected", "reason"),
    [
        ("a policy may add replicas", 4, 6, 4, 6, None),
        ("nobody scales in on a prediction alone", 4, 2, 4, 4, safety.REACTIVE),
        ("where the rule scales in, the policy may as well", 4, 2, 3, 3, safety.REACTIVE),
        ("and may stay", 4, 4, 2, 4, None),
        ("the rule is never undercut", 4, 5, 8, 8, safety.REACTIVE),
        ("a service grows by so much at once", 4, 15, 4, 8, safety.SERVICE_LIMIT),
        ("beyond what the rule wants", 4, 15, 9, 13, safety.SERVICE_LIMIT),
        ("within the bounds", 18, 25, 18, 20, safety.BOUNDS),
    ],
)
def test_one_service(why, before, proposed, reactive, expected, reason) -> None:
    found, reasons = decide([before], [proposed], [reactive], most_added_share=10)
    assert found == [expected], why
    assert reasons == [[reason] if reason else []], why


def test_all_together_are_limited_and_those_that_ask_for_most_are_cut_first() -> None:
    found, reasons = decide([10] * 4, [11, 14, 14, 10], [10] * 4, most_added_share=0.125)
    assert found == [11, 12, 12, 10]
    assert reasons == [[], [safety.TOTAL_LIMIT], [safety.TOTAL_LIMIT], []]


sizes = st.lists(st.integers(0, 30), min_size=4, max_size=4).map(np.array)


@given(before=sizes, proposed=sizes, reactive=sizes, most=st.integers(0, 6), share=st.floats(0, 1))
def test_whatever_is_asked_for(before, proposed, reactive, most, share) -> None:
    options = SafetyOptions(most_added=most, most_added_share=share)
    found, reasons = guard(options, before, proposed, reactive, LEAST, MOST)
    floor = np.clip(reactive, LEAST, MOST)
    assert (found >= floor).all()
    assert ((found >= LEAST) & (found <= MOST)).all() or (before > MOST).any()
    beyond = found - np.maximum(before, floor)
    assert (beyond <= most).all()
    assert beyond.clip(min=0).sum() <= max(1, int(share * before.sum()))
    assert [bool(why) for why in reasons] == (found != proposed).tolist()
