import csv
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from vqa.evaluation.vqa_accuracy import agreement, normalised


def by_hand(answer: str, given: list[str]) -> float:
    """The paper's words: every nine of the ten people, min(people who gave the answer / 3, 1), the mean."""
    nines = list(combinations(given, 9))
    assert len(nines) == 10
    return float(np.mean([min(sum(one == answer for one in nine) / 3, 1) for nine in nines]))


@pytest.mark.parametrize("same", range(11))
def test_agreement_is_the_mean_over_every_nine_people(same):
    given = ["red"] * same + ["blue"] * (10 - same)
    np.random.default_rng(same).shuffle(given)
    assert agreement("red", given) == pytest.approx(by_hand("red", given), abs=1e-12)


def test_agreement_on_random_answers_is_the_mean_over_every_nine_people():
    generator = np.random.default_rng(0)
    for _ in range(200):
        answer, *given = generator.choice(["red", "blue", "green", "gray"], 11, p=[0.1, 0.2, 0.3, 0.4]).tolist()
        assert agreement(answer, given) == pytest.approx(by_hand(answer, given), abs=1e-12)


def test_known_values():
    """0, 30, 60, 90 and 100 %, as every table of VQA v2 has them."""
    values = [agreement("cat", ["cat"] * same + ["dog"] * (10 - same)) for same in range(5)]
    assert values == [pytest.approx(value) for value in (0, 0.3, 0.6, 0.9, 1)]


@pytest.mark.parametrize(
    ("written", "compared"),
    [
        ("Yes", "yes"),
        ("  A red\tdog. ", "red dog"),
        ("the U.S.A.", "usa"),
        ("two", "2"),
        ("None", "0"),
        ("dont know", "don't know"),
        ("Don't know", "don't know"),
        ("the girl's hat", "girl's hat"),
        ("2:50 pm", "2:50 pm"),
        ("100,978", "100978"),
        ("1.5", "1.5"),
        ("red, white and blue!", "red white and blue"),
        ("black/white", "black white"),
        ("t-shirt (blue)", "t shirt blue"),
        ("50%", "50%"),
        ("were", "were"),
        ("", ""),
        ("🟥", "🟥"),
    ],
)
def test_answers_are_compared_as_the_evaluation_page_says(written, compared):
    assert normalised(written) == compared
    assert normalised(compared) == compared  # once is enough


def test_people_and_model_are_treated_alike():
    assert agreement("The Dog", ["a dog"] * 3 + ["dog."] + ["cat"] * 6) == 1


def test_scores_are_those_of_the_official_script():
    """The judge: scores that the official script gave to these answers, its oddities included."""
    with (Path(__file__).parent / "official_accuracy.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [agreement(row["prediction"], json.loads(row["answers_json"])) for row in rows]
    assert len(rows) > 100
    assert found == pytest.approx([float(row["official_accuracy"]) for row in rows], abs=1e-9)
