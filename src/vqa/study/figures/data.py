"""The figures of 00_data."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib import pyplot

from vqa.evaluation.metrics import BlindBaseline
from vqa.study.figures.images import show_image
from vqa.study.figures.style import SHOWN_ANSWERS, figure, intervals
from vqa.study.records import Report


@figure
def samples(report: Report) -> None:
    """Eight training images with two of their questions each."""
    table = report.source.splits["train"]
    numbers = np.linspace(0, len(table) - 1, 8, dtype=int)
    _, axes = pyplot.subplots(2, 4, figsize=(12, 7.4))
    for axis, number, image in zip(axes.flat, numbers, table.pixels(numbers), strict=True):
        show_image(axis, image)
        asked = table.questions[table.questions["image_id"] == table.image_ids[number]].drop_duplicates("question")
        lines = asked["question"].map(lambda text: fill(text, 36)) + "\n→ " + asked["answer"]
        axis.set_title(f"{lines.iloc[0]}\n{lines.iloc[-1]}", fontsize=8.5)


@figure
def answer_balance(report: Report) -> None:
    """How often each answer is right, in training and test; the commonest ones."""
    answers = {name: report.source.splits[name].questions["answer"] for name in ("train", "test")}
    shares = pd.DataFrame({name: 100 * own.value_counts(normalize=True) for name, own in answers.items()})
    rows = shares.nlargest(SHOWN_ANSWERS, "train").rename_axis("answer").reset_index().melt("answer", var_name="split")
    _, axis = pyplot.subplots(figsize=(9, 3.6))
    intervals(axis, rows, "answer", "split", bars=True)
    axis.set(xlabel="answer", ylabel="share of questions, %")
    axis.tick_params("x", rotation=30)
    axis.legend()


@figure
def blind_baseline(report: Report) -> None:
    """What the words of a question give away, by question type."""
    test, blind = report.source.splits["test"].questions, BlindBaseline(report.source.splits["train"].questions)
    guesses = {
        "image-blind majority": 100.0 * (blind(test["question"]) == test["answer"]),
        "uniform guess within the type": 100 / test.groupby("question_type")["answer"].transform("nunique"),
    }
    rows = pd.DataFrame(guesses).groupby(test["question_type"]).mean().reset_index().melt("question_type")
    _, axis = pyplot.subplots(figsize=(9, 3.6))
    intervals(axis, rows, "question_type", "variable", bars=True, number="%.3g")
    axis.set(xlabel="question type", ylabel="test accuracy, %", ylim=(0, 125), yticks=range(0, 101, 20))
    axis.legend(ncols=2, loc="upper center")
