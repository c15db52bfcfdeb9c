"""The four towers: ViT and ResNet18 read an image, BERT and DistilBERT read a question.

All are the library's own classes, built from a config (random weights) or from public weights: a
local folder, a hub id at a pinned revision, or torchvision's ResNet18. Image towers take uint8
pixels and normalise them as their weights expect, so a tower cannot get another one's statistics.
"""

import os
import pickle
import socket
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
import transformers
from torch import nn

from vqa.config import ConfigError, ImageEncoderConfig, TextEncoderConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # torchvision's ResNets
WAIT_SECONDS = 5  # for a server to answer
HALF = (0.5, 0.5, 0.5)  # ViT (Dosovitskiy et al. 2021): pixels to [-1, 1]
BERT_TO_DISTILBERT = {  # the library's names for the parts of one layer
    "attention.self.query": "attention.q_lin",
    "attention.self.key": "attention.k_lin",
    "attention.self.value": "attention.v_lin",
    "attention.output.dense": "attention.out_lin",
    "attention.output.LayerNorm": "sa_layer_norm",
    "intermediate.dense": "ffn.lin1",
    "output.dense": "ffn.lin2",
    "output.LayerNorm": "output_layer_norm",
}


class Features(NamedTuple):
    """What a tower says of each of its inputs (B of them): P tokens and one summary, D wide."""

    tokens: torch.Tensor  # (B, P, D)
    pooled: torch.Tensor  # (B, D)


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


