import hashlib
import math
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from vqa import run_folder as runs
from vqa.config import ConfigError, save_yaml
from vqa.data.batches import EpochPlan
from vqa.distributed import Rank
from vqa.evaluation.evaluate import predict
from vqa.models.vqa_model import AlignmentModel
from vqa.run_folder import Run, RunError
from vqa.training import train as training
from vqa.training.objectives import Answers
from vqa.training.train import Trainer, TrainingError, optimizer, spans


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def losses(run: Run) -> np.ndarray:
    return run.metrics()["loss"].dropna().to_numpy()


@pytest.fixture
def trainer_of(source, one_rank):
    """Gives a function from a RunConfig to a Trainer of a fresh model."""

    def make(config) -> Trainer:
        torch.manual_seed(config.seed)
        objective = Answers(config, source, one_rank)
        objective.model.train()
        return Trainer(config, objective, one_rank)

    return make


def test_the_same_config_gives_the_same_bits_again(trained, train_here, tmp_path):
    """Once started by torchrun, once in this process: another process, another time, the same weights."""
    first, parent = trained["alone"], trained["aligned"]
    shutil.copytree(parent.folder, tmp_path / parent.folder.name)
    again = train_here(first.config)
    assert again.folder != first.folder
    assert sha256(again.folder / "model" / "model.safetensors") == sha256(first.folder / "model" / "model.safetensors")
    assert losses(again).tolist() == losses(first).tolist()
    pd.testing.assert_frame_equal(again.predictions(), first.predictions())


def test_two_ranks_learn_what_one_learns(trained):
    """Measured: losses 2e-7 apart, gradient norms 1e-7, both relative; weights 1.3e-6, where steps are 1e-3."""
    alone, pair = trained["alone"], trained["pair"]
    assert len(losses(alone)) == 8
    assert losses(pair) == pytest.approx(losses(alone), rel=2e-6)
    norms = (run.metrics()["grad_norm"].dropna().to_numpy() for run in (pair, alone))
    assert next(norms) == pytest.approx(next(norms), rel=2e-6)
    weights = [load_file(run.folder / "model" / "model.safetensors") for run in (alone, pair)]
    assert all((weights[1][name] - value).abs().max() < 2e-5 for name, value in weights[0].items())


@pytest.mark.parametrize("name", ["alone", "pair"])
def test_every_question_is_answered_exactly_once(trained, source, name):
    records = trained[name].predictions()
    expected = pd.concat([source.splits[s].questions.assign(split=s) for s in ("validation", "test")])
    columns = ["split", "image_id", "question_id", "question", "question_type", "answer"]
    pd.testing.assert_frame_equal(records[columns], expected[columns].reset_index(drop=True), check_dtype=False)
    assert (records["correct"] == (records["prediction"] == records["answer"])).all()


def test_two_ranks_answer_what_one_answers(trained):
    alone, pair = (trained[name].predictions() for name in ("alone", "pair"))
    assert (pair["prediction"] == alone["prediction"]).all()
    assert pair["confidence"].to_numpy() == pytest.approx(alone["confidence"].to_numpy(), abs=1e-6)


def test_two_ranks_align_as_one_does_with_everyones_negatives(trained):
    """Measured: losses 1e-7 apart, gradient norms 5e-7. Among a rank's own eight the loss would be near ln 8."""
    alone, pair = trained["aligned"], trained["aligned_pair"]
    assert losses(alone)[0] > math.log(8) + 0.4
    assert losses(pair) == pytest.approx(losses(alone), rel=2e-6)
    norms = (run.metrics()["grad_norm"].dropna().to_numpy() for run in (pair, alone))
    assert next(norms) == pytest.approx(next(norms), rel=5e-6)
    recalls = ({r.metric: r.value for r in run.results() if r.split} for run in (pair, alone))
    assert next(recalls) == next(recalls)


def test_the_aligned_parent_comes_first_and_gives_towers_and_vocabulary(trained, source, one_rank):
    parent, child = trained["aligned"], trained["alone"]
    assert [run.folder for run in child.needed] == [parent.folder]
    assert (parent.folder / "results.json").stat().st_mtime < (child.folder / "env.json").stat().st_mtime
    aligned = AlignmentModel.from_pretrained(parent.folder / "model")
    start = Answers(child.config, source, one_rank).model
    assert start.processor.tokenizer.get_vocab() == aligned.processor.tokenizer.get_vocab()
    for tower in ("image_encoder", "text_encoder"):
        ours, theirs = (getattr(model, tower).state_dict() for model in (start, aligned))
        assert all(ours[name].equal(value) for name, value in theirs.items())


