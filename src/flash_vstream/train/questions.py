"""Questions about composed streams, with their answers."""

import random
from collections.abc import Mapping, Sequence

from flash_vstream.models.prompts import stamp
from flash_vstream.train.packing import Turn
from flash_vstream.train.streams import StreamPlan

NOW = (
    "What is happening now?",
    "What do you see right now?",
    "Describe what is happening.",
    "What is going on at the moment?",
    "What is in the picture now?",
    "Describe the scene.",
)
AT = (
    "What happened at {t}?",
    "What was happening at {t}?",
    "What did you see at {t}?",
    "Describe the scene at {t}.",
)
Captions = Mapping[str, Sequence[str]]


def caption_turns(plan: StreamPlan, captions: Captions, rng: random.Random, past_answers: int = 2) -> list[Turn]:
    """Stage 1: what is seen now (every caption), and what was seen in each earlier scene."""
    now = plan.scenes[-1]
    turns = [Turn(rng.choice(NOW), tuple(captions[now.key]))]
    for scene in plan.scenes[:-1]:
        time = stamp(rng.uniform(scene.start, scene.end))
        answers = rng.sample(list(captions[scene.key]), past_answers)
        turns.append(Turn(rng.choice(AT).format(t=time), tuple(answers)))
    return turns
