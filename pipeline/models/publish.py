"""A model directory sent to the hub, or to another that speaks like it (HF_ENDPOINT)."""

from __future__ import annotations

from pathlib import Path

from pipeline.errors import UserError

WEIGHTS = ("*.safetensors", "*.index.json", "*.bin", "adapter_config.json")  # none but those that are sent may stay
REFUSED = (OSError, ValueError, RuntimeError)  # no right, an unknown owner, a card that it refuses


def obstacle() -> str:
    """Why nothing can be sent from here, whatever it is; "" where something may. Asks nobody."""
    import huggingface_hub  # at each start of a stage it would be in the way
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set, wanted it unset"
    if huggingface_hub.get_token() is None:
        return f"no token for {constants.ENDPOINT} here, wanted HF_TOKEN set, or `hf auth login` once"
    return ""


def push(directory: Path, name: str, private: bool) -> str:
    """Send all files of `directory` to the repository `name`, made where there is none; its address.

    Weights that an earlier push left there and this one does not have are removed in the same commit. Raises UserError
    where the hub refuses, and where `private` is wanted and the repository is public.
    """
    import huggingface_hub
    from huggingface_hub import constants
    from huggingface_hub.errors import HTTPError  # also what has no network

    api = huggingface_hub.HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise UserError(f"push_to: {name} is public, wanted a private one: give private=false, or another name")
        sent = api.upload_folder(
            repo_id=name, folder_path=directory, commit_message="Export with Tiffin", delete_patterns=[*WEIGHTS]
        )
    except (*REFUSED, HTTPError) as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        kept = f"{directory} is whole: the same command sends it"
        raise UserError(f"push_to: {name}: {constants.ENDPOINT} cannot take it ({reason}): {kept}") from None
    return str(sent.repo_url) if sent.repo_url else f"{constants.ENDPOINT}/{name}"
