"""The study's figures. Each takes the Report it is drawn from and gives a matplotlib Figure.

Runs differ by line style and marker, bars by hatching, so that every figure reads in grey.
"""

from collections.abc import Callable
from textwrap import fill
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
import seaborn
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from vqa.metrics import BlindBaseline
from vqa.sources import pairs

if TYPE_CHECKING:
    from vqa.report import Record, Report

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


@figure
def learning_curves(report: "Report") -> Figure:
    """Training loss and validation accuracy of every run that answers questions."""
    made, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4))
    blind = 0.0
    for place, record in enumerate(report.answer_runs()):
        metrics = record.metrics
        style = {"marker": MARKERS[place % 5], "color": f"C{place}", "markersize": 5, "label": run_label(record)}
        loss, judged = metrics.dropna(subset="loss"), metrics.dropna(subset="validation")
        left.plot(loss["step"], loss["loss"], linestyle=("-", "--", ":", "-.")[place % 4], **style)
        right.plot(judged["step"], judged["validation"], linestyle=("-", "--", ":", "-.")[place % 4], **style)
        held = record.predictions.query("split == 'validation'")
        blind = 100 * held["blind_correct"].mean()
    right.axhline(blind, color="black", linewidth=1, linestyle=(0, (1, 1)))
    right.annotate("image-blind", (0, blind), xytext=(3, 3), textcoords="offset points", fontsize=9)
    left.set(xlabel="optimizer step", ylabel="cross-entropy, nats", yscale="log", title="training loss")
    right.set(xlabel="optimizer step", ylabel="accuracy, %", title="validation (images held out of training)")
    left.yaxis.set_minor_formatter(NullFormatter())
    right.legend(fontsize=9, bbox_to_anchor=(1.02, 1), loc="upper left")
    made.tight_layout()
    return made


@figure
def alignment_curves(report: "Report") -> Figure:
    """R-precision on held-out images while the towers are aligned with captions."""
    made, axis = pyplot.subplots(figsize=(7, 3.8))
    aligned = [record for record in report.records() if record.config.get("objective") == "alignment"]
    for place, record in enumerate(aligned):
        judged = record.metrics.dropna(subset="validation")
        axis.plot(
            judged["epoch"],
            judged["validation"],
            marker=MARKERS[place],
            linestyle=("-", "--")[place % 2],
            label=f"{record.config['role']} towers",
        )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(xlabel="epoch", ylabel="R-precision, mean of both ways, %", ylim=(0, 103))
    axis.legend(fontsize=9)
    return made


@figure
def confusion(report: "Report") -> Figure:
    """What each model answers where it should have said something else, by question type; the commonest answers."""
    records = report.first_seeds()
    made, axes = pyplot.subplots(1, len(records), figsize=(6.2 * len(records), 5.4), squeeze=False)
    kinds = pairs(report.source.splits["train"]).groupby("answer")["question_type"].min()
    often = pairs(report.source.splits["test"])["answer"].value_counts().index.intersection(kinds.index, sort=False)
    order = sorted(often[:SHOWN_ANSWERS], key=lambda answer: (kinds[answer], answer))
    for axis, record in zip(axes[0], records, strict=True):
        test = record.predictions.query("split == 'test'")
        counts = pd.crosstab(test["answer"], test["prediction"]).reindex(index=order, columns=order, fill_value=0)
        share = 100 * counts.div(counts.sum(axis=1).clip(lower=1), axis=0)
        seaborn.heatmap(
            share,
            ax=axis,
            cmap="Greys",
            vmin=0,
            vmax=100,
            annot=share.round(0).astype(int),
            fmt="d",
            annot_kws={"size": 7},
            cbar=False,
            linewidths=0.3,
        )
        axis.set(title=f"{run_label(record)}: % of each true answer", xlabel="model's answer", ylabel="true answer")
    made.tight_layout()
    return made


