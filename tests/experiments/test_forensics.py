import json
import math
import os
import socket
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from conftest import TINY
from vqa.config import ConfigError, load_profile
from vqa.data import source as sources
from vqa.experiments import forensics
from vqa.experiments.forensics import (
    RECIPES,
    Recipe,
    Trained,
    distinct_blocks,
    examine,
    explained,
    forensics_configs,
    rank_losses,
    reconstructed,
    teacher_for,
    train,
    yardstick,
)
from vqa.run_folder import Run
from vqa.study.figures.forensics import last_batches
from vqa.study.records import record
from vqa.study.report import Report
from vqa.training.losses import contrastive_loss
from vqa.training.objectives import Alignment

TOWERS = TINY["models.teacher"]  # transformers only: no batch statistics
SETTINGS = TINY | {
    "data": {"source": "easy_vqa", "validation_images": 200, "train_images": 256, "test_images": 32},
    "models.student": TOWERS,
    "alignment": {"student": {"epochs": 1, "lr": 2e-3}},
    "forensics": {"seeds": [0, 1], "images": 256, "epochs": 1},
}

REAL = """
import json, sys
import numpy as np, torch
from torch.nn.parallel import DistributedDataParallel
from vqa import sources
from vqa.config import LaunchConfig, load_profile
from vqa.distributed import process_group
from vqa.forensics import forensics_configs
from vqa.losses import contrastive_loss
from vqa.objectives import Alignment
from vqa.training.train import optimizer

config = forensics_configs(load_profile("default", json.loads(sys.argv[1])))[1]
said = {}
with process_group(LaunchConfig(world_size=2, threads_per_rank=1)) as rank:
    source = sources.load(config.run.data)
    for kind in ("gathered", "local"):
        torch.manual_seed(config.run.seed)
        objective = Alignment(config.run, source, rank)
        objective.model.train()
        network = DistributedDataParallel(objective.model)
        optimize = optimizer(objective.model, config.run.train)
        split, generator, losses = objective.train_split, np.random.default_rng([config.run.seed, 0]), []
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
            torch.nn.utils.clip_grad_norm_(objective.model.parameters(), config.run.train.max_grad_norm)
            optimize.step()
            optimize.zero_grad()
            losses.append(loss.item())
        said[kind] = losses
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def config():
    """Two ranks, seed 0."""
    return forensics_configs(load_profile("default", SETTINGS))[1]


@pytest.fixture(scope="module")
def captioned(config):
    return sources.load(config.run.data)


@pytest.fixture(scope="module")
def said(config) -> list[dict]:
    """The losses that each of two real ranks sees, every step at the full rate."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", REAL, json.dumps(SETTINGS)],
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
        )
        for rank in range(2)
    ]
    return [json.loads(rank.communicate(timeout=180)[0]) for rank in ranks]


def constant_rate(monkeypatch):
    def constant(optimizer, *_):
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    monkeypatch.setattr(forensics.transformers, "get_cosine_schedule_with_warmup", constant)


@pytest.mark.parametrize(("kind", "recipe"), [("gathered", "none"), ("local", "local negatives")])
def test_simulated_ranks_are_real_ranks(kind, recipe, said, config, captioned, one_rank, monkeypatch):
    """Later losses depend on the weights that earlier gradients made. Measured: 3e-7 apart, relative."""
    constant_rate(monkeypatch)
    simulated = train(config, RECIPES[recipe], captioned, one_rank).own
    real = np.array([rank[kind] for rank in said]).T
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


def schedules(config, recipe, captioned, one_rank, monkeypatch) -> tuple:
    """(steps run, pairs a step, warm-up, steps scheduled)"""
    seen = {}

    def schedule(optimizer, warmup, scheduled):
        seen.update(warmup=warmup, scheduled=scheduled)
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1e-3)

    def losses(model, batch, ranks, recipe, teacher):
        seen["pairs"] = len(batch)
        return model.log_scale.expand(ranks)

    monkeypatch.setattr(forensics.transformers, "get_cosine_schedule_with_warmup", schedule)
    monkeypatch.setattr(forensics, "rank_losses", losses)
    steps = len(train(config, recipe, captioned, one_rank).own)
    return steps, seen["pairs"], seen["warmup"], seen["scheduled"]


