"""What is measured on answers, with intervals that know that one image's questions go together."""

from collections import Counter
from collections.abc import Collection
from typing import Any

import numpy as np
import pandas as pd
import torch

from vqa.evaluation.vqa_accuracy import agreement
from vqa.results import Result, accuracy_of

Z = 1.959964  # normal quantile of a 95 % interval


def score(prediction: pd.Series, asked: pd.DataFrame) -> pd.Series:
    """How right each `prediction` is, 0 to 1, of the questions `asked`, row by row.

    Ten people's `answers` judge it where they are known, else whether it is the one `answer`.
    """
    if "answers" not in asked:
        return (prediction == asked["answer"]).astype(float)
    return pd.Series(map(agreement, prediction, asked["answers"]), index=asked.index, dtype=float)


def cluster_interval(correct: np.ndarray, image: np.ndarray) -> tuple[float, float, float]:
    """Mean of `correct` (N,), 0 to 1 each, and its 95 % interval, clustered by `image` (N,).

    The variance is that of a ratio of cluster totals (Cochran, Sampling Techniques, 1977, eq. 2.39);
    it gives an effective number of independent questions, with which Wilson's interval (1927) stays
    inside [0, 1] and keeps a width when everything is right (as in Korn and Graubard 1998). Where
    answers are partly right, it is the number of yes-or-no questions that would be as uncertain.
    """
    totals = pd.DataFrame({"right": correct, "image": image}).groupby("image")["right"].agg(["sum", "size"])
    share, clusters = float(np.mean(correct)), len(totals)
    residual = totals["sum"] - share * totals["size"]
    variance = clusters / max(clusters - 1, 1) * float((residual**2).sum()) / len(correct) ** 2
    effective = share * (1 - share) / variance if variance > 0 else clusters
    centre = (share + Z**2 / (2 * effective)) / (1 + Z**2 / effective)
    half = Z / (1 + Z**2 / effective) * np.sqrt(share * (1 - share) / effective + Z**2 / (4 * effective**2))
    return share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share)  # whatever rounding does


def paired_difference(first: pd.Series, second: pd.Series, image: pd.Series) -> tuple[float, float, float]:
    """Mean of `first - second` over the same questions, and its 95 % interval clustered by `image`."""
    difference = first.astype(float).to_numpy() - second.astype(float).to_numpy()
    mean = float(difference.mean())
    totals = pd.Series(difference - mean).groupby(image.to_numpy()).sum()
    clusters = len(totals)
    half = Z * np.sqrt(clusters / max(clusters - 1, 1) * float((totals**2).sum())) / len(difference)
    return mean, mean - half, mean + half


