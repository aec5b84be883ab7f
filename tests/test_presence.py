"""Questions whether things are or were there, with their answers."""

import random

from flash_vstream.synthetic.annotations import Annotation
from flash_vstream.synthetic.plans import Scene, Shot, StreamPlan
from flash_vstream.synthetic.presence import PresenceTurns


def test_presence_is_asked_half_and_half_and_ends_where_pictures_show_everything():
    def row(key, objects):
        return Annotation(key, f"A {objects[0]}.", objects[0], "room", 0, tuple(objects), ())

    both = {str(i): row(str(i), ["dog", "ball"]) for i in range(4)}
    plan = StreamPlan((Scene("0", 0.0, 0.0), Scene("1", 1.0, 1.0)), (Shot(0.0, "0", 0), Shot(1.0, "1", 0)))
    turns = PresenceTurns(both, {})
    assert {turns.now("0", random.Random(i)).answers for i in range(40)} == {("Yes.",), ("No.",)}  # nobody is there
    assert turns.ever(plan, random.Random(0)) is None
    each = PresenceTurns({k: row(k, ["dog"] if int(k) % 2 else ["ball"]) for k in "01234567"}, {})
    asked = [each.now("1", random.Random(i)) for i in range(200)]
    assert all(("dog" in turn.question) <= (turn.answers == ("Yes.",)) for turn in asked)
    assert all(("ball" in turn.question) <= (turn.answers == ("No.",)) for turn in asked)
    past = {each.ever(plan, random.Random(i)) for i in range(40)}
    assert {turn.answers for turn in past if turn} == {("Yes, at 0s.",), ("Yes, at 1s.",)}
