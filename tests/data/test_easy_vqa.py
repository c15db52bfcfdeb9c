import hashlib
import json
import shutil
from collections import Counter, defaultdict
from pathlib import Path

import easy_vqa as package
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from vqa.config import ConfigError
from vqa.data import easy_vqa
from vqa.data import source as sources
from vqa.data.source import SourceError, Table
from vqa.evaluation.metrics import BlindBaseline

COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
SHAPES = ("circle", "rectangle", "triangle")
PACKAGED = {
    "train": (package.get_train_questions, package.get_train_image_paths),
    "test": (package.get_test_questions, package.get_test_image_paths),
}


@pytest.fixture(scope="module")
def tables():
    return easy_vqa.build(Path())


@pytest.fixture(params=PACKAGED)
def split(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def decoded() -> dict[str, dict[int, np.ndarray]]:
    """Every image of the package by split and number, as Pillow reads it: (64, 64, 3)."""
    return {
        split: {number: np.asarray(Image.open(path).convert("RGB")) for number, path in images().items()}
        for split, (_, images) in PACKAGED.items()
    }


def test_every_question_is_the_packages(tables, split):
    table = tables[split].questions
    ours = zip(table["question"], table["answer"], table["image_id"], strict=True)
    assert Counter(ours) == Counter(zip(*PACKAGED[split][0](), strict=True))
    assert table["question_id"].is_unique


def test_every_image_is_what_pillow_decodes(tables, decoded, split):
    images = tables[split].pixels(np.arange(len(tables[split])))
    assert tables[split].image_ids.tolist() == sorted(decoded[split])
    assert all((image == decoded[split][n].transpose(2, 0, 1)).all() for n, image in enumerate(images))


def test_blind_baseline_is_an_independent_count(tables):
    """66.94 %. One tie, circle or rectangle as the "shape present", is worth six questions: 67.00 % the other way."""
    counts = defaultdict(Counter)
    for question, answer, _ in zip(*package.get_train_questions(), strict=True):
        counts[question][answer] += 1
    commonest = {
        question: sorted(c.items(), key=lambda item: (-item[1], item[0]))[0][0] for question, c in counts.items()
    }
    questions, answers, _ = package.get_test_questions()
    counted = [commonest[question] for question in questions]
    right = sum(guess == answer for guess, answer in zip(counted, answers, strict=True))
    assert (right, len(answers)) == (6475, 9673)

    test = tables["test"].questions.sort_values("question_id")
    blind = BlindBaseline(tables["train"].questions)(test["question"])
    assert blind.tolist() == counted and (blind == test["answer"]).sum() == right


def test_blind_baseline_answers_an_unseen_question_with_the_commonest_answer_of_all(tables):
    train = tables["train"].questions
    overall = Counter(train["answer"]).most_common(1)[0][0]
    assert BlindBaseline(train)(train["question"].head(1) + " really").tolist() == [overall]


def test_no_image_is_in_two_splits(tiny, decoded):
    """By number in the package's two halves, which each count from 0, and by content in all three splits."""
    whole = sources.load(tiny.data.model_copy(update={"train_images": None, "test_images": None})).splits
    assert {name: len(table) for name, table in whole.items()} == {"train": 3968, "validation": 32, "test": 1000}
    assert not set(whole["train"].image_ids) & set(whole["validation"].image_ids)
    contents = [hashlib.sha256(image.tobytes()).digest() for images in decoded.values() for image in images.values()]
    assert len(set(contents)) == len(contents) == 5000


def test_who_is_held_out_depends_on_the_split_seed_alone(tiny, source):
    def held(**changes) -> list[int]:
        return sources.load(tiny.data.model_copy(update=changes)).splits["validation"].image_ids.tolist()

    assert held(train_images=7, image_size=32, flips=False) == source.splits["validation"].image_ids.tolist()
    assert held(split_seed=1) != held()


def test_fewer_training_images_are_a_part_of_more(tiny, source):
    few = sources.load(tiny.data.model_copy(update={"train_images": 20})).splits["train"]
    assert len(few) == 20 and set(few.image_ids) < set(source.splits["train"].image_ids)


@pytest.mark.parametrize("changes", [{"validation_images": 4000}, {"train_images": 3990}, {"test_images": 1001}])
def test_more_images_than_there_are_are_refused(tiny, changes):
    with pytest.raises(ConfigError, match="too few"):
        sources.load(tiny.data.model_copy(update=changes))


def true_answer(question: str, colour: str, shape: str) -> str:
    """What a picture of one `colour` `shape` answers, from the words alone."""
    words = question.rstrip("?").split()
    if words[0] == "what" and set(words) & {*COLOURS, *SHAPES} - {colour, shape}:
        return "there is no such thing"
    if "color" in words:
        return colour
    if words[0] == "what":
        return shape
    (named,) = [word for word in words if word in COLOURS + SHAPES]
    return "yes" if (named in (colour, shape)) != ("not" in words or "no" in words) else "no"


def by_image(table: Table) -> list[tuple[list[str], list[str], list[str]]]:
    """Questions, answers and captions of each image."""
    asked = [group for _, group in table.questions.groupby("image_id")]  # in the order of their numbers, as the images
    columns = [[list(group[name]) for group in asked] for name in ("question", "answer")]
    return list(zip(*columns, table.captions, strict=True))


def test_captions_contradict_no_answer(tables, split):
    captioned = 0
    for questions, answers, caption in by_image(tables[split]):
        for text in caption:
            article, colour, shape = text.split()
            assert article == "a" and [true_answer(q, colour, shape) for q in questions] == answers
            captioned += 1
    assert captioned > 0.85 * len(tables[split])


def test_a_caption_is_the_only_one_that_its_questions_allow(tables):
    for questions, answers, caption in by_image(tables["test"]):
        if caption:
            allowed = [
                f"a {c} {s}" for c in COLOURS for s in SHAPES if [true_answer(q, c, s) for q in questions] == answers
            ]
            assert caption == allowed


@pytest.mark.parametrize(
    ("question", "answer", "kind"),
    [
        ("what shape is present?", "circle", "shape"),
        ("what is the blue shape?", "rectangle", "shape"),
        ("what is the color of the circle?", "teal", "color"),
        ("is there a gray shape?", "no", "yes_no"),
        ("does the image contain a rectangle?", "yes", "yes_no"),
        ("is there not a circle?", "yes", "yes_no_negated"),
        ("is no blue shape present?", "no", "yes_no_negated"),
    ],
)
def test_question_types(question, answer, kind):
    assert easy_vqa.question_type(question, answer) == kind


def test_question_types_agree_with_the_answers(tables, split):
    table = tables[split].questions
    kinds = {kind: set(group) for kind, group in table.groupby("question_type")["answer"]}
    assert kinds == {
        "shape": set(SHAPES),
        "color": set(COLOURS),
        "yes_no": {"yes", "no"},
        "yes_no_negated": {"yes", "no"},
    }


@pytest.fixture
def copy(tmp_path) -> Path:
    """The package's first six images of each split, with their questions."""
    original = easy_vqa.package_data()
    for split in PACKAGED:
        (tmp_path / split / "images").mkdir(parents=True)
        questions = json.loads((original / split / "questions.json").read_text())
        (tmp_path / split / "questions.json").write_text(json.dumps([q for q in questions if q[2] < 6]))
        for number in range(6):
            shutil.copy(original / split / "images" / f"{number}.png", tmp_path / split / "images")
    return tmp_path


def test_all_damaged_images_are_listed_in_one_error(copy):
    images = copy / "train" / "images"
    assert len(easy_vqa.build(Path(), copy)["train"]) == 6
    (images / "1.png").unlink()
    (images / "2.png").write_bytes((images / "2.png").read_bytes()[:-60])
    (images / "3.png").write_text("no image")
    Image.new("RGB", (32, 32)).save(images / "4.png")
    with pytest.raises(SourceError) as caught:
        easy_vqa.build(Path(), copy)
    listed = ", ".join(str(images / f"{number}.png") for number in (1, 2, 3, 4))
    assert (
        str(caught.value)
        == f"4 of 6 images are missing, damaged or too large ({listed}): reinstall the package easy-vqa"
    )


def test_fingerprint_changes_with_any_byte(copy):
    def changed(path: Path) -> str:
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        fingerprint = easy_vqa.fingerprint(copy)
        path.write_bytes(kept)
        return fingerprint

    places = ["train/images/0.png", "test/images/5.png", "test/questions.json"]
    assert len({easy_vqa.fingerprint(copy), *(changed(copy / place) for place in places)}) == 4


def test_a_share_of_the_questions_keeps_every_image_and_is_part_of_a_larger_share(tiny, source):
    def questions(share: float) -> pd.DataFrame:
        return sources.load(tiny.data.model_copy(update={"question_fraction": share})).splits["train"].questions

    whole, less, least = (questions(share).set_index("question_id") for share in (1.0, 0.3, 0.01))
    asked = whole.groupby("image_id").size()
    pd.testing.assert_series_equal(less.groupby("image_id").size(), (0.3 * asked).round().clip(lower=1).astype(int))
    assert (least.groupby("image_id").size() == 1).all() and len(least) == len(asked)
    for part, larger in ((less, whole), (least, less)):
        pd.testing.assert_frame_equal(part, larger.loc[part.index])


def test_a_share_of_the_questions_leaves_validation_and_test_as_they_are(tiny, source):
    thin = sources.load(tiny.data.model_copy(update={"question_fraction": 0.1}))
    for name in ("validation", "test"):
        pd.testing.assert_frame_equal(thin.splits[name].questions, source.splits[name].questions)
    first, second = (each.splits["train"].pixels(np.arange(64)) for each in (thin, source))
    assert (first == second).all()


def test_a_data_set_says_what_is_its_own(source):
    """Its question types are those that occur; what words alone are worth is near an independent count."""
    assert set(source.question_types) == set(source.splits["test"].questions["question_type"])
    assert source.relational_types == () and source.licence == "MIT"
    assert source.expected_blind == pytest.approx(100 * 6475 / 9673, abs=0.1)
