"""What can be wrong with models, tokenizers, adapters, rewards and the machine."""

from __future__ import annotations

from tests.mistakes import Mistake, adapter, copy, cut_weights, few_embeddings, judge, not_a_number

MODEL = "model=HERE/m"
WEIGHTS = "the weights of .*m cannot be read"
MODELS = [
    Mistake(
        "model: none", "sft", MODEL, ("model.path", "m does not exist", "wanted a directory or a Hugging Face name")
    ),
    Mistake(
        "model: no config",
        "sft",
        MODEL,
        ("model.path", "has no config.json", "wanted"),
        {"m": copy(drop=["config.json"])},
    ),
    Mistake(
        "model: config is no JSON",
        "sft",
        MODEL,
        ("m/config.json:1", "no JSON", "save the model again"),
        {"m": copy(write={"config.json": b"{"})},
    ),
    Mistake(
        "model: config is a list",
        "sft",
        MODEL,
        ("m/config.json", "type list", "wanted a JSON object"),
        {"m": copy(write={"config.json": b"[]"})},
    ),
    Mistake(
        "model: unknown kind",
        "sft",
        MODEL,
        ("model.path", "nonesuch", "name another"),
        {"m": copy(config={"model_type": "nonesuch"})},
    ),
    Mistake(
        "model: code of its own",
        "sft",
        MODEL,
        ("model.path", "custom code", "trust_remote_code=true"),
        {"m": copy(config={"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}})},
    ),
    Mistake(
        "model: no weights",
        "sft",
        MODEL,
        ("model.path", WEIGHTS, "save it again"),
        {"m": copy(drop=["model.safetensors"])},
    ),
    Mistake("model: weights cut", "sft", MODEL, ("model.path", WEIGHTS, "save it again"), {"m": cut_weights}),
    Mistake(
        "model: other shapes",
        "sft",
        MODEL,
        ("model.path", r"has shape \(.*wanted", "is config.json another"),
        {"m": copy(config={"hidden_size": 64})},
    ),
    Mistake(
        "model: a layer too many",
        "sft",
        MODEL,
        ("model.path", "lacks 9 weights", "is it whole"),
        {"m": copy(config={"num_hidden_layers": 3})},
    ),
    Mistake(
        "model: a layer too few",
        "sft",
        MODEL,
        ("model.path", "more layers than config.json", "wanted as many"),
        {"m": copy(config={"num_hidden_layers": 1})},
    ),
    Mistake("model: NaN", "sft", MODEL, ("model.path", "gives NaN", "wanted finite"), {"m": not_a_number}),
    Mistake(
        "tokenizer: none",
        "sft",
        MODEL,
        ("model.path", "tokenizer of .* cannot", "save it again"),
        {"m": copy(drop=["tokenizer.json", "tokenizer_config.json"])},
    ),
    Mistake(
        "tokenizer: broken",
        "sft",
        MODEL,
        ("tokenizer.json:1", "no JSON", "save the model again"),
        {"m": copy(write={"tokenizer.json": b"{"})},
    ),
    Mistake(
        "tokenizer: another model's",
        "sft",
        MODEL,
        ("model.path", "300 embeddings but", "is it another"),
        {"m": few_embeddings},
    ),
    Mistake(
        "tokenizer: of a reward model",
        "reward",
        f"{MODEL} start_from=model",
        ("model.path", "300 embeddings", "another"),
        {"m": few_embeddings},
    ),
    Mistake(
        "no end of sequence",
        "sft",
        MODEL,
        ("model.path", "no EOS token", "set eos_token"),
        {"m": copy(tokenizer_config={"eos_token": None})},
    ),
    Mistake(
        "no chat template",
        "sft",
        "model=SFT template.kind=chat",
        ("template.kind", "no chat template", "template.kind=text"),
    ),
    Mistake(
        "a broken chat template",
        "sft",
        f"{MODEL} template.kind=chat",
        ("template.kind", "cannot write the roles user", "change"),
        {"m": copy(write={"chat_template.jinja": b"{% for m in"})},
    ),
    Mistake(
        "a classifier as policy",
        "sft",
        "model=SCORER",
        ("model.path", "ForSequenceClassification", "wanted a language model"),
    ),
    Mistake(
        "a classifier that speaks",
        "generate",
        "policy=SCORER",
        ("model.path", "Classification", "wanted a language model"),
    ),
    Mistake("a policy as reward", "score", "reward=SFT", ("sft/model", "no scalar head", "stage=reward")),
    Mistake(
        "how a reward reads",
        "score",
        "reward=HERE/m",
        ("trained_input.json", "template: missing", "train .* again"),
        {"m": copy("reward/helpfulness", write={"trained_input.json": b'{"max_prompt_length": 8}'})},
    ),
    Mistake(
        "positions of a policy",
        "generate",
        "policy=HERE/m",
        ("data.max_prompt_length", "16 positions", "lower"),
        {"m": copy(config={"max_position_embeddings": 16})},
    ),
    Mistake(
        "positions of a reward",
        "score",
        "reward=HERE/m",
        ("rewards.max_length", "16 positions", "set rewards.max_length=16"),
        {"m": copy("reward/helpfulness", config={"max_position_embeddings": 16})},
    ),
    Mistake(
        "adapters nowhere",
        "sft",
        "model=SFT lora_r=4 lora_target_modules=[q_prj]",
        ("target_modules", "q_prj", "q_proj"),
    ),
    Mistake(
        "adapters: base gone",
        "sft",
        MODEL,
        ("model.path", "gone does not exist", "wanted"),
        {"m": adapter("HERE/gone")},
    ),
    Mistake(
        "adapters: of themselves", "sft", MODEL, ("model.path", "name themselves", "wanted"), {"m": adapter("HERE/m")}
    ),
    Mistake(
        "adapters: no weights",
        "sft",
        MODEL,
        ("model.path", "no adapter_model", "copy it again"),
        {"m": adapter("SFT", None)},
    ),
    Mistake(
        "adapters: cut",
        "sft",
        MODEL,
        ("model.path", "adapters of .* cannot be read", "again"),
        {"m": adapter("SFT", b"x")},
    ),
]

JUDGE = "reward=HERE/judge.py data.task_size=20"
REWARDS = [
    Mistake("reward: no such name", "score", "reward=lenght", ("reward 'lenght'", "neither", "did you mean 'length'")),
    Mistake("reward: no file", "score", JUDGE, ("judge.py", "no such file")),
    Mistake("reward: no function", "score", "reward=oracle:help", ("oracle", "no function 'help'", "it has reward")),
    Mistake(
        "reward: raises",
        "score",
        JUDGE,
        ("judge.py", "ValueError: no", r"judge\.py:2"),
        judge("raise ValueError('no')"),
    ),
    Mistake("reward: leaves", "score", JUDGE, ("judge.py", "SystemExit: 3", r":2"), judge("raise SystemExit(3)")),
    Mistake(
        "reward: NaN",
        "score",
        JUDGE,
        ("judge.py", "nan for completion 0", "wanted a finite float"),
        judge("return [float('nan')] * len(completions)"),
    ),
    Mistake(
        "reward: over float32",
        "score",
        JUDGE,
        ("judge.py", r"1e\+300", "wanted a finite float"),
        judge("return [1e300] * len(completions)"),
    ),
    Mistake(
        "reward: too few", "score", JUDGE, ("judge.py", "1 values for 20", "wanted one for each"), judge("return [1.0]")
    ),
    Mistake("reward: nothing", "score", JUDGE, ("judge.py", "a NoneType", "wanted a list"), judge("pass")),
    Mistake(
        "reward: words",
        "rl",
        f"model=SFT {JUDGE}",
        ("judge.py", "'good' for completion 0", "wanted a finite float"),
        judge("return ['good'] * len(completions)"),
    ),
    Mistake(
        "reward: eats its arguments",
        "score",
        JUDGE,
        ("judge.py", "0 values for 1 completions", r"tried on row .* before anything else"),
        judge("completions.clear(); return []"),
    ),
    Mistake(
        "reward: is a number",
        "score",
        JUDGE,
        ("judge.py", "is a int", "wanted a function"),
        {"judge.py": "reward = 7\n"},
    ),
    Mistake(
        "reward: another column",
        "score",
        JUDGE,
        ("judge.py", "it takes ground_truth, which no row has", "tried on row"),
        {"judge.py": "def mine(completions, ground_truth):\n    return [1.0] * len(completions)\n"},
    ),
    Mistake(
        "reward: syntax",
        "score",
        JUDGE,
        ("judge.py", "SyntaxError", r"judge\.py:1"),
        {"judge.py": "def reward(a b):\n"},
    ),
    Mistake(
        "reward: import",
        "evaluate",
        f"'policies={{sft: SFT}}' {JUDGE}",
        ("judge.py", "No module named 'nonesuch'", ":1"),
        {"judge.py": "import nonesuch\n"},
    ),
    *(
        Mistake(
            f"reward: tried first, {stage} {words}",
            stage,
            f"{words} {JUDGE}",
            ("judge.py", "ValueError: no", r"\(tried on row assistant/\w+/\d+ before anything else\)$"),
            judge("raise ValueError('no')"),
        )
        for stage, words in (
            *(("rl", f"model=SFT algo={algo}") for algo in ("alol", "dpo", "semi_offline", "esrl")),
            ("evaluate", "'policies={sft: SFT}'"),
            ("generate", "policy=SFT"),
        )
    ),
    Mistake(
        "reward: watched twice",
        "evaluate",
        "'policies={sft: SFT}' reward=length monitors=[length]",
        ("reward", "length is named twice", "wanted once"),
    ),
]

SYSTEM = [
    Mistake(
        "a place nobody may write", "sft", "runs_dir=/sys/tiffin", ("/sys/tiffin", "ermi", "choose another runs_dir=")
    ),
    Mistake(
        "a file for a directory",
        "sft",
        "runs_dir=HERE/runs",
        ("runs", "irectory|exists", "a file stands"),
        {"runs": "x"},
    ),
    Mistake(
        "results of nobody",
        "sft",
        "",
        ("default/sft", "results but not what made them", "remove it"),
        {"runs/default/sft/results.json": "{}"},
    ),
]
