"""Build VStream-QA questions for your own videos, following the paper (2406.08085, section 4).

A video is split into segments, and a vision-language model describes each of them. The descriptions
are summarised, and the model writes timed questions of the five kinds from both. The questions are
filtered by rules and by a second pass of the model; people review the rest. Every reply is saved
before the next request, so an interrupted run resumes where it stopped.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from flash_vstream.errors import UserError
from flash_vstream.evaluate.endpoint import ChatEndpoint
from flash_vstream.files import write_text_atomically
from flash_vstream.synthetic.texts import words, yes_or_no
from flash_vstream.video import Frame, read_frames

KINDS = (
    "scene summary",
    "action description",
    "event occurrence",
    "ordered event narrative",
    "sequence validation",
)
SHORTEST, LONGEST = 5.0, 60.0
CUT = 0.12
"""Mean brightness change (0 to 1) between frames one second apart that counts as a cut."""
PICTURES = 4
_CAPTION = "Describe in two or three plain sentences what is seen and done in these pictures of one stretch of a video."
_SUMMARY = "Summarise in at most five sentences what happens in a video, in order, from these notes with their times."
_QUESTIONS = (
    "From notes about a stretch of a video, write questions that somebody watching could ask at its end, with short"
    f" answers that the notes support. Make one of each kind: {', '.join(KINDS)}. Occurrence and validation are"
    " answered by yes or no, and about half of them by no. Do not mention notes, segments or times. Reply with a JSON"
    ' list and nothing else: [{"kind": "…", "question": "…", "answer": "…"}].'
)
_CHECK = (
    "You check questions about a video. From the notes alone, is the answer to the question right and complete? Reply"
    " with yes or no."
)
Report = Callable[[str], object]


def segments(frames: Iterator[Frame]) -> list[dict[str, Any]]:
    """Split a video at cuts into segments of 5 to 60 s; only the last may be shorter.

    Each has ``start`` and ``end`` in seconds and up to four evenly spaced ``pictures`` (base64 JPEGs).
    """
    found: list[dict[str, Any]] = []
    part: list[Frame] = []
    before: np.ndarray | None = None
    for frame in frames:
        small = np.asarray(Image.fromarray(frame.image).convert("L").resize((32, 32)), float) / 255
        length = frame.time - part[0].time if part else 0.0
        changed = before is not None and float(np.abs(small - before).mean()) > CUT
        if length >= LONGEST or (changed and length >= SHORTEST):
            found.append(_segment(part))
            part = []
        part.append(frame)
        before = small
    return [*found, _segment(part)] if part else found


def _segment(frames: list[Frame]) -> dict[str, Any]:
    rows = np.linspace(0, len(frames) - 1, min(PICTURES, len(frames))).round().astype(int)
    pictures = [_jpeg(frames[row]) for row in rows]
    return {"start": frames[0].time, "end": frames[-1].time, "pictures": pictures}


def _jpeg(frame: Frame) -> str:
    file = io.BytesIO()
    Image.fromarray(frame.image).save(file, "JPEG", quality=80)
    return base64.b64encode(file.getvalue()).decode()


class Building:
    """Builds the record of one video, saved as ``folder/NAME.json``."""

    def __init__(self, video: Path, folder: Path, endpoint: ChatEndpoint):
        self.path = folder / f"{video.stem}.json"
        self.endpoint = endpoint
        if self.path.exists():
            self.record = read_record(self.path)
            if self.record["video"] != str(video.resolve()):
                raise UserError(f"{self.path} is of another video ({self.record['video']}); name another --output")
        else:
            found = segments(read_frames(video, 1.0, 384))
            self.record = {"video": str(video.resolve()), "segments": found, "summary": None, "questions": []}
            self.record |= {"cost": {"calls": 0, "prompt_tokens": 0, "completion_tokens": 0}, "unreadable": 0}
            self.save()

    def save(self) -> None:
        """Write the record to disk."""
        write_record(self.path, self.record)

    def _ask(self, system: str, user: str | list[dict[str, Any]], max_new_tokens: int) -> str:
        text, usage = self.endpoint.complete(system, user, max_new_tokens)
        cost = self.record["cost"]
        cost["calls"] += 1
        for name in ("prompt_tokens", "completion_tokens"):
            cost[name] += usage.get(name, 0)
        return text.strip()

    def run(self, report: Report) -> None:
        """Run every step that is not done yet."""
        self._caption(report)
        if self.record["summary"] is None:
            report("summarising")
            self.record["summary"] = self._ask(_SUMMARY, self._notes(0, len(self.record["segments"])), 300)
            self.save()
        self._question(report)
        self._filter()
        self._check(report)

    def _caption(self, report: Report) -> None:
        for i, segment in enumerate(self.record["segments"]):
            if "caption" in segment:
                continue
            report(f"describing segment {i + 1} of {len(self.record['segments'])}")
            pictures = [f"data:image/jpeg;base64,{data}" for data in segment["pictures"]]
            parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in pictures]
            segment["caption"] = self._ask(_CAPTION, [*parts, {"type": "text", "text": _CAPTION}], 160)
            self.save()

    def _notes(self, begin: int, end: int) -> str:
        rows = self.record["segments"][begin:end]
        return "\n".join(f"{row['start']:.0f}-{row['end']:.0f} s: {row['caption']}" for row in rows)

    def _question(self, report: Report) -> None:
        for i, segment in enumerate(self.record["segments"]):
            if segment.get("asked"):
                continue
            report(f"questions about segment {i + 1} of {len(self.record['segments'])}")
            notes = f"Summary: {self.record['summary']}\n{self._notes(max(0, i - 3), i + 1)}"
            found = read_questions(self._ask(_QUESTIONS, notes, 500))
            self.record["unreadable"] += found is None
            for question in found or []:
                # Questions about order also cover the preceding segments.
                first = self.record["segments"][max(0, i - 3)] if question["kind"] in KINDS[3:] else segment
                times = {"start_time": first["start"], "end_time": segment["end"], "segment": i}
                self.record["questions"].append({**question, **times, "status": "new", "why": None})
            segment["asked"] = True
            self.save()

    def _filter(self) -> None:
        """Apply the rules once: without the questions that the second pass dropped, the balance would be another."""
        questions = self.record["questions"]
        is_filtered = any("checked" in question for question in questions)  # by a version that did not say so
        if not self.record.get("filtered", is_filtered):
            filter_by_rules(questions)
            self.record["filtered"] = True
            self.save()

    def _check(self, report: Report) -> None:
        for i, question in enumerate(self.record["questions"]):
            if question["status"] != "new" or "checked" in question:
                continue
            report(f"checking question {i + 1} of {len(self.record['questions'])}")
            notes = self._notes(max(0, question["segment"] - 3), question["segment"] + 1)
            claim = f"{notes}\nQuestion: {question['question']}\nAnswer: {question['answer']}"
            question["checked"] = yes_or_no(self._ask(_CHECK, claim, 8)) == "yes"
            if not question["checked"]:
                question |= {"status": "dropped", "why": "the second pass did not find it in the notes"}
            self.save()


def read_record(path: Path) -> dict[str, Any]:
    """Read a record that ``Building`` wrote. Raises ``UserError`` when the file is not one."""
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        record["questions"], record["segments"], record["video"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not a record of vstream-qa build") from None
    return record


def write_record(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically."""
    write_text_atomically(path, json.dumps(record, indent=1))


