import itertools

import numpy as np
import pytest

from vqa.evaluation import timing
from vqa.evaluation.timing import Arm, interleave, median_result, ratio, settle


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which only tests move."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    return now


def test_arms_take_turns_on_each_input_and_warm_up_is_forgotten(clock):
    calls = []

    def arm(name: str, seconds: float) -> Arm:
        def work(given: float) -> None:
            calls.append((name, given))
            clock[0] += seconds * given

        return Arm({"arm": name}, work)

    quick, slow = arm("quick", 1), arm("slow", 3)
    interleave([quick, slow], [5, 2, 4], warm_up=1)
    assert calls == [(name, given) for given in (5, 2, 4) for name in ("quick", "slow")]
    assert quick.seconds == pytest.approx([2, 4]) and slow.seconds == pytest.approx([6, 12])
    assert ratio(slow, quick) == pytest.approx([3, 3])
    row = slow.result("grouped_over_pairwise_ratio", ratio(slow, quick))
    assert (row.value, row.arm, row.unit) == (pytest.approx(3), "slow", "ratio")
    assert slow.result("step_seconds").value == pytest.approx(9)


def test_preparation_gets_the_input_and_is_not_timed(clock):
    prepared = []

    def prepare(given: int) -> None:
        prepared.append(given)
        clock[0] += 100

    arm = Arm({}, lambda given: clock.__setitem__(0, clock[0] + given), prepare)
    interleave([arm], [1, 2])
    assert prepared == [1, 2] and arm.seconds == pytest.approx([1, 2])


def test_a_random_order_differs_between_inputs_and_leaves_nobody_out():
    turns = []
    arms = [Arm({}, lambda given, name=name: turns.append((given, name))) for name in "abc"]
    interleave(arms, range(30), order=np.random.default_rng(0))
    rounds = [tuple(name for _, name in group) for _, group in itertools.groupby(turns, key=lambda turn: turn[0])]
    assert all(sorted(names) == list("abc") for names in rounds) and len(rounds) == 30
    assert len({names[0] for names in rounds}) == 3  # each is first now and then


def test_settling_is_calls_of_the_work_itself(clock, monkeypatch):
    """9 ms a call settle 20 ms in three calls, then one is timed; of 200 ms one call settles."""
    order = []

    def arm(name: str, seconds: float) -> Arm:
        def work(_: None) -> None:
            order.append(name)
            clock[0] += seconds

        return Arm({}, work, settle(work))

    monkeypatch.setattr(timing, "SETTLING_SECONDS", 0.02)
    quick, slow = arm("quick", 0.009), arm("slow", 0.2)
    interleave([quick, slow], [None, None])
    assert [(name, len(list(calls))) for name, calls in itertools.groupby(order)] == [("quick", 4), ("slow", 2)] * 2
    assert quick.seconds == pytest.approx([0.009] * 2) and slow.seconds == pytest.approx([0.2] * 2)


def test_the_interval_of_a_median_is_that_of_its_order_statistics():
    """The judge: binomial counts say which order statistics bound the median of 101 values with 95 %, 40 and 60."""
    values = np.random.default_rng(3).permutation(np.arange(101.0))
    row = median_result("step_seconds", values, arm="eager")
    assert row.value == 50 and row.arm == "eager"
    assert (row.low, row.high) == (pytest.approx(40, abs=2), pytest.approx(60, abs=2))
    assert median_result("step_seconds", values, 0.95).value == pytest.approx(95)
