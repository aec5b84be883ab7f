"""Seeded plans for streams composed of pictures, used by training and by the mini benchmark.

A plan says which view of which picture is shown when. It contains neither pixels nor features, so the
same plan can be played as features (training), as frames (tests) or as a video file (the benchmark).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass

from flash_vstream.synthetic.views import VIEWS


@dataclass(frozen=True)
class Shot:
    """One frame of a plan: at ``time`` seconds, ``view`` of the picture ``key`` (None: blank)."""

    time: float
    key: str | None
    view: int


@dataclass(frozen=True)
class Scene:
    """A stretch of a stream that shows one picture, from its first to its last frame."""

    key: str
    start: float
    end: float


@dataclass(frozen=True)
class StreamPlan:
    """Scenes in time order and the frames that show them."""

    scenes: tuple[Scene, ...]
    shots: tuple[Shot, ...]

    @property
    def duration(self) -> float:
        """Stream time of the last frame."""
        return self.shots[-1].time

    def until(self, time: float) -> "StreamPlan":
        """The plan up to ``time``: later frames and scenes are dropped and the last scene is shortened."""
        shots = tuple(shot for shot in self.shots if shot.time <= time)
        seen = [scene for scene in self.scenes if scene.start <= time]
        scenes = tuple(Scene(scene.key, scene.start, min(scene.end, shots[-1].time)) for scene in seen)
        return StreamPlan(scenes, shots)


@dataclass(frozen=True)
class StreamStyle:
    """How streams are composed.

    The number of scenes is drawn from ``scenes`` and the frames of each scene from ``frames`` (both
    inclusive), with one frame every ``interval`` seconds. ``repeat`` is the probability that a scene
    repeats an earlier picture, ``blank`` the probability that a blank stretch precedes it. ``offset`` is
    the latest possible time of the first frame.
    """

    scenes: tuple[int, int]
    frames: tuple[int, int]
    interval: float = 1.0
    repeat: float = 0.0
    blank: float = 0.0
    offset: int = 0


def plan_stream(keys: Sequence[str], style: StreamStyle, rng: random.Random) -> StreamPlan:
    """Plan a stream in the given style, with pictures from ``keys`` that are distinct except for repeats."""
    count = rng.randint(*style.scenes)
    fresh = rng.sample(list(keys), count)
    scenes: list[Scene] = []
    shots: list[Shot] = []
    time = float(rng.randint(0, style.offset))
    for key in fresh:
        if len(scenes) > 1 and rng.random() < style.repeat:
            key = rng.choice([scene.key for scene in scenes[:-1]])
        if rng.random() < style.blank:
            for _ in range(rng.randint(*style.frames)):
                shots.append(Shot(time, None, 0))
                time += style.interval
        views = scene_views(rng.randint(*style.frames), rng)
        scenes.append(Scene(key, time, time + (len(views) - 1) * style.interval))
        for view in views:
            shots.append(Shot(time, key, view))
            time += style.interval
    return StreamPlan(tuple(scenes), tuple(shots))


def scene_views(frames: int, rng: random.Random) -> list[int]:
    """The view shown in each frame of a scene: a still camera, or one that drifts back and forth."""
    if rng.random() < 0.4:
        return [rng.randrange(2)] * frames
    path = list(range(2, VIEWS))
    if rng.random() < 0.5:
        path.reverse()
    sweep = path + path[-2:0:-1]
    pace = rng.choice((1, 2, 3))
    return [sweep[(i // pace) % len(sweep)] for i in range(frames)]
