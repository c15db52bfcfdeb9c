"""Figures of 04_scaling and 07_forensics, entered in FIGURES like the others."""

import numpy as np
import pandas as pd
from matplotlib import pyplot
from matplotlib.figure import Figure

from vqa.experiments.scaling_parity import PARITY_STEPS, TOLERANCE
from vqa.study.figures.style import GREYS, MARKERS, figure
from vqa.study.records import Record, Report

LINES = ("-", "--", ":")


def measured(report: "Report", kind: str) -> "list[Record]":
    """The records of scaling jobs of `kind`, by number of ranks."""
    found = [record for record in report.records() if record.config.get("kind") == kind]
    return sorted(found, key=lambda record: record.config["run"]["launch"]["world_size"])


def by_ranks(rows: pd.DataFrame) -> pd.DataFrame:
    """`rows` of results with their world sizes as numbers, in order."""
    return rows.astype({"world_size": int}).sort_values("world_size", kind="stable")


def ranks_label(ranks: int) -> str:
    """1 rank, 2 ranks, …"""
    return f"{ranks} rank" + "s" * (ranks > 1)


@figure
def parity_curves(report: "Report") -> Figure:
    """Every step's loss at each world size, overlaid, and how far each lies from one rank's."""
    curves = {
        record.config["run"]["launch"]["world_size"]: record.metrics[record.metrics["step"] <= PARITY_STEPS]
        for record in measured(report, "parity")
    }
    first, *others = curves
    arms = list(curves[first]["arm"].unique())
    made, axes = pyplot.subplots(2, len(arms), figsize=(4.4 * len(arms), 6), sharex=True, squeeze=False)
    for (top, bottom), arm in zip(axes.T, arms, strict=True):
        losses = {ranks: curve[curve["arm"] == arm].set_index("step")["loss"] for ranks, curve in curves.items()}
        for place, (ranks, loss) in enumerate(losses.items()):
            top.plot(loss, LINES[place % 3], lw=3 - place, color=GREYS[place], label=ranks_label(ranks))
        for place, ranks in enumerate(others):
            apart = (losses[ranks] / losses[first] - 1).abs().clip(lower=1e-9)
            bottom.semilogy(apart, MARKERS[place], ms=4, mfc="none", color="black", label=ranks_label(ranks))
        bottom.axhline(TOLERANCE, color="black", lw=1, ls="--")
        top.set_title(arm)
        bottom.set(xlabel="step", ylim=(5e-10, 1))
    axes[0, 0].set_ylabel("loss, nats")
    axes[1, 0].set_ylabel("relative difference\nfrom one rank (line: allowed)")
    axes[0, -1].legend()
    if others:
        axes[1, -1].legend()
    made.tight_layout()
    return made


@figure
def step_times(report: "Report") -> Figure:
    """A training step on 1, 2, … ranks: measured, and predicted from computing alone plus exchange."""
    (record,) = measured(report, "speed")
    rows = by_ranks(pd.DataFrame(record.rows(report.profile)))
    made, axes = pyplot.subplots(1, 2, figsize=(11, 3.8))
    titles = {"plain": "one global batch, shared out", "plain, accumulated": "four global batches, exchanged once"}
    for axis, (engine, title) in zip(axes, titles.items(), strict=True):
        chosen = rows[rows["engine"] == engine]
        found = chosen[chosen["metric"] == "step_seconds"]
        predicted = chosen[chosen["metric"] == "predicted_step_seconds"].set_index("world_size")["value"]
        places = np.arange(len(found))
        spread = [1e3 * (found["value"] - found["low"]), 1e3 * (found["high"] - found["value"])]
        axis.bar(places, 1e3 * found["value"], 0.6, yerr=spread, color=GREYS[2], edgecolor="black", label="measured")
        axis.plot(places[1:], 1e3 * predicted, "kD", mfc="none", ms=8, label="predicted")
        ideal = 1e3 * found["value"].iloc[0] / found["world_size"]
        axis.plot(places, ideal, "k:", label="ideal")
        axis.set_xticks(places, [ranks_label(ranks) for ranks in found["world_size"]])
        axis.set(title=title, ylabel="step, ms")
        axis.grid(axis="x", visible=False)
    axes[0].legend()
    made.tight_layout()
    return made


@figure
def ddp_options(report: "Report") -> Figure:
    """Each option of DistributedDataParallel alone: its step over the plain one's, on two ranks."""
    return time_ratios(report, "speed")


@figure
def training_levers(report: "Report") -> Figure:
    """This study's loop with one change at a time: its step over the unchanged one's."""
    return time_ratios(report, "loops")


def time_ratios(report: "Report", kind: str) -> Figure:
    """The step_time_ratio rows of the scaling job of `kind`, with their intervals."""
    (record,) = measured(report, kind)
    rows = pd.DataFrame(record.rows(report.profile)).query("metric == 'step_time_ratio'").iloc[::-1]
    made, axis = pyplot.subplots(figsize=(8, 0.5 * len(rows) + 1.2))
    spread = [rows["value"] - rows["low"], rows["high"] - rows["value"]]
    axis.errorbar(rows["value"], rows["engine"], xerr=spread, fmt="ko", capsize=4)
    axis.axvline(1, color="black", ls="--", lw=1)
    axis.set(xlabel="step time ÷ plain step time (below 1: faster)")
    axis.margins(y=0.2)
    return made


@figure
def training_loops(report: "Report") -> Figure:
    """Questions a second of this study's loop and of others on the same pairs."""
    (record,) = measured(report, "loops")
    rows = pd.DataFrame(record.rows(report.profile)).query("metric == 'questions_per_second'")
    rows = rows.sort_values("value")
    made, axis = pyplot.subplots(figsize=(9, 3.2))
    drawn = axis.barh(
        rows["engine"],
        rows["value"],
        xerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
        color=GREYS[2],
        edgecolor="black",
    )
    axis.bar_label(drawn, fmt="{:,.0f}", padding=6, fontsize=9)
    axis.set(xlabel="questions a second in training")
    axis.margins(x=0.15)
    axis.grid(axis="y", visible=False)
    return made
