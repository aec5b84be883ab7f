"""A model for a program that only watches and answers on a CPU, without Transformers, whose import takes seconds.

What a model of Transformers needs once to run in OpenVINO is kept in the cache (``keep``): its whole configuration, its
tokenizer, its vision tower's graph, and where its language model's graph is. From then on ``load`` has all it needs
there and in the model's own folder, and gives the same answers.
"""

import json
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import safe_open
from torch import nn

from flash_vstream.files import atomic_folder, remove_oldest
from flash_vstream.memory import SemanticAttention
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.grounding import Grounding
from flash_vstream.models.kept import KEPT_MODELS, SETTINGS, is_plain, place_for
from flash_vstream.models.light_text import TOKENIZER, LightConfig, LightText, opened
from flash_vstream.models.prompt_layout import PromptLayout
from flash_vstream.models.short_answers import ShortAnswers
from flash_vstream.models.sight import Sight
from flash_vstream.models.squares import FrameSquares
from flash_vstream.models.stream_parts import Projector, StreamParts

TOWER = "tower.xml"
log = logging.getLogger("flash_vstream.models")


def can_be_light(choice: ModelChoice) -> bool:
    """Whether a model is to run as it comes, and on a CPU."""
    return is_plain(choice) and (choice.device == "cpu" or not torch.cuda.is_available())


def load(choice: ModelChoice) -> "tuple[LightModel, LightProcessor] | None":
    """The model and its processor; None unless all that they need is kept."""
    if not can_be_light(choice):
        return None
    return opened(choice, lambda settings, kept: (LightModel(settings, kept), LightProcessor(settings, kept)))


def keep(folder: Path, model: Any, processor: Any, graph: Path) -> None:
    """Keep what ``load`` needs of the Transformers ``model`` in ``folder``, whose language model is in ``graph``."""
    from flash_vstream.models.efficientnet import EfficientNetLiteModel
    from flash_vstream.models.engines.openvino_tower import save_tower

    tokenizer, pixels = processor.tokenizer, processor.image_processor
    if not isinstance(model.vision_tower, EfficientNetLiteModel) or tokenizer.clean_up_tokenization_spaces:
        return
    settings = {
        "folder": str(folder.resolve()),
        "graph": str(graph),
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "pixels": {name: getattr(pixels, name) for name in ("size", "image_mean", "image_std")},
        "prompt": {name: getattr(processor, name) for name in ("prompt_template", "video_token_id", "time_stamps")},
        "tokens": {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")},
        "special": sorted(tokenizer.all_special_ids),
    }
    target = place_for(folder)
    if target is None:
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{target}.lock"):
            if not target.exists():
                with atomic_folder(target) as scratch:
                    tokenizer.backend_tokenizer.save(str(scratch / TOKENIZER))
                    save_tower(model.vision_tower, model.config.pooled_size, scratch / TOWER)
                    (scratch / SETTINGS).write_text(json.dumps(settings))
                remove_oldest(target.parent, KEPT_MODELS)
    except (OSError, RuntimeError) as error:
        log.warning("the next start takes as long as this one, since nothing could be kept: %s", error)


class LightModel(StreamParts, nn.Module):
    """Everything of a Flash-VStream model except its language model's layers, which run in OpenVINO, as its tower does.

    Raises ``KeyError`` if the model's folder lacks weights.
    """

    device = torch.device("cpu")

    def __init__(self, settings: dict[str, Any], kept: Path):
        super().__init__()
        self.config = config = LightConfig(settings["config"])
        self.dtype: torch.dtype = getattr(torch, settings["dtype"])
        self._graph, self._tower = Path(settings["graph"]), kept / TOWER
        self._compiled: Future[Any] | None = None
        channels, width = config.vision_config.hidden_size, config.text_config.hidden_size
        small: dict[str, tuple[Any, tuple[int, ...]]] = {
            "grounding": (Grounding, (channels, width)),
            "sight": (Sight, (channels,)),
            "short_answers": (ShortAnswers, (channels, width)),
        }
        self.semantic_attention = SemanticAttention(channels, config.attention_hidden_size).to(self.dtype)
        self.projector = Projector(channels, width).to(self.dtype)
        # Neither drawn at random, which takes a while, nor on the device "meta", which imports torch._dynamo.
        table = nn.Embedding(
            config.text_config.vocab_size,
            width,
            _weight=torch.empty(config.text_config.vocab_size, width, dtype=self.dtype),
        )
        self.language_model = nn.ModuleDict({"model": nn.ModuleDict({"embed_tokens": table})})
        for name, (kind, sizes) in small.items():
            options = getattr(config, f"{name}_config")
            setattr(self, name, None if options is None else kind(*sizes, **options))
        self.load_state_dict(_weights(Path(settings["folder"]), self.state_dict()), assign=True)
        if not self._graph.is_file():
            raise FileNotFoundError(f"{self._graph} is gone")
        self.train(False)

    def get_input_embeddings(self) -> nn.Module:
        """The language model's input embeddings."""
        embeddings: nn.Module = self.language_model["model"]["embed_tokens"]
        return embeddings

    def start_compiling(self) -> None:
        """Begin to compile the language model in a thread: most of it needs neither Python nor what else is loaded."""
        if self._compiled is None:
            self._compiled = Future()
            # Not a daemon: a thread in OpenVINO that the interpreter's end cuts off may abort the process.
            threading.Thread(target=self._compile, args=(self._compiled,)).start()

    def _compile(self, compiled: "Future[Any]") -> None:
        from flash_vstream.models.engines.openvino import compile_stored

        try:
            compiled.set_result(compile_stored(self._graph))
        except BaseException as error:
            compiled.set_exception(error)

    def compiled(self) -> Any:
        """The compiled language model."""
        self.start_compiling()
        assert self._compiled is not None
        return self._compiled.result()

    def open_tower(self) -> None:
        """Compile the vision tower."""
        from flash_vstream.models.engines.openvino_tower import OpenVinoTower

        self.vision_tower = OpenVinoTower(self._tower, config=self.config.vision_config)


def _weights(folder: Path, wanted: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The ``wanted`` tensors of a model's folder, in the same dtypes; raises ``KeyError`` if one is missing."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in wanted.keys() & set(file.keys()):
                found[name] = file.get_tensor(name).to(wanted[name].dtype)
    if missing := wanted.keys() - found.keys():
        raise KeyError(f"{folder} lacks {min(missing)}")
    return found


class LightSquares(FrameSquares):
    """The frame processor's arithmetic for a model."""

    def __init__(self, size: int, image_mean: Sequence[float], image_std: Sequence[float]):
        self.size, self.image_mean, self.image_std = size, image_mean, image_std


class LightProcessor(LightText, PromptLayout):
    """Tokenizer, frame processor and prompt layout of a model."""

    def __init__(self, settings: dict[str, Any], kept: Path):
        super().__init__(settings, kept)
        self.image_processor = LightSquares(**settings["pixels"])
