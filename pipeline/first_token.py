"""What a decoder reads before its first word.

BART and its kin were fine-tuned to say BOS (mBART: the language) first of all, and their own `generate` forces that
token. Here responses begin with their first word, so that token is what the decoder starts from: as in the released
code of semi-offline RL (Chen et al., ICML 2023), whose BART starts from `<s>` and not from `</s>`.
"""

from __future__ import annotations

from transformers import PreTrainedModel


def start_from_forced(model: PreTrainedModel) -> None:
    """Let the token that `model` is forced to say first be the one that its decoder starts from, in what is saved too.

    Without it a checkpoint would spend its first words' probability on that token, and the `generate` of transformers
    would force a token that training never showed.
    """
    speech = model.generation_config
    if speech is None or not isinstance(speech.forced_bos_token_id, int):
        return
    model.config.decoder_start_token_id = speech.decoder_start_token_id = speech.forced_bos_token_id
    speech.forced_bos_token_id = None