@figure
def right_and_wrong(report: "Report") -> Figure:
    """Per run: the surest right answers and the surest wrong ones, on test images."""
    records = report.first_seeds()
    made, axes = pyplot.subplots(len(records), 8, figsize=(14, 2.5 * len(records)), squeeze=False)
    for row, record in zip(axes, records, strict=True):
        test = record.predictions.query("split == 'test'").sort_values("confidence", ascending=False)
        chosen = [test[test["correct"] == 1].drop_duplicates("question_type").head(4)]
        chosen.append(test[test["correct"] == 0].drop_duplicates("image_id").head(4))
        for axis, block in zip((row[:4], row[4:]), chosen, strict=True):
            for place, cell in enumerate(axis):
                if place >= len(block):
                    cell.set_axis_off()
                    continue
                item = block.iloc[place]
                show_image(cell, test_image(report, item["image_id"]))
                cell.set_title(answered(item), fontsize=7)
        row[0].set_ylabel(run_label(record), fontsize=9)
    made.tight_layout()
    return made


@figure
def accuracy_by_type(report: "Report") -> Figure:
    """Test accuracy by question type with 95 % intervals clustered by image, beside the blind baseline."""
    results = report.results()
    rows = results[(results["split"] == "test") & (results["engine"] == "eager")]
    rows = rows[rows["metric"].str.startswith("accuracy_")]
    rows = rows[~rows["metric"].isin(["accuracy_blind", "accuracy_minus_blind", "accuracy_written"])]
    records = report.answer_runs()
    rows = rows[rows["run"].isin([record.name for record in records])]
    kinds = sorted(rows["metric"].unique())
    made, axis = pyplot.subplots(figsize=(10, 4))
    for place, record in enumerate(records):
        own = rows[rows["run"] == record.name].set_index("metric").loc[kinds]
        at = np.arange(len(kinds)) + (place - (len(records) - 1) / 2) * min(0.15, 0.8 / len(records))
        error = [own["value"] - own["low"], own["high"] - own["value"]]
        axis.errorbar(
            at, own["value"], error, fmt=MARKERS[place % 5], capsize=2, color=f"C{place}", label=run_label(record)
        )
    if records:
        test = records[0].predictions.query("split == 'test'")
        blind = 100 * test.groupby("question_type")["blind_correct"].mean()
        for place, kind in enumerate(kinds):
            level = blind[kind.removeprefix("accuracy_")]
            axis.hlines(
                level, place - 0.35, place + 0.35, color="black", linestyle=":", label=None if place else "image-blind"
            )
    axis.set_xticks(range(len(kinds)), [kind.removeprefix("accuracy_").replace("_", "\n") for kind in kinds])
    axis.set(xlabel="question type", ylabel="test accuracy, %", ylim=(None, 101))
    axis.legend(fontsize=9, bbox_to_anchor=(1.02, 1), loc="upper left")
    return made


@figure
def precision_costs(report: "Report") -> Figure:
    """Step time and peak memory of fp32 and bf16, with and without gradient checkpointing."""
    rows = report.results()
    rows = rows[rows["metric"].isin(["step_seconds", "peak_memory_bytes"]) & rows["run"].str.contains("precision")]
    rows = rows.assign(arm=rows["precision"] + rows["engine"].str.removeprefix("eager").str.replace(", ", "\n"))
    made, axes = pyplot.subplots(1, 2, figsize=(11, 3.6))
    for axis, metric, unit, scale in zip(
        axes,
        ("step_seconds", "peak_memory_bytes"),
        ("step, ms", "peak memory of a step, MiB"),
        (1e3, 2**-20),
        strict=True,
    ):
        own = rows[rows["metric"] == metric].set_index("arm")[["value"]] * scale
        bars(axis, own, labels=True)
        axis.set(xlabel="", ylabel=unit)
        axis.get_legend().remove()
    made.tight_layout()
    return made


