"""Every answer is recomputed here from the `scene` column and the words of the question.

The checker shares no code with the generator: plain Python loops and squared integers, no numpy.
"""

import hashlib
import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from vqa.data import sort_of_clevr
from vqa.data.batches import Split
from vqa.data.processor import Processor, train_tokenizer

SCENES = 1_000
COLOUR_VALUES = {
    "red": [255, 0, 0],
    "green": [0, 128, 0],
    "blue": [0, 0, 255],
    "orange": [255, 165, 0],
    "gray": [128, 128, 128],
    "yellow": [255, 255, 0],
}
WHITE = [255, 255, 255]
REACH = 5  # pixels from an object's centre to its edge
RELATIONAL = {"relational_closest", "relational_furthest", "relational_count"}


@pytest.fixture(scope="module")
def train():
    return sort_of_clevr.table("train", SCENES)


@pytest.fixture(scope="module")
def rows(train):
    """(objects, question, question type, answer) for each of the 20,000 questions."""
    scenes = {i: json.loads(text) for i, text in zip(train.image_ids, train.images["scene"], strict=True)}
    asked = train.questions
    return [(scenes[i], q, t, a) for i, _, q, t, a in asked.itertuples(index=False)]


@pytest.fixture(scope="module")
def pixels(train):
    """(M, 3, 75, 75) uint8."""
    return train.pixels(np.arange(SCENES))


def squared_distance(a: dict, b: dict) -> int:
    return (a["x"] - b["x"]) ** 2 + (a["y"] - b["y"]) ** 2


def recomputed(objects: list[dict], question: str) -> str:
    """The answer, from the words alone. Raises ValueError for a question of no known form."""
    colour = re.search(r"the (\w+) object", question)[1]
    asked = next(o for o in objects if o["colour"] == colour)
    others = sorted((o for o in objects if o is not asked), key=lambda o: squared_distance(o, asked))
    if "closest to" in question:
        return others[0]["shape"]
    if "furthest from" in question:
        return others[-1]["shape"]
    if question.startswith("how many objects have the same shape"):
        return str(1 + sum(o["shape"] == asked["shape"] for o in others))
    if question == f"what is the shape of the {colour} object?":
        return asked["shape"]
    if question.endswith("on the left?"):
        return "yes" if asked["x"] + 0.5 < 75 / 2 else "no"
    if question.endswith("at the top?"):
        return "yes" if asked["y"] + 0.5 < 75 / 2 else "no"
    raise ValueError(question)


def disagreements(rows: list[tuple]) -> list[tuple]:
    return [row for row in rows if recomputed(row[0], row[1]) != row[3]]


def test_every_answer_follows_from_its_scene(rows):
    assert len(rows) == 20 * SCENES
    assert disagreements(rows) == []


@pytest.mark.parametrize("kind", sorted(sort_of_clevr.TEMPLATES))
def test_the_checker_catches_a_planted_wrong_answer(rows, kind):
    swap = {"circle": "square", "square": "circle", "yes": "no", "no": "yes"}
    place = next(i for i, row in enumerate(rows) if row[2] == kind)
    objects, question, _, answer = rows[place]
    planted = (objects, question, kind, swap.get(answer) or str(int(answer) % 6 + 1))
    assert disagreements([*rows[:place], planted, *rows[place + 1 :]]) == [planted]


def test_the_checker_catches_objects_that_are_closest_to_themselves(rows):
    """Two faults: the distance to oneself not masked, or, as in a widely used generator, masked with 999.

    Its distances are squared, so that an object without another one within 31.6 pixels is its own closest.
    """
    far_away, always = [], []
    for objects, question, kind, _ in rows:
        if kind == "relational_closest":
            asked = next(o for o in objects if f"the {o['colour']} object?" in question)
            squares = [999 if o is asked else squared_distance(o, asked) for o in objects]
            far_away.append((objects, question, kind, objects[squares.index(min(squares))]["shape"]))
            always.append((objects, question, kind, asked["shape"]))
    assert len(disagreements(far_away)) > 0.01 * len(far_away)  # half of these answers are right by chance
    assert 0.45 < len(disagreements(always)) / len(always) < 0.55


