"""The study's figures. Each takes the Report it is drawn from and gives a matplotlib Figure.

Runs differ by line style and marker, bars by hatching, so that every figure reads in grey.
"""

from collections.abc import Callable
from textwrap import fill

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from vqa.study.records import Record, Report

GREYS = ("0.15", "0.5", "0.75", "0.9")
HATCHES = ("", "//", "..", "xx")
MARKERS = ("o", "s", "^", "D", "v", "P")
SHOWN_ANSWERS = 25  # the commonest, where there are more
FIGURES: dict[str, Callable[["Report"], Figure]] = {}


def set_style() -> None:
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    matplotlib.rcParams.update({"figure.dpi": 100, "savefig.dpi": 110, "savefig.bbox": "tight", "hatch.linewidth": 0.6})


def figure(draw: Callable[["Report"], Figure]) -> Callable[["Report"], Figure]:
    """Enter `draw` in FIGURES under its name, and keep notebooks from showing its figure twice."""

    def drawn(report: "Report") -> Figure:
        made = draw(report)
        pyplot.close(made)
        return made

    FIGURES[draw.__name__] = drawn
    return drawn


def bars(axis: Axes, table: pd.DataFrame, labels: bool = False) -> None:
    """Grouped bars, one group a row of `table`, told apart in grey by shade and hatching."""
    table.plot.bar(ax=axis, color=GREYS[: table.shape[1]], edgecolor="black", linewidth=0.5, rot=0, width=0.75)
    for place, group in enumerate(axis.containers):
        for patch in group:
            patch.set_hatch(HATCHES[place])
        if labels:
            axis.bar_label(group, fmt="%.3g", fontsize=8, padding=1)
    axis.margins(y=0.12)
    axis.grid(axis="x", visible=False)


def answered(item: pd.Series) -> str:
    """A question and what became of it, in lines that fit over a small image."""
    verdict = "right" if item["correct"] else f"wrong, is {item['answer']}"
    return f"{fill(item['question'], 28)}\n→ {item['prediction']} ({verdict})"


def logarithmic(axis: Axes) -> None:
    """A logarithmic x axis with 1, 2 and 5 of each decade as plain numbers."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def test_image(report: "Report", image_id: int) -> np.ndarray:
    """The test image of that number, uint8 (3, H, W)."""
    table = report.source.splits["test"]
    (row,) = np.flatnonzero(np.array(table["image_id"][:]) == image_id)
    return np.asarray(table[int(row)]["image"], dtype=np.uint8)


def show_image(axis: Axes, image: object) -> None:
    axis.imshow(np.asarray(image, dtype=np.uint8).transpose(1, 2, 0))
    axis.set_xticks([])
    axis.set_yticks([])
    axis.grid(visible=False)


def run_label(record: "Record") -> str:
    config = record.config
    fusion = config["model"]["fusion"]["kind"].replace("_", " ")
    alone = "" if config["parent"] else ", from scratch"
    return f"{config['role']} ({fusion}{alone}, seed {config['seed']})"
