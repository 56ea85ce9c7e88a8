"""Metadata of tiffin. Ranges are for environments that users bring; run.sh installs the pins of constraints.txt."""

from setuptools import find_packages, setup

REQUIREMENTS = [
    "torch>=2.6",
    "deepspeed>=0.18.3",
    "transformers>=5.0",
    "tokenizers>=0.22",
    "safetensors>=0.4.3",
    "peft>=0.17",
    "datasets>=4.0",
    "huggingface-hub>=1.0",
    "sentencepiece>=0.2",
    "tensorboard>=2.16",
    "pyyaml>=6.0",
    "pydantic>=2.7",
    "pyarrow>=15.0",
    "numpy>=1.26",
    "tqdm>=4.66",
    "packaging>=24.0",
    "jinja2>=3.1",
    "filelock>=3.25",
    "urllib3>=2.2",
    "sacrebleu>=2.4",
    "nltk>=3.10.3",  # before it, the stemmer took quadratic time for a long run of y
    "rapidfuzz>=3.0",
    "scikit-learn>=1.5",
]
DEV = [
    "pytest>=8.0",
    "pytest-xdist>=3.6",
    "ruff>=0.9",
    "rouge-score>=0.1.2",
    "psutil>=5.9",
    "sentence-transformers>=5.0",
]

setup(
    name="tiffin",
    version="0.1.0",
    description="Supervised fine-tuning, reward models and offline reinforcement learning of language models",
    license="Apache-2.0",
    python_requires=">=3.10",
    install_requires=REQUIREMENTS,
    extras_require={
        "dev": DEV,
        "bitsandbytes": ["bitsandbytes>=0.48"],  # 8-bit AdamW, models of 4 bits
        "similarity": ["sentence-transformers>=5.0"],  # reward_models/similarity.py
        "vader": ["vaderSentiment>=3.3"],  # reward=vader
    },
    entry_points={"console_scripts": ["tiffin = stages.__main__:tiffin"]},
    packages=[*find_packages(include=["pipeline", "pipeline.*", "stages", "reward_models"]), "ds_configs"],
    package_data={
        "stages": ["*.yaml", "*/*.yaml"],
        "ds_configs": ["*.json"],
        "pipeline.models": ["calls/*.py"],
        "pipeline.report": ["measures/*.yaml", "templates/*"],
    },
)
