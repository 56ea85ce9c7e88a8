"""Rows as the methods' own releases ship them: hh-rlhf transcripts, the two A-LOL kinds, the ranked-candidates TSV."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.data import fields
from pipeline.data.columns import Fields, ranked
from pipeline.data.fields import Columns, RowError
from pipeline.data.transcripts import ASSISTANT, HUMAN, answer_of
from pipeline.records import Message

TURN_TAGS = {"<|prompter|>": "user", "<|assistant|>": "assistant"}
REFERENCES_MARK, REFERENCE_MARK = "<#REFS#>", "<#REF#>"
QUERY_MARK, CANDIDATE_MARK, SCORE_MARK = "<#QUERY#>", "<#SEP#>", "<#SCORE#>"


def hh(row: Columns) -> Fields:
    """Two whole transcripts; the prompt is what they share, up to and including the last "Assistant:".

    Where they part before their last turn, the answers end where the human speaks again.
    """
    chosen, rejected = fields.text(row, "chosen"), fields.text(row, "rejected")
    cut = _shared_length(chosen, rejected)
    if cut == 0:
        raise RowError(f"chosen, rejected: share no beginning up to {ASSISTANT!r}, wanted two answers to one prompt")
    return {
        "prompt": chosen[:cut],
        "chosen": fields.checked_text(answer_of(chosen[cut:]), "chosen, its last answer"),
        "rejected": fields.checked_text(answer_of(rejected[cut:]), "rejected, its last answer"),
    }


def parts_early(row: Columns) -> bool:
    """Whether a transcript of `hh` goes on with the human behind the answer that is read."""
    chosen, rejected = fields.text(row, "chosen"), fields.text(row, "rejected")
    cut = _shared_length(chosen, rejected)
    return HUMAN in chosen[cut:] or HUMAN in rejected[cut:]


def prefix_suffix(row: Columns) -> Fields:
    """prefix: the list of tagged turns, twice; suffix: chosen, rejected; reward: theirs. The source is meta.path."""
    prefix = fields.checked_list(row.get("prefix"), "prefix", "two lists of turns", 2)
    suffix = fields.checked_list(row.get("suffix"), "suffix", "two texts: chosen, rejected", 2)
    reward = fields.checked_list(row.get("reward"), "reward", "two numbers: chosen, rejected", 2)
    if prefix[0] != prefix[1]:
        raise RowError("prefix: the two lists of turns differ, wanted one prompt for both suffixes")
    meta = row.get("meta")
    origin = fields.optional_text(meta, "path") if isinstance(meta, Mapping) else None
    return {
        "prompt": _tagged_turns(prefix[0]),
        "chosen": fields.checked_text(suffix[0], "suffix[0]"),
        "rejected": fields.checked_text(suffix[1], "suffix[1]"),
        "chosen_reward": fields.checked_number(reward[0], "reward[0]"),
        "rejected_reward": fields.checked_number(reward[1], "reward[1]"),
        "reward": None,
        "source": fields.optional_label(row, "source") or origin,
    }


def gen_task(row: Columns) -> Fields:
    """`references` is ONE text, the logged response; final_reward is its reward, the other components its rewards."""
    response = fields.text(row, "references")
    components = fields.named_numbers(row, "reward_components")
    if "final_reward" not in components:
        raise RowError("reward_components: no final_reward, wanted {..., final_reward: a finite number}")
    return {
        "prompt": fields.text(row, "prompt_or_input_text"),
        "completion": response,
        "references": (),
        "reward": components.pop("final_reward"),
        "rewards": components,
    }


def candidates_tsv(row: Columns) -> Fields:
    """Source, reference and ranked candidates. The completion is the reference; candidates are ordered by score.

    A row of two columns, as in the files to predict from, has no candidates.
    """
    reference = fields.text(row, "data_gt")
    given = {"prompt": fields.text(row, "data_src"), "completion": reference}
    if "data_kd" not in row:
        return given
    rest, others = _split_once(fields.text(row, "data_kd"), REFERENCES_MARK)
    references = (reference, *(others.split(REFERENCE_MARK) if others is not None else ()))
    before, after = _split_once(rest, QUERY_MARK)
    pieces = (before if after is None else after).split(CANDIDATE_MARK)
    scored = [_candidate(piece, f"data_kd, candidate {i}") for i, piece in enumerate(pieces, start=1)]
    checked = tuple(dict.fromkeys(fields.checked_text(one, "data_kd, references") for one in references))
    return given | ranked(*zip(*scored, strict=True)) | {"references": checked}


def _shared_length(chosen: str, rejected: str) -> int:
    """How many characters both share up to the end of the last mark they share; 0 if they share no mark."""
    shared, at = 0, chosen.find(ASSISTANT)
    while at >= 0 and rejected.startswith(chosen[: at + len(ASSISTANT)]):
        shared = at + len(ASSISTANT)
        at = chosen.find(ASSISTANT, shared)
    return shared


def _tagged_turns(turns: object) -> tuple[Message, ...]:
    """Chat messages of `<|prompter|>...`, `<|assistant|>...`; the last turn is a bare `<|assistant|>`."""
    listed = fields.checked_list(turns, "prefix[0]", "a list of turns")
    if len(listed) < 2 or listed[-1] != "<|assistant|>":
        raise RowError("prefix[0]: wanted turns of which the last is a bare '<|assistant|>'")
    return tuple(_tagged_turn(turn, f"prefix[0][{i}]") for i, turn in enumerate(listed[:-1]))


def _tagged_turn(turn: object, place: str) -> Message:
    tag = next((tag for tag in TURN_TAGS if isinstance(turn, str) and turn.startswith(tag)), None)
    if tag is None:
        raise RowError(f"{place}: {fields.described(turn)}, wanted text that begins with {' or '.join(TURN_TAGS)}")
    return Message(TURN_TAGS[tag], fields.checked_text(turn.removeprefix(tag), place))


def _candidate(piece: str, place: str) -> tuple[str, float]:
    candidate, score = _split_once(piece, SCORE_MARK)
    if score is None:
        raise RowError(f"{place}: no {SCORE_MARK}, wanted candidate{SCORE_MARK}score")
    return fields.checked_text(candidate, place), fields.checked_number(score, f"{place}, score")


def _split_once(whole: str, mark: str) -> tuple[str, str | None]:
    """(before, after) of `mark`; after is None where there is no mark. Twice is an error."""
    parts = whole.split(mark)
    if len(parts) > 2:
        raise RowError(f"data_kd: {mark} stands {len(parts) - 1} times in one place, wanted once")
    return parts[0], parts[1] if len(parts) == 2 else None
