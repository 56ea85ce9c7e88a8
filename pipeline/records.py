"""The records that packages pass to one another, each field with its type, shape and meaning.

Shapes: B sequences of a micro-batch, L tokens the model reads, T response tokens, P prompt tokens; S tokens of static
responses, M masked ones among them in all, n tokens drawn for each, V the vocabulary.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # shapes and types only: the command line answers without loading torch
    import torch
    from torch import Tensor


class Message(NamedTuple):
    """One turn of a chat; `role` is system, developer, user, assistant or tool.

    Messages that differ in weight and reward alone are equal: a model reads the same.
    """

    role: str
    content: str
    more: str = ""  # JSON text of a mapping: what a chat template is given beside these two, as tool_calls; "": nothing
    weight: float | None = None  # of a turn of the assistant: 0 is not learned, 1 is
    reward: float | None = None  # of a turn of the assistant by itself

    def given(self) -> dict[str, Any]:
        """The message as a chat template is given it, and as files have it, weight and reward aside."""
        return {"role": self.role, "content": self.content} | (json.loads(self.more) if self.more else {})

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Message) and self[:3] == other[:3]

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self[:3])

    def __repr__(self) -> str:
        """Of what is read alone, as splits and caches go by it."""
        read = {"role": self.role, "content": self.content} | ({"more": self.more} if self.more else {})
        return f"Message({', '.join(f'{name}={value!r}' for name, value in read.items())})"


@dataclass(frozen=True)
class Chat:
    """Turns, with what their chat template is given beside them; a prompt without that is the turns alone."""

    turns: tuple[Message, ...]
    tools: str = ""  # JSON text of a list
    arguments: str = ""  # JSON text of a mapping: variables of the template, as enable_thinking

    def __len__(self) -> int:
        return len(self.turns)

    def __iter__(self) -> Iterator[Message]:
        return iter(self.turns)

    def __getitem__(self, place: Any) -> Any:
        """One turn; of a slice the Chat of these turns."""
        found = self.turns[place]
        return replace(self, turns=found) if isinstance(place, slice) else found


Answer = str | Message  # a response: its text, or, where that is not all, as of a call of tools, the message


def text_of(answer: Answer) -> str:
    """An answer as text for whoever reads no messages: the content, then a line of JSON for each call of a tool."""
    if isinstance(answer, str):
        return answer
    calls = [json.dumps(call, ensure_ascii=False) for call in answer.given().get("tool_calls", ())]
    return "\n".join([answer.content, *calls] if answer.content else calls)


@dataclass(frozen=True)
class Example:
    """One row of data, whatever the stage. Absent columns are None or empty."""

    id: str
    prompt: str | tuple[Message, ...] | Chat
    completion: Answer | None = None
    references: tuple[str, ...] = ()
    candidates: tuple[str, ...] = ()  # best first
    candidate_rewards: tuple[float, ...] = ()
    chosen: Answer | None = None
    rejected: Answer | None = None
    chosen_reward: float | None = None
    rejected_reward: float | None = None
    margin: float | None = None
    reward: float | None = None
    rewards: Mapping[str, float] = field(default_factory=dict)
    source: str = ""
    correctness: float | None = None  # of a pair: 1 where its two rewards can be trusted, else only its order
    turn_weight: float | None = None  # of the completion's message, as `Message.weight`
    columns: Mapping[str, Any] = field(default_factory=dict)  # the row's further columns, which rewards are given
    candidate_scores: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)  # by name, one per candidate
    unfinished: tuple[str, ...] = ()  # texts among its responses that were cut off before they ended


@dataclass(frozen=True)
class Row:
    """One sequence ready for the model: ids only, already truncated; `response_ids` ends with EOS unless cut off."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    cut_prompt: bool = False
    cut_response: bool = False
    learned: tuple[bool, ...] = ()  # for each of `response_ids` whether it is learned; (): all are
    spelled: bool = False  # a special token is spelled in its texts, and is plain text to the model
    own_end: bool = False  # the response brought the token that ends it along as text
    unfinished: bool = False  # the response was cut off when it was written
    cut_text: bool = False  # cut_response, and not of the token that ends it alone

    def __len__(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)


@dataclass(frozen=True)
class Item:
    """What one draw of the sampler yields: one Row, or two (chosen, rejected), and the numbers that go with it."""

    example: Example
    rows: tuple[Row, ...]
    numbers: Mapping[str, float] = field(default_factory=dict)  # reward, value, margin ...
    ref_logp: tuple[Tensor, ...] = ()  # one (T_row,) float32 per row
    static_rows: tuple[Row, ...] = ()  # static responses, of which one at a time is read beside the first row


