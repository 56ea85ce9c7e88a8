"""COMET, a learned metric of translations (Rei et al. 2020), from the package unbabel-comet 2.x; for servers only.

That package wants other versions of what training needs, so it lives in an environment of its own, and this file is
imported by nothing but `reward_models/serve.py` there. The prompt is the source, the completion the translation, the
first reference the reference; models that score without one (CometKiwi) do not read it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


def load(model: str, batch_size: int, gpus: int) -> Callable[..., list[float]]:
    """A reward with COMET's segment scores, mostly in 0 .. 1. Downloads the model where it is not there yet.

    Args:
        model: a name such as Unbabel/wmt22-comet-da, or the path of a .ckpt with its hparams.yaml one folder above.
        gpus: 0 runs on the CPU, 1 on one GPU.
    """
    from comet import download_model, load_from_checkpoint

    checkpoint = model if model.endswith(".ckpt") else download_model(model)
    scorer = load_from_checkpoint(checkpoint)
    compares = scorer.requires_references()

    def reward(
        prompts: Sequence[str],
        completions: Sequence[str],
        references: Sequence[Sequence[str]] | None = None,
        **columns: Sequence,
    ) -> list[float]:
        """One score per completion. Raises ValueError for a row without a reference where the model needs one."""
        golds = references if references is not None else [()] * len(completions)
        if compares and not all(golds):
            raise ValueError(f"row {[*map(bool, golds)].index(False)} has no reference, which {model} compares with")
        rows = [
            {"src": source, "mt": text, **({"ref": gold[0]} if gold else {})}
            for source, text, gold in zip(prompts, completions, golds, strict=True)
        ]
        predicted = scorer.predict(rows, batch_size=batch_size, gpus=gpus, progress_bar=False, num_workers=0)
        return [float(score) for score in predicted.scores]

    return reward
