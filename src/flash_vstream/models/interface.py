"""What a model is to everything above it: streams, servers, training-free evaluation.

Three kinds of models stand behind it: Flash-VStream and nano (``modeling``), Flash-VStream-Qwen (``flash_qwen``), and
any vision-language model of Transformers (``vlm``). ``hub.load`` returns a ``StreamModel`` and its ``StreamProcessor``;
``generation.AnswerGenerator`` reads memories and answers questions with any of them, and knows no more than this.

1. ``model.encode``: pixels become feature maps; ``model.new_memory``: an empty memory for them.
2. ``processor.lay_out``: a snapshot of that memory becomes a prompt, with the times as text between visual tokens.
3. ``model(...)``: the language model reads a prompt, or goes on from a cache.
4. A ``QuestionFit`` (``question_fit``) says which real frames of the long-term memory fit a question, and
   ``processor.lay_out_recalled`` puts them before it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from flash_vstream.memory import MemorySnapshot, Slots, StarConfig
from flash_vstream.models.prompts import PromptTemplate
from flash_vstream.models.squares import FrameSquares

if TYPE_CHECKING:  # importing it takes seconds, and not every model needs it
    from transformers import Cache

VIDEO_TOKEN = -200
"""The id that marks a visual token's place in a prompt, as in the released code; no vocabulary has it."""


@dataclass(frozen=True)
class Layout:
    """A memory as the beginning of a prompt, or recalled frames as a piece of one.

    ``ids`` are its L tokens, with ``VIDEO_TOKEN`` in place of each visual token; ``features [n, D]`` are those tokens
    in the same order. ``slot_of_token [L]`` is the index of the slot that each token belongs to, counted over
    the memory's parts in the order of ``MemorySnapshot.parts``, and -1 for text. ``positions [3, L]`` is given
    where the tokens do not simply follow one another.
    """

    ids: list[int]
    features: Tensor | None
    slot_of_token: Tensor
    positions: Tensor | None = None


class Memory(Protocol):
    """What remembers one stream: a ``StarMemory``, or one with its methods."""

    config: StarConfig

    @property
    def frames(self) -> int: ...
    @property
    def time(self) -> float | None: ...
    @property
    def nbytes(self) -> int: ...
    def write(self, features: Tensor, times: Tensor | list[float]) -> None: ...
    def read(self) -> MemorySnapshot: ...
    def state_dict(self) -> dict[str, Tensor]: ...
    def load_state_dict(self, state: dict[str, Tensor]) -> None: ...


class ModelConfig(Protocol):
    """What the rest needs to know of a model's configuration."""

    text_config: Any
    grounding_config: dict[str, Any] | None
    time_stamps: bool

    @property
    def star(self) -> StarConfig: ...


class StreamModel(Protocol):
    """The weights: a vision tower, and a language model that reads what the tower saw."""

    config: Any
    frames_per_step: int
    """How many frames in a row a map may show: 2 where the tower was trained on pairs of frames, else 1."""
    attention_is_chosen: bool
    """Whether the user chose how attention is computed; otherwise CPUs compute it in the way that shows evidence."""

    @property
    def language_model(self) -> Any:
        """The language model, a Transformers model with a configuration of its own."""
        ...

    @property
    def device(self) -> torch.device: ...
    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def feature_shape(self) -> tuple[int, int]:
        """The shape ``(P², D)`` of an encoded frame."""
        ...

    def encode(self, pixel_values: Tensor) -> Tensor:
        """Feature maps ``[B, P², D]`` of pixels ``[B, 3, H, W]``, without gradients.

        Where ``frames_per_step`` is n > 1, also of that many frames in a row, ``[B, n, 3, H, W]``.
        """
        ...

    def new_memory(
        self, dtype: torch.dtype | None = None, star: StarConfig | None = None, offline: bool = False
    ) -> Memory:
        """An empty memory for one stream, of the model's own sizes or those in ``star``, on the model's device.

        ``offline`` matters to ``compat="release"`` alone: the form that reads a whole video at once.
        """
        ...

    def snapshot_of(
        self, features: Tensor, times: list[float], every: bool, star: StarConfig | None = None
    ) -> MemorySnapshot:
        """A snapshot of chosen frames ``[n, P², D]`` in the form that the model reads: a memory that saw only those.

        With ``every``, each frame is a slot at full resolution, however many there are.
        """
        ...

    def star_of(self, count: int) -> StarConfig:
        """The sizes of ``snapshot_of(..., every=False)`` for up to ``count`` frames."""
        ...

    def drop_vision(self) -> None:
        """Free the vision tower, in a process that only answers."""
        ...

    def drop_language(self) -> None:
        """Free the language model, in a process that only watches."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        memory_features: Sequence[Tensor] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: "Cache | None" = None,
        **kwargs: Any,
    ) -> Any:
        """The language model's output for ``input_ids [B, L]``; ``.logits`` and, if asked for, ``.attentions``."""
        ...

    def state_dict(self) -> dict[str, Any]: ...


class StreamProcessor(Protocol):
    """Text and frames: prompts to ids, ids to text, pictures to pixels."""

    @property
    def image_processor(self) -> FrameSquares:
        """What makes pixels of frames."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Transformers' tokenizer, or one with as much of it as is used."""
        ...

    @property
    def template(self) -> PromptTemplate:
        """The texts that stand around questions and answers."""
        ...

    def tokenize(self, text: str | Sequence[str], first: bool = True) -> list[int]:
        """Ids of a piece of a prompt; ``Typed`` parts never become control tokens."""
        ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids that end an answer."""
        ...

    def lay_out(self, snapshot: MemorySnapshot | None, time_stamps: bool = True, cue: str = "") -> Layout:
        """A prompt up to its question: its opening, then the memory (None: no video) and a cue for its newest frame."""
        ...

    def lay_out_recalled(
        self, recalled: Slots, first_slot: int, time_stamps: bool = True, cues: Sequence[str] = ()
    ) -> Layout:
        """Frames of the long-term memory as a piece of a prompt, in time order; slots count from ``first_slot``."""
        ...

    def longest_layout(self, config: ModelConfig) -> int:
        """The tokens of ``lay_out`` for a full memory with its time stamps."""
        ...

    def question_ids(self, question: str, history: Sequence[tuple[str, str]] = ()) -> list[int]:
        """Ids that follow ``lay_out`` when ``question`` is asked after the turns in ``history``."""
        ...

    def decode(self, ids: Any) -> str:
        """Text of generated ids."""
        ...
