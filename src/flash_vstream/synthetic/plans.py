"""Streams composed of pictures, seeded: what training asks about and what the benchmark plays.

A plan says which view of which picture is seen when; it knows neither pixels nor features, so one
plan can be played as features (training), as frames (tests) or as a video file (the benchmark).
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
    """Scenes in order of time and the frames that show them."""

    scenes: tuple[Scene, ...]
    shots: tuple[Shot, ...]

    @property
    def duration(self) -> float:
        """Stream time of the last frame."""
        return self.shots[-1].time

    def until(self, time: float) -> "StreamPlan":
        """What was seen up to ``time``: later frames and scenes are gone, the last scene is cut."""
        shots = tuple(shot for shot in self.shots if shot.time <= time)
        seen = [scene for scene in self.scenes if scene.start <= time]
        scenes = tuple(Scene(scene.key, scene.start, min(scene.end, shots[-1].time)) for scene in seen)
        return StreamPlan(scenes, shots)


@dataclass(frozen=True)
class StreamStyle:
    """How streams are composed.

    Each scene lasts a whole number of frames drawn from ``frames`` (inclusive), one every
    ``interval`` seconds. With the given chances a scene is an earlier one come back (``repeat``),
    or is preceded by a blank stretch (``blank``). ``offset`` is the latest time of a first frame.
    """

    scenes: tuple[int, int]
    frames: tuple[int, int]
    interval: float = 1.0
    repeat: float = 0.0
    blank: float = 0.0
    offset: int = 0


def plan_stream(keys: Sequence[str], style: StreamStyle, rng: random.Random) -> StreamPlan:
    """A stream of distinct pictures drawn from ``keys`` (but for repeats) in the given style."""
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
    """Which view each of a scene's frames shows: a still camera, or one that drifts to and fro."""
    if rng.random() < 0.4:
        return [rng.randrange(2)] * frames
    path = list(range(2, VIEWS))
    if rng.random() < 0.5:
        path.reverse()
    sweep = path + path[-2:0:-1]
    pace = rng.choice((1, 2, 3))
    return [sweep[(i // pace) % len(sweep)] for i in range(frames)]
