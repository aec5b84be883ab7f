"""A set of captions in which every picture shows an actor doing something."""

from flash_vstream.synthetic.events import Events

ACTORS = ("dog", "man", "girl", "bird", "horse")

DOINGS = ("runs", "sleeps", "jumps", "swims", "eats", "plays")

CAPTIONS = {
    f"{actor}-{doing}.jpg": [f"A {actor} {doing} outside.", f"The {actor} is seen while it {doing}."]
    for actor in ACTORS
    for doing in DOINGS
}

EVENTS = Events(CAPTIONS)
