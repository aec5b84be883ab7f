"""``ask``: watch a file, answer questions at the given times, and show the evidence for each answer."""

import json
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from flash_vstream.cli.options import Attn, Bits, Device, Dtype, Fps, Json, LanguageEngine, Memory, Model, Pair
from flash_vstream.cli.terminal import describe_evidence, load_pipeline
from flash_vstream.errors import UserError
from flash_vstream.models.choice import ModelChoice
from flash_vstream.timecode import format_time, parse_time

if TYPE_CHECKING:
    from flash_vstream.models.answer import Answer
    from flash_vstream.pipeline import FlashVStream, Stream
    from flash_vstream.video import Frame


def ask(
    video: Annotated[str, typer.Argument(help="A video file.")],
    questions: Annotated[list[str], typer.Argument(metavar="QUESTION...", help="One question or several.")],
    at: Annotated[list[str] | None, typer.Option("--at", help="Stream time to ask at, such as 35s or 1:05.")] = None,
    fps: Fps = 1.0,
    model: Model = "nano",
    memory: Memory = "star",
    device: Device = None,
    dtype: Dtype = None,
    attn: Attn = None,
    bits: Bits = None,
    pair: Pair = None,
    language_engine: LanguageEngine = None,
    as_json: Json = False,
) -> None:
    """Watch a video file and answer questions about it, from the memory as of --at (default: its end)."""
    choice = ModelChoice(model, device, dtype, attn, bits, memory, pair=pair, language_engine=language_engine)
    ask_file(video, questions, at or [], fps, choice, as_json)


def ask_file(
    video: str, questions: Sequence[str], at: Sequence[str], fps: float, model: str | ModelChoice, as_json: bool
) -> None:
    """Answer ``questions`` about ``video`` at each of the times ``at``, or at its end if there are none."""
    from flash_vstream.video import probe, read_frames

    for question in questions:
        _check_question(question)
    if not 0 < fps <= 1000:
        raise UserError(f"--fps is {fps:g}; it must be above 0 and at most 1000")
    info = probe(video)
    times = sorted({parse_time(text) for text in at})
    if times and info.duration is not None and times[-1] > info.duration + 0.5:
        raise UserError(f"--at {times[-1]:g}s lies after the end of {video} ({info.duration:.1f} s)")
    pipeline = load_pipeline(model)
    from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS, PromptLimit

    limit = PromptLimit(pipeline.model.config, pipeline.processor)
    for question in questions:  # fail before the video is watched
        limit.check(question, (), MAX_NEW_TOKENS)
    frames = read_frames(video, fps, pipeline.processor.image_processor.size, times[-1] if times else None)
    moments: list[float | None] = [*times] or [None]
    schedule = [(moment, questions) for moment in moments]
    report = Session(pipeline, as_json).run(frames, schedule, times[-1] if times else info.duration)
    if as_json:
        print(json.dumps({"video": video, "model": str(model), "fps": fps, **report}))


def _check_question(question: str) -> None:
    if not question.strip():
        raise UserError("a question is empty; write what you want to know")
    try:
        question.encode()
    except UnicodeEncodeError:
        raise UserError(f"the question {question!a} is not text in the terminal's encoding") from None


class Session:
    """One pass over a video with questions at given times, printed for a person or collected for JSON."""

    def __init__(self, pipeline: "FlashVStream", as_json: bool):
        self.pipeline = pipeline
        self.as_json = as_json
        self.out = Console(highlight=False, emoji=False)
        self.err = Console(stderr=True)

    def run(
        self,
        frames: "Iterable[Frame]",
        schedule: Sequence[tuple[float | None, Sequence[str]]],
        duration: float | None,
    ) -> dict[str, Any]:
        """Watch ``frames`` and answer; ``schedule`` has stream times in order, None for the end.

        Causal: an answer at a given time has seen no later frame. ``duration`` (seconds) is for the
        progress bar.
        """
        stream = self.pipeline.new_stream()
        waiting, together = list(schedule), self.pipeline.model.frames_per_step
        answers: list[dict[str, Any]] = []
        step: list[Frame] = []
        watched, watched_seconds = 0, 0.0

        def write_step() -> None:
            if step:
                stream.write([frame.image for frame in step], [frame.time for frame in step])
                step.clear()

        bar = Progress(
            TextColumn("watching"),
            BarColumn(),
            TextColumn("{task.fields[moment]}  {task.fields[rate]:.1f} frames/s"),
            TimeRemainingColumn(),
            console=self.err,
            transient=True,
        )
        with bar:
            task = bar.add_task("watch", total=duration, moment="0 s", rate=0.0)
            started = time.perf_counter()
            for frame in frames:
                while waiting and waiting[0][0] is not None and frame.time > waiting[0][0]:
                    write_step()  # also half of one: an answer has seen everything up to its time
                    watched_seconds += time.perf_counter() - started
                    bar.stop()
                    answers += self._answer(stream, waiting.pop(0)[1])
                    bar.start()
                    started = time.perf_counter()
                step.append(frame)
                if len(step) == together:
                    write_step()
                watched += 1
                rate = watched / (watched_seconds + time.perf_counter() - started)
                bar.update(task, completed=frame.time, moment=format_time(frame.time), rate=rate)
            write_step()
            watched_seconds += time.perf_counter() - started
        for _, questions in waiting:
            answers += self._answer(stream, questions)
        return {"frames": watched, "watch_seconds": watched_seconds, "answers": answers}

    def _answer(self, stream: "Stream", questions: Sequence[str]) -> list[dict[str, Any]]:
        snapshot = stream.snapshot()
        # Several questions share one prefix; a single question reads the memory itself, and its timing includes that.
        context = self.pipeline.generator.read(snapshot) if len(questions) > 1 else snapshot
        size = {"slots": sum(len(part) for _, part in snapshot.parts()), "tokens": len(snapshot.tokens())}
        size["bytes"] = stream.memory.nbytes
        answers = []
        for question in questions:
            answer = self.pipeline.ask(context, question)
            if self.as_json:
                answer.finish()
            else:
                self._print(answer)
            fields = answer.to_dict()
            answers.append({"question": question, "answer": fields.pop("text"), **fields, "memory": size})
        return answers

    def _print(self, answer: "Answer") -> None:
        moment = format_time(answer.stream_time or 0.0)
        self.out.print(f"[bold]{moment}[/bold]  ", end="")
        self.out.print(answer.question, markup=False, style="cyan")
        self.out.print("  ", end="")
        for piece in answer:
            self.out.print(piece, end="", markup=False, soft_wrap=True)
        self.out.print()
        speed = f"first token {answer.first_token_seconds:.2f} s"
        if answer.tokens_per_second:
            speed += f", {answer.tokens_per_second:.0f} tokens/s"
        self.out.print(f"  [dim]{describe_evidence(answer)}  ({speed})[/dim]\n", soft_wrap=True)
