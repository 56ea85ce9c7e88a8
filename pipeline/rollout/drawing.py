"""Drawing: each row's next token with that row's own random numbers, and what is known of the draw."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from pipeline.algorithms import capability
from pipeline.config.generation import GenerationSettings
from pipeline.data.sampling import generator
from pipeline.records import Request, SampleStats


class RowSampler:
    """Draws each row's next token with that row's own random numbers, so that the rest of the batch changes nothing."""

    def __init__(self, uniforms: Tensor, temperatures: Tensor, warpers: LogitsProcessorList):
        """`uniforms`: (B, T) in [0, 1), T the most new tokens; `temperatures`: (B, 1), above 0; `warpers`: narrow."""
        self.uniforms, self.temperatures, self.warpers = uniforms, temperatures, warpers
        self.tempered = bool((temperatures != 1.0).any())
        self.steps = 0  # that were drawn
        self.rows = torch.arange(len(uniforms), device=uniforms.device)  # those that go on, of all
        # (B, T, 4): the drawn token's log-probability under the tempered policy; entropy in nats and largest
        # probability of the untempered one; largest probability of what was drawn from
        self.known = torch.zeros(*uniforms.shape, 4, device=uniforms.device)

    def __call__(self, ids: Tensor, scores: Tensor) -> Tensor:
        """As transformers calls it, with the scores (B, V) of one step after another: what is drawn stays possible."""
        return torch.full_like(scores, -torch.inf).scatter(1, self.draw(scores)[:, None], 0.0)

    def draw(self, scores: Tensor) -> Tensor:
        """(B,): the next token of each row that goes on, by its scores (B, V)."""
        logps = scores.float().log_softmax(-1)  # of the untempered policy
        probs = logps.exp()
        plain = not self.warpers and not self.tempered
        tempered = (logps / self.temperatures).log_softmax(-1) if self.tempered else logps
        shares = self.warpers(None, tempered.clone()).softmax(-1) if self.warpers else tempered.exp()
        shares = (probs if plain else shares).double()
        # the distribution function is inverted: in float64, in which a row's sum grows with every likely token
        sums = shares.cumsum(-1)  # (B, V)
        points = self.uniforms[:, self.steps, None].to(sums) * sums[:, -1:]
        drawn = torch.searchsorted(sums, points, right=True)  # (B, 1): the first token whose sum exceeds the point
        entropies = -torch.where(logps > -torch.inf, probs * logps, 0.0).sum(-1)
        peaks = logps.amax(-1).exp(), shares.amax(-1).float()
        known = torch.stack((tempered.gather(1, drawn)[:, 0], entropies, *peaks), dim=1)
        self.known[self.rows, self.steps] = known
        self.steps += 1
        return drawn[:, 0]

    def keep(self, places: Tensor) -> None:
        """Only the rows at these places, of those that go on, go on."""
        self.rows, self.uniforms, self.temperatures = (
            one[places] for one in (self.rows, self.uniforms, self.temperatures)
        )

    def stats(self, lengths: Sequence[int], batch: int) -> list[SampleStats]:
        """Of each row, whose responses have `lengths` tokens, in the batch of that number.

        `drop` is known where every row was drawn for to the end of the longest, else NaN.
        """
        dropped = len(self.rows) < len(self.known)
        all_stats = []
        for steps, length in zip(self.known[:, : self.steps].cpu(), lengths, strict=True):  # (steps, 4)
            logps, entropies, peaks, _ = steps[:length].unbind(1)
            # every step of the batch, those after this row's end too
            drop = float("nan") if dropped else capability.drop_score(steps[:, 3])
            entropy, confidence = float(entropies.double().mean()), capability.confidence(peaks)
            all_stats.append(SampleStats(logps.clone(), entropy, confidence, drop, batch))
        return all_stats


def row_sampler(
    requests: Sequence[Request], settings: GenerationSettings, seed: int, device: torch.device
) -> RowSampler:
    """Draws the responses to `requests`, row by row."""
    generators = [
        generator("response", seed, (request.example.id, request.prompt_ids, request.first + copy))
        for request in requests
        for copy in range(len(request.temperatures))
    ]
    uniforms = torch.stack([torch.rand(settings.max_new_tokens, generator=one) for one in generators])
    temperatures = torch.tensor([[level] for request in requests for level in request.temperatures])
    warpers = LogitsProcessorList()
    if settings.top_k > 0:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return RowSampler(uniforms.to(device), temperatures.to(device), warpers)
