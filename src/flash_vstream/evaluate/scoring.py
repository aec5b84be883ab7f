"""Rules by which benchmarks score replies themselves, without a judge.

The rules are those of the benchmarks' own scripts, lenient as they are: a reply that says both yes and no
is right either way.
"""

import re
from collections.abc import Mapping
from typing import Any

POLL_SECONDS = 1.0
POLLED_AFTER = 4.0
"""A proactive question is polled every second, until so long after the right moment (StreamingBench)."""
IN_TIME = 2.0
"""How far from the right moment an answer may come (StreamingBench)."""


def poll(question: str, answer: str) -> str:
    """What a model is asked, every second, before it may give a proactive ``answer``."""
    return f'{question} Is it the right time to output "{answer}"? You can only answer yes or no.'


def says_yes(reply: str) -> bool:
    """Whether a reply to a poll is taken as a yes: it contains the word anywhere (StreamingBench)."""
    return "yes" in reply.lower()


def is_right(row: Mapping[str, Any]) -> bool:
    """Whether a prediction is right by the rule that its ``scoring`` names.

    - ``count``: the reply's digits, written one after the other, are the count (OVO-Bench, REC)
    - ``yes/no``: the reply contains "Yes" or "No" as the answer has it, or is its first letter (SSR, CRR)
    - ``proactive``: the answer is contained in the reply, which came within ``IN_TIME`` (StreamingBench)
    """
    reply, answer = str(row["prediction"] or ""), str(row["answer"])
    if row["scoring"] == "count":
        return "".join(re.findall(r"\d+", reply)) == answer
    if row["scoring"] == "yes/no":
        return answer in reply or reply == answer[0]
    if row["scoring"] == "proactive":
        answered = row["answered_at"]
        return answered is not None and abs(float(answered) - row["end"]) <= IN_TIME and answer in reply
    raise ValueError(f"no rule is called {row['scoring']!r}")
