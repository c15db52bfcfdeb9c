import json
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from vqa.config import ConfigError, Profile, save_yaml
from vqa.data.source import load
from vqa.experiments import forensics as experiment
from vqa.experiments.earlier_study import explained, last_batches, spread
from vqa.experiments.forensics import (
    RECIPES,
    Recipe,
    Trained,
    distinct_blocks,
    forensics,
    rank_losses,
    teacher_for,
    train,
    yardstick,
)
from vqa.experiments.jobs import forensics_configs
from vqa.training.losses import contrastive_loss
from vqa.training.objectives import Alignment

REAL = """
import json, sys
from pathlib import Path
import numpy as np, torch
from torch.nn.parallel import DistributedDataParallel
from vqa.config import LaunchConfig, RunConfig, load_section
from vqa.data.source import load
from vqa.distributed import process_group
from vqa.training.losses import contrastive_loss
from vqa.training.objectives import Alignment
from vqa.training.train import optimizer

run = load_section(RunConfig, Path(sys.argv[1]))
seen = {}
with process_group(LaunchConfig(world_size=2, threads_per_rank=1)) as rank:
    source = load(run.data)
    for kind in ("gathered", "local"):
        torch.manual_seed(run.seed)
        objective = Alignment(run, source, rank)
        objective.model.train()
        network = DistributedDataParallel(objective.model)
        optimize = optimizer(objective.model, run.train)
        split, generator, losses = objective.train_split, np.random.default_rng([run.seed, 0]), []
        for images in generator.permutation(len(split))[:192].reshape(-1, 64)[:len(split) // 64]:
            flips = generator.random((64, 2)) < 0.5
            mine = slice(32 * rank.rank, 32 * rank.rank + 32)
            batch = split.batch(images[mine], flips[mine])
            if kind == "gathered":
                loss = objective.loss(network, batch, images)
            else:
                vectors = network(**batch.inputs())
                numbers = batch.image_index, batch.question_number[batch.question_index]
                loss = contrastive_loss(*vectors[:2], *numbers, vectors[2])
            loss.backward()
            torch.nn.utils.clip_grad_norm_(objective.model.parameters(), run.train.max_grad_norm)
            optimize.step()
            optimize.zero_grad()
            losses.append(loss.item())
        seen[kind] = losses
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def profile(tiny_profile) -> Profile:
    """Two seeds; towers of transformers only, without batch statistics."""
    return Profile.model_validate(
        tiny_profile.model_dump()
        | {
            "data": tiny_profile.data.model_dump() | {"validation_images": 200, "train_images": 256},
            "models": {role: tiny_profile.models["teacher"].model_dump() for role in ("teacher", "student")},
            "alignment": {"student": {"epochs": 1, "lr": 2e-3}},
            "forensics": {"seeds": [0, 1], "images": 256, "epochs": 1},
        }
    )


@pytest.fixture(scope="module")
def captioned(profile):
    return load(forensics_configs(profile)[0].runs[0].data)


@pytest.fixture(scope="module")
def jobs(profile, captioned, measurement) -> list:
    """The measurements of seed 0 on 1, 2 and 4 simulated ranks."""
    configs = forensics_configs(profile)[:3]
    return [
        measurement("forensics", *config.runs, simulated_ranks=config.simulated_ranks, source=captioned)
        for config in configs
    ]


@pytest.fixture(scope="module")
def pair(jobs):
    """Two simulated ranks."""
    return jobs[1]


@pytest.fixture(scope="module")
def seen(pair, tmp_path_factory) -> list[dict]:
    """The losses that each of two real ranks sees, every step at the full rate."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    file = tmp_path_factory.mktemp("real") / "run.yaml"
    save_yaml(pair.first, file)
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", REAL, str(file)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=180)[0]) for rank in ranks]


def constant_rate(monkeypatch):
    def constant(optimizer, *_):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    monkeypatch.setattr(experiment.transformers, "get_cosine_schedule_with_warmup", constant)


