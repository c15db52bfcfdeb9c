import math

import numpy as np
import pandas as pd
import pytest

from vqa.experiments.earlier_study import earlier_form, explained, last_batches, reconstructed


def test_shares_of_the_earlier_spread():
    """A fault that halves the loss from rank to rank, one that does nothing, two seeds."""
    losses = {"halves": {1: 1.0, 2: 0.5, 4: 0.25}, "nothing": {1: 1.0, 2: 1.0, 4: 1.0}}
    rows = [
        {
            "arm": fault,
            "run": f"run-{seed}" if fault == "nothing" else f"run-{n}-{seed}",
            "world_size": n,
            "metric": metric,
            "seed": seed,
            "value": (1 + seed) * value,
        }
        for fault, by_ranks in losses.items()
        for n, value in by_ranks.items()
        for metric in ("reported_loss", "yardstick_loss", "last_batch_spread")
        for seed in (0, 1)
    ]
    table = explained(pd.DataFrame(rows))
    share = 100 * math.log(4) / math.log(1.44 / 0.098)
    assert table.loc["halves", "spread over ranks, %"] == f"{share:.3g} [{share:.3g}, {share:.3g}]"
    assert table.loc["nothing", "by the yardstick, %"] == "0 [0, 0]"
    assert table.loc["halves", "reported, 2 ranks"] == "0.75 [0.5, 1]"
    assert table.loc["nothing", "by which batch was last, %"] == "1.5 [1, 2]"
    assert table["trained"].tolist() == ["on each number of ranks", "once: no step depends on ranks"]


def test_how_often_draws_repeat_the_earlier_table():
    """By listing all draws."""
    losses = {1: np.array([0.5, 2.0]), 2: np.array([1.0, 1.6, 0.1]), 4: np.array([0.1, 0.4, 3.0])}
    draws = [(one, two, four) for one in losses[1] for two in losses[2] for four in losses[4]]
    found = reconstructed(losses)
    assert found["order"] == pytest.approx(np.mean([four < one < two for one, two, four in draws]))
    assert found["apart"] == pytest.approx(np.mean([two / four > 1.44 / 0.098 for _, two, four in draws]))
    assert found["reach"] == pytest.approx(16)
    assert found["span"] == pytest.approx(100 * math.log(3.0 / 0.1) / math.log(1.44 / 0.098))


def test_last_batches_are_those_of_one_fault():
    steps = pd.DataFrame({"fault": ["a", "a", "b", "a"], "ranks": [1, 2, 1, 1], "first_rank": [0.1, 0.2, 0.3, 0.4]})
    found = last_batches(steps, "a")
    assert {ranks: losses.tolist() for ranks, losses in found.items()} == {1: [0.1, 0.4], 2: [0.2]}


def test_the_table_in_the_earlier_form():
    values = {"final_loss": 0.5, "questions_right": 9, "questions_answered": 12}
    rows = [
        {"kind": "parity", "arm": "answers", "world_size": n, "metric": metric, "value": value}
        for n in (1, 2)
        for metric, value in (values | ({"loss_max_relative_difference": 3e-5} if n > 1 else {})).items()
    ]
    speed = {"kind": "speed", "arm": "plain", "metric": "step_seconds"}
    rows += [speed | {"world_size": n, "value": 0.3 / n} for n in (1, 2)]
    table = earlier_form(pd.DataFrame(rows))
    assert table["accuracy, %"].tolist() == ["75.00"] * 2 and table["relative speed"].tolist() == ["1.00×", "2.00×"]
    assert table["note"].tolist() == ["the reference", "loss curve within 3e-05 of one rank's"]
