"""The four towers: ViT and ResNet18 read an image, BERT and DistilBERT read a question.

All are the library's own classes, built from a config (random weights) or from public weights: a
local folder, a hub id at a pinned revision, or torchvision's ResNet18. Image towers take uint8
pixels and normalise them as their weights expect, so a tower cannot get another one's statistics.
"""

import pickle
import socket
from pathlib import Path

import torch
import torchvision
import transformers
from torch import nn

from vqa.config import ConfigError

WAIT_SECONDS = 5  # for a server to answer


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