def test_each_fault_of_the_schedule_does_what_it_names(config, captioned, one_rank, monkeypatch):
    found = {
        name: schedules(config, RECIPES[name], captioned, one_rank, monkeypatch)
        for name in ("none", "16 pairs a rank, same rate", "schedule cut at 4/7")
    }
    count = len(sources.captions(captioned.splits["train"]))
    assert found["none"][:2] == (count // 64, 64) and found["none"][3] == count // 64
    assert found["16 pairs a rank, same rate"][:2] == (count // 32, 32)
    assert found["schedule cut at 4/7"][0] == count // 64
    assert found["schedule cut at 4/7"][3] == round(count // 64 * 7 / 4)


def test_warm_up_is_counted_in_steps_where_the_batch_grows(captioned, one_rank, monkeypatch):
    """As many steps on four ranks as on one, where steps are four times fewer; a sound one keeps its share."""
    found = {}
    for config in forensics_configs(load_profile("default", SETTINGS))[:3]:
        for name in ("none", "16 pairs a rank, same rate"):
            found[name, config.ranks] = schedules(config, RECIPES[name], captioned, one_rank, monkeypatch)
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


def test_too_few_images_are_a_sentence(config, one_rank):
    few = config.model_copy(
        update={"run": config.run.model_copy(update={"data": config.run.data.model_copy(update={"train_images": 40})})}
    )
    with pytest.raises(ConfigError, match=r"^forensics.images leaves \d+ captions, too few for a batch of each rank$"):
        train(few, Recipe(), sources.load(few.run.data), one_rank)


def test_teachers(config, captioned, one_rank):
    sound = Trained(Alignment(config.run, captioned, one_rank), np.ones((2, 2)), 1)
    good = teacher_for(Recipe(teacher="trained"), config, captioned, one_rank, sound)
    bad = teacher_for(Recipe(teacher="untrained"), config, captioned, one_rank, sound)
    assert good is sound.objective.model and not good.training
    assert bad.training and {m.p for m in bad.modules() if isinstance(m, torch.nn.Dropout)} == {0.1}
    assert teacher_for(Recipe(), config, captioned, one_rank, sound) is None
    assert 1 < yardstick(sound, Recipe()) < 12  # untrained: near ln 16 or worse, at a scale of 14


def test_every_recipe_is_examined_on_every_number_of_ranks(captioned, one_rank, tmp_path, monkeypatch):
    monkeypatch.setattr("vqa.run_folder.RUNS", tmp_path)
    profile = load_profile("default", SETTINGS)
    report, rows, steps = Report(tmp_path / "report", profile), [], []
    for config in forensics_configs(profile)[:3]:
        run = Run(config, "vqa.experiments.forensics")
        with run.writing():
            rows += (found := examine(config, captioned, one_rank, run))
            run.finish(found)
        steps.append(run.metrics())
        record(run, report.folder / "records" / "07_forensics")
    table = pd.DataFrame([row.labels | {"metric": row.metric, "value": row.value} for row in rows])
    assert table.groupby("metric")["value"].agg(["size", "count"]).to_numpy().tolist() == [[27, 27]] * 4
    wide = table.pivot_table(index="engine", columns=["metric", "world_size"], values="value")
    assert set(wide.index) == set(RECIPES)
    assert wide["reported_loss"].loc["none"].nunique() == 1
    local, sound = (wide["reported_loss"].loc[fault] for fault in ("local negatives", "none"))
    assert local["1"] == pytest.approx(sound["1"]) and local["4"] < local["2"] < local["1"] - 0.3
    logged = pd.concat(steps).groupby(["fault", "ranks"])
    assert local["2"] == pytest.approx(logged["loss"].mean()["local negatives", 2])
    drawn = last_batches(report, "local negatives")
    assert list(drawn) == [1, 2, 4] and len(drawn[2]) == logged.size()["local negatives", 2]
    assert len(explained(report.results())) == len(RECIPES)
    _, axis = (report.draw(name).axes[0] for name in ("earlier_table", "fault_effects"))
    shown = [line for line in axis.lines if line.get_label() == "2 ranks"]
    assert [value for line in shown for value in line.get_xdata()] == pytest.approx(
        table[(table["metric"] == "reported_loss") & (table["world_size"] == "2")]["value"].tolist()
    )
    single = logged["first_rank"].quantile([0.025, 0.975])["local negatives", 2]
    assert wide["last_batch_spread"].loc["local negatives", "2"] == pytest.approx(forensics.spread(*single))


def test_a_step_that_does_not_know_of_ranks_is_the_same_on_any(config, captioned, one_rank):
    """What lets one training stand for three."""
    four = config.model_copy(update={"ranks": 4})
    for recipe in RECIPES.values():
        if not recipe.knows_ranks and not recipe.teacher:
            losses = [train(c, recipe, captioned, one_rank).own for c in (config, four)]
            assert np.array_equal(losses[0][:, 0], losses[1][:, 3])


def test_shares_of_the_earlier_spread():
    """A fault that halves the loss from rank to rank, one that does nothing, two seeds."""
    losses = {"halves": {1: 1.0, 2: 0.5, 4: 0.25}, "nothing": {1: 1.0, 2: 1.0, 4: 1.0}}
    rows = [
        {"engine": fault, "world_size": str(n), "metric": metric, "seed": seed, "value": (1 + seed) * value}
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


def test_how_often_draws_repeat_the_earlier_table():
    """By listing all draws."""
    losses = {1: np.array([0.5, 2.0]), 2: np.array([1.0, 1.6, 0.1]), 4: np.array([0.1, 0.4, 3.0])}
    draws = [(one, two, four) for one in losses[1] for two in losses[2] for four in losses[4]]
    found = reconstructed(losses)
    assert found["order"] == pytest.approx(np.mean([four < one < two for one, two, four in draws]))
    assert found["apart"] == pytest.approx(np.mean([two / four > 1.44 / 0.098 for _, two, four in draws]))
    assert found["reach"] == pytest.approx(16)
    assert found["span"] == pytest.approx(100 * math.log(3.0 / 0.1) / math.log(1.44 / 0.098))
