"""What streams are composed of, and what is asked about their pictures, where there are very few."""

import random

import pytest

from flash_vstream.errors import UserError
from flash_vstream.models.short_answers import ShortAnswers
from flash_vstream.synthetic.annotations import Annotation
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.plans import StreamStyle, plan_stream
from flash_vstream.synthetic.short_questions import picture_turns, short_answer


@pytest.mark.parametrize("hard", [True, False])
def test_a_stream_of_all_pictures_leaves_nothing_that_is_absent(hard):
    events = Events({f"{i}.jpg": [f"A dog runs number {i}."] for i in range(4)})
    rng = random.Random(0)
    plan = plan_stream(events.keys, StreamStyle((3, 3), (1, 1)), rng)
    assert events.absent(plan, rng, hard) not in {scene.key for scene in plan.scenes}
    plan = plan_stream(events.keys, StreamStyle((4, 4), (1, 1)), rng)
    with pytest.raises(UserError, match=r"all 4 pictures.*streams of fewer scenes"):
        events.absent(plan, rng, hard)


def test_a_picture_with_one_caption_is_described_by_it():
    annotation = Annotation("1", "a dog runs", "a dog", "unknown", 0, (), ())
    described, *_ = picture_turns(annotation, ["A dog runs."], random.Random(0), 1)
    assert described.answers == ("A dog runs.",)


def test_articles_are_taken_off_answers_and_alternatives_alike():
    network = ShortAnswers(8, 8, ["", *map(short_answer, ("At a zoo.", "The park"))], width=8)
    assert network.answers[1:] == ["zoo", "park"]
    assert network.choice("Is he in the park or at a zoo?") == [2, 1]
