"""What a training step on several ranks should take: computing, and the wait for an exchange of gradients."""

from dataclasses import dataclass

import pandas as pd

from vqa.models.parts import parameter_count
from vqa.models.vqa_model import TwoTowers

ACCUMULATED_PARTS = 4  # micro-batches that all ranks together accumulate in one step
BUCKET_BYTES = 25 * 2**20  # of gradients that travel together: DDP's own default


def exposed_seconds(gradient: int, bandwidth: float, hidden_behind: float = 0.0) -> float:
    """The seconds of a gradient exchange that a step waits for.

    `gradient` in bytes, `bandwidth` in bytes all-reduced a second, `hidden_behind` the seconds of
    backward pass during which messages travel by themselves. The last bucket is only full when the
    backward pass ends, so it is never hidden. Where the cores that compute also carry the messages,
    nothing is: `hidden_behind` is 0.
    """
    return max(min(gradient, BUCKET_BYTES) / bandwidth, gradient / bandwidth - hidden_behind)


@dataclass(frozen=True)
class Machine:
    """A GPU and how GPUs of its kind are linked, as its maker's datasheet has it."""

    name: str
    flops: float  # bf16 operations a second, dense
    link: float  # bytes a second, one direction


MACHINES = (  # NVIDIA's L4 and H100 SXM datasheets; the printed flops are with sparsity, which doubles them
    Machine("L4, PCIe 4.0", 242e12 / 2, 64e9 / 2),
    Machine("H100, NVLink", 1979e12 / 2, 900e9 / 2),
)
REACHED = 0.4  # share of a datasheet's figures that training is assumed to reach
BACKWARD = 2 / 3  # of the operations of a step


def predictions(model: TwoTowers, image_tokens: int, text_tokens: int, images: int) -> pd.DataFrame:
    """Predicted, not measured: steps of `model` on 1, 2, 4 GPUs, plain and with gradients exchanged every fourth.

    A micro-batch of all ranks has `images` images of `image_tokens` tokens each and `text_tokens`
    tokens of distinct questions. 6 operations a parameter and token (https://arxiv.org/abs/2001.08361);
    fp32 gradients, all-reduced in a ring.
    """
    flops = 6 * (
        parameter_count(model.image_encoder) * image_tokens * images + parameter_count(model.text_encoder) * text_tokens
    )
    gradient = 4 * parameter_count(model)
    rows = []
    for machine in MACHINES:
        for parts in (1, ACCUMULATED_PARTS):
            alone = flops / (REACHED * machine.flops)
            for ranks in (1, 2, 4):
                compute = alone / ranks
                ring = 2 * (ranks - 1) / ranks  # times each byte travels
                waiting = ring and exposed_seconds(gradient, REACHED * machine.link / ring, BACKWARD * compute)
                seconds = parts * compute + waiting
                rows.append(
                    {
                        "machine (predicted)": machine.name,
                        "exchange": "every step" if parts == 1 else f"every {parts} micro-batches",
                        "ranks": ranks,
                        "step, ms": 1e3 * seconds,
                        "images/s": parts * images / seconds,
                        "efficiency": parts * alone / (ranks * seconds),
                    }
                )
    return pd.DataFrame(rows)
