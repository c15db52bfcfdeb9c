"""What all figures share: their registry, how they tell things apart in grey, and the one way to draw intervals.

A figure is a function of this folder that draws with pyplot what the Report it is given holds.
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
from pandas.api.types import is_numeric_dtype

from vqa.study.records import Record, Report

FIGURES: dict[str, Callable[[Report], Figure]] = {}
GREYS, HATCHES = ("0.5", "0.85", "0.3", "0.7"), ("", "//", "..", "xx")
MARKERS, DASHES = "os^DvPX", ("-", "--", ":", "-.")
SHOWN_ANSWERS = 25  # the commonest, where there are more


def set_style() -> None:
    seaborn.set_theme(context="notebook", style="whitegrid", palette="colorblind")
    small = {"legend.fontsize": 9, "xtick.labelsize": 9, "ytick.labelsize": 9, "axes.titlesize": 11}
    saved = {"figure.dpi": 100, "savefig.dpi": 110, "savefig.bbox": "tight", "figure.constrained_layout.use": True}
    matplotlib.rcParams.update(small | saved | {"hatch.linewidth": 0.6})


def figure(draw: Callable[[Report], None]) -> Callable[[Report], Figure]:
    """Enter `draw` in FIGURES under its name, as a function that gives the Figure which `draw` opened."""

    def drawn(report: Report) -> Figure:
        draw(report)
        made = pyplot.gcf()
        pyplot.close(made)  # else a notebook shows it twice
        return made

    FIGURES[draw.__name__] = drawn
    return drawn


def intervals(axis: Axes, rows: pd.DataFrame, x: str, by: str | None = None, *, bars=False, joined=False,
              horizontal=False, number="", scale=1.0) -> None:  # fmt: skip
    """Draw each row's `value` at its `x`, with low to high where they are known; each `by` in a look of its own.

    An `x` of words gives each word a place, in order of appearance, where groups and repeats stand side by side.
    Points are `joined` by a line, bars have their value beside them in the format `number`; all is times `scale`.
    """
    places = {} if is_numeric_dtype(rows[x]) else {name: place for place, name in enumerate(rows[x].unique())}
    groups = [(None, rows)] if by is None else list(rows.groupby(by, sort=False))
    width = (0.75 if bars else 0.6) / len(groups)
    for place, (label, own) in enumerate(groups):
        at, value, error = own[x], scale * own["value"], None
        if places:
            repeats = own.groupby(x)[x]
            aside = (repeats.cumcount() + 0.5) / repeats.transform("size") - 0.5
            at = at.map(places) + width * (place - (len(groups) - 1) / 2 + 0.7 * aside)
        if "low" in own and own["low"].notna().any():
            error = scale * np.array([own["value"] - own["low"], own["high"] - own["value"]])
        if bars:
            look = {"color": GREYS[place % len(GREYS)], "hatch": HATCHES[place % len(HATCHES)], "capsize": 3}
            draw, sides = (axis.barh, {"xerr": error}) if horizontal else (axis.bar, {"yerr": error})
            drawn = draw(at, value, width, label=label, edgecolor="black", linewidth=0.5, **sides, **look)
            if number:
                axis.bar_label(drawn, fmt=number, fontsize=8, padding=3)
        else:
            dash = DASHES[place % len(DASHES)] if joined else ""
            look = {"color": f"C{place}", "marker": MARKERS[place % len(MARKERS)], "linestyle": dash, "capsize": 3}
            axis.errorbar(*((value, at, None, error) if horizontal else (at, value, error)), label=label, **look)
    if places and horizontal:
        axis.set_yticks(range(len(places)), places)
        axis.set_ylim(len(places) - 0.4, -0.6)  # the first on top
    elif places:
        axis.set_xticks(range(len(places)), [fill(words(name), 17, break_on_hyphens=False) for name in places])
    if places:
        axis.grid(axis="y" if horizontal else "x", visible=False)
        axis.margins(**{"x" if horizontal else "y": 0.12})  # room for numbers


def words(name: str) -> str:
    """A name of the code as readers see it."""
    return name.replace("_", " ")


def words_of(rows: pd.DataFrame, *columns: str) -> pd.Series:
    """For each of `rows`, what stands in `columns`, with commas; empty ones are left out."""
    return rows[list(columns)].apply(lambda row: ", ".join(filter(None, row)), axis=1)


def ranks_label(ranks: int) -> str:
    """1 rank, 2 ranks, …"""
    return f"{ranks} rank" + "s" * (ranks > 1)


def run_label(report: Report, run: Record) -> str:
    """What legends call a run that learned to answer: model, fusion, what is special about it, seed."""
    about = (run.config["model"]["fusion"]["kind"], run.arm(report.profile), f"seed {run.config['seed']}")
    return words(f"{run.model} ({', '.join(filter(None, about))})")


def legend_outside(axis: Axes) -> None:
    axis.legend(bbox_to_anchor=(1.02, 1), loc="upper left")


def logarithmic(axis: Axes, ticks: list[float] | None = None) -> None:
    """A logarithmic x axis with plain numbers: `ticks`, or 1, 2 and 5 of each decade."""
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())
    if ticks is not None:
        axis.set_xticks(ticks)


def measured(report: Report, *kinds: str) -> pd.DataFrame:
    """The results of every measurement of these kinds, by world size.

    For legends there are `ranks`, the world size in words, and `variant`, precision and arm.
    """
    rows = report.results()
    rows = rows[rows["kind"].isin(kinds)].sort_values("world_size", kind="stable")
    return rows.assign(ranks=rows["world_size"].map(ranks_label), variant=words_of(rows, "precision", "arm"))


def records_of(report: Report, kind: str) -> list[Record]:
    return [record for record in report.records() if record.kind == kind]