@pytest.mark.parametrize(("kind", "recipe"), [("gathered", "none"), ("local", "local negatives")])
def test_simulated_ranks_are_real_ranks(kind, recipe, seen, pair, monkeypatch):
    """Later losses depend on the weights that earlier gradients made. Measured: 3e-7 apart, relative."""
    constant_rate(monkeypatch)
    simulated = train(pair, RECIPES[recipe]).losses
    real = np.array([rank[kind] for rank in seen]).T
    assert len(real) >= 2 and simulated == pytest.approx(real, rel=5e-6)
    assert (kind == "gathered") == np.allclose(real[:, 0], real[:, 1])
    assert np.abs(real[1:] - real[0]).max() > 1e-2  # the rate is not zero


class Fixed(torch.nn.Module):
    """Gives the vectors it was made with."""

    def __init__(self, ranks: int):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        vectors = torch.nn.functional.normalize(torch.randn(2, 8 * ranks, 4, generator=generator), dim=-1)
        self.vectors = (*vectors, torch.tensor(5.0))

    def forward(self, **_):
        return self.vectors


class Numbered:
    """A batch of N pairs of which only the captions' numbers matter."""

    def __init__(self, number: list[int]):
        self.question_number = torch.tensor(number)
        self.image_index = self.question_index = torch.arange(len(number))

    def inputs(self) -> dict:
        return {}


NUMBER = [0, 1, 2, 3, 4, 5, 6, 0, 8, 9, 10, 11, 12, 13, 1, 0]


def test_each_fault_of_the_loss_is_the_loss_it_names():
    model, batch = Fixed(2), Numbered(NUMBER)
    images, captions, scale = model.vectors
    image, caption = batch.image_index, batch.question_number
    expected = {
        "none": [contrastive_loss(images, captions, image, caption, scale)] * 2,
        "local negatives": [
            contrastive_loss(images[part], captions[part], image[part], caption[part], scale)
            for part in (slice(8), slice(8, 16))
        ],
        "temperature applied twice": [contrastive_loss(images, captions, image, caption, scale / 0.07)] * 2,
        "equal captions as negatives": [image_text_contrastive_loss(scale * captions @ images.T)] * 2,
    }
    for fault, losses in expected.items():
        found = rank_losses(model, batch, 2, RECIPES[fault], None)
        assert found.tolist() == pytest.approx([loss.item() for loss in losses], rel=1e-5), fault
    assert len({round(losses[0].item(), 4) for losses in expected.values()}) == len(expected)


def test_a_student_is_pulled_to_its_teachers_rows():
    """Taught by itself, half of its own loss is left; by another, a divergence is added."""
    model, batch, taught = Fixed(2), Numbered(NUMBER), Recipe(teacher="trained")
    alone = rank_losses(model, batch, 2, Recipe(), None)
    assert rank_losses(model, batch, 2, taught, model).tolist() == pytest.approx((alone / 2).tolist())
    other = Fixed(2)
    other.vectors = (other.vectors[1], *other.vectors[1:])
    assert (rank_losses(model, batch, 2, taught, other) > alone / 2 + 0.01).all()


def schedules(m, recipe, monkeypatch) -> tuple:
    """(steps run, pairs a step, warm-up, steps scheduled)"""
    seen = {}

    def schedule(optimizer, warmup, scheduled):
        seen.update(warmup=warmup, scheduled=scheduled)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1e-3)

    def losses(model, batch, ranks, recipe, teacher):
        seen["pairs"] = len(batch)
        return model.log_scale.expand(ranks)

    monkeypatch.setattr(experiment.transformers, "get_cosine_schedule_with_warmup", schedule)
    monkeypatch.setattr(experiment, "rank_losses", losses)
    steps = len(train(m, recipe).losses)
    return steps, seen["pairs"], seen["warmup"], seen["scheduled"]


