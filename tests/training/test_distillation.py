"""The teacher's cache: what it holds is what the teacher would say, computed once, of the right teacher."""

import hashlib
import threading
import time

import numpy as np
import pytest
import torch

from vqa import run_folder as runs
from vqa.config import ConfigError, RunConfig
from vqa.data.batches import VIEWS, EpochPlan, Split
from vqa.data.processor import Processor, train_tokenizer
from vqa.models.build import load_vqa_model
from vqa.run_folder import RunError
from vqa.training import distillation
from vqa.training.distillation import TeacherCache, cached, read_all
from vqa.training.losses import feature_loss, soft_target_loss, token_loss


@pytest.fixture
def student(tiny_profile, untrained_teacher) -> RunConfig:
    return tiny_profile.run("student", distilled=True)


@pytest.fixture
def split(source, processor):
    return Split(source.splits["train"], processor)


def cache_of(config: RunConfig, split) -> TeacherCache:
    return TeacherCache(config, split, "fingerprint", torch.device("cpu"))


def test_the_cache_says_what_the_teacher_would_say(student, split, untrained_teacher):
    """In random views and other batches than it was made in. Measured: 5e-7 apart, loss 3e-8 relative."""
    cache, teacher = cache_of(student, split), load_vqa_model(untrained_teacher.folder / "model")
    plan = EpochPlan.make(len(split), 16, seed=3, epoch=0, flips=True)
    assert len(np.unique(plan.flips[0] @ [1, 2])) == len(VIEWS)
    for batch in plan.micro_batches(0, split, 0, 1, 2):
        with torch.no_grad():
            online = cache.standardised(teacher(**batch.inputs()))
        own = batch.attention_mask[..., None]
        said = [answer._replace(tokens=answer.tokens * own) for answer in (cache.of(batch), online)]
        for ours, theirs in zip(*(answer[1:] for answer in said), strict=True):
            assert ours.shape == theirs.shape and (ours - theirs).abs().max() < 2e-5 * theirs.abs().max()
        logits, features, tokens = (
            torch.randn(len(batch), 13),
            torch.randn_like(online.image),
            torch.randn_like(online.tokens),
        )
        losses = [
            soft_target_loss(logits, said.logits, 2.0, 9)
            + feature_loss(features, said.image, batch.image_index, 9)
            + token_loss(tokens, said.tokens, batch.attention_mask, batch.question_index, 9)
            for said in (cache.of(batch), online)
        ]
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-6)


def test_views_differ_so_that_a_wrong_one_would_be_found(student, split):
    said = cache_of(student, split).outputs
    assert len(said.logits) == len(VIEWS)
    gaps = [(said.logits[view] - said.logits[0]).abs().max() for view in range(1, len(VIEWS))]
    assert min(gaps) > 1e-3 * said.logits.std()


def test_features_are_standardised_over_the_split(student, split):
    """Tokens over those that questions have: padding, of which the cache says zero, would shift them."""
    cache = cache_of(student, split)
    everything = cache.standardised(cache.outputs)
    padding = split.attention_mask == 0
    assert padding.any() and not cache.outputs.tokens[padding].any()
    for flat in (everything.image.flatten(0, -2), everything.text, everything.tokens[~padding]):
        assert flat.mean(0).abs().max() < 1e-4 and flat.std(0) == pytest.approx(1, abs=1e-3)


def test_the_teacher_is_read_once(student, split, monkeypatch):
    first = cache_of(student, split)
    monkeypatch.setattr(distillation, "read_all", None)
    assert cache_of(student, split).outputs.logits.equal(first.outputs.logits)


def test_two_runs_at_once_compute_once(tmp_path):
    made = []

    def compute():
        made.append(1)
        time.sleep(0.2)
        return {"logits": torch.arange(3.0)}

    path, found = tmp_path / "targets" / "key.safetensors", []
    both = [threading.Thread(target=lambda: found.append(cached(path, compute))) for _ in range(2)]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert len(made) == 1 and all(said["logits"].tolist() == [0, 1, 2] for said in found) and len(found) == 2


def test_an_interrupted_computation_leaves_no_cache(tmp_path, monkeypatch):
    def half_written(_, path):
        path.write_bytes(b"half")
        raise OSError("disk full")

    path = tmp_path / "key.safetensors"
    with monkeypatch.context() as broken, pytest.raises(OSError, match="disk full"):
        broken.setattr(distillation, "save_file", half_written)
        cached(path, lambda: {"logits": torch.ones(1)})
    assert [left.name for left in tmp_path.glob("*key*")] == ["key.lock"] and not list(tmp_path.glob(".*"))
    assert cached(path, lambda: {"logits": torch.ones(1)})["logits"].item() == 1


@pytest.mark.parametrize(
    "change", [{"data__flips": False}, {"data__train_images": 48}, {"launch__threads_per_rank": 2}, "weights", "data"]
)
def test_another_teacher_or_other_data_has_a_cache_of_its_own(
    change, student, split, tiny_profile, untrained_teacher, keep_untrained
):
    cache_of(student, split)
    if change == "weights":
        keep_untrained(untrained_teacher.config, seed=1)
    fingerprint = "another" if change == "data" else "fingerprint"
    changes = change if isinstance(change, dict) else {}
    TeacherCache(tiny_profile.run("student", distilled=True, **changes), split, fingerprint, torch.device("cpu"))
    assert len(list((runs.RUNS / "targets").glob("*.safetensors"))) == 2


def test_the_teacher_stays_as_it_is(role, split, tiny_profile, keep_untrained):
    """Of both kinds: a ResNet's running statistics are buffers that training mode would change."""
    model = load_vqa_model(keep_untrained(tiny_profile.run(role)).folder / "model")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    read_all(model, split, VIEWS[:2])
    assert not model.training and all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_teachers_weights_are_named_by_their_hash(student, split, untrained_teacher):
    weights = (untrained_teacher.folder / "model" / "model.safetensors").read_bytes()
    said = {"run": untrained_teacher.folder.name, "sha256": hashlib.sha256(weights).hexdigest()}
    assert cache_of(student, split).teacher == said


def test_an_unfinished_teacher_is_refused(student, split, untrained_teacher):
    (untrained_teacher.folder / "results.json").unlink()
    with pytest.raises(RunError, match=r"^teacher-concat-seed0-\w{8} has not finished$"):
        cache_of(student, split)


def test_a_teacher_with_other_answers_is_refused(student, split, untrained_teacher, keep_untrained, processor):
    fewer = Processor(processor.tokenizer, processor.answers[:-1], 64, 32)
    keep_untrained(untrained_teacher.config, processor=fewer)
    with pytest.raises(
        ConfigError, match=r"^the teacher teacher-\S+ chooses among 12 answers .* student's 13: [^\n]*$"
    ):
        cache_of(student, split)


def test_a_teacher_with_another_tokenizer_is_refused(student, split, untrained_teacher, keep_untrained, processor):
    other = Processor(train_tokenizer(["is there a hexagon?"]), processor.answers, 64, 32)
    keep_untrained(untrained_teacher.config, processor=other)
    with pytest.raises(ConfigError, match=r"^the teacher teacher-\S+ reads with another tokenizer than the student$"):
        cache_of(student, split)
