"""A model's card, the README.md of its directory, for people and the Hub: facts in, text out; no dates, no paths."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.yaml_text import as_flow

CALLS = Path(__file__).with_name("calls")  # how each kind of model is called
PIPELINES = {
    "chat": "text-generation",
    "text": "text-generation",
    "encoder_decoder": "text2text-generation",
    "reward": "text-classification",
}
PAPERS = {  # by what algo= and the stages are called
    "alol": "Baheti et al., ICLR 2024, arXiv 2305.14718",
    "r_gold": "Pang and He, ICLR 2021, arXiv 2009.07839",
    "dpo": "Rafailov et al., NeurIPS 2023, arXiv 2305.18290",
    "kto": "Ethayarajh et al., ICML 2024, arXiv 2402.01306",
    "bco": "Jung et al., ACL 2025, arXiv 2404.04656",
    "rebel": "Gao et al., NeurIPS 2024, arXiv 2404.16767",
    "agro": "Tang et al., AISTATS 2026, arXiv 2503.19612",
    "nca": "Chen et al., NeurIPS 2024, arXiv 2402.05369",
    "semi_offline": "Chen et al., ICML 2023, arXiv 2306.09712",
    "esrl": "Wang et al., AAAI 2024, arXiv 2308.02223",
    "reinforce": "Williams, Machine Learning 1992",
    "mrt": "Shen et al., ACL 2016, arXiv 1512.02433",
    "rft": "Dong et al., RAFT, arXiv 2304.06767; Gulcehre et al., ReST, arXiv 2308.08998",
    "dft": "Wu et al., arXiv 2508.05629",
    "iw_sft": "Qin and Springenberg, arXiv 2507.12856",
    "awr": "Peng et al., arXiv 1910.00177",
    "asymre": "Arnal et al., NeurIPS 2025, arXiv 2506.20520",
    "topr": "Le Roux et al., arXiv 2503.14286",
    "grpo_offline": "Shao et al., DeepSeekMath, arXiv 2402.03300, of whose group advantages it is made",
    "dro": "Richemond et al., arXiv 2405.19107",
    "qrpo": "Matrenok et al., arXiv 2507.08068",
    "a_star_po": "Brantley et al., NeurIPS 2025, arXiv 2505.20686",
}
TRAINED = "Trained with Tiffin."
AS_ADAPTERS = ", as LoRA adapters"
MOVED = " The model below them is a directory: if it was moved, write its new place into `adapter_config.json`."
PAPERS |= dict.fromkeys(("a_lol_ref_free", "a_lol_seq", "a_lol_kl", "r_lol"), PAPERS["alol"])


@dataclass(frozen=True)
class Facts:
    """All that a card says."""

    name: str  # run/stage
    kind: str  # a file of calls/
    adapters: bool
    start: str  # in words: what training began with
    base: str | None  # the hub name of the model that it goes back to
    method: str  # the stage, or algo=
    described: str  # the method in one sentence
    datasets: tuple[str, ...]  # hub names
    data: Mapping[str, str]  # what of it -> in words
    settings: Mapping[str, object]  # those that are not the defaults
    results: Mapping[str, tuple[float | None, float | None]]  # tag -> before the first step, of these weights
    step: int  # at which these weights were
    steps: int
    reads: str  # one sentence: template, end of response
    example: str  # a prompt with a response as the model reads it
    scale: str | None  # of a reward model: what its numbers are
    versions: Mapping[str, str]


def text(facts: Facts) -> str:
    """The card. What it says of the call works where DIRECTORY is replaced."""
    parts = [
        _front(facts),
        f"# {facts.name}",
        f"{_what(facts)} {TRAINED}",
        f"## How to call it\n\n```python\n{call(facts.kind, facts.adapters)}```",
        f"## How it reads\n\n{_reading(facts)}",
        f"## Training\n\n{_training(facts)}",
        f"## Results on held-out data\n\n{_results(facts)}",
        "## Versions\n\n" + ", ".join(f"{name} {version}" for name, version in facts.versions.items()),
    ]
    return "\n\n".join(parts) + "\n"


def call(kind: str, adapters: bool) -> str:
    """Python that calls the model in DIRECTORY."""
    code = (CALLS / f"{kind}.py").read_text(encoding="utf-8")
    if not adapters:
        # a whole model says itself what its adapters would have to be told
        return re.sub(r"\(\s*directory, num_labels[^()]*\)", "(directory)", code)
    code = re.sub(
        r"from transformers import (Auto)(Model\w+), ", r"from peft import \1Peft\2\nfrom transformers import ", code
    )
    if ".generate(" in code:  # peft reads how its base generates
        code = code.replace("import AutoTokenizer\n", "import AutoTokenizer, GenerationConfig\n")
        own = "model.generation_config = GenerationConfig.from_pretrained(directory)\n"
        code = re.sub(r"(\nmodel = .*\n)", rf"\1{own}", code)
    return code.replace(" AutoModelFor", " AutoPeftModelFor")


def exported(text: str, merged: bool, said: str) -> str | None:
    """The card of a trained model as that of what was made of it; None where `text` is no card of a training.

    Args:
        merged: adapters were added to the model below them.
        said: what was done, in sentences.
    """
    for kind in PIPELINES:
        for adapters in (True, False):
            if call(kind, adapters) in text:
                whole = _without_adapters(text, kind) if merged and adapters else text
                return whole.replace(TRAINED, f"{TRAINED} {said}", 1)
    return None


def _without_adapters(text: str, kind: str) -> str:
    text = text.replace(call(kind, True), call(kind, False), 1).replace(AS_ADAPTERS, "", 1).replace(MOVED, "", 1)
    return text.replace("library_name: peft", "library_name: transformers", 1).replace(", lora]", "]", 1)


def of_another(source: str, said: str) -> str:
    """The card of what was made of a model that came without one."""
    front = f"---\nlibrary_name: transformers\nbase_model: {source}\n---" if source.count("/") == 1 else ""
    return f"{front}\n\n# {source}\n\nMade of {source} with Tiffin. {said}\n".lstrip()


def _front(facts: Facts) -> str:
    kind = "reward-model" if facts.kind == "reward" else facts.method.replace("_", "-")
    front: dict[str, object] = {"library_name": "peft" if facts.adapters else "transformers"}
    front |= {"base_model": facts.base} if facts.base else {}
    front |= {"datasets": [*facts.datasets]} if facts.datasets else {}
    front |= {"pipeline_tag": PIPELINES[facts.kind], "tags": ["tiffin", kind, *(["lora"] if facts.adapters else [])]}
    front = {name: f"[{', '.join(value)}]" if isinstance(value, list) else value for name, value in front.items()}
    return "---\n" + "".join(f"{name}: {value}\n" for name, value in front.items()) + "---"


def _what(facts: Facts) -> str:
    kinds = {
        "chat": "A language model that answers chats",
        "text": "A language model that continues texts",
        "encoder_decoder": "An encoder-decoder that answers chats",
        "reward": "A reward model: one number for a chat that ends with an answer, higher is better",
    }
    what = f"{kinds[facts.kind]}{AS_ADAPTERS if facts.adapters else ''}. Training began with {facts.start}."
    if facts.adapters and facts.base is None:
        what += MOVED
    return what


def _reading(facts: Facts) -> str:
    lines = [f"{facts.reads[0].upper()}{facts.reads[1:]}."]
    if facts.kind != "text":
        lines[0] += " `tokenizer.apply_chat_template` writes that; a prompt and its response are, with all signs shown:"
        lines.append(f"    {json.dumps(facts.example, ensure_ascii=False)}")
    return "\n\n".join([*lines, facts.scale] if facts.scale else lines)


def _training(facts: Facts) -> str:
    paper = f" ({PAPERS[facts.method]})" if facts.method in PAPERS else ""
    lines = [f"- method: `{facts.method}`{paper}. {facts.described}"]
    lines += [f"- {name}: {words}" for name, words in facts.data.items()]
    if facts.settings:
        given = ", ".join(f"`{name}={as_flow(value)}`" for name, value in facts.settings.items())
        lines.append(f"- settings that are not the defaults: {given}")
    return "\n".join(lines)


def _results(facts: Facts) -> str:
    verdict = f"These are the weights of step {facts.step} of {facts.steps}."
    if facts.step == 0:
        verdict = f"**No evaluation in {facts.steps} steps was better than the start: these weights are the start's.**"
    rows = [f"| `{tag}` | {_number(before)} | {_number(after)} |" for tag, (before, after) in facts.results.items()]
    return "\n".join([verdict, "", "| | at the start | these weights |", "|---|---|---|", *rows]) if rows else verdict


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"