@pytest.mark.parametrize("left_right", [False, True])
@pytest.mark.parametrize("top_bottom", [False, True])
def test_a_mirrored_image_has_the_answers_of_the_mirrored_scene(train, left_right, top_bottom):
    few = train.select(np.arange(100))
    words = sorted(set(few.questions["question"]) | set(few.questions["answer"]))
    answers = sorted(set(few.questions["answer"]) - {"1"})  # one answer is not in the vocabulary
    split = Split(few, Processor(train_tokenizer(words), answers, 75, 32))
    batch = split.batch(np.arange(100), np.tile([left_right, top_bottom], (100, 1)))
    expected = []
    for scene, (_, asked) in zip(few.images["scene"][:100], few.questions.groupby("image_id"), strict=True):
        objects = json.loads(scene)
        for item in objects:  # centres are pixels, the last of which is 74
            item["x"], item["y"] = (
                74 - item["x"] if left_right else item["x"],
                74 - item["y"] if top_bottom else item["y"],
            )
        expected += [recomputed(objects, question) for question in asked["question"]]
    given = [answers[label] if label >= 0 else "1" for label in batch.labels.tolist()]
    assert given == expected
    assert [answers[label] if label >= 0 else "1" for label in split.label_of] == few.questions["answer"].tolist()


def test_closest_and_furthest_are_beyond_dispute(rows):
    """By a pixel or more, counted without a square root: sqrt(b) >= sqrt(a) + 1 iff b - a - 1 >= 2 sqrt(a)."""
    for objects, *_ in rows[::20]:
        for asked in objects:
            squares = sorted(squared_distance(o, asked) for o in objects if o is not asked)
            for nearer, further in (squares[:2], squares[-2:]):
                lead = further - nearer - 1
                assert lead >= 0 and lead**2 >= 4 * nearer


def test_objects_lie_inside_the_image_and_do_not_overlap(rows):
    for objects, *_ in rows[::20]:
        assert [o["colour"] for o in objects] == list(COLOUR_VALUES)
        covered = Counter()
        for o in objects:
            across, down = (range(o[axis] - REACH, o[axis] + REACH + 1) for axis in "xy")
            assert across[0] >= 0 and down[0] >= 0 and across[-1] < 75 and down[-1] < 75
            assert 37 not in (o["x"], o["y"])  # neither half
            covered.update((x, y) for x in across for y in down)
        assert max(covered.values()) == 1


def test_pixels_show_the_scene(train, pixels):
    assert pixels.shape == (SCENES, 3, 75, 75)
    for image, text in zip(pixels, train.images["scene"], strict=True):
        shown = (image == 255).all(0).sum()
        for o in json.loads(text):
            colour, x, y = COLOUR_VALUES[o["colour"]], o["x"], o["y"]
            assert image[:, y, x].tolist() == colour
            edges = [(y - REACH, x), (y + REACH, x), (y, x - REACH), (y, x + REACH)]
            assert all(image[:, row, column].tolist() == colour for row, column in edges)
            corners = [image[:, y + dy, x + dx].tolist() for dy in (-REACH, REACH) for dx in (-REACH, REACH)]
            assert corners == [colour if o["shape"] == "square" else WHITE] * 4
            area = (image == np.reshape(colour, (3, 1, 1))).all(0).sum()
            assert area == pytest.approx(11**2 if o["shape"] == "square" else np.pi * 5.5**2, rel=0.05)
            shown += area
        assert shown == 75 * 75  # nothing but the scene


def test_ten_questions_of_each_class_and_none_twice(train):
    asked = train.questions
    for _, of_image in asked.groupby("image_id"):
        assert of_image["question"].nunique() == len(of_image) == 20
        assert of_image["question_type"].isin(RELATIONAL).sum() == 10
    assert set(sort_of_clevr.FACTS["relational_types"]) == RELATIONAL
    assert set(sort_of_clevr.FACTS["question_types"]) == set(asked["question_type"])
    assert asked["question"].nunique() == 36
    assert asked["question_id"].is_unique


def test_words_alone_are_worth_what_the_data_set_says(train):
    """By an independent count on the first test images: half a per cent is a standard deviation."""
    commonest = {
        question: Counter(group).most_common(1)[0][0]
        for question, group in train.questions.groupby("question")["answer"]
    }
    test = sort_of_clevr.table("test", SCENES).questions
    share = 100 * (test["question"].map(commonest) == test["answer"]).mean()
    assert share == pytest.approx(sort_of_clevr.FACTS["expected_blind"], abs=2)