def test_each_fault_of_the_schedule_does_what_it_names(pair, captioned, monkeypatch):
    found = {
        name: schedules(pair, RECIPES[name], monkeypatch)
        for name in ("none", "16 pairs a rank, same rate", "schedule cut at 4/7")
    }
    count = len(captioned.splits["train"].captioned())
    assert found["none"][:2] == (count // 64, 64) and found["none"][3] == count // 64
    assert found["16 pairs a rank, same rate"][:2] == (count // 32, 32)
    assert found["schedule cut at 4/7"][0] == count // 64
    assert found["schedule cut at 4/7"][3] == round(count // 64 * 7 / 4)


def test_warm_up_is_counted_in_steps_where_the_batch_grows(jobs, monkeypatch):
    """As many steps on four ranks as on one, where steps are four times fewer; a sound one keeps its share."""
    found = {}
    for m in jobs:
        for name in ("none", "16 pairs a rank, same rate"):
            found[name, m.config.simulated_ranks] = schedules(m, RECIPES[name], monkeypatch)
    assert found["none", 1] == found["none", 2] == found["none", 4]
    one, four = found["16 pairs a rank, same rate", 1], found["16 pairs a rank, same rate", 4]
    assert one[3] // four[3] == 4 and abs(one[2] - four[2]) <= 1


def test_blocks_hold_no_caption_twice():
    generator = np.random.default_rng(0)
    caption = generator.integers(0, 24, 500)
    blocks = distinct_blocks(generator.permutation(500), caption, 16)
    assert len(blocks) > 20
    assert all(len(set(caption[block])) == 16 == len(block) for block in blocks)
    assert len(set(np.concatenate(blocks))) == 16 * len(blocks)
    assert distinct_blocks(np.arange(500), np.zeros(500, int), 16) == []


def test_too_few_images_are_a_sentence(pair, measurement):
    few = pair.first.model_copy(update={"data": pair.first.data.model_copy(update={"train_images": 40})})
    m = measurement("forensics", few, simulated_ranks=2, source=load(few.data))
    with pytest.raises(ConfigError, match=r"^forensics.images leaves \d+ captions, too few for a batch of each rank$"):
        train(m, Recipe())


def test_teachers(pair):
    sound = Trained(Alignment(pair.first, pair.source, pair.rank), np.ones((2, 2)), 1)
    good = teacher_for(Recipe(teacher="trained"), pair, sound)
    bad = teacher_for(Recipe(teacher="untrained"), pair, sound)
    assert good is sound.objective.model and not good.training
    assert bad.training and {m.p for m in bad.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert teacher_for(Recipe(), pair, sound) is None
    assert 1 < yardstick(sound, Recipe()) < 12  # untrained: near ln 16 or worse, at a scale of 14


def test_every_recipe_is_examined_on_every_number_of_ranks(jobs):
    rows, steps = [], []
    for m in jobs:
        with m.run.writing():
            rows += [row.as_row() | {"run": m.run.folder.name, "seed": 0} for row in forensics(m)]
        steps.append(m.run.metrics())
    table, steps = pd.DataFrame(rows), pd.concat(steps)
    assert table.groupby("metric")["value"].agg(["size", "count"]).to_numpy().tolist() == [[27, 27]] * 4
    wide = table.pivot_table(index="arm", columns=["metric", "world_size"], values="value")
    assert set(wide.index) == set(RECIPES)
    assert wide["reported_loss"].loc["none"].nunique() == 1
    local, sound = (wide["reported_loss"].loc[fault] for fault in ("local negatives", "none"))
    assert local[1] == pytest.approx(sound[1]) and local[4] < local[2] < local[1] - 0.3
    logged = steps.groupby(["fault", "ranks"])
    assert local[2] == pytest.approx(logged["loss"].mean()["local negatives", 2])
    drawn = last_batches(steps, "local negatives")
    assert list(drawn) == [1, 2, 4] and len(drawn[2]) == logged.size()["local negatives", 2]
    single = logged["first_rank"].quantile([0.025, 0.975])["local negatives", 2]
    assert wide["last_batch_spread"].loc["local negatives", 2] == pytest.approx(spread(*single))
    once = explained(table)["trained"].str.startswith("once")
    assert {fault: not recipe.knows_ranks for fault, recipe in RECIPES.items()} == once.to_dict()


def test_a_step_that_does_not_know_of_ranks_is_the_same_on_any(jobs):
    """What lets one training stand for three."""
    for recipe in RECIPES.values():
        if not recipe.knows_ranks and not recipe.teacher:
            losses = [train(m, recipe).losses for m in jobs[1:]]
            assert np.array_equal(losses[0][:, 0], losses[1][:, 3])
