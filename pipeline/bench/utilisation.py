"""Model FLOPs utilisation: the work that a model's mathematics asks for, against what the device can do.

Padding, layers computed again by checkpointing, normalisation and the optimizer count as no work. Source: Chowdhery
et al. (2022, PaLM, appendix B): 6 operations per weight and token, and those of attention, here half of them, for it
is causal. Logits are made for response tokens alone.
"""

from __future__ import annotations

import re

import torch
from torch import nn

from pipeline.bench.measure import Result
from pipeline.models.loading import hugging_face
from pipeline.models.policy import Policy
from pipeline.records import Batch

# Dense FLOP/s in bfloat16, and in float32 without TF32, by the makers' data sheets; None: it has none of its own. The
# first name that the device's own holds as words.
PEAKS: dict[str, tuple[float | None, float]] = {
    "B200": (2250e12, 75e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A30": (165e12, 10.3e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "V100": (None, 15.7e12),
    "T4": (None, 8.1e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
    "MI300X": (1307.4e12, 163.4e12),
}


def peak(device: str, precision: str) -> float | None:
    """FLOP/s that `device` reaches at most, None where it is not on record."""
    found = next((row for name, row in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)
    return None if found is None else found[0 if precision != "fp32" else 1]


def flops(policy: Policy, window: list[Batch]) -> float:
    """Operations of one step on `window`, forward and backward, where all weights of a causal model are trained."""
    lm = hugging_face(policy.model)
    config, head = lm.config.get_text_config(), lm.get_output_embeddings()
    matrices = sum(_size(part.weight) for part in lm.modules() if isinstance(part, nn.Linear) and part is not head)
    width = config.num_attention_heads * (
        config.to_dict().get("head_dim") or config.hidden_size // config.num_attention_heads
    )
    total = 0.0
    for batch in window:
        lengths = batch.input_mask.sum(1)  # (B,)
        total += 6.0 * matrices * int(lengths.sum())
        total += 6.0 * _size(head.weight) * int(batch.response_mask.sum())
        total += 6.0 * config.num_hidden_layers * width * int((lengths**2).sum())
    return total


def _size(weight: nn.Parameter) -> int:
    """Its elements, also where ZeRO-3 has shared them out."""
    return weight.ds_numel if hasattr(weight, "ds_numel") else weight.numel()


def utilisation(name: str, speed: float, precision: str) -> Result:
    """`speed`, FLOP/s of this process's device, as a result with its share of the peak, where that is known."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    most = None if torch.backends.cuda.matmul.allow_tf32 and precision == "fp32" else peak(device, precision)
    if most is None:
        return Result(
            name, "TFLOP/s", speed / 1e12, note=f"MFU not known: no peak of {device} in {precision} on record"
        )
    note = f"MFU {speed / most:.1%} of {most / 1e12:g} TFLOP/s ({device}, {precision})"
    return Result(name, "TFLOP/s", speed / 1e12, note=note, mfu=speed / most)
