"""The text side of a kept model (``models/light.py``): its configuration and its tokenizer. Needs no PyTorch."""

import json
import logging
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from safetensors import SafetensorError
from tokenizers import Tokenizer

from flash_vstream.memory import StarConfig
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.kept import SETTINGS, kept_folder
from flash_vstream.models.prompt_text import PromptText

TOKENIZER = "tokenizer.json"
Made = TypeVar("Made")
log = logging.getLogger("flash_vstream.models")


def load_text(choice: ModelChoice) -> "tuple[LightConfig, LightText] | None":
    """Configuration and text side of a model; None unless they are kept."""
    return opened(choice, lambda settings, kept: (LightConfig(settings["config"]), LightText(settings, kept)))


def opened(choice: ModelChoice, make: Callable[[dict[str, Any], Path], Made]) -> Made | None:
    """What ``make`` makes of the settings and the folder that are kept of a model; what is damaged is removed."""
    kept = kept_folder(choice)
    if kept is None:
        return None
    try:
        return make(json.loads((kept / SETTINGS).read_text()), kept)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        log.warning("what is kept of %s in %s cannot be used (%s)", choice.name, kept, error)
        shutil.rmtree(kept, ignore_errors=True)
        return None


class LightConfig(SimpleNamespace):
    """A ``FlashVStreamConfig``'s values."""

    def __init__(self, values: dict[str, Any]):
        parts = {name: SimpleNamespace(**values[name]) for name in ("vision_config", "text_config")}
        super().__init__(**values | parts)

    @property
    def star(self) -> StarConfig:
        """The memory's sizes and variants."""
        return StarConfig.from_dict(self.memory_config)


class LightTokenizer:
    """As much of a Transformers tokenizer as answers need; threads may share it."""

    def __init__(self, path: Path, tokens: dict[str, int | None], special: Sequence[int]):
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises nothing narrower
            raise ValueError(f"{path}: {error}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._lock = threading.Lock()
        self.bos_token_id, self.eos_token_id = tokens["bos_token_id"], tokens["eos_token_id"]
        self.unk_token_id, self.pad_token_id = tokens["unk_token_id"], tokens["pad_token_id"]
        self.all_special_ids = list(special)

    @property
    def added_tokens_decoder(self) -> dict[int, Any]:
        """The added tokens by their ids."""
        added: dict[int, Any] = self._tokenizer.get_added_tokens_decoder()
        return added

    def __call__(
        self,
        text: str | list[str],
        add_special_tokens: bool = True,
        split_special_tokens: bool = False,
        max_length: int | None = None,
        **_: Any,
    ) -> SimpleNamespace:
        """``input_ids`` of a text, or of each of several with their ``offset_mapping``."""
        texts = [text] if isinstance(text, str) else text
        with self._lock:
            self._tokenizer.encode_special_tokens = split_special_tokens
            rows = self._tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)
        ids, offsets = [row.ids[:max_length] for row in rows], [row.offsets[:max_length] for row in rows]
        if isinstance(text, str):
            return SimpleNamespace(input_ids=ids[0], offset_mapping=offsets[0])
        return SimpleNamespace(input_ids=ids, offset_mapping=offsets)

    def convert_tokens_to_ids(self, token: str) -> int | None:
        """The id of a token; that of the unknown token if there is no such token."""
        found: int | None = self._tokenizer.token_to_id(token)
        return self.unk_token_id if found is None else found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """The text of ids."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text


class LightText(PromptText):
    """Tokenizer and prompt template of a model."""

    def __init__(self, settings: dict[str, Any], kept: Path):
        self.tokenizer = LightTokenizer(kept / TOKENIZER, settings["tokens"], settings["special"])
        self.prompt_template = settings["prompt"]["prompt_template"]
        self.video_token_id = settings["prompt"]["video_token_id"]
        self.time_stamps = settings["prompt"]["time_stamps"]
