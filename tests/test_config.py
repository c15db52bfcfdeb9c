import re
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from vqa.config import (
    PARAMS,
    ROOT,
    ConfigError,
    MeasurementConfig,
    Profile,
    RunConfig,
    Section,
    digest,
    load_profile,
    load_section,
    parse_overrides,
    save_yaml,
)
from vqa.config import profile as profiles
from vqa.config.section import read_yaml

PROFILES = sorted(path.stem for path in PARAMS.glob("*.yaml"))


def refusal(call, *arguments, **named) -> str:
    """The ConfigError that `call` must raise, which must be one sentence."""
    with pytest.raises(ConfigError) as caught:
        call(*arguments, **named)
    sentence = str(caught.value)
    assert "\n" not in sentence and "pydantic" not in sentence and len(sentence) < 250
    return sentence


@pytest.fixture
def params(tmp_path, monkeypatch):
    """An empty params/; gives a function that writes a profile into it."""
    monkeypatch.setattr(profiles, "PARAMS", tmp_path)
    return lambda name, text: (tmp_path / f"{name}.yaml").write_text(text)


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_loads(name):
    profile = load_profile(name)
    assert profile.name == name
    assert all(profile.run(role).role == role for role in profile.models)


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("sead", "seeds"),
        ("data.image_sise", "image_size"),
        ("models.teecher", "teacher"),
        ("models.teacher.fusoin", "fusion"),
        ("models.teacher.image_encoder.widht", "width"),
        ("train.student.epoch", "epochs"),
        ("alignment.teacher.golbal_batch_size", "global_batch_size"),
        ("launch.world_sizes", "world_size"),
    ],
)
def test_unknown_key_names_the_nearest_right_one(wrong, right):
    assert refusal(load_profile, "default", {wrong: 1}).endswith(f"unknown key {wrong}; did you mean {right}?")


def test_unknown_key_of_a_run_names_the_nearest_right_one(tiny_profile):
    assert "unknown key train.epochz; did you mean epochs?" in refusal(tiny_profile.run, "teacher", train__epochz=2)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("train.teacher.epochs", "ten"),
        ("train.teacher.epochs", 2.5),
        ("train.teacher.epochs", True),
        ("train.teacher.epochs", 0),
        ("train.teacher.lr", "fast"),
        ("train.teacher.lr", float("nan")),
        ("train.teacher.warmup_fraction", 1.5),
        ("data.flips", "no"),
        ("seeds", []),
        ("launch", 3),
    ],
)
def test_wrong_value_is_refused_by_place_and_value(key, value):
    sentence = refusal(load_profile, "default", {key: value})
    assert f"{key} is {value!r}: " in sentence


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.image_size": 60}, "image_size 60 is not a multiple of patch_size"),
        (
            {"models.teacher.image_encoder.heads": 7},
            r"models.teacher.image_encoder: width \d+ is not a multiple of heads 7",
        ),
        (
            {"models.teacher.text_encoder.heads": 7},
            r"models.teacher.text_encoder: width \d+ is not a multiple of heads 7",
        ),
        (
            {"models.teacher.fusion": {"kind": "cross_attention", "heads": 7}},
            r"models.teacher.fusion: width \d+ is not a multiple of heads 7",
        ),
        ({"models.teacher.image_encoder.patch_size": 32}, "a conv stem needs patch_size 4, 8 or 16, not 32"),
        ({"models.student.image_encoder.width": 100}, "width 100 is not a multiple of 8"),
        ({"train.teacher.global_batch_size": 30, "launch.world_size": 4}, "30 does not divide evenly by .* = 4"),
        (
            {"train.teacher.global_batch_size": 30, "train.teacher.gradient_accumulation_steps": 4},
            "30 does not divide evenly by .* = 4",
        ),
        ({"alignment.teacher.gradient_accumulation_steps": 2}, "cannot accumulate gradients"),
        ({"data.question_fraction": 0.5}, "data.question_fraction does not go with alignment"),
        ({"data.source": "vqa_v2", "data.flips": False}, "vqa_v2 needs data.root, the folder of its official files"),
        ({"data.root": "data"}, "data.root is for vqa_v2; easy_vqa has no files to look for"),
        ({"data.source": "vqa_v2", "data.root": "data"}, "data.flips must be false for vqa_v2"),
        ({"models.teacher.text_encoder.revision": "main"}, "models.teacher.text_encoder.revision is 'main'"),
        ({"models.teacher.image_encoder.revision": "v1.0"}, "models.teacher.image_encoder.revision is 'v1.0'"),
    ],
)
def test_impossible_combination_is_refused_when_the_profile_loads(changes, said):
    assert re.search(said, refusal(load_profile, "default", changes))


def test_missing_key_is_named(params):
    params("bare", "seeds: [0]")
    assert refusal(load_profile, "bare") == "profile bare: the key data is missing"


