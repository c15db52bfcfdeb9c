import itertools

import numpy as np
import pandas as pd
import pytest
import torch

from vqa.evaluation.metrics import (
    accuracy_results,
    calibration_error,
    cluster_interval,
    image_only_ceiling,
    linear_cka,
    mean_paired_difference,
    paired_difference,
    recall_results,
    score,
    swap_test,
)

Z = 1.959964


def correlated(seed: int, images: int = 300, p: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """(correct, image): 5 to 14 questions an image, which are easy or hard together."""
    generator = np.random.default_rng(seed)
    image = np.repeat(np.arange(images), generator.integers(5, 15, images))
    ease = generator.beta(2 * p, 2 * (1 - p), images)
    return generator.random(len(image)) < ease[image], image


def bootstrap(values: np.ndarray, image: np.ndarray, draws: int = 4000) -> tuple[float, float]:
    """The 2.5 % and 97.5 % quantiles of the mean of `values` when whole images are drawn anew."""
    totals = pd.DataFrame({"value": values, "image": image}).groupby("image")["value"].agg(["sum", "size"]).to_numpy()
    drawn = totals[np.random.default_rng(0).integers(0, len(totals), (draws, len(totals)))].sum(1)
    return tuple(np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975]))


@pytest.mark.parametrize("p", [0.5, 0.8, 0.95])
def test_interval_is_that_of_a_cluster_bootstrap(p):
    """Measured over 10 seeds: ends differ by at most 7 % of the width, most at p = 0.95."""
    correct, image = correlated(1, p=p)
    share, low, high = cluster_interval(correct, image)
    assert share == correct.mean()
    assert (low, high) == pytest.approx(bootstrap(correct, image), abs=0.12 * (high - low))


def partly_right(seed: int, images: int = 300, p: float = 0.8) -> tuple[np.ndarray, np.ndarray]:
    """As `correlated`, but where it is wrong ten people are of many minds, and where it is right not all agree."""
    correct, image = correlated(seed, images, p)
    generator = np.random.default_rng(seed + 1000)
    shares = np.where(
        correct, generator.choice([0.6, 0.9, 1, 1, 1], len(image)), generator.choice([0, 0.3], len(image))
    )
    return shares, image


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 0.95])
def test_interval_of_partly_right_answers_is_that_of_a_cluster_bootstrap(p):
    """Measured over 10 seeds: ends differ by at most 3.1 % of the width, most at p = 0.95."""
    shares, image = partly_right(1, p=p)
    share, low, high = cluster_interval(shares, image)
    assert share == shares.mean()
    assert (low, high) == pytest.approx(bootstrap(shares, image), abs=0.06 * (high - low))


