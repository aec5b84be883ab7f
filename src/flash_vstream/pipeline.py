"""The Python API: watch a video, and ask questions about it.

``FlashVStream`` holds a model's weights; a ``Stream`` holds the memory of one stream.
"""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open

from flash_vstream.errors import UserError
from flash_vstream.memory import MemorySnapshot, pool_grid
from flash_vstream.memory.frames import FrameMemory
from flash_vstream.models import light
from flash_vstream.models.answer import Answer, Prefix
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.engines import Engine, PyTorchEngine, fastest_engine, speed_up_vision
from flash_vstream.models.generation import AnswerGenerator
from flash_vstream.models.interface import Memory, StreamProcessor
from flash_vstream.models.kept import folder_of
from flash_vstream.models.prompt_layout import pad_rows
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS
from flash_vstream.video.pictures import LOCAL_FORMATS, decode_picture

if TYPE_CHECKING:  # frames can be encoded without FFmpeg
    from flash_vstream.video import Frame

log = logging.getLogger("flash_vstream.models")
Picture = np.ndarray | Image.Image
PICTURE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif")


class Stream:
    """The state of one stream: its memory.

    Create one with ``FlashVStream.new_stream`` or ``FlashVStream.watch``. The weights belong to the
    pipeline, so all its streams share them.
    """

    def __init__(self, pipeline: "FlashVStream"):
        self._pipeline = pipeline
        self.memory = pipeline.new_memory()

    def write(self, frames: Sequence[Picture] | np.ndarray, times: Sequence[float]) -> None:
        """Write ``frames`` (RGB, ``[H, W, 3]`` uint8 or PIL pictures) seen at ``times`` (seconds, non-decreasing).

        The frames of one write follow one another, so they may be encoded together (``FlashVStream.encode_steps``).
        Raises ``ValueError`` if times decrease or are not finite.
        """
        self.memory.write(*self._pipeline.encode_steps(frames, times))

    def snapshot(self) -> MemorySnapshot:
        """A snapshot of the memory; later frames do not change it."""
        return self.memory.read()

    @property
    def frames(self) -> int:
        """Frames seen so far; a step of two frames counts as one."""
        return self.memory.frames

    @property
    def time(self) -> float | None:
        """Stream time of the newest frame in seconds; None before the first."""
        return self.memory.time