@dataclass(frozen=True)
class StaticBatch:
    """The static response of each sequence, fixed but for its masked tokens, in whose places others are drawn."""

    ids: Tensor  # (B, S) int64, the response itself
    shown_ids: Tensor  # (B, S) int64: the same as the model reads them, [MASK] where one is masked
    mask: Tensor  # (B, S) bool, True on its tokens and their EOS
    masked: Tensor  # (B, S) bool, True where the model reads [MASK] and a token is drawn
    uniforms: Tensor  # (M, n) float32 in [0, 1), which decide the draws of each masked token, in row-major order
    suppressed: Tensor  # (V,) bool: ids that are never drawn
    rewards: Tensor | None = None  # (B, n) float32, of the n compositions; 0 for fillers

    def to(self, device: torch.device) -> StaticBatch:
        """The same on `device`."""
        return _moved(self, device)


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank. Sequences of pairs come as all first rows, then all second rows.

    Masks are built from lengths. A filler sequence, which keeps ranks in step, has an all-False mask.

    A causal model reads the static responses in rows of their own: `input_ids` then has 2B rows.
    """

    items: tuple[int, ...]  # index in the data set of each item, fillers excluded
    input_ids: Tensor  # (B, L) int64: prompt + response for a causal model, the prompt for an encoder-decoder
    input_mask: Tensor  # (B, L) bool
    prompt_lengths: Tensor  # (B,) int64, of each row of a causal model; of an encoder's, of each sequence
    response_ids: Tensor  # (B, T) int64
    response_mask: Tensor  # (B, T) bool, True on response tokens and their EOS
    numbers: Mapping[str, Tensor] = field(default_factory=dict)  # (items,) float32 each
    ref_logp: Tensor | None = None  # (B, T) float32, zero where response_mask is False
    shown_ids: Tensor | None = None  # (B, T) int64: response_ids as the model reads them, [MASK] where one is masked
    static: StaticBatch | None = None
    owners: Tensor | None = None  # (B,) int64: each sequence's row of an encoder, whose input_ids then hold each prompt
    # once; of a causal model the first row that has the same prompt, which is then read there alone
    suppressed: Tensor | None = None  # (V,) bool: ids that the policy never says, whose probability is 0

    @property
    def sequence_mask(self) -> Tensor:
        """(B,) bool, False for fillers."""
        return self.response_mask.any(1)

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device) -> Any:
    """`value`, a tensor or a record or mapping of tensors, on `device`; what holds no tensor stays as it is."""
    if isinstance(value, (Batch, StaticBatch)):
        return replace(value, **{one.name: _moved(getattr(value, one.name), device) for one in fields(value)})
    if isinstance(value, Mapping):
        return {name: _moved(one, device) for name, one in value.items()}
    return value if value is None or isinstance(value, tuple) else value.to(device, non_blocking=True)


class Needs(NamedTuple):
    """What an algorithm wants computed before training starts."""

    rewards: bool = False
    values: bool = False
    ref_logp: bool = False
    output: str = "logp"  # what the policy has to compute: see Policy.forward
    # what the number `advantage` is the reward over: value | prompt | group | rows; "": nobody asks
    baseline: str = ""
    samples: bool = False  # rewards of several responses of the reference to each prompt
    weighed_by: str | None = None  # the number of an item that decides how often it is drawn; None: all alike


class Stat(NamedTuple):
    """An additive statistic: micro-batches, ranks and steps are merged by adding `sums`, reduced only to be written.

    `sums` is (3,) float64: count, sum, sum of squares. `kind` names the reduction: mean; std (population);
    ess, the effective sample share (sum w)^2 / (n sum w^2) in (0, 1].
    """

    kind: str
    sums: Tensor


class SampleStats(NamedTuple):
    """What plain sampling knows of one response of T tokens."""

    logps: Tensor  # (T,) float32, of the tokens, under the policy at the temperature they were drawn at
    entropy: float  # mean nats per token, of the untempered policy
    confidence: float  # 1 + mean of m ln m, m the largest probability at each token
    # 1 + mean of m e^m over all steps of the batch, m of what was drawn from: see algorithms/capability.py; NaN where
    # rows left the batch as they ended
    drop: float
    batch: int  # which batch it was decoded in


class Request(NamedTuple):
    """One prompt and the responses that are wanted to it, one per temperature."""

    example: Example
    prompt_ids: tuple[int, ...]
    temperatures: tuple[float, ...]
    first: int = 0  # the number of the first of them, which is part of the random seed


class Completion(NamedTuple):
    """One response's ids, with the token that ends it, and its statistics where it comes from plain sampling."""

    ids: list[int]
    stats: SampleStats | None


@dataclass(frozen=True)
class Response:
    """One sampled or decoded response with what is known of it."""

    example: Example
    prompt_text: str
    text: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]  # the last one ends it, if finished
    finished: bool  # a token that ends responses was generated
    stats: SampleStats | None = None


@dataclass(frozen=True)
class Scores:
    """What the reward models say of N responses, in the order given; None where one does not judge a response."""

    raw: Mapping[str, Sequence[float | None]]  # by reward name, before normalisation
    normalised: Mapping[str, Sequence[float | None]]
    total: Sequence[float] | None  # the weighted sum: the reward; None where a part of it judges no new text


# reward(prompts, completions, **columns) -> for each completion a float, or None where it does not judge the row
RewardFunction = Callable[..., list[float | None]]

# what rewards are called with beside the data's own columns, none of which may have such a name
TRL_ARGUMENTS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
REWARD_ARGUMENTS = (*TRL_ARGUMENTS, "raw_prompt", "references", "id", "source")
