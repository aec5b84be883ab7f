"""A benchmark of real video: streams joined from annotated clips, with questions of VStream-QA's five kinds.

Streams and questions are made by a seed from the held-out clips of a folder in UCF101's layout: one clip of an
action each, in full, one after the other. A description is right when no clip of another action is closer to it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from flash_vstream.errors import UserError
from flash_vstream.evaluate.judges import Judgement, OfflineJudge
from flash_vstream.evaluate.mini import stream_record
from flash_vstream.files import atomic_folder
from flash_vstream.synthetic.annotations import Annotation, read_annotations
from flash_vstream.synthetic.clips import frames_of_clips, held_out
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.grading import caption_likeness
from flash_vstream.synthetic.plans import Scene, Shot, StreamPlan
from flash_vstream.synthetic.texts import yes_or_no
from flash_vstream.video.writer import write_video
from flash_vstream.wheels import cache_dir, cache_errors

STREAMS = 24
SCENES = (5, 9)
FPS = 2.0
SIZE = 256
SEED = 2406
ANNOTATIONS, QUESTIONS, SCENES_FILE = "annotations.jsonl", "clips.json", "scenes.json"


class ClipEvents(Events):
    """The captions of clips as events. What did not happen is taken from actions that a stream does not show."""

    def __init__(self, annotations: Mapping[str, Annotation]):
        super().__init__({key: [own.caption, own.short] for key, own in annotations.items()})
        self.actions = {key: own.action for key, own in annotations.items()}

    def absent(self, plan: StreamPlan, rng: random.Random, hard: bool) -> str:
        """A clip of an action that the stream has not shown; with ``hard``, one similar to a clip it has shown."""
        shown = {self.actions[scene.key] for scene in plan.scenes}
        near = self.likely(rng.choice(plan.scenes).key) if hard else self.keys
        candidates = [key for key in near if self.actions[key] not in shown]
        return rng.choice(candidates[: len(candidates) // 2 + 1] if hard and candidates else self._others(shown))

    def _others(self, shown: set[str | None]) -> list[str]:
        return [key for key in self.keys if self.actions[key] not in shown]


def build_clips(data: Path, report: Callable[[str], object] = lambda text: None) -> Path:
    """The benchmark's folder in the cache, built from the clips in ``data`` unless it is there already.

    Raises ``UserError`` for a folder without annotations or clips, or with too few of them held out.
    """
    source = data / ANNOTATIONS
    annotations = read_annotations(source)
    files = sorted(f"{path.name} {path.stat().st_size}" for path in [*data.glob("*.tar"), *data.rglob("*.mp4")])
    settings = [SEED, STREAMS, SCENES, FPS, SIZE, source.read_bytes(), files]
    folder = cache_dir() / f"clips-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}"
    if folder.exists():
        return folder
    clips = {key: annotations[key] for key in held_out(annotations)}
    actions = {own.action for own in clips.values()}
    if len(actions) <= SCENES[1]:
        raise UserError(
            f"{data} has held-out clips of {len(actions)} actions, and a stream shows up to {SCENES[1]}; every third"
            " group of an action is held out, so annotate clips of more groups"
        )
    report(f"reading {len(clips)} clips")
    frames = frames_of_clips(data, clips, FPS, SIZE)
    events = ClipEvents(clips)
    with cache_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
    with cache_errors(), atomic_folder(folder) as scratch:
        (scratch / "videos").mkdir(parents=True)
        records = []
        for number in range(STREAMS):
            report(f"joining stream {number + 1} of {STREAMS}")
            rng = random.Random(f"{SEED}/{number}")
            plan = join_clips(clips, {key: len(own) for key, own in frames.items()}, rng)
            with (scratch / "videos" / f"clips-{number:02}.mp4").open("wb") as file:
                write_video(file, _shown(plan, frames), int(FPS))
            records.append(stream_record(f"clips-{number:02}", plan, events, rng))
        (scratch / QUESTIONS).write_text(json.dumps(records, indent=1))
        scenes = {key: {"action": own.action, "captions": events.captions[key]} for key, own in clips.items()}
        (scratch / SCENES_FILE).write_text(json.dumps(scenes, indent=1))
    return folder


def join_clips(clips: Mapping[str, Annotation], frames: Mapping[str, int], rng: random.Random) -> StreamPlan:
    """A stream of whole clips of different actions; a shot's ``view`` is the number of the clip's frame."""
    by_action: dict[str, list[str]] = {}
    for key in sorted(clips):
        by_action.setdefault(str(clips[key].action), []).append(key)
    chosen = rng.sample(sorted(by_action), rng.randint(*SCENES))
    scenes: list[Scene] = []
    shots: list[Shot] = []
    for key in (rng.choice(by_action[action]) for action in chosen):
        start = len(shots)
        whole = int(frames[key] - frames[key] % FPS) or frames[key]  # every clip begins at a whole second
        shots += [Shot((start + i) / FPS, key, i) for i in range(whole)]
        scenes.append(Scene(key, start / FPS, (len(shots) - 1) / FPS))
    return StreamPlan(tuple(scenes), tuple(shots))


def _shown(plan: StreamPlan, frames: Mapping[str, Sequence[np.ndarray]]) -> Iterator[np.ndarray]:
    for shot in plan.shots:
        assert shot.key is not None
        yield frames[shot.key][shot.view]


class ClipJudge(OfflineJudge):
    """Accepts a description when the captions closest to it are of a clip with the right clip's action.

    Yes/no answers are judged as by the offline judge.
    """

    name = "nearest-action-1"

    def __init__(self, folder: Path):
        scenes = json.loads((folder / SCENES_FILE).read_text())
        self.actions = {key: scene["action"] for key, scene in scenes.items()}
        self.captions = {key: scene["captions"] for key, scene in scenes.items()}

    def judge(self, question: str, answer: str, prediction: str) -> Judgement:
        if yes_or_no(answer) is not None:
            right = yes_or_no(answer) == yes_or_no(prediction)
            return Judgement(right, 5.0 if right else 0.0)
        truths = {self.actions[key] for key, texts in self.captions.items() if any(text in answer for text in texts)}
        likeness: dict[str, float] = {}
        for key, captions in self.captions.items():
            value = caption_likeness(prediction, captions)
            likeness[self.actions[key]] = max(value, likeness.get(self.actions[key], 0.0))
        best = max(likeness.values())
        found = {action for action, value in likeness.items() if value == best and value > 0}
        right = len(found) == 1 and found <= truths
        return Judgement(right, round(5 * max(likeness[action] for action in truths), 2))