def test_interval_of_partly_right_answers_holds_the_truth_in_95_of_100_samples():
    """The truth is the mean over 100,000 images; of 400 samples three standard deviations are 3.3 points."""
    truth = partly_right(7, images=100_000)[0].mean()
    intervals = [cluster_interval(*partly_right(seed, images=60))[1:] for seed in range(400)]
    assert np.mean([low <= truth <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.033)


@pytest.mark.parametrize("p", [0.5, 0.9])
def test_interval_holds_the_truth_in_95_of_100_samples(p):
    """400 samples: three standard deviations are 3.3 points."""
    intervals = [cluster_interval(*correlated(seed, images=60, p=p))[1:] for seed in range(400)]
    assert np.mean([low <= p <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.033)


def test_interval_of_unclustered_questions_is_wilsons():
    """Wilson's ends solve (share - p)^2 = z^2 p (1 - p) / n; the sample variance takes one off n."""
    correct = np.arange(50) < 40
    n, share = 49, 0.8
    ends = np.roots([1 + Z**2 / n, -2 * share - Z**2 / n, share**2])
    assert cluster_interval(correct, np.arange(50)) == pytest.approx((share, ends.min(), ends.max()), abs=1e-12)


def test_interval_is_wider_where_an_images_questions_go_together():
    correct, image = correlated(2)
    _, low, high = cluster_interval(correct, image)
    _, alone_low, alone_high = cluster_interval(correct, np.arange(len(correct)))
    assert high - low > 1.3 * (alone_high - alone_low)


def test_interval_stays_inside_and_keeps_a_width_at_the_ends():
    """All right in 20 images: Wilson's lower end for 20 of 20 is n / (n + z^2)."""
    image = np.repeat(np.arange(20), 10)
    right, wrong = (cluster_interval(np.full(200, value), image) for value in (True, False))
    assert right == pytest.approx((1, 20 / (20 + Z**2), 1)) and wrong == pytest.approx((0, 0, 1 - right[1]))
    for count in range(1, 2000, 7):  # rounding must not put an end on the wrong side of the share
        one, low, high = cluster_interval(np.ones(count, bool), np.arange(count))
        assert low <= one <= high
    for only in (0, 199):
        share, low, high = cluster_interval(np.arange(200) != only, image)
        assert 0 <= low < share < high <= 1
    assert cluster_interval(np.array([True]), np.array([0]))[1] < 1


def test_difference_is_that_of_a_cluster_bootstrap():
    """The second model fails on whole images, so that an image's differences go together.

    Measured over 10 seeds: ends differ by at most 3 % of the width; without clusters it would be half as wide.
    """
    first, image = correlated(3)
    second = first & (np.random.default_rng(4).random(300) < 0.8)[image]
    difference = first.astype(float) - second
    mean, low, high = paired_difference(pd.Series(first), pd.Series(second), pd.Series(image))
    assert mean == pytest.approx(difference.mean())
    assert (low, high) == pytest.approx(bootstrap(difference, image), abs=0.06 * (high - low))
    apart = bootstrap(difference, np.arange(len(difference)))
    assert high - low > 1.5 * (apart[1] - apart[0])  # the case can tell who ignores clusters


def test_difference_of_one_question_an_image_is_the_textbooks_paired_interval():
    """Closed form: standard deviation of the differences over the root of n."""
    generator = np.random.default_rng(8)
    first, second = (pd.Series(generator.random(40)) for _ in range(2))
    half = Z * (first - second).std(ddof=1) / np.sqrt(40)
    mean = (first - second).mean()
    found = paired_difference(first, second, pd.Series(np.arange(40)))
    assert found == pytest.approx((mean, mean - half, mean + half))


def test_difference_of_equals_is_zero():
    correct, image = correlated(5)
    assert paired_difference(pd.Series(correct), pd.Series(correct), pd.Series(image)) == (0, 0, 0)


def test_accuracies_are_counted_per_question_type():
    frame = pd.DataFrame(
        {
            "image_id": [1, 1, 2, 2, 3],
            "question_type": ["color", "shape", "color", "shape", "color"],
            "answer": ["red", "circle", "blue", "circle", "red"],
            "written": [None] * 5,
            "correct": [True, False, True, True, False],
            "blind_correct": [False, False, True, False, False],
        },
        index=[7, 3, 9, 1, 0],
    )
    rows = accuracy_results(frame, "test")
    assert {(row.metric, round(row.value, 6), row.unit, row.split) for row in rows} == {
        ("accuracy", 60, "%", "test"),
        ("accuracy_color", 66.666667, "%", "test"),
        ("accuracy_shape", 50, "%", "test"),
        ("accuracy_blind", 20, "%", "test"),
        ("accuracy_minus_blind", 40, "points", "test"),
    }
    assert all(row.low <= row.value <= row.high for row in rows)

    written = frame.assign(written=["red", "circle", "blue", "circle", "reddish"])
    (row,) = [row for row in accuracy_results(written, "test") if row.metric == "accuracy_written"]
    assert row.value == pytest.approx(80)


def test_an_answer_is_judged_by_ten_people_where_they_were_asked():
    asked = pd.DataFrame(
        {"answer": ["red", "2"], "answers": [["red"] * 8 + ["pink"] * 2, ["2"] * 9 + ["3"]]}, index=[4, 9]
    )
    predictions = pd.Series(["pink", "two"], index=[4, 9])
    assert score(predictions, asked).to_dict() == pytest.approx({4: 0.6, 9: 1.0})
    assert score(predictions, asked[["answer"]]).to_dict() == {4: 0, 9: 0}
    written = asked.assign(image_id=[0, 1], question_type="other", correct=1.0, blind_correct=0.0, written=predictions)
    (row,) = [row for row in accuracy_results(written, "test") if row.metric == "accuracy_written"]
    assert row.value == pytest.approx(80)


@pytest.mark.parametrize("captions_an_image", [1, 2])
def test_recall_is_a_loop_over_the_gallery(captions_an_image):
    """40 images, each with one or two of 12 captions in random order, by brute force."""
    generator = torch.Generator().manual_seed(0)
    caption = torch.stack([torch.randperm(12, generator=generator)[:captions_an_image] for _ in range(40)]).flatten()
    image = torch.arange(40).repeat_interleave(captions_an_image)
    words = torch.nn.functional.normalize(torch.randn(12, 8, generator=generator), dim=1)
    seen = torch.stack([words[caption[image == i]].sum(0) for i in range(40)]) + 0.6 * torch.randn(
        40, 8, generator=generator
    )
    seen = torch.nn.functional.normalize(seen, dim=1)
    order = torch.randperm(len(image), generator=generator)
    image, caption = image[order], caption[order]
    true = {(int(i), int(c)) for i, c in zip(image, caption, strict=True)}
    distinct = sorted({c for _, c in true})

    expected = {}
    scores = seen @ words.T
    searches = {"image_to_caption": [], "caption_to_image": []}  # of each query: (scores of what is found, right ones)
    for i in range(40):
        searches["image_to_caption"].append(
            ({c: float(scores[i, c]) for c in distinct}, {c for j, c in true if j == i})
        )
    for c in distinct:
        searches["caption_to_image"].append(
            ({i: float(scores[i, c]) for i in range(40)}, {i for i, d in true if d == c})
        )
    for direction, found in searches.items():
        ranked = [(sorted(scores, key=scores.get, reverse=True), right) for scores, right in found]
        for k in (1, 5):
            expected[f"recall_at_{k}_{direction}"] = np.mean([bool(right & set(order[:k])) for order, right in ranked])
        shares = [len(right & set(order[: len(right)])) / len(right) for order, right in ranked]
        expected[f"r_precision_{direction}"] = np.mean(shares)

    rows = recall_results(seen[image], words[caption], image.numpy(), caption.numpy(), "validation")
    assert {row.metric: row.value for row in rows} == {name: pytest.approx(100 * v) for name, v in expected.items()}
    values = [row.value for row in rows]
    assert 0 < min(values) < max(values)  # the case is neither trivial nor hopeless


def test_no_answer_given_without_the_question_beats_the_image_only_ceiling():
    """Against every way to give each of three images one answer, tried out."""
    frame = pd.DataFrame({"image_id": [0, 0, 0, 1, 1, 2], "answer": ["yes", "no", "no", "red", "yes", "no"]})
    tried = [
        np.mean([chosen[image] == answer for image, answer in frame.itertuples(index=False)])
        for chosen in itertools.product(["yes", "no", "red"], repeat=3)
    ]
    assert image_only_ceiling(frame)[0] == max(tried) == 4 / 6


def test_relational_questions_are_also_taken_together():
    kinds = ["relational_count", "relational_closest", "shape", "shape", "left_right"]
    frame = pd.DataFrame({"image_id": range(5), "question_type": kinds, "correct": [1, 0, 1, 1, 0], "blind_correct": 0})
    relational = ("relational_count", "relational_closest")
    found = {row.metric: row.value for row in accuracy_results(frame, "test", relational)}
    assert found["relational_accuracy"] == pytest.approx(50)
    assert found["non_relational_accuracy"] == pytest.approx(200 / 3)
    plain = accuracy_results(frame[~frame["question_type"].isin(relational)], "test", relational)
    assert not [row for row in plain if row.metric in ("relational_accuracy", "non_relational_accuracy")]


def test_calibration_error_by_hand():
    """Four answers in two ranges: three at 0.9 of which two are right, one at 0.4 that is right."""
    error = calibration_error(np.array([0.9, 0.9, 0.9, 0.4]), np.array([True, True, False, True]), bins=2)
    assert error == pytest.approx((abs(2 - 2.7) + abs(1 - 0.4)) / 4)


def test_a_model_that_is_as_right_as_it_is_sure_is_calibrated():
    generator = np.random.default_rng(0)
    confidence = generator.random(200_000)
    assert calibration_error(confidence, generator.random(200_000) < confidence) < 0.01


@pytest.fixture
def answered() -> pd.DataFrame:
    """Ten questions about each of forty images: half yes, half no."""
    generator = np.random.default_rng(1)
    frame = pd.DataFrame({"image_id": np.repeat(np.arange(40), 10), "question": np.tile(np.arange(10), 40)})
    return frame.assign(answer=generator.choice(["yes", "no"], 400))


def test_who_is_always_right_changes_the_answer_when_it_must_and_only_then(answered):
    swaps = swap_test(answered.assign(prediction=answered["answer"]), ["question"])
    assert len(swaps) == 390  # of each question's forty images one has no other left
    assert (swaps["changed"] == swaps["must_change"]).all() and 0.3 < swaps["must_change"].mean() < 0.7


def test_who_does_not_look_never_changes_the_answer_with_the_image(answered):
    blind = answered.assign(prediction=answered["question"] % 2)
    assert not swap_test(blind, ["question"])["changed"].any()
    assert swap_test(blind, ["image_id"])["changed"].any()  # but does with the question


def test_swapped_answers_are_of_the_same_question_and_another_image(answered):
    """A prediction that names question and image: the image always changes, the question never."""
    named = answered.assign(prediction=answered["question"].astype(str) + "/" + answered["image_id"].astype(str))
    assert swap_test(named, ["question"])["changed"].all()
    assert not swap_test(named.assign(prediction=named["question"]), ["question"])["changed"].any()


def test_cka_is_one_for_a_rotation_and_near_nothing_for_noise():
    """https://arxiv.org/abs/1905.00414: invariant to rotation, scale and shift, not to any linear map."""
    generator = torch.Generator().manual_seed(0)
    first, other = (torch.randn(400, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    assert linear_cka(first, 3 * first @ rotation + 5) == pytest.approx(1, abs=1e-9)
    assert linear_cka(first, other) < 0.05
    assert linear_cka(first, first * torch.tensor([9.0, 1, 1, 1, 1, 1])) < 0.7


def test_cka_is_its_definition_with_gram_matrices():
    """Eq. 1 and 2 of the paper, on N x N matrices; the code works on D x E ones."""
    x, y = (np.random.default_rng(seed).normal(size=(30, width)) for seed, width in ((0, 4), (1, 7)))
    centre = np.eye(30) - 1 / 30
    hsic = lambda k, m: np.trace(k @ centre @ m @ centre)  # noqa: E731
    k, m = x @ x.T, y @ y.T
    expected = hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m))
    assert linear_cka(torch.from_numpy(x), torch.from_numpy(y)) == pytest.approx(expected, rel=1e-10)


def test_seeds_are_averaged_before_questions_are_compared():
    """By hand: of three questions the first kind answers 1, 1/2, 0 of two seeds, the second kind 0, 1/2, 1/2."""
    asked = pd.DataFrame({"image_id": [0, 0, 1], "question_id": [5, 6, 7], "split": "test"})
    seeds = [[asked.assign(correct=c) for c in kind] for kind in ([[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 0]])]
    shuffled = [seeds[0], [frame.sample(frac=1, random_state=1) for frame in seeds[1]]]
    difference = mean_paired_difference(*shuffled)
    expected = paired_difference(pd.Series([1, 0.5, 0]), pd.Series([0, 0.5, 0.5]), pd.Series([0, 0, 1]))
    assert difference == pytest.approx(expected) and difference[0] == pytest.approx(1 / 6)


def test_only_the_split_that_is_asked_for_is_compared():
    asked = pd.DataFrame({"image_id": [0, 1], "question_id": [5, 6], "split": ["validation", "test"]})
    first, second = asked.assign(correct=[0, 1]), asked.assign(correct=[1, 0])
    assert mean_paired_difference([first], [second])[0] == 1
