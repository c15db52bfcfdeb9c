"""Distillation: which terms a student learns from, how they are scaled, and what is left of them afterwards."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from vqa.distributed import Rank
from vqa.models.build import load_vqa_model, vqa_model
from vqa.run_folder import Run
from vqa.training import objectives
from vqa.training import train as training
from vqa.training.distillation import Distillation
from vqa.training.objectives import Alignment, Answers
from vqa.training.train import Trainer

IMAGES = np.arange(16)
FLIPS = np.zeros((16, 2), bool)
FLIPS[1] = True
CPU = torch.device("cpu")


@pytest.fixture
def objective_of(tiny_profile, untrained_teacher, source, one_rank):
    """Gives a function from weights of the terms to a student's objective, and maybe another rank."""

    def make(alpha: float, features: float, tokens: float, role="student", rank: Rank = one_rank) -> Distillation:
        terms = {"temperature": 2.0, "alpha": alpha, "feature_weight": features, "token_weight": tokens}
        torch.manual_seed(0)
        return Distillation(tiny_profile.run(role, distilled=True, distillation=terms), source, rank)

    return make


def step_loss(objective, part: slice = slice(None)) -> torch.Tensor:
    """The loss of `part` of the step that IMAGES make up, one of them mirrored; nothing at random."""
    objective.network.eval()
    return objective.loss(objective.network, objective.train_split.batch(IMAGES[part], FLIPS[part]), IMAGES)


def test_without_the_teachers_terms_the_loss_is_that_of_the_labels(objective_of):
    objective = objective_of(alpha=0.0, features=0.0, tokens=0.0)
    batch = objective.train_split.batch(IMAGES, FLIPS)
    objective.model.eval()
    chances = objective.model(**batch.inputs()).logits.log_softmax(-1)
    expected = -chances[torch.arange(len(batch)), batch.labels].sum() / len(batch)
    assert step_loss(objective).item() == pytest.approx(expected.item(), rel=1e-6)


def test_terms_add_up_with_their_weights(objective_of):
    hard, soft, features, tokens = (
        step_loss(objective_of(*terms)).item()
        for terms in ((0.0, 0.0, 0.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    )
    whole = step_loss(objective_of(alpha=0.3, features=2.0, tokens=3.0)).item()
    assert whole == pytest.approx(0.3 * soft + 0.7 * hard + 2 * (features - hard) + 3 * (tokens - hard), rel=1e-5)
    assert min(hard, soft, features - hard, tokens - hard) > 1e-3


def test_a_student_with_its_teachers_weights_has_nothing_to_learn(objective_of, untrained_teacher):
    """Its own answers, and its own tokens through the projection that standardises them as the teacher's are."""
    objective = objective_of(alpha=1.0, features=0.0, tokens=1.0, role="teacher")
    objective.model.load_state_dict(load_vqa_model(untrained_teacher.folder / "model").state_dict())
    centre, spread, projection = (
        objective.cache.centre[2],
        objective.cache.spread[2],
        objective.network.token_projection,
    )
    projection.load_state_dict({"weight": torch.diag(1 / spread), "bias": -centre / spread})
    loss = step_loss(objective)
    loss.backward()
    assert abs(loss.item()) < 1e-6
    assert max(p.grad.abs().max() for p in objective.model.parameters() if p.grad is not None) < 1e-5


def test_shares_of_two_ranks_make_the_loss_of_one(objective_of):
    """DDP takes the mean over ranks. Images of unequal numbers of questions, as they come."""
    whole = step_loss(objective_of(0.7, 1.0, 1.0)).item()
    shares = [
        step_loss(objective_of(0.7, 1.0, 1.0, rank=Rank(rank, rank, 2, CPU)), part=part).item()
        for rank, part in enumerate((slice(0, 8), slice(8, 16)))
    ]
    assert sum(shares) / 2 == pytest.approx(whole, rel=1e-5)


def test_alone_or_distilled_a_seed_starts_from_the_same_weights(objective_of, tiny_profile, source, one_rank):
    taught = objective_of(0.7, 1.0, 1.0).model.state_dict()
    torch.manual_seed(0)
    alone = Answers(tiny_profile.run("student"), source, one_rank).model.state_dict()
    assert taught.keys() == alone.keys() and all(value.equal(alone[name]) for name, value in taught.items())


def test_the_optimizer_has_the_student_and_its_projections_but_not_the_teacher(objective_of, tiny_profile, one_rank):
    objective = objective_of(0.7, 1.0, 1.0)
    trainer = Trainer(tiny_profile.run("student", distilled=True), objective, one_rank)
    moved = {p for group in trainer.optimizer.param_groups for p in group["params"]}
    projections = {p for name, p in objective.network.named_parameters() if "projection" in name}
    assert moved == set(objective.network.parameters()) == set(objective.model.parameters()) | projections
    assert len(projections) == 6


def test_an_heir_reads_as_its_teacher_from_the_start(tiny_profile, untrained_teacher, source, one_rank):
    """All layers of the teacher's are taken here: the text towers say the same, the rest of the student is its own."""
    changes = {"model__text_encoder__width": 32, "distillation__inherit_text": True}
    heir = Distillation(tiny_profile.run("student", distilled=True, **changes), source, one_rank)
    teacher = load_vqa_model(untrained_teacher.folder / "model")
    batch = heir.train_split.batch(IMAGES)
    with torch.no_grad():
        ours, theirs = (model.eval().towers(batch)[1] for model in (heir.model, teacher))
    assert (ours.tokens - theirs.tokens).abs().max() < 1e-5 and heir.model.config.text_encoder.kind == "distilbert"


def test_a_distilled_run_keeps_a_plain_student_and_names_its_teacher(
    tiny_profile, untrained_teacher, one_rank, processor
):
    before = (untrained_teacher.folder / "model" / "model.safetensors").read_bytes()
    run = Run(tiny_profile.run("student", distilled=True))
    try:
        with run.writing():
            training.train(run.config, run, one_rank)
    finally:
        torch.use_deterministic_algorithms(False)
    assert (untrained_teacher.folder / "model" / "model.safetensors").read_bytes() == before
    alone = vqa_model(run.config.model, processor)
    assert load_file(run.folder / "model" / "model.safetensors").keys() == alone.state_dict().keys()
    assert run.environment()["teacher"]["run"] == untrained_teacher.folder.name
    assert run.result("accuracy").value > 0
    losses = run.metrics()["loss"].dropna().tolist()
    assert losses[-1] < losses[0]


def test_all_ranks_judge_an_alignment_by_the_main_ranks_score(tiny_profile, source, one_rank, monkeypatch):
    """With batch statistics of their own, ranks would differ on which epoch was the best, and wait for each other."""
    told = []
    monkeypatch.setattr(objectives, "from_main", lambda score: told.append(score) or 0.25)
    run = tiny_profile.run("student").model_copy(update={"objective": "alignment"})
    assert Alignment(run, source, one_rank).validate() == 0.25 and 0 <= told[0] <= 1