def mean_paired_difference(first: list[pd.DataFrame], second: list[pd.DataFrame]) -> tuple[float, float, float]:
    """`paired_difference` of two kinds of model, several seeds each: a question counts with its mean over seeds.

    `first`, `second` are answers to the same questions, as in predictions.parquet; only the test split counts.
    """
    means = []
    for frames in (first, second):
        answered = pd.concat(frames).query("split == 'test'")
        means.append(answered.groupby(["image_id", "question_id"])["correct"].mean())
    image = means[0].index.get_level_values("image_id").to_series()
    return paired_difference(means[0], means[1].reindex(means[0].index), image)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error, 0 to 1: mean |accuracy - confidence| over `bins` equal ranges of confidence.

    https://arxiv.org/abs/1706.04599, eq. 3; each range counts by its share of the N answers.
    """
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = np.bincount(place, weights=correct - confidence.astype(float), minlength=bins)
    return float(np.abs(gaps).sum() / len(confidence))


def swap_test(predictions: pd.DataFrame, same: list[str]) -> pd.DataFrame:
    """Each answer beside another one, drawn at random among those equal in the columns `same`.

    image_id, `must_change` (the true answers differ) and `changed` (the given ones do). With the
    question the same, the image was swapped; with the image the same, the question.
    """
    shuffled = predictions.sample(frac=1, random_state=0)
    other = shuffled.groupby(same)[["answer", "prediction"]].shift(-1).dropna()  # the last of a group has no other
    each = shuffled.loc[other.index]
    return pd.DataFrame(
        {
            "image_id": each["image_id"],
            "must_change": each["answer"] != other["answer"],
            "changed": each["prediction"] != other["prediction"],
        }
    )


def linear_cka(first: torch.Tensor, second: torch.Tensor) -> float:
    """How alike two representations (N, D), (N, E) of the same inputs are, 0 to 1, whatever their rotation or scale.

    Linear centred kernel alignment, https://arxiv.org/abs/1905.00414, section 3.
    """
    x, y = (features.double() - features.double().mean(0) for features in (first, second))
    return ((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm())).item()


class BlindBaseline:
    """Answers a question without its image: the commonest training answer to the same words.

    A question never seen in training gets the commonest answer of all.
    """

    def __init__(self, train: pd.DataFrame):
        self.overall = _commonest(train["answer"])
        self.answer_to = train.groupby("question")["answer"].agg(_commonest).to_dict()

    def __call__(self, questions: pd.Series) -> pd.Series:
        return questions.map(self.answer_to).fillna(self.overall)


def image_only_ceiling(pairs: pd.DataFrame) -> tuple[float, float, float]:
    """An upper bound, with its interval, on the accuracy of any answer that does not depend on the question.

    `pairs` has image_id and answer, which alone counts as right here; each image gets the one answer
    that is right most often for it.
    """
    best = pairs.groupby("image_id")["answer"].transform(_commonest)
    return cluster_interval((best == pairs["answer"]).to_numpy(), pairs["image_id"].to_numpy())


def _commonest(answers: pd.Series) -> str:
    counts = Counter(answers)
    return min(counts, key=lambda answer: (-counts[answer], answer))  # ties: alphabetically


def accuracy_results(
    predictions: pd.DataFrame, split: str, relational_types: Collection[str] = (), **labels: Any
) -> list[Result]:
    """Accuracy overall, by question type, of the blind baseline, and the difference, all in percent.

    `predictions` has one row a question, with the columns image_id, question_type and correct. With blind_correct the
    baseline is added; with written, which is judged by answer (or answers), the accuracy of what a decoder writes. The
    question types in `relational_types` are also taken together, as are the others. `labels` are fields of Result.
    """

    def accuracy(metric: str, of: pd.DataFrame, correct: pd.Series) -> Result:
        interval = percent(cluster_interval(correct.to_numpy(), of["image_id"].to_numpy()))
        return Result(metric, *interval, split=split, **labels)

    rows = [accuracy("accuracy", predictions, predictions["correct"])]
    for question_type, group in predictions.groupby("question_type"):
        rows.append(accuracy(accuracy_of(question_type), group, group["correct"]))
    relational = predictions["question_type"].isin(relational_types)
    for metric, chosen in (("relational_accuracy", relational), ("non_relational_accuracy", ~relational)):
        if relational.any() and chosen.any():
            rows.append(accuracy(metric, predictions[chosen], predictions[chosen]["correct"]))
    if "written" in predictions and predictions["written"].notna().all():  # by a decoder
        rows.append(accuracy("accuracy_written", predictions, score(predictions["written"], predictions)))
    if "blind_correct" in predictions:
        rows.append(accuracy("accuracy_blind", predictions, predictions["blind_correct"]))
        above = paired_difference(predictions["correct"], predictions["blind_correct"], predictions["image_id"])
        rows.append(Result("accuracy_minus_blind", *percent(above), split=split, **labels))
    return rows


def percent(shares: tuple[float, float, float]) -> tuple[float, ...]:
    """A value and the ends of its interval, from shares of 1."""
    return tuple(100 * share for share in shares)


def recall_results(
    images: torch.Tensor, captions: torch.Tensor, image_number: np.ndarray, caption_number: np.ndarray, split: str
) -> list[Result]:
    """Recall@1, recall@5 and R-precision over the whole gallery, in percent, both ways.

    `images`, `captions` (N, E) are unit vectors, row n a true pair; the numbers (N,) are equal where the
    image is the same, or the caption the same words. Distinct images search the distinct captions, and
    the other way round. Recall@k: any right one is among the first k. R-precision: the share of right
    ones among the first R, of which R are right.
    """
    _, image_row, image = np.unique(image_number, return_index=True, return_inverse=True)
    _, caption_row, caption = np.unique(caption_number, return_index=True, return_inverse=True)
    similarity = images[image_row] @ captions[caption_row].T  # (distinct images, distinct captions)
    true = torch.zeros(similarity.shape, dtype=torch.bool)
    true[image, caption] = True
    rows = []
    for direction, scores, right in (
        ("image_to_caption", similarity, true),
        ("caption_to_image", similarity.T, true.T),
    ):
        hits = right.gather(1, scores.argsort(dim=1, descending=True, stable=True)).numpy()
        count = hits.sum(1, keepdims=True)
        found = {f"recall_at_{k}": hits[:, :k].any(1) for k in (1, 5)}
        found["r_precision"] = (hits & (np.arange(hits.shape[1]) < count)).sum(1) / count[:, 0]
        for name, values in found.items():
            interval = percent(cluster_interval(values, np.arange(len(values))))
            rows.append(Result(f"{name}_{direction}", *interval, split=split))
    return rows
