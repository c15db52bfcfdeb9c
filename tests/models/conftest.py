"""What the tests of fusions and of the unified decoder share: small models, batches, and what is done to them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from vqa.data.batches import Batch, Split
from vqa.models.build import vqa_model
from vqa.models.vqa_model import VQAModel

IMAGE_INDEX = torch.tensor([2, 0, 3, 2, 2, 0, 3, 2])  # 8 pairs in no order; images 1 and 4 have none
IMAGES = 5


@pytest.fixture(scope="session")
def build(tiny_profile, processor):
    """Makes a small teacher of a fusion; "cross_attention of summaries" is the one with that kind of queries."""

    def build(kind: str, processor=processor) -> VQAModel:
        torch.manual_seed(0)
        kind, _, summaries = kind.partition(" of ")
        fusion = {"kind": kind, "width": 32} | ({"queries": "summary"} if summaries else {})
        image = {"kind": "vit", "width": 32, "layers": 1, "heads": 2, "patch_size": 32, "stem": "patch"}
        config = tiny_profile.run("teacher", model__fusion=fusion, model__image_encoder=image)
        return vqa_model(config.model, processor)

    return build


@pytest.fixture(scope="session")
def stirred():
    """Puts noise on all weights of a module: no norm is the identity, each input matters to the output."""

    def stirred(module: nn.Module) -> nn.Module:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.2 * torch.randn(parameter.shape, generator=generator)
        return module.eval()

    return stirred


@pytest.fixture(scope="session")
def overfit():
    """Trains on one batch alone until its losses add up to less than ln 2: each answer has more than even chances."""

    def overfit(model: VQAModel, batch: Batch, steps: int = 300) -> None:
        optimizer = torch.optim.AdamW(model.train().parameters(), lr=5e-3)
        for _ in range(steps):  # measured: 60 to 135
            optimizer.zero_grad()
            loss = model(**batch.inputs(), labels=batch.labels, num_items_in_batch=1).loss
            if loss < math.log(2):
                break
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        model.eval()

    return overfit


@pytest.fixture(scope="session")
def five(source, processor) -> Batch:
    """5 images of easy-VQA with all their questions."""
    return Split(source.splits["train"], processor).batch(np.arange(IMAGES))


@pytest.fixture(scope="session")
def lesson(source, processor) -> Batch:
    """3 images, few enough to learn by heart."""
    return Split(source.splits["train"], processor).batch(np.arange(3))


@pytest.fixture(scope="session")
def scattered(five) -> Batch:
    """Other pairs of the five images and their questions, 8 in no order, as IMAGE_INDEX says."""
    questions = torch.arange(len(IMAGE_INDEX)) * 5 % len(five.input_ids)
    return replace(five, image_index=IMAGE_INDEX, question_index=questions, labels=torch.zeros_like(IMAGE_INDEX))