class BertEncoder(nn.Module):
    """BERT, https://arxiv.org/abs/1810.04805; summary: the mean of the question's tokens."""

    def __init__(self, config: TextEncoderConfig, vocabulary: int, dropout: float):
        super().__init__()
        shape = transformers.BertConfig(
            vocab_size=vocabulary,
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
        self.text = _build(transformers.BertModel, shape, config, add_pooling_layer=False)
        self.width = config.width

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Features:
        tokens = self.text(input_ids, attention_mask=attention_mask).last_hidden_state  # (U, T, D)
        weights = attention_mask / attention_mask.sum(1, keepdim=True)  # (U, T), padding weighs nothing
        return Features(tokens, (weights.to(tokens.dtype)[:, None, :] @ tokens).squeeze(1))

    def checkpoint_gradients(self) -> None:
        _checkpoint_layers(self.text)


class DistilBertEncoder(BertEncoder):
    """DistilBERT, https://arxiv.org/abs/1910.01108; summary: as BertEncoder."""

    def __init__(self, config: TextEncoderConfig, vocabulary: int, dropout: float):
        nn.Module.__init__(self)
        shape = transformers.DistilBertConfig(
            vocab_size=vocabulary,
            dim=config.width,
            n_layers=config.layers,
            n_heads=config.heads,
            hidden_dim=4 * config.width,
            dropout=dropout,
            attention_dropout=dropout,
        )
        self.text = _build(transformers.DistilBertModel, shape, config)
        self.width = config.width

    def inherit(self, teacher: BertEncoder) -> None:
        """Start from `teacher`: its embeddings and layers 0, s, 2s, …, where s is how often our depth goes into its.

        A teacher twice as deep gives every other layer (https://arxiv.org/abs/1910.01108, section 3). Widths, heads
        and vocabulary must be equal.
        """
        depth, theirs = self.text.config.n_layers, teacher.text.config.num_hidden_layers
        layers = [layer * (theirs // depth) for layer in range(depth)]
        self.text.load_state_dict(from_bert(teacher.text.state_dict(), layers))


def image_encoder(config: ImageEncoderConfig, image_size: int, dropout: float) -> nn.Module:
    return ResNet18Encoder(config) if config.kind == "resnet18" else ViTEncoder(config, image_size, dropout)


def text_encoder(config: TextEncoderConfig, vocabulary: int, dropout: float) -> nn.Module:
    kinds = {"bert": BertEncoder, "distilbert": DistilBertEncoder}
    return kinds[config.kind](config, vocabulary, dropout)


def from_bert(state: dict[str, torch.Tensor], layers: list[int]) -> dict[str, torch.Tensor]:
    """The embeddings and `layers` of a BertModel's weights, under the names of transformers' DistilBertModel.

    DistilBERT has no token types: that of a first sentence, which BERT adds at every position, goes into the positions.
    """
    embeddings = "embeddings.word_embeddings.weight", "embeddings.LayerNorm.weight", "embeddings.LayerNorm.bias"
    renamed = {name: state[name] for name in embeddings}
    positions, types = (state[f"embeddings.{kind}_embeddings.weight"] for kind in ("position", "token_type"))
    renamed["embeddings.position_embeddings.weight"] = positions + types[0]
    for place, layer in enumerate(layers):
        for theirs, ours in BERT_TO_DISTILBERT.items():
            for part in ("weight", "bias"):
                source = state[f"encoder.layer.{layer}.{theirs}.{part}"]
                renamed[f"transformer.layer.{place}.{ours}.{part}"] = source
    return renamed


def from_torchvision(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """torchvision's ResNet18 weights under the names that transformers' ResNetModel gives them."""
    renamed = {}
    for name, value in state.items():
        head, _, rest = name.partition(".")
        if head == "fc":
            continue
        if head == "conv1":
            place, part = "embedder.embedder.convolution", rest
        elif head == "bn1":
            place, part = "embedder.embedder.normalization", rest
        else:
            block, layer, part = rest.split(".", 2)
            prefix = f"encoder.stages.{int(head[-1]) - 1}.layers.{block}"
            if layer == "downsample":
                index, part = part.split(".", 1)
                place = f"{prefix}.shortcut.{('convolution', 'normalization')[int(index)]}"
            else:
                kind = "convolution" if layer.startswith("conv") else "normalization"
                place = f"{prefix}.layer.{int(layer[-1]) - 1}.{kind}"
        renamed[f"{place}.{part}"] = value
    return renamed


def pretrained_folder(name: str, revision: str | None) -> str:
    """A local folder as it is, or the hub's snapshot of `name` at `revision`, fetched if need be.

    Only weights that are safetensors are fetched, and no code. Raises ConfigError in one sentence if neither
    is there, without trying again and again.
    """
    from huggingface_hub import snapshot_download

    if Path(name).is_dir():
        return name
    if revision is None:
        raise ConfigError(f"pretrained {name!r} is no local folder, and a hub id needs a revision (a commit hash)")
    files, reached = ["*.json", "*.txt", "model.safetensors"], _hub_answers()
    try:
        return snapshot_download(name, revision=revision, allow_patterns=files, local_files_only=not reached)
    except OSError:
        why = "does not give it: check its name and revision, or" if reached else "cannot be reached:"
        raise ConfigError(
            f"no copy of {name} at {revision[:8]} here and the hub {why} download it where "
            f"there is a network and put its folder's path under pretrained"
        ) from None


def _hub_answers() -> bool:
    """Whether the hub can be reached, asked once: a download by itself asks six times, which takes 24 s."""
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError

    try:
        get_session().head(constants.ENDPOINT, timeout=WAIT_SECONDS)
    except (HTTPError, OSError):  # the latter when HF_HUB_OFFLINE says not to ask
        return False
    return True


def pretrained_tokenizer(name: str, revision: str | None) -> transformers.PreTrainedTokenizerBase:
    """The tokenizer beside public weights. Raises ConfigError if it is not there, or would need code of its own."""
    folder = pretrained_folder(name, revision)
    if not any((Path(folder) / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        raise ConfigError(
            f"cannot load the tokenizer of {name}: there is none, and the library would make an empty one"
        )
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load the tokenizer of {name}: {str(error).splitlines()[0]}") from None


def _torchvision_state(name: str) -> dict[str, torch.Tensor]:
    """torchvision's ResNet18 weights `name`, fetched if need be. Raises ConfigError if they cannot be.

    They are pickled: the hash of what is fetched is checked, and nothing but tensors is unpickled.
    """
    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(WAIT_SECONDS)
    try:
        weights = torchvision.models.ResNet18_Weights[name]
        return weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ConfigError(f"torchvision's {name} cannot be fetched or read: {str(error).splitlines()[0]}") from None
    finally:
        socket.setdefaulttimeout(patience)


def _checkpoint_layers(model: transformers.PreTrainedModel) -> None:
    """Turn on gradient checkpointing, which transformers renamed in 5.2x."""
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})


def _build(kind: type, shape: transformers.PretrainedConfig, config, **arguments) -> nn.Module:
    """A library model with random weights of `shape`, or with the public weights that `config` names.

    Raises ConfigError if those weights do not fit the shape.
    """
    if config.pretrained is None:
        return kind(shape, **arguments)
    if config.kind == "resnet18" and hasattr(torchvision.models.ResNet18_Weights, config.pretrained):
        model = kind(shape, **arguments)
        state = from_torchvision(_torchvision_state(config.pretrained))
        if any(state[name].shape != value.shape for name, value in model.state_dict().items()):
            raise ConfigError(f"{config.pretrained} is of width 512 and does not fit width {config.width}")
        model.load_state_dict(state)
        return model
    folder = pretrained_folder(config.pretrained, config.revision)
    try:
        model, report = kind.from_pretrained(
            folder, config=shape, dtype=torch.float32, output_loading_info=True, use_safetensors=True, **arguments
        )
    except (RuntimeError, OSError, ValueError) as error:
        raise ConfigError(f"cannot load {config.pretrained}: {str(error).splitlines()[0]}") from None
    if report["missing_keys"]:
        raise ConfigError(f"{config.pretrained} lacks {len(report['missing_keys'])} weights of a {config.kind}")
    return model


os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
