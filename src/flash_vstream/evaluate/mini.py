"""VStream-QA-mini: a benchmark of VStream-QA's five kinds that runs on a clean machine.

Seeded streams are composed of photographs and clips from package-index wheels and rendered as video
files, with questions at moments during each stream. The captions were written for this project. The
pictures are few and well known, so the benchmark shows whether a memory works, not how good a model
is, and its numbers are only comparable with each other.
"""

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from flash_vstream.errors import UserError
from flash_vstream.evaluate.judges import Judgement, OfflineJudge
from flash_vstream.files import write_text_atomically
from flash_vstream.sample_clips import CAR, CARTOON, STREET
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.grading import caption_likeness
from flash_vstream.synthetic.plans import StreamPlan, StreamStyle, plan_stream
from flash_vstream.synthetic.questions import Question, stream_questions
from flash_vstream.synthetic.texts import yes_or_no
from flash_vstream.synthetic.views import picture_views
from flash_vstream.video import read_frames
from flash_vstream.video.writer import write_video
from flash_vstream.wheels import WheelFile, cache_dir, cache_errors, fetch

STREAMS, MOMENTS, AT_A_MOMENT = 16, 5, 3
FPS = 2.0
SEED = 2406
QUESTIONS_FILE = "vstream_qa_mini.json"
_SKIMAGE = ("scikit-image", "0.25.2", "skimage/data/", "BSD-3-Clause package; public-domain or CC0 picture")
_SKLEARN = ("scikit-learn", "1.7.2", "sklearn/datasets/images/", "BSD-3-Clause package; CC-BY picture")


def _file(home: tuple[str, str, str, str], name: str, sha256: str) -> WheelFile:
    package, version, folder, licence = home
    return WheelFile(package, version, folder + name, sha256, licence)


SCENES: dict[str, tuple[WheelFile, tuple[str, ...]]] = {
    "astronaut": (
        _file(_SKIMAGE, "astronaut.png", "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5"),
        (
            "A woman in an orange space suit smiles.",
            "An astronaut poses in front of a flag.",
            "A smiling woman in orange holds a helmet.",
        ),
    ),
    "photographer": (
        _file(_SKIMAGE, "camera.png", "b0793d2adda0fa6ae899c03989482bff9a42d3d5690fc7e3648f2795d730c23a"),
        (
            "A man in a black coat looks through a camera.",
            "A man takes a picture with a camera on a tripod.",
            "A photographer stands on a lawn.",
        ),
    ),
    "coffee": (
        _file(_SKIMAGE, "coffee.png", "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7"),
        (
            "A cup of coffee stands on a red saucer.",
            "A red cup with coffee and a spoon on a table.",
            "Coffee in a cup on a wooden table.",
        ),
    ),
    "cat": (
        _file(_SKIMAGE, "chelsea.png", "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb"),
        ("A brown cat with green eyes.", "The face of a striped cat.", "A cat looks to the side."),
    ),
    "motorcycle": (
        _file(_SKIMAGE, "motorcycle_left.png", "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179"),
        (
            "A red motorcycle stands in a garage.",
            "A motorcycle is parked in front of shelves.",
            "A red motorbike in a workshop.",
        ),
    ),
    "page": (
        _file(_SKIMAGE, "page.png", "341a6f0a61557662b02734a9b6e56ec33a915b2c41886b97509dedf2a43b47a3"),
        ("A page of printed text.", "Black text on white paper.", "A paragraph in a book."),
    ),
    "coins": (
        _file(_SKIMAGE, "coins.png", "f8d773fc9cfa6f4d8e5942dc34d0a0788fcaed2a4fefbbed0aef5398d7ef4cba"),
        ("Rows of old coins.", "Many ancient coins lie on a dark cloth.", "A collection of round coins."),
    ),
    "moon": (
        _file(_SKIMAGE, "moon.png", "78739619d11f7eb9c165bb5d2efd4772cee557812ec847532dbb1d92ef71f577"),
        ("The surface of the moon with craters.", "Craters on a grey moon.", "A grey, dusty moon from above."),
    ),
    "grass": (
        _file(_SKIMAGE, "grass.png", "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89"),
        ("Grass and dry leaves on the ground.", "A close view of a lawn.", "Blades of grass from above."),
    ),
    "bricks": (
        _file(_SKIMAGE, "brick.png", "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf"),
        ("A wall of bricks.", "Rows of grey bricks.", "A brick wall in black and white."),
    ),
    "rocket": (
        _file(_SKIMAGE, "rocket.jpg", "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c"),
        (
            "A rocket stands on its launch pad at night.",
            "A white rocket between towers at dusk.",
            "A tall rocket waits for its launch.",
        ),
    ),
    "galaxies": (
        _file(_SKIMAGE, "hubble_deep_field.jpg", "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4"),
        (
            "Stars and galaxies in a black sky.",
            "Many small galaxies in deep space.",
            "The night sky full of coloured stars.",
        ),
    ),
    "pagoda": (
        _file(_SKLEARN, "china.jpg", "8378025ad2519d649d02e32bd98990db4ab572357d9f09841c2fbfbb4fefad29"),
        (
            "A pagoda with many roofs above trees.",
            "A tall Chinese temple near a lake.",
            "An old tower in front of the water.",
        ),
    ),
    "flower": (
        _file(_SKLEARN, "flower.jpg", "a77f6ec41e353afdf8bdff2ea981b2955535d8d83294f8cfa49cf4e423dd5638"),
        ("An orange flower in bloom.", "A round orange dahlia.", "A flower with many orange petals."),
    ),
    "street": (
        STREET,
        (
            "People walk on a street with bicycles.",
            "A bicycle stands on a street in a city.",
            "Traffic and bicycles on a road.",
        ),
    ),
    "car": (
        CAR,
        (
            "A man in a suit and a bow tie talks in a car.",
            "A man in a dark suit sits in a car.",
            "A young man speaks inside a car.",
        ),
    ),
    "rabbit": (
        CARTOON,
        (
            "A big cartoon rabbit stands on a meadow.",
            "A fat grey rabbit in a cartoon.",
            "An animated rabbit in the grass.",
        ),
    ),
}
CAPTIONS = {key: captions for key, (_, captions) in SCENES.items()}
KINDS = {
    "now": "scene summary",
    "at": "action description",
    "occurrence": "event occurrence",
    "occurrence-hard": "event occurrence",
    "first": "ordered event narrative",
    "before": "ordered event narrative",
    "after": "ordered event narrative",
    "order": "ordered event narrative",
    "validation": "sequence validation",
}
CATEGORIES = dict.fromkeys(KINDS.values(), "backward") | {"scene summary": "real time"}
"""What a kind's answer needs: the newest frames, or the past."""
_MIX = {"now": 1.0, "at": 1.0, "occurrence": 1.5, "first": 0.4, "beside": 0.6, "order": 0.8, "validation": 1.2}
_STYLE = StreamStyle(scenes=(5, 10), frames=(4, 12), interval=1 / FPS)