class FlashVStream:
    """A model that watches streams and answers questions about them.

    >>> pipeline = FlashVStream.from_pretrained("nano")
    >>> stream = pipeline.watch("clip.mp4")
    >>> for text in pipeline.ask(stream, "What is happening now?"):
    ...     print(text, end="", flush=True)
    """

    def __init__(
        self,
        model: Any,
        processor: StreamProcessor,
        memory: str = "star",
        as_is: bool = True,
        language_engine: str | None = None,
    ):
        """``model`` is any ``StreamModel``; ``memory`` and ``language_engine`` as in ``ModelChoice``.

        Unless the model is to run ``as_is``, in PyTorch and its own dtype, the fastest engine for this machine is
        chosen.
        """
        self.model = model
        self.processor = processor
        self.memory = memory
        self._as_is = as_is
        self._language_engine = language_engine
        self._kept_from: ModelChoice | None = None
        """The choice by which ``for_answers`` loaded the model."""

    @cached_property
    def generator(self) -> AnswerGenerator:
        """Reads memories and generates answers; created on first use, since a frame worker does not need it."""
        if self._language_engine is not None:
            from flash_vstream.models.engines.vllm import VllmEngine

            url = self._language_engine.removeprefix("vllm=")
            engine: Engine = VllmEngine(self.model, self.processor, url)
        else:
            engine = PyTorchEngine(self.model) if self._as_is else self._fastest_engine()
        return AnswerGenerator(self.model, self.processor, engine)

    def _fastest_engine(self) -> Engine:
        """The fastest engine; what was made for it is kept if the pipeline is one ``for_answers``."""
        choice = self._kept_from
        try:
            engine = fastest_engine(self.model)
        except RuntimeError as error:
            if choice is None or not isinstance(self.model, light.LightModel):
                raise
            from flash_vstream.models import hub

            log.warning("what is kept of %s cannot be used (%s)", choice.name, error)
            self.model, self.processor = hub.load(choice)
            engine = fastest_engine(self.model)
        graph = getattr(engine, "graph_file", None)
        if choice is not None and graph is not None and light.can_be_light(choice) and (folder := folder_of(choice)):
            light.keep(folder, self.model, self.processor, graph)
        return engine

    @classmethod
    def from_pretrained(
        cls, name: str | ModelChoice = "nano", device: str | None = None, dtype: torch.dtype | None = None
    ) -> "FlashVStream":
        """Load a model by name (``nano``, ``flash-vstream-7b``), model folder or hub id.

        The model may be one of this project or a vision-language model of Transformers. A hub id may include a
        revision, ``ORG/MODEL@REVISION``. ``device`` defaults to a GPU if there is one, ``dtype`` to the fastest for
        the device; a ``ModelChoice`` has more to choose. On a CPU, a small model's language model runs with 8-bit
        weights unless ``dtype`` or a choice says how it shall run. Raises ``UserError`` if there is no such model or
        its files are damaged.
        """
        from flash_vstream.models import hub

        choice = ModelChoice.of(name)
        as_is = any(value is not None for value in (dtype, choice.dtype, choice.attn, choice.bits))
        return cls(*hub.load(choice, device, dtype), choice.memory, as_is, choice.language_engine)

    @classmethod
    def for_answers(cls, name: str | ModelChoice = "nano") -> "FlashVStream":
        """Load a model for a program that only watches and answers; otherwise as ``from_pretrained``.

        A model like nano that has run in OpenVINO before is loaded in a fraction of the time, as a ``LightModel``
        instead of one of Transformers.
        """
        choice = ModelChoice.of(name)
        if (found := light.load(choice)) is not None:
            pipeline = cls(*found, choice.memory, as_is=False)
        else:
            from flash_vstream.models import hub

            hub.silence_transformers()
            pipeline = cls.from_pretrained(choice)
        pipeline._kept_from = choice
        return pipeline

    def prepare_answers(self) -> None:
        """Prepare the language model before it is needed: a ``LightModel``'s in the background, another's at once."""
        if isinstance(self.model, light.LightModel):
            self.model.start_compiling()
        else:
            _ = self.generator

    def encode(self, frames: Sequence[Picture] | np.ndarray) -> torch.Tensor:
        """Feature maps ``[T, P², D]`` of T RGB frames of any size (``[H, W, 3]`` uint8 or PIL pictures)."""
        square = np.stack([self.processor.image_processor.square(frame) for frame in frames])
        with torch.inference_mode():
            features: torch.Tensor = self._seeing.encode(self.processor.image_processor.pixels(square))
        return features

    def encode_steps(
        self, frames: Sequence[Picture] | np.ndarray, times: Sequence[float]
    ) -> tuple[torch.Tensor, list[float]]:
        """Feature maps ``[S, P², D]`` of frames that follow one another, and the time of each in seconds.

        A map shows one frame, or two with Flash-VStream-Qwen, whose tower was trained on pairs. A pair has the time
        of its newer frame, so that a memory never shows more than its time says. An odd last frame stands alone.
        Raises ``ValueError`` if there is not one time for each frame, or if times decrease.
        """
        together, times = self.model.frames_per_step, list(times)
        if together == 1:
            return self.encode(frames), times
        if len(times) != len(frames) or not all(before <= after for before, after in pairwise(times)):
            raise ValueError(f"{len(frames)} frames need as many times that do not decrease; got {times[:4]}…")
        square = np.stack([self.processor.image_processor.square(frame) for frame in frames])
        pixels = self.processor.image_processor.pixels(square)
        last = len(pixels) // together * together
        parts = [self._seeing.encode(pixels[:last].unflatten(0, (-1, together)))] if last else []
        parts += [self._seeing.encode(pixels[last:])] if last < len(pixels) else []
        newest = [times[min(at + together, len(times)) - 1] for at in range(0, len(times), together)]
        return torch.cat(parts), newest

    @cached_property
    def _seeing(self) -> Any:
        """The model with its vision tower in its fastest form, made on first use: a question worker sees nothing."""
        if not self._as_is:
            speed_up_vision(self.model)
        return self.model

    def encode_file(
        self, path: Path, fps: float = 1.0, until: float | None = None
    ) -> Iterator[tuple[list[float], torch.Tensor]]:
        """Yield times (seconds) and float32 feature maps ``[T, P², D]`` of a file, from up to eight frames at a time.

        Frames are joined as in ``encode_steps``.
        ``path`` is a video, a folder of pictures, or a single picture, which becomes a frame at 0 s. A
        ``.safetensors`` file holds ``feature [T, P², D]`` at one frame per second, as the papers' authors
        store them. Raises ``UserError`` naming the path if it cannot be read.
        """
        if path.suffix == ".safetensors":
            yield from self._stored_features(path, until)
            return
        if path.suffix.lower() in PICTURE_ENDINGS:
            try:
                picture = decode_picture(path, formats=LOCAL_FORMATS)
            except UserError as error:
                raise UserError(f"{path} is not a picture that can be read ({error})") from None
            yield [0.0], self.encode([picture]).float()
            return
        from flash_vstream.video import read_frames
        from flash_vstream.video.sources import Source, watch_source

        size = self.processor.image_processor.size
        if path.is_dir():
            frames = watch_source(Source(str(path), fps, size, pace="fast"))
        else:
            frames = read_frames(path, fps, size, until)
        while batch := list(islice(frames, 8)):
            shown = [frame for frame in batch if until is None or frame.time <= until + 1e-6]
            if shown:
                maps, times = self.encode_steps([frame.image for frame in shown], [frame.time for frame in shown])
                yield times, maps.float()
            if len(shown) < len(batch):
                return

    def new_memory(self) -> Memory:
        """An empty memory for one stream: the model's own, or the frames chosen in ``memory``."""
        dtype = torch.float32 if self.model.device.type == "cpu" else self.model.dtype
        method, count = ModelChoice("", memory=self.memory).memory_method
        if method == "star":
            memory: Memory = self.model.new_memory(dtype)
            return memory
        every = method == "all"
        star = self.model.config.star if every else self.model.star_of(count)

        def present(features: torch.Tensor, times: list[float]) -> MemorySnapshot:
            snapshot: MemorySnapshot = self.model.snapshot_of(features, times, every)
            return replace(snapshot, frames=chosen.frames)

        _, channels = self.model.feature_shape
        chosen = FrameMemory(method, count, star, channels, present, dtype, self.model.device)
        return chosen

    def _stored_features(self, path: Path, until: float | None) -> Iterator[tuple[list[float], torch.Tensor]]:
        """Stored features, which may have been computed before pooling, as ``encode_file`` yields them."""
        _, channels = self.model.feature_shape
        try:
            with safe_open(path, "pt") as file:
                features = file.get_tensor("feature").float()
            if features.ndim != 3 or features.shape[-1] != channels:
                raise ValueError(f"feature is {list(features.shape)}, and this model's are [T, P², {channels}]")
            features = pool_grid(features, math.isqrt(self.model.feature_shape[0]))
        except (SafetensorError, OSError, ValueError) as error:
            raise UserError(f"{path} does not hold stored features of this model ({error})") from None
        shown = [second for second in range(len(features)) if until is None or second <= until]
        for batch in (shown[begin : begin + 8] for begin in range(0, len(shown), 8)):
            yield [float(second) for second in batch], features[batch]

    def new_stream(self) -> Stream:
        """A new, empty stream."""
        return Stream(self)

    def watch(
        self,
        source: "str | Path | Iterable[Frame]",
        fps: float = 1.0,
        until: float | None = None,
        stream: Stream | None = None,
        on_frame: "Callable[[Stream, Frame], None] | None" = None,
    ) -> Stream:
        """Watch a video file as fast as it can be read, and return the stream.

        Watches ``fps`` frames per second of stream time, up to stream time ``until`` (seconds), and calls
        ``on_frame`` after each. With ``stream``, continues that stream and skips frames no newer than its
        newest. ``source`` can also be any iterable of ``Frame``. With a model that encodes frames in twos, they are
        taken in twos. Raises ``UserError`` if the video cannot be read.
        """
        stream = stream or self.new_stream()
        size, seen = self.processor.image_processor.size, stream.time
        frames: Iterable[Frame] = [] if isinstance(source, str | Path) else source
        if isinstance(source, str | Path):
            from flash_vstream.video import read_frames

            frames = read_frames(source, fps, size, until)
        fresh = (frame for frame in frames if seen is None or frame.time > seen)
        while step := list(islice(fresh, self.model.frames_per_step)):
            stream.write([frame.image for frame in step], [frame.time for frame in step])
            if on_frame is not None:
                for frame in step:
                    on_frame(stream, frame)
        return stream

    def ask(
        self,
        context: Stream | MemorySnapshot | Prefix | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> Answer:
        """Ask about the current state of a stream, a snapshot, a prefix, or nothing (plain chat).

        The answer is generated as you iterate over it; afterwards it has its text, stream time, evidence
        and timings. ``history`` holds earlier questions and answers of the conversation. Raises
        ``ValueError`` for an empty question or a stream without frames, ``PromptTooLongError`` if the
        question and its history do not fit the model.
        """
        read_from = context.snapshot() if isinstance(context, Stream) else context
        return self.generator.ask(read_from, question, history, max_new_tokens)

    def ask_batch(
        self,
        snapshots: Sequence[MemorySnapshot | None],
        questions: Sequence[str],
        max_new_tokens: int = MAX_NEW_TOKENS,
        beams: int = 1,
    ) -> list[str]:
        """Answer ``questions``, each about its own snapshot (or None), together.

        Up to rounding, the texts are the same as from ``ask``. With ``beams`` above 1, the language model's own beam
        search answers from the same prompts, without what else shapes an answer of ``ask``: guidance, verdicts,
        objections and stories. Raises ``UserError`` for beams of a Transformers vision-language model.
        """
        pairs = list(zip(snapshots, questions, strict=True))
        if beams == 1:
            answers = [self.generator.ask(*pair, max_new_tokens=max_new_tokens) for pair in pairs]
            return self.generator.finish_together(answers)
        if not hasattr(self.model, "generate"):
            raise UserError("beam search is for this project's own models; this one decodes greedily")
        prompts = [self.generator.prompt(*pair) for pair in pairs]
        batch = pad_rows([ids for ids, _ in prompts], self.processor.tokenizer.pad_token_id or 0, "left")
        model: Any = self.model
        rows = model.generate(
            **{name: value.to(model.device) for name, value in batch.items()},
            memory_features=[features for _, features in prompts if features is not None],
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=beams,
        )
        return [self.processor.decode(row) for row in rows[:, batch["input_ids"].shape[1] :]]
