"""Our loop against a bare torch loop: what windows, engine, statistics and logging cost.

The bare loop is given the same micro-batches ready made, reads only the response positions as we do, and takes the
same step: cross entropy, clip, fused AdamW. Under bf16 it keeps float32 weights and computes in bf16 (autocast).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.bench.bed import Bed, algorithm_of, job, new_engine, new_policy, stepper
from pipeline.bench.measure import Goal, Result, Step, alternate, compared
from pipeline.models.loading import hugging_face
from pipeline.records import Batch
from pipeline.trainer.engine import PRECISIONS, adam_arguments, parameter_groups
from pipeline.trainer.loop import learning_rate

TIME = Goal(1.05)


def measure(bed: Bed) -> list[Result]:
    ours = job(
        bed, new_engine(bed, new_policy(bed)), algorithm_of("stage=sft"), bed.singles, bed.settings.train.batch_size
    )
    windows = [ours.windows.at(step) for step in range(bed.plan.warm + bed.plan.rounds * bed.plan.steps)]
    rounds = alternate(stepper(ours), bare_loop(bed, windows), bed.plan)
    return [compared("our loop / bare torch loop", "s", rounds, TIME)]


def bare_loop(bed: Bed, windows: list[list[Batch]]) -> Step:
    """A function that takes one step on the window of that number, with torch alone."""
    settings, device = bed.settings.optimizer, bed.ranks.device
    model = hugging_face(new_policy(bed).model).float().to(device)
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True, **adam_arguments(settings))
    dtype = PRECISIONS[bed.settings.train.precision]

    def step(number: int) -> None:
        window = [batch.to(device) for batch in windows[number]]
        n_terms = sum(int(batch.response_mask.sum()) for batch in window)
        model.train()
        for batch in window:
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                (response_nll(model, batch) / n_terms).backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(number, len(windows), settings)
        optimizer.step()
        optimizer.zero_grad()

    return step


def response_nll(model: nn.Module, batch: Batch) -> Tensor:
    """The sum of the response tokens' negative log-likelihood, logits made for response positions only."""
    hidden = model.base_model(input_ids=batch.input_ids, use_cache=False).last_hidden_state  # (B, L, H)
    place = torch.arange(hidden.shape[1], device=hidden.device)
    learned = batch.input_mask & (place >= batch.prompt_lengths[:, None])  # (B, L)
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])  # (N, V)
    return F.cross_entropy(logits.float(), batch.input_ids[learned], reduction="sum")
