"""What can be wrong with the words, the YAML and the files that settings name."""

from __future__ import annotations

from tests.mistakes import Mistake

C = "command line"
BARE = '{"zero_optimization": {"stage": 0}}'


def ds(text: str) -> dict[str, str]:
    return {"ds.json": text}


CONFIGURATION = [
    Mistake("unknown key", "sft", "optimizer.learning_rte=1", (C, "no such setting", "did you mean .*learning_rate")),
    Mistake("text for a number", "sft", "batch_size=many", (C, "batch_size: 'many' is text", "wanted a whole number")),
    Mistake("a fraction for a count", "sft", "batch_size=1.5", (C, "batch_size: 1.5", "wanted a whole number")),
    Mistake("nothing for a count", "sft", "batch_size=", (C, "batch_size: null", "wanted a whole number")),
    Mistake("a negative rate", "sft", "learning_rate=-1e-5", (C, "learning_rate: -1e-05", "wanted more than 0")),
    Mistake("an infinite rate", "sft", "learning_rate=.inf", (C, "learning_rate: inf", "wanted a finite number")),
    Mistake("a warm-up of twice the run", "sft", "warmup_ratio=2", (C, "warmup_ratio: 2", "wanted at most 1")),
    Mistake("dropout of everything", "sft", "lora_dropout=1.0", (C, r"lora.dropout: 1.0", "wanted less than 1")),
    Mistake("beta 1", "sft", "adam_beta2=1.0", (C, "adam_beta2: 1.0", "wanted less than 1")),
    Mistake("a negative number of rows", "sft", "data.max_rows=-3", (C, "max_rows: -3", "wanted at least 1")),
    Mistake("a seed too large", "sft", "seed=99999999999999999999", (C, "seed: 9999", "wanted at most")),
    Mistake("no such port", "sft", "master_port=99999", (C, "master_port: 99999", "wanted at most 65535")),
    Mistake(
        "both batch limits",
        "sft",
        "micro_batch_size=4 train.max_tokens=99",
        (C, "wanted one of micro_batch_size and max_tokens", "the other null"),
    ),
    Mistake(
        "epochs and steps",
        "sft",
        "max_steps=1 num_train_epochs=1.0",
        (C, "wanted one of num_train_epochs and max_steps", "the other null"),
    ),
    Mistake(
        "a remainder",
        "sft",
        "batch_size=16 micro_batch_size=3",
        ("train.batch_size", "16 is no multiple of .* micro_batch_size 3", "change either"),
    ),
    Mistake("no such algorithm", "rl", "algo=ppo2", (C, "algo=ppo2", "wanted one of .*alol")),
    Mistake("no such recipe", "sft", "recipe=nothing", (C, "recipe=nothing", "wanted one of abstracts")),
    Mistake("no such sharding", "sft", "zero=zero9", ("train.zero", "'zero9' is no file", "wanted one of zero0")),
    Mistake("sharding: no file", "sft", "zero=HERE/ds.json", ("train.zero", "ds.json' is no file", "wanted one of")),
    Mistake(
        "sharding: no JSON",
        "sft",
        "zero=HERE/ds.json",
        ("ds.json:2", "Expecting", "wanted a DeepSpeed configuration"),
        ds('{"zero_optimization":\n {"stage": 0,}}'),
    ),
    Mistake(
        "sharding: a list",
        "sft",
        "zero=HERE/ds.json",
        ("ds.json", "zero_optimization.stage is None", "copy a file of ds_configs"),
        ds("[]"),
    ),
    Mistake(
        "sharding: stage 7",
        "plan",
        "zero=HERE/ds.json",
        ("ds.json", "stage is 7", "wanted 0, 1, 2 or 3"),
        ds(BARE.replace("0", "7")),
    ),
    Mistake(
        "sharding: an unknown key",
        "sft",
        "zero=HERE/ds.json",
        ("train.zero: .*ds.json", "stge: 1", "wanted"),
        ds(BARE.replace('"stage"', '"stge": 1, "stage"')),
    ),
    Mistake(
        "sharding: another's key",
        "sft",
        "zero=HERE/ds.json",
        ("ds.json", "optimizer is set there", "remove it"),
        ds(BARE.replace("{", '{"optimizer": {}, ', 1)),
    ),
    Mistake(
        "sharding: auto",
        "sft",
        "zero=HERE/ds.json",
        ("ds.json", "reduce_bucket_size is 'auto'", "remove it"),
        ds(BARE.replace('"stage"', '"reduce_bucket_size": "auto", "stage"')),
    ),
    Mistake("fp16 without a GPU", "sft", "fp16=true", ("train.precision", "fp16 needs a GPU", "use bf16 or fp32")),
    Mistake("heads", "sft", "model.scratch.num_heads=3", ("model.scratch", "32 is no multiple of .* 3", "change one")),
    Mistake("a vocabulary too small", "sft", "model.scratch.vocab_size=99", ("vocab_size", "99", "wanted over 260")),
    Mistake("the algorithm's range", "rl", "model=SFT clip=1.5", ("algorithm.settings", "clip: 1.5", "wanted null or")),
    Mistake("the algorithm's type", "rl", "model=SFT clip=wide", ("settings.clip", "'wide'", "wanted a number")),
    Mistake(
        "the algorithm's keys",
        "rl",
        "algorithm.settings.clp=0.2",
        (C, "settings.clp", "has the settings", "did you mean 'algorithm.settings.clip"),
    ),
    *(
        Mistake(name, "rl", f"algo={words}", (C, *says))
        for name, words, says in (
            ("more samples at least than at most", "esrl sampler.k_min=9", ("k_min is 9", "wanted at most k_max, 8")),
            ("no sample, and none left out", "esrl sampler.k_min=0", ("k_min is 0", "wanted both or neither")),
            ("a first number out of bounds", "esrl sampler.k=9", ("k is 9", "wanted a number from 2 .* to 8")),
            ("probes that use rewards", "esrl sampler.probe=2 sampler.capability=reward", ("probe is 2", "bias")),
            ("probes and a budget", "esrl sampler.probe=2 sampler.budget=64", ("probe is 2", "one of them null")),
            (
                "probes and a mean that holds them",
                "esrl sampler.probe=2 algorithm.settings.baseline=mean",
                ("sampler.probe: 2 with mean", "baseline=leave_one_out"),
            ),
            ("a budget of fixed numbers", "reinforce sampler.budget=64", ("budget is 64 with mode static", "dynamic")),
            ("a range upside down", "esrl 'sampler.reward_range=[1, 0]'", ("reward_range", "a low and a higher")),
            ("no such temperature", "esrl sampler.temperature_min=0", ("temperature_min: 0", "more than 0")),
        )
    ),
    *(
        Mistake(name, "rl", f"model=SFT reward=length algo={words}", says)
        for name, words, says in (
            (
                "one response to compare",
                "mrt sampler.k=1",
                ("sampler: 1 response", "mrt", "raise sampler.k"),
            ),
            (
                "one response and its own mean",
                "reinforce sampler.k=1 algorithm.settings.baseline=mean",
                ("sampler: 1 response", "baseline: mean", "set algorithm.settings.baseline=queue"),
            ),
            (
                "k1 in the loss",
                "reinforce algorithm.settings.kl_beta=0.1 algorithm.settings.kl_form=k1",
                ("kl_form: k1 with kl_in: loss", "wanted k3 there"),
            ),
            (
                "k3 in the reward",
                "reinforce kl_beta=0.1 kl_form=k3 algorithm.settings.kl_in=reward",
                ("kl_form: k3 with kl_in: reward", "no pull to the reference", "wanted k1 there"),
            ),
            ("nothing to learn", "reinforce algorithm.settings.rl_weight=0", ("rl_weight: 0", "sft_weight is 0 too")),
            (
                "responses over the budget",
                "reinforce train.max_tokens=50",
                ("train.max_tokens: 50", "may have 60 tokens", "generation.max_new_tokens"),
            ),
            (
                "batches that are dropped whole",
                "esrl_drop generation.batch_size=5",
                ("sampler.drop_share: 0.3 of a batch of 1", "raise generation.batch_size"),
            ),
        )
    ),
    Mistake("a weight of text", "rl", "'reward={length: big}'", (C, "reward.length: 'big' is text", "wanted a number")),
    Mistake("a weight of nothing", "score", "'reward={length: 0}'", ("reward.length", "weight is 0", "other than 0")),
    Mistake("a list of rewards", "score", "reward=[length]", (C, r"reward: \['length'\]", "wanted text or a mapping")),
    Mistake("a run above the runs", "sft", "run=../x", (C, r"run: '\.\./x'", "wanted the name of one folder")),
    Mistake("a run of two folders", "sft", "run=a/b", (C, "run: 'a/b'", "wanted the name of one folder")),
    Mistake("a name that is taken", "sft", "name=model", (C, "name: 'model'", "wanted another name")),
    Mistake("a reward without a name", "reward", "name=null", (C, "name: null", "wanted text")),
    Mistake("twice", "sft", "lr=1e-5 learning_rate=1e-4", (C, "learning_rate is given twice", "give it once")),
    Mistake("no value", "sft", "verbose", (C, "'verbose'", "wanted key=value")),
    Mistake("dashes", "sft", "--lr=1", (C, "'--lr=1'", "write settings without dashes")),
    Mistake("another stage's key", "sft", "sampling=priority", (C, "sampling: stage=sft has no", "belongs to rl")),
    Mistake("another tool's key", "sft", "gradient_accumulation_steps=4", (C, "is derived", "set train.batch_size")),
    Mistake("hostfile: none", "sft", "hostfile=HERE/hosts", ("launch.hostfile", "hosts is not a file", "wanted lines")),
    Mistake(
        "hostfile: broken",
        "sft",
        "hostfile=HERE/hosts",
        ("hosts:2", "'b slots=x'", "wanted 'host slots=8'"),
        {"hosts": "a slots=1\nb slots=x\n"},
    ),
    Mistake("one process of two", "sft", "gpus=2 launch.launcher=single", ("launch", "gpus=2", "wanted gpus=1")),
    Mistake("config: none", "sft", "config=HERE/c.yaml", ("c.yaml", "cannot be read", "wanted a YAML file")),
    Mistake(
        "config: broken", "sft", "config=HERE/c.yaml", ("c.yaml:3", "not YAML"), {"c.yaml": "train:\n  keep: [1\n"}
    ),
    Mistake(
        "config: a value for a section",
        "sft",
        "config=HERE/c.yaml",
        ("c.yaml:1", "train: 7", "wanted a mapping of settings such as train"),
        {"c.yaml": "train: 7\n"},
    ),
    Mistake("no such split", "evaluate", "split=tset", (C, "split: 'tset'", "wanted train, validation or test")),
    Mistake("no splits", "score", "reward=length splits=[]", (C, r"splits: \[\]", "wanted at least 1")),
    Mistake("no policies", "evaluate", "'policies={}'", (C, r"policies: \{\}", "wanted at least 1")),
    Mistake("a policy to come", "evaluate", "reward=length", ("policy sft", "holds none", "bash run.sh stage=sft")),
    Mistake("a model to come", "rl", "", ("stage=rl", "holds no model", "bash run.sh stage=sft")),
    Mistake("nothing to judge with", "score", "", ("stage=score", "nothing to score with", "give reward=")),
    Mistake("nothing to report", "report", "run=none", ("none", "no stage has left", "run a stage first")),
    Mistake(
        "candidates that cannot differ",
        "generate",
        "policy=SFT num_return_sequences=3",
        ("num_return_sequences", "3 of 1 beam", "set do_sample=true"),
    ),
    Mistake("rows over the budget", "sft", "train.max_tokens=20", ("train.max_tokens", "row .* alone has", "raise it")),
    Mistake(
        "rows over the positions",
        "sft",
        "max_prompt_length=2000",
        ("data.max_prompt_length", "2000 .* the model has 1024 positions", "lower"),
    ),
    Mistake("a template without a place", "sft", "template.prompt=x", ("template.prompt", "'x' lacks", "wanted it")),
    Mistake("a kernel that is not there", "sft", "attn_implementation=flash_attention_2", ("attn", "set sdpa")),
    Mistake("adapters of nothing", "sft", "lora_r=4", ("model.lora.r", "a new model", "give model=")),
    Mistake("a task and files", "sft", "data.path=x task=assistant", (C, "task and path", "set data.task=null")),
    Mistake("no such task", "sft", "task=assistent", ("data.task", "'assistent': not in", "did you mean 'assistant'")),
    Mistake("no data", "sft", "task=null data.task_size=null", ("data", "none is named", "give data.train=")),
    Mistake("no source", "sft", "data.sources=[nobody]", ("data", "no rows", "nobody")),
    Mistake(
        "a task that raises",
        "sft",
        "task=HERE/mine.py",
        ("data.task", "KeyError: 'x'", r"mine\.py:2"),
        {"mine.py": "def examples(split, seed, size):\n    raise KeyError('x')\n"},
    ),
    Mistake(
        "a task that returns numbers",
        "sft",
        "task=HERE/mine.py",
        ("data.task", "returned 1", "wanted a list of .*Example"),
        {"mine.py": "def examples(split, seed, size):\n    return [1, 2]\n"},
    ),
]
