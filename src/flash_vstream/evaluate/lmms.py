"""flash-vstream as an lmms-eval model, registered through an entry point.

    lmms-eval --model flash_vstream --model_args model=nano,fps=1 --tasks activitynetqa
    lmms-eval --model flash_vstream --model_args model=nano,fps=1 --tasks ovobench

lmms-eval is not a dependency of this project: only lmms-eval itself imports this module.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from flash_vstream.errors import UserError
from flash_vstream.models.answer import Prefix, cut
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS
from flash_vstream.pipeline import FlashVStream

NAME = "flash_vstream"


def manifest() -> ModelManifest:
    """Entry point for the group ``lmms_eval.models``."""
    return ModelManifest(NAME, simple_class_path=f"{__name__}.{FlashVStreamLmms.__name__}")


class FlashVStreamLmms(lmms):  # type: ignore[misc]
    """Watches a document's video, or its pictures at one frame per second, and answers greedily.

    ``model`` is a model name, a model folder or a hub id; ``fps`` is the video sampling rate. A document
    without visuals is plain chat. Requests are answered one at a time, in order; consecutive requests
    about the same video share its memory.
    """

    def __init__(self, model: str = "nano", fps: float = 1.0, device: str | None = None, **_: Any):
        super().__init__()
        self._pipeline = FlashVStream.from_pretrained(model, device)
        self._fps = float(fps)
        self._read: tuple[Any, list[Any], Prefix] | None = None

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        answers = []
        for request in tqdm(requests, desc="answering", disable=self.rank != 0):
            context, settings, to_visual, number, task, split = request.args
            visuals = to_visual(self.task_dict[task][split][number]) if to_visual else []
            answers.append(self._answer(visuals, context, settings))
        return answers

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[list[str]]:
        """The replies of every round: a streaming task asks again as its document's video goes on."""
        answers = []
        for request in tqdm(requests, desc="answering", disable=self.rank != 0):
            context, settings, to_visual, to_round, number, task, split = request.args
            document = self.task_dict[task][split][number]
            visuals, said, info = to_visual(document), [], None
            while True:
                said.append(self._answer(visuals, context, settings))
                visuals, context, is_over, kept, info = to_round(
                    document, previous_output=said, round_idx=len(said), previous_round_info=info
                )
                if is_over:
                    answers.append(list(kept))
                    break
        return answers

    def _answer(self, visuals: Any, context: str, settings: dict[str, Any]) -> str:
        limit = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        text = self._pipeline.ask(self._prefix(visuals), context, max_new_tokens=limit).finish().text
        until = settings.get("until") or ()
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        return cut(text, stops, whole=True)[0].strip()

    def _prefix(self, visuals: Any) -> Prefix:
        """The prefix for a document's visuals; the last one is cached."""
        flat = [item for visual in visuals or [] for item in (visual if isinstance(visual, list | tuple) else [visual])]
        key = tuple(item if isinstance(item, str) else id(item) for item in flat)
        if self._read is None or self._read[0] != key:
            # The visuals are kept with it, so that no other picture gets the id of one of them.
            self._read = (key, flat, self._pipeline.generator.read(self._watched(flat)))
        return self._read[2]

    def _watched(self, visuals: Sequence[Any]) -> Any:
        if not visuals:
            return None
        if len(visuals) == 1 and isinstance(visuals[0], str | Path):
            return self._pipeline.watch(visuals[0], self._fps).snapshot()
        if not all(isinstance(visual, Image.Image) for visual in visuals):
            kinds = ", ".join(sorted({type(visual).__name__ for visual in visuals}))
            raise UserError(f"a document shows {kinds}; flash-vstream takes one video's path or pictures")
        stream = self._pipeline.new_stream()
        stream.write(list(visuals), [float(second) for second in range(len(visuals))])
        return stream.snapshot()

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError("flash_vstream answers by generating text; use a generate_until task")
