"""The four towers: ViT and ResNet18 read an image, BERT and DistilBERT read a question.

All are the library's own classes, built from a config (random weights) or from public weights: a
local folder, a hub id at a pinned revision, or torchvision's ResNet18. Image towers take uint8
pixels and normalise them as their weights expect, so a tower cannot get another one's statistics.
"""

import os
from itertools import chain, pairwise

import torch
import transformers
from torch import nn

from vqa.config import ImageEncoderConfig
from vqa.models.layers import Features
from vqa.models.pretrained import _build, _checkpoint_layers

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's ResNets
HALF = (0.5, 0.5, 0.5)  # ViT (Dosovitskiy et al. 2021): pixels to [-1, 1]


class Normalize(nn.Module):
    """uint8 pixels (I, 3, H, W) to float, with the statistics that a tower's weights expect."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return (pixel_values.float() - self.mean) / self.std


class ViTEncoder(nn.Module):
    """Vision Transformer, https://arxiv.org/abs/2010.11929; summary: the mean of the patch tokens.

    Averaging learns faster from scratch than a [CLS] token, and so do positions that start as sines and cosines of
    the patch's row and column (https://arxiv.org/abs/2205.01580).
    """

    def __init__(self, config: ImageEncoderConfig, image_size: int, dropout: float):
        super().__init__()
        self.normalize = Normalize(HALF, HALF)
        shape = transformers.ViTConfig(
            image_size=image_size,
            patch_size=config.patch_size,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.vit = _build(transformers.ViTModel, shape, config, add_pooling_layer=False)
        if config.pretrained is None:
            self.vit.embeddings.position_embeddings.data = sines_and_cosines(
                image_size // config.patch_size, config.width
            )
        if config.stem != "patch":
            stem = ConvStem(config.width, config.patch_size, plain=config.stem == "conv")
            self.vit.embeddings.patch_embeddings.projection = stem
        self.width = config.width

    def forward(self, pixel_values: torch.Tensor) -> Features:
        tokens = self.vit(self.normalize(pixel_values)).last_hidden_state  # (I, P, D)
        return Features(tokens, tokens[:, 1:].mean(1))

    def checkpoint_gradients(self) -> None:
        _checkpoint_layers(self.vit)


def sines_and_cosines(side: int, width: int) -> torch.Tensor:
    """(1, 1 + side², width): zeros for [CLS], then for each patch, row by row, waves of its column and its row.

    https://arxiv.org/abs/2205.01580, section 2; a quarter of the width for each of sine and cosine of either.
    """
    waves = 1e4 ** -torch.linspace(0, 1, width // 4)
    row, column = (place.reshape(-1, 1) * waves for place in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    places = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
    return torch.cat([torch.zeros(1, width), nn.functional.pad(places, (0, width % 4))])[None]


class ConvStem(nn.Sequential):
    """Convolutions in place of the patch projection, after https://arxiv.org/abs/2106.14881.

    Per halving of the resolution a strided and, if asked for, a plain 3 x 3 convolution, each with
    BatchNorm and ReLU; then 1 x 1 to the tower's width. At patch size 16 a token sees 91 x 91 pixels
    with plain ones and 31 x 31 without. (I, 3, H, W) -> (I, width, H / patch_size, W / patch_size).
    """

    def __init__(self, width: int, patch_size: int, plain: bool):
        halvings = patch_size.bit_length() - 1
        channels = [3] + [width // 2**level for level in reversed(range(halvings))]
        convolutions = [(i, o, 2) for i, o in pairwise(channels)]
        if plain:
            convolutions = chain(*((strided, (strided[1], strided[1], 1)) for strided in convolutions))
        blocks = [
            (nn.Conv2d(i, o, 3, stride, padding=1, bias=False), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, stride in convolutions
        ]
        super().__init__(*chain(*blocks), nn.Conv2d(width, width, 1))

    @property
    def weight(self) -> torch.Tensor:
        return self[-1].weight  # ViTModel asks its projection for the dtype of this


class ResNet18Encoder(nn.Module):
    """ResNet18, https://arxiv.org/abs/1512.03385; tokens: the last feature map; summary: its mean."""

    def __init__(self, config: ImageEncoderConfig):
        super().__init__()
        self.normalize = Normalize(IMAGENET_MEAN, IMAGENET_STD)
        widths = [config.width // 8, config.width // 4, config.width // 2, config.width]
        shape = transformers.ResNetConfig(
            embedding_size=widths[0], hidden_sizes=widths, depths=[2, 2, 2, 2], layer_type="basic"
        )
        self.resnet = _build(transformers.ResNetModel, shape, config)
        self.width = config.width

    def forward(self, pixel_values: torch.Tensor) -> Features:
        grid = self.resnet(self.normalize(pixel_values)).last_hidden_state  # (I, D, h, w)
        return Features(grid.flatten(2).transpose(1, 2), grid.mean((2, 3)))

    def checkpoint_gradients(self) -> None:
        """Nothing: recomputing a stage would count its batch statistics twice."""


def image_encoder(config: ImageEncoderConfig, image_size: int, dropout: float) -> nn.Module:
    return ResNet18Encoder(config) if config.kind == "resnet18" else ViTEncoder(config, image_size, dropout)


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
