"""The towers that look at an image: ViT and ResNet18, the library's own classes.

They take uint8 pixels and normalise them as their weights expect, so a tower cannot get another one's statistics.
"""

from itertools import chain, pairwise

import torch
import transformers
from torch import Tensor, nn

from vqa.config import ConfigError
from vqa.config.runs import ResNet18Config, ViTConfig
from vqa.models.layers import Features
from vqa.models.pretrained import build, checkpoint_layers, image_statistics, public_folder, transformer_sizes

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's ResNets
HALF = (0.5, 0.5, 0.5)  # ViT (Dosovitskiy et al. 2021): pixels to [-1, 1]


class Normalize(nn.Module):
    """uint8 pixels (I, 3, H, W) to float, with the statistics that a tower's weights expect."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", 255 * torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(3, 1, 1))

    def forward(self, pixel_values: Tensor) -> Tensor:
        return (pixel_values.float() - self.mean) / self.std


class ViTEncoder(nn.Module):
    """Vision Transformer, https://arxiv.org/abs/2010.11929; summary: the mean of the patch tokens.

    Averaging learns faster from scratch than a [CLS] token, and so do positions that start as sines and cosines of
    the patch's row and column (https://arxiv.org/abs/2205.01580).
    """

    def __init__(self, config: ViTConfig, image_size: int, dropout: float, library: dict | None = None):
        """Raises ConfigError for public weights that do not fit `config`."""
        super().__init__()
        if config.pretrained and config.stem != "patch":
            raise ConfigError(
                f"stem {config.stem} would throw away the patch projection of {config.pretrained}: use stem patch"
            )
        asked = transformer_sizes(config, dropout) | {"image_size": image_size, "patch_size": config.patch_size}
        public = public_folder(config)
        self.normalize = Normalize(*image_statistics(public, (HALF, HALF)))
        self.vit = build(transformers.ViTModel, config, asked, public, library, add_pooling_layer=False)
        if config.pretrained is None:
            self.vit.embeddings.position_embeddings.data = sines_and_cosines(
                image_size // config.patch_size, config.width
            )
        if config.stem != "patch":
            stem = ConvStem(config.width, config.patch_size, plain=config.stem == "conv")
            self.vit.embeddings.patch_embeddings.projection = stem
        self.width = config.width

    def forward(self, pixel_values: Tensor) -> Features:
        tokens = self.vit(self.normalize(pixel_values)).last_hidden_state  # (I, P, D)
        return Features(tokens, tokens[:, 1:].mean(1))

    def checkpoint_gradients(self) -> None:
        checkpoint_layers(self.vit)


def sines_and_cosines(side: int, width: int) -> Tensor:
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
    def weight(self) -> Tensor:
        return self[-1].weight  # ViTModel asks its projection for the dtype of this


class ResNet18Encoder(nn.Module):
    """ResNet18, https://arxiv.org/abs/1512.03385; tokens: the last feature map; summary: its mean."""

    def __init__(self, config: ResNet18Config, image_size: int, dropout: float, library: dict | None = None):
        """It takes any `image_size` and has no dropout. Raises ConfigError for public weights that do not fit."""
        super().__init__()
        widths = [config.width // 8, config.width // 4, config.width // 2, config.width]
        asked = {"embedding_size": widths[0], "hidden_sizes": widths, "depths": [2, 2, 2, 2], "layer_type": "basic"}
        public = public_folder(config)
        self.normalize = Normalize(*image_statistics(public, (IMAGENET_MEAN, IMAGENET_STD)))
        self.resnet = build(transformers.ResNetModel, config, asked, public, library)
        self.width = config.width

    def forward(self, pixel_values: Tensor) -> Features:
        grid = self.resnet(self.normalize(pixel_values)).last_hidden_state  # (I, D, h, w)
        return Features(grid.flatten(2).transpose(1, 2), grid.mean((2, 3)))

    def checkpoint_gradients(self) -> None:
        """Nothing: recomputing a stage would count its batch statistics twice."""