def build_mini(folder: Path | None = None, report: Callable[[str], object] = lambda text: None) -> Path:
    """Return the benchmark's folder (default: in the cache), building it first if it is incomplete.

    Raises ``UserError`` if the pictures cannot be fetched or the folder cannot be written.
    """
    built = folder or cache_dir() / "vstream-qa-mini-2"
    if (built / QUESTIONS_FILE).exists():
        return built
    paths = fetch([file for file, _ in SCENES.values()], report)
    if folder is None:
        with cache_errors():
            _build(built, paths, report)
        return built
    try:
        _build(built, paths, report)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written ({error.strerror or error}); name another") from None
    return built


def _build(folder: Path, paths: list[Path], report: Callable[[str], object]) -> None:
    """Write the videos, and last the questions, whose presence tells that the benchmark is complete."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    frames = {key: _frames(key, path) for key, path in zip(SCENES, paths, strict=True)}
    events = Events(CAPTIONS)
    records = []
    for number in range(STREAMS):
        report(f"composing stream {number + 1} of {STREAMS}")
        rng = random.Random(f"{SEED}/{number}")
        plan = plan_stream(events.keys, _STYLE, rng)
        write_stream(folder / "videos" / f"mini-{number:02}.mp4", plan, frames)
        records.append(stream_record(f"mini-{number:02}", plan, events, rng))
    write_text_atomically(folder / QUESTIONS_FILE, json.dumps(records, indent=1))


def stream_record(name: str, plan: StreamPlan, events: Events, rng: random.Random) -> dict[str, Any]:
    """A stream's questions in ReKV's format, ordered by moment: three at each of five moments."""
    moments = sorted(rng.sample([shot.time for shot in plan.shots[len(plan.shots) // 4 :]], MOMENTS - 1))
    turns = []
    for moment in [*moments, plan.duration]:
        seen = plan.until(moment)
        questions: dict[str, Question] = {}
        while len(questions) < AT_A_MOMENT:
            for question in stream_questions(seen, events, rng, _MIX, 1):
                questions.setdefault(question.text, question)
        for question in questions.values():
            turns.append(
                {
                    "question": question.text,
                    "answer": question.answers[0],
                    "answer_type": KINDS[question.kind],
                    "start_time": question.span[0],
                    "end_time": moment,
                }
            )
    return {"video_id": name, "video_path": f"videos/{name}.mp4", "duration": plan.duration, "conversations": turns}


def _frames(key: str, path: Path) -> list[np.ndarray]:
    """The frames of a scene: views of a picture, or a clip's frames at ``FPS``."""
    if path.suffix == ".mp4":
        return [frame.image for frame in read_frames(path, FPS, 256)]
    picture = ImageOps.fit(Image.open(path).convert("RGB"), (512, 512))
    return [np.asarray(view) for view in picture_views(picture, key)]


def _shown(plan: StreamPlan, frames: dict[str, list[np.ndarray]]) -> Iterator[np.ndarray]:
    place = 0
    before = None
    for shot in plan.shots:
        place = place + 1 if shot.key == before else 0
        before = shot.key
        assert shot.key is not None
        own = frames[shot.key]
        # A clip plays in a loop; a picture shows the view that the plan asks for.
        yield own[place % len(own)] if SCENES[shot.key][0].name.endswith(".mp4") else own[shot.view]


def write_stream(path: Path, plan: StreamPlan, frames: dict[str, list[np.ndarray]]) -> None:
    """Render a plan as a video file at ``FPS`` frames per second."""
    with path.open("wb") as file:
        write_video(file, _shown(plan, frames), int(FPS))


class MiniJudge(OfflineJudge):
    """Accepts a description when the right scene's captions match it better than any other scene's.

    Yes/no answers are judged as by the offline judge.
    """

    name = "nearest-scene-2"

    def judge(self, question: str, answer: str, prediction: str) -> Judgement:
        if yes_or_no(answer) is not None:
            right = yes_or_no(answer) == yes_or_no(prediction)
            return Judgement(right, 5.0 if right else 0.0)
        likeness = {key: caption_likeness(prediction, captions) for key, captions in CAPTIONS.items()}
        truth = next(key for key, captions in CAPTIONS.items() if any(text in answer for text in captions))
        best = max(likeness.values())
        right = best > 0 and likeness[truth] == best and list(likeness.values()).count(best) == 1
        return Judgement(right, round(5 * likeness[truth], 2))


if __name__ == "__main__":  # fetch the pictures and build the benchmark ahead of time
    print(build_mini())
