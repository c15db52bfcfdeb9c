import os

import numpy as np
import pytest

from vqa.evaluation.timing import interleave
from vqa.experiments.measurement import TrainingArm, step_images
from vqa.experiments.scaling_loops import (
    BARE,
    MEMORY,
    OURS,
    PAIRWISE,
    RATIOS,
    TRAINER,
    bare_arm,
    levers,
    loops,
    memory_arm,
    padded,
    train_beside,
    without_variables,
)


def weights(arm: TrainingArm) -> np.ndarray:
    return np.concatenate([p.detach().numpy().ravel() for p in arm.model.parameters()])


def test_every_loop_learns_the_same(tiny, source, one_rank):
    """Same model, optimizer and pairs: equal bits of the bare loop; a step is 1e-3."""
    ours, bare, theirs = (TrainingArm(tiny, source, one_rank) for _ in range(3))
    start = weights(ours)
    steps = list(np.random.default_rng(0).permutation(64).reshape(4, 16))
    others = [ours, bare_arm(bare)]
    trainer = train_beside(theirs, steps, others)
    assert [len(arm.seconds) for arm in (trainer, *others)] == [4, 4, 4]
    assert np.array_equal(weights(ours), weights(bare))
    assert np.abs(weights(ours) - start).max() > 1e-3
    assert np.abs(weights(ours) - weights(theirs)).max() < 2e-4


def test_batches_in_memory_are_noise_of_the_same_questions(tiny, source, one_rank, monkeypatch):
    learner, taken = TrainingArm(tiny, source, one_rank), []
    steps = step_images(tiny, len(learner.split), 0)
    arm = memory_arm(learner, steps)
    monkeypatch.setattr(learner.trainer, "update", lambda batches, images: taken.extend(batches) or (0, 0))
    interleave([arm], steps)
    for noise, images in zip(taken, steps, strict=True):
        real = learner.split.batch(images)
        assert noise.labels.equal(real.labels) and noise.input_ids.equal(real.input_ids)
        assert noise.pixel_values.shape == real.pixel_values.shape
        assert not noise.pixel_values.equal(real.pixel_values)


def test_rates_and_ratios_of_every_loop(tiny, measurement):
    rows = loops(measurement("loops", tiny, steps=3))
    rates = {row.arm: row.value for row in rows if row.metric == "questions_per_second"}
    assert rates.keys() == {OURS, PAIRWISE, BARE, MEMORY, TRAINER}
    assert len([row for row in rows if row.metric == "step_time_ratio"]) == 4
    ratios = {row.metric: row for row in rows if row.metric in RATIOS}
    assert {metric: row.arm for metric, row in ratios.items()} == RATIOS
    assert ratios["loop_over_trainer_ratio"].value == pytest.approx(rates[OURS] / rates[TRAINER], rel=0.5)
    assert all(row.low <= row.value <= row.high for row in ratios.values())


def test_each_lever_changes_what_it_names(tiny_profile, source, one_rank):
    run = tiny_profile.run("student")
    arms = [*levers(run, source, one_rank), TrainingArm(run, source, one_rank)]
    found = [
        (
            arm.trainer.config.train.amp == "bf16",
            next(p for p in arm.model.parameters() if p.ndim == 4 and p.shape[2] > 1).stride(1) == 1,
            not arm.trainer.optimizer.param_groups[0]["fused"],
            arm.regroup(arm.split.batch(np.arange(4))).input_ids.shape[1] == run.model.max_question_tokens,
        )
        for arm in arms
    ]
    assert [sum(changes) for changes in found] == [1, 1, 1, 1, 0] and len(set(found)) == 5


def test_padding_changes_no_answer(tiny, source, one_rank):
    arm = TrainingArm(tiny, source, one_rank)
    batch = arm.split.batch(np.arange(8))
    longer, model = padded(batch, 20), arm.model.eval()
    assert longer.input_ids.shape[1] == 20 == longer.attention_mask.shape[1] > batch.input_ids.shape[1]
    one, other = (model(**given.inputs()).logits.detach().numpy() for given in (batch, longer))
    assert np.abs(one - other).max() < 1e-5


def test_variables_come_back_even_after_a_failure(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError), without_variables("RANK", "WORLD_SIZE"):
        assert "RANK" not in os.environ
        raise ValueError
    assert os.environ["RANK"] == "3" and "WORLD_SIZE" not in os.environ
