"""One optimizer step side by side: A-LOL's against SFT's, and our loop's against one in bare torch.

The bare loop is given the same micro-batches ready made, reads only the response positions as we do, and takes the
same step: cross entropy, clip, fused AdamW. Under bf16 it keeps float32 weights and computes in bf16 (autocast).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.bench.measure import Goal, Result, alternate, compared, peak_megabytes
from pipeline.bench.setup import Setup, alol_trainer, new_policy, sft_trainer, singles, stepper
from pipeline.bench.utilisation import flops, utilisation
from pipeline.models.loading import hugging_face
from pipeline.records import Batch
from pipeline.trainer.optimizer import PRECISIONS, adam_arguments, parameter_groups
from pipeline.trainer.schedule import learning_rate

TIME, MEMORY = Goal(1.05), Goal(1.02)


def against_sft(setup: Setup) -> list[Result]:
    """Time and memory of A-LOL's step and SFT's: the same rows in the same micro-batches."""
    items = singles(setup)
    sft, alol = sft_trainer(setup, items), alol_trainer(setup, items)
    name, (ours, other) = "A-LOL step / SFT step", (stepper(alol), stepper(sft))
    time = compared(name, "s", alternate(ours, other, setup.timing), TIME)
    steps = range(setup.settings.rounds)
    peaks = [(peak_megabytes(partial(ours, step)), peak_megabytes(partial(other, step))) for step in steps]
    return [time, compared(f"{name}, peak memory beyond the model's own", "MB", peaks, MEMORY)]


def against_bare(setup: Setup) -> list[Result]:
    """What windows, engine, metrics and logging cost."""
    ours = sft_trainer(setup, singles(setup))
    windows = [ours.windows.at(step) for step in range(setup.timing.total)]
    rounds = alternate(stepper(ours), bare_loop(setup, windows), setup.timing)
    time = compared("our loop / bare torch loop", "s", rounds, TIME)
    work = statistics.fmean(flops(ours.engine.module, window) for window in windows[setup.timing.warm :])
    return [time, utilisation("SFT step, of one process", work / time.ours, setup.settings.train.precision)]


def bare_loop(setup: Setup, windows: list[list[Batch]]) -> Callable[[int], None]:
    """A function that takes one step on the window of that number, with torch alone."""
    settings, device = setup.settings.optimizer, setup.ranks.device
    model = hugging_face(new_policy(setup).model).float().to(device)
    groups = parameter_groups(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, fused=True, **adam_arguments(settings))
    dtype = PRECISIONS[setup.settings.train.precision]

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
    positions = torch.arange(hidden.shape[1], device=hidden.device)
    learned = batch.input_mask & (positions >= batch.prompt_lengths[:, None])  # (B, L)
    logits = model.lm_head(hidden[:, :-1][learned[:, 1:]])  # (N, V)
    return F.cross_entropy(logits.float(), batch.input_ids[learned], reduction="sum")