def test_wrong_profile_or_role_names_the_nearest(tiny_profile):
    assert refusal(load_profile, "defualt") == "no profile 'defualt' in params/: did you mean default?"
    assert refusal(tiny_profile.run, "teachr") == "no model 'teachr' in profile default: did you mean teacher?"


def test_a_model_without_training_settings_is_refused():
    assert "models.student has no settings under train" in refusal(load_profile, "default", {"train.student": None})


def test_yaml_is_1_2_in_a_file_as_on_the_command_line(params):
    params("plain", "lr: 3e-4\nword: no\nflag: true\n")
    assert read_yaml(profiles.PARAMS / "plain.yaml") == {"lr": 0.0003, "word": "no", "flag": True}
    assert parse_overrides(["a.lr=3e-4", "a.word=no", "a.list=[1, 2]", "a.none="]) == {
        "a.lr": 0.0003,
        "a.word": "no",
        "a.list": [1, 2],
        "a.none": None,
    }


@pytest.mark.parametrize("pair", ["train.teacher.lr", "seeds=[1", "seeds=a: b: c"])
def test_malformed_override_is_refused(pair):
    refusal(parse_overrides, [pair])


def test_override_cannot_go_below_a_value():
    assert "seeds holds a value" in refusal(load_profile, "default", {"seeds.first": 1})


def test_base_gives_what_a_profile_leaves_out(params):
    whole = (ROOT / "params" / "default.yaml").read_text()
    params("ground", whole)
    params("middle", "base: ground\nseeds: [7]\ntrain: {teacher: {epochs: 3}}")
    params("top", "base: middle\ntrain: {teacher: {lr: 0.5}}")
    ground, top = load_profile("ground"), load_profile("top")
    expected = ground.model_dump()
    expected["train"]["teacher"] |= {"epochs": 3, "lr": 0.5}
    assert top.model_dump() == expected | {"name": "top", "seeds": [7]}


def test_a_null_takes_a_section_of_the_base_away(params):
    params("ground", (ROOT / "params" / "default.yaml").read_text())
    params("top", "base: ground\nalignment: null")
    profile = load_profile("top")
    assert profile.alignment == {} and profile.run("student").parent is None


def test_a_cycle_of_bases_is_refused(params):
    params("a", "base: b")
    params("b", "base: a")
    assert refusal(load_profile, "a") == "profile a is its own base, through a -> b"


@pytest.mark.parametrize("text", ["seeds: [0", "a: b: c", "", "- 1", "a: 1\na: 2"])
def test_a_file_that_is_no_mapping_is_refused_by_name(params, text):
    params("odd", text)
    assert "odd.yaml" in refusal(load_profile, "odd")


def test_the_command_line_prints_the_resolved_profile_or_one_sentence():
    def command(*arguments):
        return subprocess.run([sys.executable, "-m", "vqa.config", *arguments], capture_output=True, text=True)

    wrong = command("defualt")
    assert wrong.returncode == 1
    assert wrong.stderr == "error: no profile 'defualt' in params/: did you mean default?\n"
    right = command("default", "--set", "train.teacher.lr=3e-4")
    assert right.returncode == 0
    printed = YAML(typ="safe", pure=True).load(right.stdout)
    assert Profile.model_validate(printed) == load_profile("default", {"train.teacher.lr": 3e-4})


def variants(section: Section):
    """Every section that differs from `section` in one value, at any depth."""
    for name, value in section:
        if isinstance(value, Section):
            yield from (section.model_copy(update={name: variant}) for variant in variants(value))
        else:
            other = {str: f"{value}x", bool: not value, type(None): "x"}.get(type(value), 7.25)
            yield section.model_copy(update={name: other})


@pytest.mark.filterwarnings("ignore:Pydantic serializer")  # some of the other values are not allowed ones
def test_digest_changes_with_every_value_the_parents_included(tiny):
    child = tiny.model_copy(update={"parent": tiny})
    digests = [digest(child), *(digest(variant) for variant in variants(child))]
    assert len(digests) > 60 and len(set(digests)) == len(digests)


def test_digest_survives_the_disk(tiny, tmp_path):
    child = tiny.model_copy(update={"parent": tiny})
    save_yaml(child, tmp_path / "kept.yaml")
    assert digest(load_section(RunConfig, tmp_path / "kept.yaml")) == digest(child)


def test_digest_is_the_same_however_the_values_were_given():
    one = load_profile("default", {"train.teacher.lr": 1, "train.teacher.epochs": 5})
    other = load_profile("default", parse_overrides(["train.teacher.epochs=5", "train.teacher.lr=1.0"]))
    assert digest(one) == digest(other)


def test_alignment_is_the_parent_whatever_the_fusion():
    profile = load_profile("default", {"alignment.teacher": {"epochs": 1}})
    concat, cross = (profile.run("teacher", model__fusion__kind=kind) for kind in ("concat", "cross_attention"))
    assert concat.parent == cross.parent and digest(concat) != digest(cross)
    assert concat.parent.objective == "alignment" and concat.parent.train.epochs == 1


