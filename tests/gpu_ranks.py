"""What test_gpu.py runs on every GPU: `torchrun --nproc-per-node N -m tests.gpu_ranks FOLDER`.

Rank 0 writes the gradient norms of two steps under each ZeRO stage to FOLDER/seen.pt; any assertion that fails on a
rank fails the launch.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from pipeline.models.policy import Policy
from pipeline.trainer import group
from tests import tiny

STAGES = ("zero0", "zero2", "zero3")


def talk(ranks: group.Ranks) -> None:
    """Each thing that ranks say to each other, through the backend of their device."""
    assert dist.get_backend() == ("nccl" if ranks.device.type == "cuda" else "gloo")
    total = ranks.all_sum(torch.tensor([1.0 + ranks.rank, 10.0], device=ranks.device))
    assert total.tolist() == [ranks.world * (ranks.world + 1) / 2, 10.0 * ranks.world]
    assert total.device == ranks.device
    assert ranks.gather(ranks.rank) == [*range(ranks.world)]
    assert ranks.from_main(f"from {ranks.rank}") == "from 0"
    assert ranks.any(ranks.rank == ranks.world - 1) and not ranks.any(False)
    assert ranks.on_main(lambda: ranks.rank + 5) == 5
    ranks.barrier()


def norms(device: torch.device) -> dict[str, list[float]]:
    """Gradient norms of two steps, by stage, of a model that was read into the host's memory."""
    found = {}
    for zero in STAGES:
        trained = tiny.trainer(Policy(tiny.language_model("llama"), 64), zero)
        assert {buffer.device.type for buffer in trained.module.buffers()} == {device.type}
        found[zero] = tiny.two_steps(trained, tiny.items(9))
    return found


if __name__ == "__main__":
    joined = tiny.ranks()
    talk(joined)
    seen = norms(joined.device)
    if joined.main:
        torch.save(seen, Path(sys.argv[1]) / "seen.pt")
    joined.barrier()
