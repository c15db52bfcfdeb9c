import numpy as np
import pytest

from vqa.experiments.fusion import costs, sharing


@pytest.fixture(scope="module")
def fused(tiny_profile):
    changes = {"kind": "cross_attention", "width": 32, "layers": 1, "heads": 2}
    return tiny_profile.run("teacher", model__fusion=changes)


def test_the_fusion_alone_is_timed_both_ways(fused, measurement):
    rows = sharing(measurement("sharing", fused, steps=4))
    rates = {row.arm: row.value for row in rows if row.metric == "questions_per_second"}
    assert rates.keys() == {"once per image", "once per pair"}
    ratio = rows[-1]
    assert rates["once per image"] / rates["once per pair"] == pytest.approx(ratio.value, rel=0.4)


def test_costs_of_two_models_side_by_side(tiny, fused, measurement):
    rows = costs(measurement("costs", tiny, fused, steps=3))
    table = {(row.metric, row.fusion): row.value for row in rows}
    assert len(table) == len(rows) == 2 * 5 and {row.model for row in rows} == {"teacher"}
    assert all(np.isfinite(value) and value > 0 for value in table.values())
    assert table["flops_per_question", "cross_attention"] > table["flops_per_question", "concat"]
