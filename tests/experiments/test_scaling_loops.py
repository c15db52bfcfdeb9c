import numpy as np
import pytest

from vqa.experiments.measurement import Arm
from vqa.experiments.scaling_loops import (
    BARE,
    MEMORY,
    OURS,
    PAIRWISE,
    RATIOS,
    TRAINER,
    _bare_update,
    _beside_trainer,
    levers,
    loops,
    padded,
)
from vqa.experiments.scaling_parity import ScalingConfig


def weights(arm: Arm) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in arm.objective.model.parameters()])


def test_every_loop_learns_the_same(tiny, source, one_rank):
    """Same model, optimizer and pairs: equal bits of the bare loop; a step is 1e-3."""
    ours, bare, theirs = (Arm({}, tiny, source, one_rank) for _ in range(3))
    start = weights(ours)
    bare.trainer.update = _bare_update(bare)
    steps = np.random.default_rng(0).permutation(64).reshape(4, 16)
    seconds = _beside_trainer(theirs, list(steps), [ours, bare])
    assert len(seconds) == len(ours.seconds) == len(bare.seconds) == 4
    assert np.array_equal(weights(ours), weights(bare))
    assert np.abs(weights(ours) - start).max() > 1e-3
    assert np.abs(weights(ours) - weights(theirs)).max() < 2e-4


def test_rates_and_ratios_of_every_loop(tiny, source, one_rank):
    rows = loops(ScalingConfig(kind="loops", run=tiny, steps=3), source, one_rank)
    rates = {row.labels["engine"]: row.value for row in rows if row.metric == "questions_per_second"}
    assert rates.keys() == {OURS, PAIRWISE, BARE, MEMORY, TRAINER}
    assert len([row for row in rows if row.metric == "step_time_ratio"]) == 4
    ratios = {row.metric: row for row in rows if row.metric in RATIOS}
    assert ratios.keys() == RATIOS.keys()
    assert ratios["loop_over_trainer_ratio"].value == pytest.approx(rates[OURS] / rates[TRAINER], rel=0.5)
    assert all(row.low <= row.value <= row.high for row in ratios.values())


def test_each_lever_changes_what_it_names(tiny_profile, source, one_rank):
    run = tiny_profile.run("student")
    arms = levers(run, source, one_rank) | {"plain": Arm({}, run, source, one_rank)}
    found = {
        name: (
            arm.trainer.config.train.amp == "bf16",
            next(p for p in arm.objective.model.parameters() if p.ndim == 4 and p.shape[2] > 1).stride(1) == 1,
            not arm.trainer.optimizer.param_groups[0]["fused"],
            arm.regroup(arm.trainer.split.batch(np.arange(4))).input_ids.shape[1] == run.model.max_question_tokens,
        )
        for name, arm in arms.items()
    }
    assert [sum(changes) for changes in found.values()] == [1, 1, 1, 1, 0]
    assert len(set(found.values())) == 5


def test_padding_changes_no_answer(tiny, source, one_rank):
    arm = Arm({}, tiny, source, one_rank)
    batch = arm.trainer.split.batch(np.arange(8))
    longer, model = padded(batch, 20), arm.objective.model.eval()
    assert longer.input_ids.shape[1] == 20 == longer.attention_mask.shape[1] > batch.input_ids.shape[1]
    assert np.abs((model(**batch.inputs()) - model(**longer.inputs())).detach().numpy()).max() < 1e-5