def records_in(folder: Path) -> dict[Path, dict[str, Any]]:
    """Read every record in a folder. Raises ``UserError`` when there are none."""
    paths = sorted(path for path in folder.glob("*.json") if path.name != "rvs.json")
    if not paths:
        raise UserError(
            f"{folder} holds no records; make some with: flash-vstream vstream-qa build VIDEO… --output {folder}"
        )
    return {path: read_record(path) for path in paths}


def read_questions(reply: str) -> list[dict[str, str]] | None:
    """Parse the questions in a reply, ignoring prose around the list; None when there is no valid list."""
    match = re.search(r"\[.*\]", reply, re.DOTALL)
    try:
        rows = json.loads(match[0]) if match else None
    except ValueError:
        return None
    if not isinstance(rows, list):
        return None
    texts = ("kind", "question", "answer")
    good = [row for row in rows if isinstance(row, dict) and all(isinstance(row.get(name), str) for name in texts)]
    return [{name: row[name].strip() for name in texts} for row in good]


_LEAKS = re.compile(
    r"\b(?:notes?|segments?|captions?|summary|described|timestamps?|\d+\s*(?:s|sec|seconds))\b", re.IGNORECASE
)


def filter_by_rules(questions: list[dict[str, Any]]) -> None:
    """Drop new questions that break a rule and record why: kind, form, leaks, duplicates, yes/no balance."""
    seen: set[str] = set()
    balance: Counter[str] = Counter()
    for question in questions:
        if question["status"] != "new":
            continue
        why = _broken_rule(question, seen)
        seen.add(_plain(question["question"]))
        said = yes_or_no(question["answer"])
        if why is None and said is not None:
            if balance[said] > balance["no" if said == "yes" else "yes"] + 1:
                why = f"too many answers are {said}"
            else:
                balance[said] += 1
        if why is not None:
            question |= {"status": "dropped", "why": why}


def _broken_rule(question: dict[str, Any], seen: set[str]) -> str | None:
    text, answer = question["question"], question["answer"]
    if question["kind"] not in KINDS:
        return "not one of the five kinds"
    if not text.endswith("?") or not 3 <= len(text.split()) <= 40:
        return "not a question of 3 to 40 words"
    if not 1 <= len(answer.split()) <= 40:
        return "the answer is empty or long"
    if _LEAKS.search(text) or _LEAKS.search(answer):
        return "it speaks of notes or times"
    if _plain(text) in seen:
        return "asked before"
    if question["kind"] in (KINDS[2], KINDS[4]) and yes_or_no(answer) is None:
        return "not answered by yes or no"
    return None


def _plain(text: str) -> str:
    return " ".join(words(text, ignored=frozenset()))


def export(folder: Path, target: Path) -> int:
    """Write all questions that were not dropped, in the format ``eval rvs-ego`` reads; return their number."""
    rows = []
    for record in records_in(folder).values():
        kept = [question for question in record["questions"] if question["status"] != "dropped"]
        names = ("question", "answer", "start_time", "end_time")
        turns = [{**{name: q[name] for name in names}, "answer_type": q["kind"]} for q in kept]
        name = Path(record["video"]).stem
        end = record["segments"][-1]["end"] if record["segments"] else 0.0
        rows.append({"video_id": name, "video_path": record["video"], "duration": end, "conversations": turns})
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(rows, indent=1))
    return sum(len(row["conversations"]) for row in rows)