def test_the_learning_rate_warms_up_and_falls_as_a_cosine(tiny, trainer_of):
    trainer = trainer_of(tiny.model_copy(update={"train": tiny.train.model_copy(update={"epochs": 5})}))
    total, warm, seen = 20, 1, []
    for _ in range(total):
        seen.append(trainer.schedule.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.schedule.step()
    falling = [(1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2 for step in range(warm, total)]
    assert seen == pytest.approx([0.0, *(tiny.train.lr * part for part in falling)])


def test_only_matrices_and_filters_are_decayed(model, tiny):
    """Biases and whatever belongs to a normalisation are not."""
    decayed, plain = optimizer(model, tiny.train).param_groups
    assert decayed["weight_decay"] == tiny.train.weight_decay > 0 == plain["weight_decay"]
    norms = {p for module in model.modules() if "Norm" in type(module).__name__ for p in module.parameters()}
    biases = {p for name, p in model.named_parameters() if name.endswith("bias")}
    assert set(plain["params"]) == norms | biases
    assert set(decayed["params"]) == set(model.parameters()) - norms - biases


def test_the_model_that_is_kept_is_the_best_not_the_last(tiny_profile, train_here):
    """So few images and so high a rate that validation goes up and down: of six seeds, the first that ends lower."""
    for seed in range(6):
        run = train_here(tiny_profile.run("student", seed, train__epochs=4, train__lr=2e-2, train__warmup_fraction=0.0))
        validations = run.metrics()["validation"].dropna().tolist()
        if validations[-1] < max(validations):
            break
    assert validations[-1] < max(validations) == pytest.approx(run.result("accuracy", "validation").value)


def test_what_a_run_starts_from_is_trained_first_if_nobody_has(tiny_profile, one_rank, tmp_path, monkeypatch):
    """As `python -m vqa.training.train` does; the second time the finished parent stays as it is."""
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    alignment = tiny_profile.model_copy(update={"alignment": {"teacher": tiny_profile.train["teacher"]}})
    child = alignment.run("teacher", train__epochs=1)
    try:
        training.train_all(child, one_rank)
        first = (Run(child.parent).folder / "results.json").stat().st_mtime_ns
        assert first < (Run(child).folder / "env.json").stat().st_mtime_ns
        training.train_all(child, one_rank)
    finally:
        torch.use_deterministic_algorithms(False)
    assert Run(child).finished and (Run(child.parent).folder / "results.json").stat().st_mtime_ns == first


def test_a_rank_that_does_not_see_the_run_folder_is_told_of_before_training(tiny, one_rank, tmp_path, monkeypatch):
    """The main rank writes, so only another can be blind: here one that finds nobody writing."""
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    blind = Rank(1, 0, 2, one_rank.device)
    with pytest.raises(RunError, match=r"^not every host sees .*: hosts must share the folder VQA_RUNS$"):
        training.train_all(tiny, blind)


@pytest.mark.parametrize(("rank", "builds_on_turn"), [((0, 0), 0), ((1, 1), 1), ((4, 0), 0)])
def test_a_data_set_is_built_by_one_rank_of_those_that_share_a_disk(rank, builds_on_turn, tiny, one_rank, monkeypatch):
    """The main rank first, alone; then local rank 0 of each other host, then all others; each loads once."""
    turns, loaded = [], []
    monkeypatch.setattr(training, "barrier", lambda: turns.append(None))
    monkeypatch.setattr(training, "load", lambda data: loaded.append(len(turns)) or "source")
    monkeypatch.setattr(training, "main_first", lambda work, rank: work() if rank.is_main else None)
    assert training.load_data(tiny, Rank(*rank, 8, one_rank.device)) == "source"
    assert loaded == [builds_on_turn] and len(turns) == 2


def test_costs_are_those_of_the_saved_model(trained):
    run = trained["alone"]
    assert 0 < run.result("checkpoint_share", "").value < 1
    weights = run.folder / "model" / "model.safetensors"
    assert run.result("bytes_on_disk", "").value == weights.stat().st_size
    assert run.result("parameters", "").value == sum(
        value.numel() for name, value in load_file(weights).items() if not name.endswith((".mean", ".std"))
    )


def test_one_batch_can_be_learned_by_heart(role, tiny_profile, trainer_of, one_rank):
    """Measured: 120 steps for the teacher, 60 for the student."""
    changes = {"train__global_batch_size": 8, "train__epochs": 40, "train__lr": 3e-3}
    trainer = trainer_of(tiny_profile.run(role, **changes))
    images = np.arange(8)
    batch, pairs = trainer.split.batch(images), trainer.split.pairs_of(images)
    for _ in range(200):
        loss, _ = trainer.update([batch], images)
        if loss < 0.02:
            break
    assert predict(trainer.objective.model, trainer.split, one_rank)["correct"].iloc[pairs].mean() == 1.0


def first_step(trainer: Trainer) -> tuple[float, float]:
    images = np.arange(16)
    return tuple(value.item() for value in trainer.update([trainer.split.batch(images)], images))


def test_the_optimizer_meets_a_clipped_gradient(tiny_profile, trainer_of):
    """Norm and direction of what it is given; the norm that is reported is the one before clipping."""
    gradients = []
    for limit in (1e9, 0.5):
        trainer = trainer_of(tiny_profile.run("teacher", train__max_grad_norm=limit))
        trainer.optimizer.register_step_pre_hook(
            lambda optimizer, *_: gradients.append(
                torch.cat([p.grad.flatten() for group in optimizer.param_groups for p in group["params"]])
            )
        )
        reported = first_step(trainer)[1]
        assert reported == pytest.approx(gradients[0].norm().item(), rel=1e-5) and reported > 0.6
    free, clipped = gradients
    assert clipped.norm().item() == pytest.approx(0.5, rel=1e-4)
    torch.testing.assert_close(clipped, free * (0.5 / free.norm()), rtol=1e-4, atol=1e-8)


def test_each_step_says_what_it_did(tiny_profile, trainer_of):
    """Two epochs from the start, and one gone on with after its first step."""
    trainer, steps = trainer_of(tiny_profile.run("teacher", train__gradient_accumulation_steps=2)), []
    for epoch in range(2):
        trainer.epoch(epoch, steps.append)
    assert [(step.epoch, step.step) for step in steps] == [(epoch, step) for epoch in range(2) for step in range(4)]
    plans = [EpochPlan.make(64, 16, trainer.config.seed, epoch, trainer.config.data.flips) for epoch in range(2)]
    for step, images in zip(steps, np.concatenate([plan.steps for plan in plans]), strict=True):
        assert step.images.tolist() == images.tolist() and step.pairs == len(trainer.split.pairs_of(images))
        assert step.loss > 0 and step.norm > 0
    assert steps[-1].lr == 0.0 < steps[-2].lr
    trainer, steps = trainer_of(tiny_profile.run("teacher")), []
    trainer.update([trainer.split.batch(np.arange(16))], np.arange(16))
    trainer.epoch(0, steps.append)
    assert [step.step for step in steps] == [1, 2, 3]


def test_bf16_loses_little(role, tiny_profile, trainer_of):
    """Measured over 6 seeds: loss 3e-4, gradient norm 2e-2 apart, relative; 2^-8 is the grain of a bf16 number."""
    runs = (tiny_profile.run(role, train__amp=amp) for amp in ("off", "bf16"))
    (loss, norm), (low, low_norm) = (first_step(trainer_of(run)) for run in runs)
    assert low == pytest.approx(loss, rel=2e-3) and low != loss
    assert low_norm == pytest.approx(norm, rel=6e-2)


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing_loses_nothing(role, tiny_profile, trainer_of):
    runs = (tiny_profile.run(role, train__gradient_checkpointing=used) for used in (False, True))
    stored, computed_again = (first_step(trainer_of(run)) for run in runs)
    assert computed_again == pytest.approx(stored, rel=1e-6)


def test_compile_catches_the_whole_model_once(tiny_profile, trainer_of):
    """Traced, not translated to C++, which takes minutes: one graph, kept for batches of other sizes."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    plain = first_step(trainer_of(tiny_profile.run("teacher")))
    torch.compiler.set_default_backend(backend)
    try:
        trainer = trainer_of(tiny_profile.run("teacher", train__compile=True))
        assert first_step(trainer) == pytest.approx(plain, rel=1e-5)
        other = np.arange(20, 36)
        assert len(trainer.split.pairs_of(other)) != len(trainer.split.pairs_of(np.arange(16)))
        trainer.update([trainer.split.batch(other)], other)
    finally:
        torch.compiler.set_default_backend(None)
    assert len(graphs) == 1


def test_accumulated_parts_make_the_step_of_the_whole(tiny_profile, trainer_of):
    """Transformers only: a ResNet's batch statistics are of the part. Measured over 6 seeds: 2e-7 apart."""
    steps = []
    for parts in (1, 4):
        trainer = trainer_of(tiny_profile.run("teacher", train__gradient_accumulation_steps=parts))
        plan = EpochPlan.make(len(trainer.split), 16, seed=0, epoch=0, flips=True)
        batches = list(plan.micro_batches(0, trainer.split, 0, 1, parts))
        assert len(batches) == parts
        steps.append([value.item() for value in trainer.update(batches, plan.steps[0])])
    assert steps[1] == pytest.approx(steps[0], rel=2e-6)


@pytest.mark.parametrize("spoiled", ["loss", "gradient"])
def test_what_is_not_finite_ends_training_before_the_update(spoiled, tiny_profile, trainer_of):
    """An infinite loss with a finite gradient, and the reverse. The sentence names every question of the step."""
    trainer = trainer_of(tiny_profile.run("teacher", train__warmup_fraction=0.0))
    images = np.array([5, 3, 40])
    before = {name: value.clone() for name, value in trainer.objective.model.state_dict().items()}
    loss = trainer.objective.loss

    def infinite(*given):
        value = loss(*given)
        if spoiled == "loss":
            return value + math.inf
        value.register_hook(lambda gradient: gradient * math.inf)
        return value

    trainer.objective.loss = infinite
    with pytest.raises(TrainingError, match=r"^epoch 1, step 1: the loss or the gradient is not finite") as caught:
        trainer.update([trainer.split.batch(images)], images)
    named = [part.split("-") for part in str(caught.value).split("questions ")[1].split(", ")]
    asked = {number for ends in named for number in range(int(ends[0]), int(ends[-1]) + 1)}
    assert asked == set(
        trainer.split.frame["question_id"][
            trainer.split.frame["image_id"].isin(trainer.split.frame["image_id"].unique()[images])
        ]
    )
    after = trainer.objective.model.state_dict()
    assert all(after[name].equal(value) for name, value in before.items())


def test_a_run_that_is_not_finite_names_its_last_good_checkpoint(tiny_profile, train_here):
    changes = {"train__lr": 1e30, "train__warmup_fraction": 0.0, "train__checkpoint_every_steps": 1}
    with pytest.raises(TrainingError, match=r"^epoch 1, step 2: .*; the last good checkpoint is step-1$"):
        train_here(tiny_profile.run("teacher", **changes))
    (folder,) = runs.RUNS.glob("teacher*")
    assert not (folder / "results.json").exists() and not (folder / "model").exists()


def test_spans_hold_every_number_once():
    assert spans([9, 3, 4, 5]) == "3-5, 9" and spans([]) == ""


def test_a_batch_larger_than_the_data_is_refused(tiny_profile, trainer_of):
    with pytest.raises(ConfigError, match=r"^train.global_batch_size 128 is more than the 64 training images$"):
        trainer_of(tiny_profile.run("teacher", train__global_batch_size=128))


def command(monkeypatch, *arguments: str, **environment: str) -> str:
    """What `python -m vqa.training.train` with `arguments` says on its way out."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train", *arguments])
    with pytest.raises(SystemExit) as caught:
        training.main()
    assert isinstance(caught.value.code, str) and "\n" not in caught.value.code  # printed to stderr, status 1
    return caught.value.code


def test_without_torchrun_there_is_one_sentence(monkeypatch):
    assert command(monkeypatch).startswith("error: start with torchrun: torchrun --standalone")


def test_another_number_of_ranks_is_one_sentence(tiny, tmp_path, monkeypatch):
    save_yaml(tiny, tmp_path / "config.yaml")
    said = command(monkeypatch, "--config", str(tmp_path / "config.yaml"), RANK="0", LOCAL_RANK="0", WORLD_SIZE="2")
    assert said == "error: torchrun started 2 ranks but launch.world_size is 1"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "defualt"], "error: no profile 'defualt' in params/: did you mean default?"),
        (["--set", "data.sorce=x"], "error: profile default: unknown key data.sorce; did you mean source?"),
        (["--config", "/no/where.yaml"], "error: "),
    ],
)
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, said, monkeypatch):
    assert command(monkeypatch, *arguments, RANK="0", LOCAL_RANK="0", WORLD_SIZE="1").startswith(said)


def test_the_run_folder_says_what_it_was_made_from(trained):
    for run in trained.values():
        assert Run.open(run.folder).config == run.config
        assert run.environment()["threads"] == str(run.config.launch.threads_per_rank)
        assert run.environment()["packages"]["torch"] in torch.__version__
        assert not [path for path in run.folder.rglob(f".*.{os.getpid()}")]
