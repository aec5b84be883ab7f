"""Questions in their plainest form: ``Can you tell me what the man is doing?`` asks ``What is the man doing?``.

The small networks and the small language model know whole, direct questions in the present tense best. They take a
polite frame for the question (``Can you tell me …?`` would be answered by yes or no), and half a question for another.
"""

import re

_VERB = r"is|are|was|were|isn't|aren't|wasn't|weren't|am|has|have|had|can|will"
_PLEASE = r"\W*(?:please,? )?"
_WOULD_YOU = r"(?:can|could|will|would) you (?:please )?"
_FRAME = re.compile(
    rf"{_PLEASE}(?:{_WOULD_YOU}(?:tell|say|explain|let)(?: (?:me|us|to me)(?: know)?)?|"
    r"(?:do|does) (?:you|anybody|anyone) (?:know|see)|tell (?:me|us)|let (?:me|us) know|"
    r"(?:i|we) (?:want|need|would like|wish|'d like) to know|i'd like to know|i wonder|i'm wondering)"
    r",? (?:please,? )?(?P<asked>(?:if|whether|who|whom|whose|what|which|where|when|why|how)\b.*)",
    re.IGNORECASE | re.DOTALL,
)
_WHETHER = re.compile(rf"(?:if|whether) (?P<subject>.+?) (?P<verb>{_VERB})\b(?P<rest>.*)", re.IGNORECASE | re.DOTALL)
_PHRASE = (
    r"how (?:many|much) [\w'-]+|(?:what|which) (?:color|colour|kind of [\w'-]+|sort of [\w'-]+|type of [\w'-]+|time)|"
    r"how (?:old|big|large|long|far|often|many)|who|whom|what|which|where|when|why|how"
)
_SUBJECT = r"there|it|he|she|they|this|that|these|those|(?:the|a|an|his|her|its|their|any|some)\b.+?|any(?:one|body)"
_ASKED = re.compile(
    rf"(?P<phrase>{_PHRASE}) (?P<subject>{_SUBJECT}) (?P<verb>{_VERB})\b(?P<rest>.*)", re.IGNORECASE | re.DOTALL
)
_DESCRIBE = re.compile(
    rf"{_PLEASE}(?:{_WOULD_YOU})?describe (?:the|this|what) "
    r"(?:scene|picture|image|photo|frame|view|you see|is (?:happening|going on))\b[^?.!]*[?.!]?\s*",
    re.IGNORECASE,
)
NOW = "What is happening now?"
"""How a description of the present is asked for, whatever the wording."""
_ABOUT_MODEL = re.compile(
    r"\W*(?:(?:so|and|hi|hello|hey),? )?(?:who are you|what(?:'s| is) your name|what can you do|what do you do|"
    r"can you hear(?: me| us| this| anything)?|do you have a name)\W*",
    re.IGNORECASE,
)
_FEW_WORDS = r"[\w'-]+(?: [\w'-]+){0,2}"
_WORDS = r"[\w'-]+(?: [\w'-]+){0,9}"
_ALTERNATIVES = re.compile(
    rf"\W*(?!(?:{_VERB}|do|does|did|what|which|who|whose|how|when|where|why|yes|no|tell|describe|name|say|sooner|more)\b)"
    rf"({_FEW_WORDS},? or {_FEW_WORDS})\W*",
    re.IGNORECASE,
)
_HALVES = (
    (_ALTERNATIVES, "Is it {}?"),
    (re.compile(rf"\W*(any {_WORDS})\?\W*", re.IGNORECASE), "Are there {}?"),
    (re.compile(rf"\W*(an? {_WORDS})\?\W*", re.IGNORECASE), "Is there {}?"),
)
"""Halves of questions, and the whole ones."""
_INDOORS = r"(?:indoors?|outdoors?|inside|outside)"
_PLACE = re.compile(
    r"\W*(?:is|was|are|were|does|did|do) (?:it|this|that|the|all)(?: [\w'-]+){0,2} "
    rf"(?:happen\w*|tak(?:e|es|en|ing)(?: place)?|filmed|shot|recorded|played) ({_INDOORS}(?:,? or {_INDOORS})?)\W*",
    re.IGNORECASE,
)
_COUNT = re.compile(
    rf"{_PLEASE}(?:{_WOULD_YOU})?count (?:all )?(?:the |these |those )?(?!to\b)([\w' -]+?)[?.!]*\s*", re.IGNORECASE
)
_TIME_OF_DAY = re.compile(r"\W*what time of (?:the )?day (?:is|was) (?:it|this)\W*", re.IGNORECASE)
_PLAINER = (
    (_PLACE, "Is this {}?"),
    (_COUNT, "How many {} are there?"),
    (_TIME_OF_DAY, "Is it day or night?"),
)
"""Questions that short answers know in other words."""
_NUMBER_SEEN = re.compile(
    r"(how many .+?) (?:did|have|can|do|could) (?:you|we) (?:see|seen|count|counted|notice|noticed|spot|spotted)\b(.*)",
    re.IGNORECASE | re.DOTALL,
)
_DIRECT = re.compile(rf"(?:{_PHRASE}) (?:is|are|was|were|can|will|happened|came)\b", re.IGNORECASE)


def direct_question(question: str) -> str:
    """The question inside a polite frame, in the word order of a direct one; any other question as it is.

    One that cannot be turned around keeps the plain frame ``Tell me …``. ``Describe the scene`` asks for what is
    happening now. What is left out of ``Indoors or outdoors?`` and of ``Any dogs?`` is put in, and ``Was this filmed
    inside?`` asks whether it is inside, ``Count the dogs.`` how many there are.

    >>> direct_question("Could you tell me how many people there are?")
    'How many people are there?'
    >>> direct_question("I want to know whether the man is sitting.")
    'Is the man sitting?'
    >>> direct_question("Can you describe it?")
    'Can you describe it?'
    """
    if _DESCRIBE.fullmatch(question):
        return NOW
    for half, whole in _HALVES:
        if match := half.fullmatch(question):
            return whole.format(match[1][0].lower() + match[1][1:])
    for form, plain in _PLAINER:
        if match := form.fullmatch(question):
            return plain.format(*match.groups())
    framed = _FRAME.fullmatch(question.strip())
    if framed is None:
        return question
    asked = framed["asked"].strip().rstrip(".?! ")
    if match := _WHETHER.fullmatch(asked):
        words = [match["verb"], match["subject"], match["rest"]]
    elif match := _ASKED.fullmatch(asked):
        words = [match["phrase"], match["verb"], match["subject"], match["rest"]]
    elif _DIRECT.match(asked):
        words = [asked]
    else:  # such as "if the dog barks", whose verb would change its form, or "what has happened so far"
        return f"Tell me {asked}."
    text = " ".join(word.strip() for word in words if word.strip())
    return f"{text[0].upper()}{text[1:]}?"


def in_present(question: str) -> str:
    """A question about one frame, in the present tense; ``How many … did you see?`` asks how many there are.

    >>> in_present("What color was the bus?")
    'What color is the bus?'
    """
    question = _NUMBER_SEEN.sub(r"\1 are there\2", question)
    return re.sub(r"\bwere\b", "are", re.sub(r"\bwas\b", "is", question))


def asks_about_model(question: str) -> bool:
    """Whether a question is about whom it asks: ``Who are you?``, or ``Can you hear me?``.

    A small language model takes it for one about whomever it sees.
    """
    return _ABOUT_MODEL.fullmatch(question) is not None
