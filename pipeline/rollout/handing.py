"""A server that writes for a policy in training: the weights go into a folder, and the server is told of it.

How a server takes weights is found out once, by trying these in turn; 404 is answered to what it does not know:

adapters: a policy's adapters under a name of their own, /v1/load_lora_adapter (vLLM, VLLM_ALLOW_RUNTIME_LORA_UPDATING).
disk: all weights in the place of those before, /update_weights_from_disk (SGLang).
reload: the same, /collective_rpc of reload_weights (vLLM, VLLM_SERVER_DEV_MODE).
name: the folder is the name of the model that is asked for; /reset lets go of the one before (`transformers serve`).

Sources: vLLM's features/lora and features/sleep_mode, reload_weights of its worker; SGLang's sglang_for_rl;
transformers/cli/serving/server.py.
"""

from __future__ import annotations

import json
import logging
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Event
from typing import Any, Literal

from peft import PeftModel

from pipeline.config.schema import RlStage
from pipeline.errors import UserError
from pipeline.models.exporting import Form, export
from pipeline.models.writing import SHARD
from pipeline.rewards import http
from pipeline.rollout import served
from pipeline.rollout.served import Served
from pipeline.trainer.group import Ranks
from pipeline.trainer.model import Model

logger = logging.getLogger("tiffin")

FOLDER = "handed"  # in a stage's directory
Way = Literal["adapters", "disk", "reload", "name"]
UNKNOWN = (404, 405)  # what a server answers that has no such path
TOLD = {
    "adapters": "as adapters of a new name",
    "disk": "in the place of those before (update_weights_from_disk)",
    "reload": "in the place of those before (reload_weights)",
    "name": "as a model whose name is its folder",
}
WANTED = (
    "wanted one that reads {place} and takes weights: transformers serve (without a model), SGLang, vLLM with "
    "VLLM_SERVER_DEV_MODE=1, or of adapters with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"
)