def test_question_types_say_what_is_asked(train):
    words = {
        "relational_closest": "closest to",
        "relational_furthest": "furthest from",
        "relational_count": "how many",
        "shape": "what is the shape of the [a-z]+ object",
        "left_right": "on the left",
        "top_bottom": "at the top",
    }
    asked = train.questions
    for question, kind in set(zip(asked["question"], asked["question_type"], strict=True)):
        assert re.search(words[kind] + (r"\?$" if kind == "shape" else ""), question)


def test_captions_are_true(train):
    for captions, scene in zip(train.captions, train.images["scene"], strict=True):
        sides = lambda o: ("top" if o["y"] < 37 else "bottom", "left" if o["x"] < 37 else "right")  # noqa: E731
        facts = [
            "the {} object is a {} at the {} {}".format(o["colour"], o["shape"], *sides(o)) for o in json.loads(scene)
        ]
        assert captions == facts


def content(table) -> str:
    """A digest of all a table holds, whatever its form on disk: image by image, with lists of its questions."""
    digest, asked = hashlib.sha256(), table.questions.groupby("image_id")
    for number, image_id in enumerate(table.image_ids.tolist()):
        row = table.images[int(table.rows[number])] | asked.get_group(image_id).drop(columns="image_id").to_dict("list")
        digest.update(np.asarray(row.pop("image"), dtype=np.uint8).tobytes())
        digest.update(json.dumps({name: row[name] for name in sorted(row)}).encode())
    return digest.hexdigest()


def test_a_seed_gives_the_same_bytes_and_another_seed_others(train):
    assert content(sort_of_clevr.table("train", 50)) == content(sort_of_clevr.table("train", 50))
    assert content(sort_of_clevr.table("train", 50)) != content(sort_of_clevr.table("train", 50, seed=1))


def test_the_data_are_those_of_this_version():
    """Results name the data by its fingerprint. If this fails on purpose, raise VERSION."""
    known = {2: "f81d0bdb6be0a7caec2050a28ad5e86b40c147c68f6c4e782962a1925967a215"}
    assert content(sort_of_clevr.table("train", 20)) == known[sort_of_clevr.VERSION]


def test_the_beginning_does_not_depend_on_the_size(train):
    assert content(train.select(np.arange(50))) == content(sort_of_clevr.table("train", 50))
    assert content(train.select(np.arange(50, 100))) != content(sort_of_clevr.table("train", 50))


def test_no_image_is_in_two_splits(train, pixels):
    test = sort_of_clevr.table("test", SCENES)
    test_pixels = test.pixels(np.arange(SCENES))
    seen, held_out = ({hashlib.sha256(image.tobytes()).digest() for image in split} for split in (pixels, test_pixels))
    assert len(seen) == len(held_out) == SCENES
    assert seen.isdisjoint(held_out)
    assert not set(train.image_ids) & set(test.image_ids)


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("shape", "circle"),
        ("relational_closest", "circle"),
        ("relational_furthest", "circle"),
        ("left_right", "yes"),
        ("top_bottom", "yes"),
    ],
)
def test_two_way_answers_are_balanced(rows, kind, answer):
    given = Counter(a for _, _, t, a in rows if t == kind)
    assert len(given) == 2
    assert 0.45 < given[answer] / given.total() < 0.55


def test_counts_are_spread_as_chance_would(rows):
    """One plus five fair coins: 1, 5, 10, 10, 5, 1 in 32."""
    given = Counter(a for _, _, t, a in rows if t == "relational_count")
    for answer, share in zip("123456", (1, 5, 10, 10, 5, 1), strict=True):
        assert given[answer] / given.total() == pytest.approx(share / 32, abs=0.03)


def test_build_makes_both_splits_and_the_fingerprint_follows_the_seed(monkeypatch):
    before = sort_of_clevr.fingerprint()
    assert re.fullmatch(r"[0-9a-f]{16}", before) and before == sort_of_clevr.fingerprint()
    monkeypatch.setattr(sort_of_clevr, "SPLITS", {"train": 3, "test": 2})
    assert {split: len(table) for split, table in sort_of_clevr.build(Path()).items()} == {"train": 3, "test": 2}
    shrunk = sort_of_clevr.fingerprint()
    monkeypatch.setattr(sort_of_clevr, "SEED", 1)
    assert len({before, shrunk, sort_of_clevr.fingerprint()}) == 3