@figure
def step_breakdown(report: "Report") -> Figure:
    """Where a training step's time goes, by torch.profiler."""
    rows = report.results()
    rows = rows[rows["metric"].str.startswith("seconds_")]
    rows = rows.assign(part=rows["metric"].str.removeprefix("seconds_").str.replace("_", " "))
    table = rows.pivot_table(index="part", columns="model", values="value", sort=False) * 1e3
    made, axis = pyplot.subplots(figsize=(9, 3.6))
    bars(axis, table, labels=True)
    axis.set(xlabel="", ylabel="time per step, ms")
    axis.tick_params("x", rotation=20)
    return made


@figure
def fusion_costs(report: "Report") -> Figure:
    """Accuracy of each fusion against what a question costs it, in operations and in time."""
    results = report.results()
    costs = results[results["run"].str.contains("-costs-")]
    accuracy = results.query("metric == 'accuracy' and split == 'test' and model == 'teacher' and engine == 'eager'")
    made, axes = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, metric, words, scale in zip(
        axes,
        ("flops_per_question", "training_questions_per_second"),
        ("operations per question, MFLOP", "training speed, questions/s"),
        (1e-6, 1),
        strict=True,
    ):
        for place, (fusion, own) in enumerate(accuracy.groupby("fusion", sort=False)):
            cost = costs[(costs["metric"] == metric) & (costs["fusion"] == fusion)]["value"]
            if cost.empty:
                continue
            error = [own["value"] - own["low"], own["high"] - own["value"]]
            axis.errorbar([cost.iloc[0] * scale] * len(own), own["value"], error, fmt=MARKERS[place], capsize=3,
                          color=f"C{place}", label=fusion.replace("_", " "))  # fmt: skip
        axis.set(xlabel=words)
        logarithmic(axis)
    axes[0].set(ylabel="test accuracy, % [95 %]")
    axes[1].legend(fontsize=9)
    made.tight_layout()
    return made


@figure
def full_size_memory(report: "Report") -> Figure:
    """Peak memory of one full-size training step on one image, concat beside cross attention."""
    rows = report.results()
    rows = rows[rows["run"].str.contains("-full_size-")]
    rows = rows.assign(arm=rows["precision"] + rows["engine"].str.removeprefix("eager").str.replace(", ", "\n"))
    table = rows.pivot_table(index="arm", columns="fusion", values="value", sort=False) * 2**-30
    made, axis = pyplot.subplots(figsize=(9, 3.8))
    bars(axis, table, labels=True)
    axis.set(xlabel="", ylabel="peak memory of a step, GiB")
    return made


@figure
def attention_maps(report: "Report") -> Figure:
    """Where a cross-attention model looks: the mean over heads and question tokens, wrong answers first."""
    (record,) = [record for record in report.records() if (record.folder / "attention.npz").is_file()]
    kept = np.load(record.folder / "attention.npz")
    looked = next(r for r in report.first_seeds() if r.config["model"]["fusion"]["kind"] == "cross_attention")
    test = looked.predictions.query("split == 'test'").set_index("question_id")
    count = len(kept["question_id"])
    made, axes = pyplot.subplots(2, count, figsize=(1.9 * count, 5), squeeze=False)
    for place, (asked, seen, words) in enumerate(zip(*kept.values(), strict=True)):
        item = test.loc[asked]
        image = test_image(report, item["image_id"])
        side = int(np.sqrt(seen.shape[1]))  # a [CLS] token, where there is one, comes first
        over_image = seen[words != ""].mean(0)[-side * side :].reshape(side, side)
        show_image(axes[0, place], image)
        axes[0, place].set_title(answered(item), fontsize=7)
        show_image(axes[1, place], image)
        whole = (0, image.shape[2], image.shape[1], 0)
        axes[1, place].imshow(over_image, cmap="Greys_r", alpha=0.75, extent=whole, interpolation="nearest")
    axes[0, 0].set_ylabel("image", fontsize=9)
    axes[1, 0].set_ylabel("attention (light = looked at)", fontsize=9)
    made.tight_layout()
    return made


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