def test_a_distilled_run_names_its_teacher_and_starts_where_the_student_alone_does(tiny_profile):
    alone, taught = tiny_profile.run("student"), tiny_profile.run("student", distilled=True)
    assert (
        taught.teacher == tiny_profile.run("teacher")
        and taught.model_name == "distilled"
        and alone.model_name == "student"
    )
    shared = {"objective", "teacher", "distillation"}
    assert taught.model_dump(exclude=shared) == alone.model_dump(exclude=shared)
    assert taught.name == "student-concat-distilled-seed0"
    other = tiny_profile.run("student", distilled=True, teacher=tiny_profile.run("teacher", 1).model_dump())
    assert digest(other) != digest(taught)


def test_the_alignment_run_is_the_same_alone_or_distilled():
    profile = load_profile("default")
    assert profile.run("student").parent == profile.run("student", distilled=True).parent is not None


HEIR = {
    "distillation__inherit_text": True,
    "model__text_encoder__width": 32,
}  # the tiny student, as wide as its teacher


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"teacher": None}, "needs a distillation section and a teacher run that learned answers"),
        ({"distillation": None}, "needs a distillation section and a teacher run that learned answers"),
        ({"data__split_seed": 1}, "the teacher was trained with data.split_seed 0, the student with 1"),
        ({"data__validation_images": 8}, "the teacher was trained with data.validation_images 32, the student with 8"),
        ({"teacher__objective": "alignment"}, "a teacher run that learned answers"),
        ({"model__fusion__kind": "unified_decoder"}, "a unified_decoder has one tower"),
        ({"distillation__alpha": 1.5}, "distillation.alpha is 1.5"),
        ({"distillation__temperature": 0.0}, "distillation.temperature is 0.0"),
        ({"distillation__token_weight": -1.0}, "distillation.token_weight is -1.0"),
        (HEIR | {"model__text_encoder__width": 24}, "of equal width: the teacher's has 32, the student's 24"),
        (HEIR | {"model__text_encoder__heads": 4}, "of equal heads: the teacher's has 2, the student's 4"),
        (HEIR | {"model__text_encoder__layers": 2}, "cannot take 2 layers from a teacher's text tower of 1"),
        (HEIR | {"model__text_encoder__kind": "bert"}, "makes a distilbert of a bert, not a bert of a bert"),
        ({"distillation__temprature": 1.0}, "unknown key distillation.temprature; did you mean temperature?"),
    ],
)
def test_an_impossible_distillation_is_refused(changes, said, tiny_profile):
    assert said in refusal(tiny_profile.run, "student", distilled=True, **changes)


@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("models.student.image_encoder.heads", "known: kind, pretrained, revision, width"),  # a ViT's, not a ResNet18's
        ("models.teacher.fusion.layers", "known: kind, width"),  # concat has none
    ],
)
def test_a_key_of_another_kind_is_refused(key, said):
    assert f"unknown key {key}; {said}" in refusal(load_profile, "default", {key: 2})


@pytest.mark.parametrize("where", ["models.teacher.image_encoder.kind", "models.teacher.fusion.kind"])
def test_an_unknown_kind_names_the_nearest(where):
    assert f"{where} is 'vot'; " in refusal(load_profile, "default", {where: "vot"})


def test_another_kind_replaces_the_section_of_the_base(params):
    params("ground", (ROOT / "params" / "default.yaml").read_text())
    params("top", "base: ground\nmodels: {teacher: {image_encoder: {kind: resnet18, width: 64}}}")
    tower = load_profile("top").models["teacher"].image_encoder
    assert (tower.kind, tower.width) == ("resnet18", 64)


def test_an_override_of_a_section_keeps_the_rest_of_it():
    assert load_profile("base", {"launch": {"world_size": 2}}).launch.device == "cuda"
    trained = load_profile("base", {"train.teacher": {"epochs": 1}}).train["teacher"]
    assert (trained.epochs, trained.amp) == (1, "bf16")
    assert load_profile("default", {"alignment": None}).alignment == {}


def test_set_may_be_given_several_times():
    command = [sys.executable, "-m", "vqa.config", "smoke", "--set", "seeds=[3]", "--set", "launch.world_size=2"]
    printed = YAML(typ="safe", pure=True).load(subprocess.run(command, capture_output=True, text=True).stdout)
    assert printed["seeds"] == [3] and printed["launch"]["world_size"] == 2


def test_an_unknown_measurement_names_the_nearest(tiny):
    with pytest.raises(ValueError, match="did you mean grouping"):
        MeasurementConfig(kind="groping", runs=[tiny])


def test_measurements_of_other_ranks_have_other_names(tiny):
    names = {MeasurementConfig(kind="forensics", runs=[tiny], simulated_ranks=n).name for n in (1, 2, 4)}
    assert len(names) == 3
