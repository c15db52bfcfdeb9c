"""The study's figures. Each takes the Report it is drawn from and gives a matplotlib Figure.

Runs differ by line style and marker, bars by hatching, so that every figure reads in grey.
"""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure

from vqa.data.source import pairs
from vqa.evaluation.metrics import BlindBaseline
from vqa.study.figures.style import SHOWN_ANSWERS, bars, figure, show_image
from vqa.study.records import Report


@figure
def samples(report: "Report") -> Figure:
    """Eight training images with two of their questions each."""
    table = report.source.splits["train"]
    made, axes = pyplot.subplots(2, 4, figsize=(12, 7.4))
    for axis, row in zip(axes.flat, np.linspace(0, len(table) - 1, 8, dtype=int), strict=True):
        item = table[int(row)]
        show_image(axis, item["image"])
        asked = list(dict.fromkeys(zip(item["question"], item["answer"], strict=True)))
        spread = [asked[0], asked[-1]]
        axis.set_title("\n".join(f"{question}\n→ {answer}" for question, answer in spread), fontsize=8.5)
    made.tight_layout()
    return made


@figure
def answer_balance(report: "Report") -> Figure:
    """How often each answer is right, in training and test; the commonest ones."""
    splits = report.source.splits
    shares = pd.DataFrame(
        {name: pairs(splits[name])["answer"].value_counts(normalize=True) * 100 for name in ("train", "test")}
    ).nlargest(SHOWN_ANSWERS, "train")
    made, axis = pyplot.subplots(figsize=(9, 3.6))
    bars(axis, shares)
    axis.set(xlabel="answer", ylabel="share of questions, %")
    axis.tick_params("x", rotation=30)
    return made


@figure
def blind_baseline(report: "Report") -> Figure:
    """What the words of a question give away, by question type."""
    test = pairs(report.source.splits["test"])
    blind = BlindBaseline(pairs(report.source.splits["train"]))
    test["right"] = 100.0 * (blind(test["question"]) == test["answer"])
    test["chance"] = 100 / test.groupby("question_type")["answer"].transform("nunique")
    by_type = test.groupby("question_type")[["right", "chance"]].mean()
    by_type.columns = ["image-blind majority", "uniform guess within the type"]
    made, axis = pyplot.subplots(figsize=(9, 3.6))
    bars(axis, by_type, labels=True)
    axis.set(xlabel="question type", ylabel="test accuracy, %", ylim=(0, 105))
    return made