class HandOver:
    """Gives a server the weights of a policy whenever they are others than it has. Every rank makes the same calls."""

    def __init__(self, settings: RlStage, directory: Path):
        self.settings, self.folder = settings, (directory / FOLDER).absolute()
        self.engine: str = settings.generation.engine
        purpose = served.PURPOSE._replace(again=http.Purpose().again)
        self.address = served.address_of(self.engine, settings.generation.server)._replace(purpose=purpose)
        self.way: Way | None = None  # known on rank 0
        self.lets_go = True  # of models before, when it is told to
        self.server: Served | None = None
        self.version = -1  # of the weights that the server has

    def to_server(self, model: Model) -> Served:
        """The server with the weights that `model` has now. Raises UserError, on all ranks, where it takes none."""
        if self.version == model.engine.updates:
            return self.server
        ranks, first = model.ranks, self.server is None
        if first:
            served.refuse_encoder_decoder(self.engine, model.encoder)
            ranks.on_main(lambda: shutil.rmtree(self.folder, ignore_errors=True))  # of a start that was killed
        # a name that no server has heard before, in no start: some keep what they have read under it
        place = self.folder / f"{model.engine.updates}-{ranks.from_main(uuid.uuid4().hex[:8])}"
        model.export(place)
        name = ranks.on_main(lambda: self._tell(model, place))
        if first:
            manner = ranks.on_main(lambda: self._manner(model, name))
            self.server = Served(self.address, name, manner, set())
        self.server, self.version = self.server._replace(model=name), model.engine.updates
        return self.server

    def close(self) -> None:
        """Let the server forget what it was handed, and remove it. On rank 0; a server that is gone is no error."""
        try:
            if self.way == "name":
                self._post("/reset", {}, once=True)
            if self.way == "adapters" and self.server is not None:
                self._unload(self.server.model, once=True)
        except UserError as error:
            logger.info(f"{error} (it was to let go of the weights that it was handed)")
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tell(self, model: Model, place: Path) -> str:
        """Tell the server of the weights in `place`, and remove those before; the name to ask for them."""
        adapted, before = isinstance(model.engine.module.model, PeftModel), self.server
        known: list[Way] = ["adapters"] * adapted + ["disk", "reload", "name"]
        whole = place.with_name(place.name + "-merged") if adapted else place
        for way in known if self.way is None else [self.way]:
            if way != "adapters" and not whole.is_dir():
                self._merge(place, whole)
            if self._took(way, place if way == "adapters" else whole):
                self.way = way
                break
        kept = place if self.way == "adapters" else whole
        if self.way == "adapters" and before is not None:
            self._unload(before.model)
        for other in self.folder.iterdir():
            if other != kept:
                shutil.rmtree(other)
        if self.way in ("disk", "reload"):
            listed = self.address._replace(address=f"{self.engine}/models")
            return before.model if before else served.model_of(listed, self.settings.generation.served_model)
        return kept.name if self.way == "adapters" else str(kept)

    def _merge(self, adapters: Path, whole: Path) -> None:
        """All weights, for a server that takes no adapters; what merging rounds away is said the first time."""
        model = self.settings.model.model_copy(update={"path": str(adapters), "revision": None})
        export(model, whole, Form(True, None, SHARD, quiet=self.server is not None))

    def _took(self, way: Way, place: Path) -> bool:
        """Whether the server knows this way, and took the weights in `place`; raises UserError where it failed."""
        match way:
            case "adapters":
                body = {"lora_name": place.name, "lora_path": str(place)}
                return self._post("/v1/load_lora_adapter", body)
            case "disk":
                return self._post("/update_weights_from_disk", {"model_path": str(place)})
            case "reload":
                body = {"method": "reload_weights", "kwargs": {"weights_path": str(place)}}
                return self._post("/collective_rpc", body) and self._post("/reset_prefix_cache", {})
            case "name":
                if self.server is None or self.lets_go:
                    self.lets_go = self._post("/reset", {}, once=self.server is None)
                return True

    def _manner(self, model: Model, name: str) -> served.Manner:
        """How the server wants to be asked, found out with the first weights; said, with the way that it took them.

        Raises UserError where it answers whatever model is asked for: then it has not read the one that it was told.
        """
        wanted = WANTED.format(place=self.folder)
        try:
            manner = served.manner_of(self.address, name, model.encoder)
        except UserError as error:
            raise UserError(f"{error}; {wanted}") from None
        if self.way == "name":
            absent = served.probe(Served(self.address, f"{name}.none", manner), model.encoder)
            if http.answered(self.address, absent)[0] == 200:
                problem = "it answers whatever model is asked for, and knows no way to change its own"
                raise self.address.error(f"{problem}, {wanted}")
        if manner == "ids":
            tokens = self.address._replace(address=self.engine.removesuffix("/v1") + "/tokenize")
            served.check_tokens(tokens, name, model.encoder.tokenizer)
        self._say(manner)
        return manner

    def _say(self, manner: served.Manner) -> None:
        """What was found out."""
        how = f"takes its weights {TOLD[self.way]} whenever they have changed"
        logger.info(
            f"generation.engine: {self.engine} writes the responses of the policy, and {how}; {served.TOLD[manner]}"
        )
        if not self.lets_go:
            logger.warning(
                f"generation.engine: {self.engine} has no /reset: it keeps the weights of each step until it drops "
                "them itself (transformers serve: --model-timeout)"
            )
        if self.way in ("adapters", "name") and (name := self.settings.generation.served_model) is not None:
            logger.warning(f"generation.served_model: {name} is not asked for: each hand-over has a name of its own")

    def _unload(self, name: str, once: bool = False) -> None:
        self._post("/v1/unload_lora_adapter", {"lora_name": name}, once)

    def _post(self, path: str, body: dict[str, Any], once: bool = False) -> bool:
        """Whether the server has this path and did what it says. Raises UserError where it failed.

        Of one that has taken weights before it is tried again after failures that may pass, unless `once`.
        """
        to = self.address._replace(address=self.engine.removesuffix("/v1") + path)
        content = json.dumps(body).encode("ascii")
        if self.server is not None and not once:
            http.patiently(to, content, Event())
            return True
        status, answer = http.answered(to, content)
        if status in UNKNOWN:
            return False
        if status != 200:
            said = f" ({line})" if (line := http.first_line(answer)) else ""
            raise to.error(f"it answered {status}{said} to new weights, wanted 200: can it read {self.folder}?")
        return True


@contextmanager
def opened(settings: RlStage, ranks: Ranks, directory: Path) -> Iterator[HandOver | None]:
    """Where generation.engine names a server, what hands it the weights of the policy until the end; else None."""
    if not settings.generation.by_server:
        yield None
        return
    hand_over = HandOver(settings, directory)
    try:
        yield hand_over
    finally:
        if ranks.main:
            hand_over.close()
