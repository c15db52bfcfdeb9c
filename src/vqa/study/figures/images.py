"""How figures show test images and what became of the questions about them."""

from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from vqa.study.records import Report


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Draw `image`, uint8 (3, H, W), without ticks."""
    axis.imshow(image.transpose(1, 2, 0))
    axis.set(xticks=[], yticks=[])
    axis.grid(visible=False)


def test_image(report: Report, image_id: int) -> np.ndarray:
    """The test image of that number, uint8 (3, H, W)."""
    table = report.source.splits["test"]
    return table.pixels(np.flatnonzero(table.image_ids == image_id))[0]


def judged_answer(item: pd.Series) -> str:
    """A question and what became of it, in lines that fit over a small image."""
    verdict = "right" if item["correct"] else f"wrong, is {item['answer']}"
    return f"{fill(item['question'], 28)}\n→ {item['prediction']} ({verdict})"
