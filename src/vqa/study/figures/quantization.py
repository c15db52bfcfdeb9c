"""The figures of 06_quantization."""

from matplotlib import pyplot

from vqa.results import ALLOWED_DROP, COMPILED, EAGER, PT2E, accuracy_of
from vqa.study.figures.images import show_image, test_image
from vqa.study.figures.style import figure, intervals, legend_outside, logarithmic, measured, records_of, words_of
from vqa.study.records import Report

SHOWN = 8
PYTORCH = {EAGER: "PyTorch", COMPILED: "PyTorch compiled", PT2E: "PyTorch PT2E"}  # as readers know these engines


@figure
def accuracy_in_int8(report: Report) -> None:
    """Test accuracy by question type, fp32 beside int8 on the same questions."""
    types = {"accuracy": "all"} | {accuracy_of(name): name for name in report.source.question_types}
    rows = measured(report, "quantization").query("split == 'test'")
    rows = rows[rows["metric"].isin(types)].replace({"metric": types})
    models = list(rows["model"].unique())
    _, axes = pyplot.subplots(1, len(models), figsize=(6 * len(models), 3.8), sharey=True, squeeze=False)
    for axis, model in zip(axes[0], models, strict=True):
        intervals(axis, rows[rows["model"] == model], "metric", "precision", bars=True)
        axis.set(title=model, xlabel="question type")
    axes[0, 0].set(ylim=(max(rows["low"].min() - 1, 0), min(rows["high"].max() + 0.5, 100.5)))
    axes[0, 0].set_ylabel("test accuracy, % [95 %]")
    legend_outside(axes[0, -1])


@figure
def layer_sensitivity(report: Report) -> None:
    """How far each layer of the student moves the answers when it alone is int8, in the order of the graph."""
    rows = measured(report, "sensitivity")
    calibrated = rows["arm"].str.endswith("calibration images")  # all layers in int8; the most images come last
    alone, whole = rows[~calibrated].replace({"arm": "^int8 in "}, "", regex=True), rows[calibrated].iloc[-1]
    _, axis = pyplot.subplots(figsize=(9, 0.22 * len(alone) + 1))
    intervals(axis, alone, "arm", bars=True, horizontal=True)
    axis.axvline(whole["value"], color="black", linestyle="--", linewidth=1, label="all layers")
    axis.set(xscale="log", xlabel="divergence of the answers from fp32, nats")
    axis.tick_params("y", labelsize=8)
    axis.legend(loc="lower right")


@figure
def deployment_pareto(report: Report) -> None:
    """Every trained model of this study as it can be served: accuracy against bytes and against latency."""
    model = ["model", "fusion"]
    rows = measured(report, "quantization", "cross_check")
    served = rows.pivot_table("value", [*model, "precision", "engine"], "metric", sort=False).reset_index()
    trained = measured(report, "training").query("arm == '' and split != 'validation'")
    trained = trained.pivot_table("value", model, "metric", aggfunc="first")  # of the first seed, which is served
    served = served.fillna(served[model].join(trained[["accuracy", "bytes_on_disk"]], model))  # in PyTorch, as trained
    served = served.assign(value=served["accuracy"], MB=served["bytes_on_disk"] / 1e6).replace({"engine": PYTORCH})
    served["label"] = words_of(served, "model", "precision", "engine")
    _, axes = pyplot.subplots(1, 2, figsize=(12, 4), sharey=True)
    for axis, x in zip(axes, ("MB", "latency_p50_ms"), strict=True):
        intervals(axis, served, x, "label")
        logarithmic(axis)
    axes[0].set(xlabel="size on disk, MB", ylabel="test accuracy, %")
    axes[1].set(xlabel="latency of one question, p50, ms")
    legend_outside(axes[1])


@figure
def deployment_latency(report: Report) -> None:
    """Latency of one question with random weights: models and engines in turn on the same threads."""
    rows = measured(report, "latency", "latency_compiled").replace({"engine": PYTORCH})
    rows = rows.assign(variant=words_of(rows, "model", "precision", "engine", "arm"))
    p50, p95 = (rows[rows["metric"] == f"latency_{name}_ms"] for name in ("p50", "p95"))
    medians = p50["variant"] + p50["value"].map(": {:.3g}".format)  # beside a bar the number would hide its interval
    _, axis = pyplot.subplots(figsize=(9, 0.36 * len(p50) + 1))
    intervals(axis, p50.assign(what="median [95 %]"), "variant", "what", bars=True, horizontal=True)
    axis.set_yticks(axis.get_yticks(), medians)
    p95 = p95.set_index("variant")["value"][p50["variant"]]
    axis.plot(p95, range(len(p95)), "k|", markersize=11, label="95th percentile")
    axis.set(xlabel="milliseconds")
    logarithmic(axis)
    axis.legend(loc="lower right")


@figure
def fewer_bits(report: Report) -> None:
    """What the student loses to fp32 with coarser weights, rounded after training and fine-tuned, by ranks."""
    rows = measured(report, "quantization_aware").query("metric == 'accuracy_drop' and precision != 'fp32'")
    _, axis = pyplot.subplots(figsize=(9, 3.6))
    intervals(axis, rows, "variant", "ranks", bars=True, number="%.2g")
    axis.axhline(ALLOWED_DROP, color="black", linestyle="--", linewidth=1, label=f"{ALLOWED_DROP} points")
    axis.set(xlabel="weights of the student", ylabel="accuracy lost, points [95 %]")
    axis.legend()


@figure
def flipped_answers(report: Report) -> None:
    """Test questions that int8 answers otherwise than fp32; filled up with those whose confidence moved most."""
    answered = next(record.predictions for record in records_of(report, "quantization") if record.model == "student")
    moved = (answered["confidence"] - answered["fp32_confidence"]).abs()
    flipped = answered["prediction"] != answered["fp32_prediction"]
    ranked = answered.assign(flipped=flipped, moved=moved).sort_values(["flipped", "moved"], ascending=False)
    _, axes = pyplot.subplots(2, SHOWN // 2, figsize=(12, 7))
    for axis, item in zip(axes.flat, ranked.head(SHOWN).itertuples(), strict=True):
        show_image(axis, test_image(report, item.image_id))
        before = f"fp32 {item.fp32_prediction} {100 * item.fp32_confidence:.1f} %"
        after = f"int8 {item.prediction} {100 * item.confidence:.1f} %"
        title = f"{item.question}\n{before}, {after}\n(is {item.answer})"
        axis.set_title(title, fontsize=8, fontweight="bold" if item.flipped else "normal")
