"""Benchmarks as they define themselves: their own files, scoring and totals; polling; choices by likelihood."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flash_vstream.cli.evaluate import default_memories
from flash_vstream.errors import UserError
from flash_vstream.evaluate import runner
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.judges import OfflineJudge
from flash_vstream.evaluate.loading import load_items
from flash_vstream.evaluate.report import judged, summary
from flash_vstream.evaluate.runner import Run, run_benchmark
from flash_vstream.evaluate.scoring import is_right
from flash_vstream.pipeline import FlashVStream
from helpers.cli import run

# As the repositories publish them, with other questions.
OVO = [
    {"id": 0, "task": "EPM", "video": "Ego4D/a.mp4", "realtime": 2, "question": "Who?", "options": ["x", "y"], "gt": 1},
    {
        "id": 1,
        "task": "OCR",
        "video": "COIN/b.mp4",
        "realtime": 1.5,
        "question": "What?",
        "options": ["x", "y"],
        "gt": 0,
    },
    {
        **{"id": 2, "task": "REC", "video": "COIN/b.mp4", "activity": "clap"},
        "test_info": [{"realtime": 1, "count": 0}, {"realtime": 3, "count": 12}],
    },
    {
        **{"id": 3, "task": "SSR", "video": "COIN/b.mp4", "tutorial": "Tea", "all_steps": ["boil"]},
        "test_info": [{"realtime": 2, "step": "boil", "type": 1}, {"realtime": 4, "step": "boil", "type": 0}],
    },
    {
        **{"id": 4, "task": "CRR", "video": "COIN/b.mp4", "question": "Why?", "answer": "Because.", "ask_time": 1},
        "test_info": [{"realtime": 1, "type": 0}],
    },
]
ASKED = {"question": "?", "answer": "!", "start_time": 0, "end_time": 1}
CHOICE = {"task_type": "Counting", "question": "How many?", "time_stamp": "00:00:03", "answer": "B"}
REAL = [
    {"questions": [{**CHOICE, "options": ["A. One.", "B. Two."]}], "video_path": "./videos/sample_1_real.mp4"},
    {"questions": [{**CHOICE, "options": ["One.", "Two."]}], "video_path": "./videos/sample_1_real.mp4"},
]
PROACTIVE = {
    **{"task_type": "Proactive Output", "question": 'When it is 3, output "3".', "time_stamp": "00:00:01"},
    **{"ground_truth_time_stamp": "00:00:04", "ground_truth_output": "3"},
}


def loaded(name: str, rows, folder: Path, file: str):
    (folder / file).write_text(json.dumps(rows))
    return load_items(BENCHMARKS[name], folder)


# --- files


def test_ovo_benchs_own_file_is_read_with_its_forward_part(tmp_path):
    items = loaded("ovobench", OVO, tmp_path, "ovo_bench_new.json")
    assert [item.id for item in items] == ["0", "1", "2_0", "2_1", "3_0", "3_1", "4_0"]
    assert (items[0].video, items[0].end, items[0].correct, items[0].answer) == ("Ego4D/a", 2.0, 1, "y")
    assert [(item.kind, item.answer, item.scoring) for item in items[2:]] == [
        ("REC", "0", "count"),
        ("REC", "12", "count"),
        ("SSR", "Yes", "yes/no"),
        ("SSR", "No", "yes/no"),
        ("CRR", "No", "yes/no"),
    ]
    assert "clap" in items[2].prompt
    assert "boil" in items[4].prompt
    (tmp_path / "chunked_videos").mkdir()  # the published cuts, one for each question
    assert loaded("ovobench", OVO, tmp_path, "ovo_bench_new.json")[3].video == "chunked_videos/2_1"


def test_streaming_benchs_own_files_are_read(tmp_path):
    items = loaded("streamingbench", REAL, tmp_path, "questions_real.json")
    assert [(item.id, item.video, item.choices, item.correct, item.end) for item in items] == [
        (f"sample_1_real/{i}", "sample_1_real", ("One.", "Two."), 1, 3.0) for i in range(2)
    ]
    later = {"questions": [{**REAL[1]["questions"][0], "time_stamp": "00:01:03"}], "video_path": "sample_1_real.mp4"}
    first, second = loaded("streamingbench-sqa", [[REAL[1], later]], tmp_path, "questions_sqa.json")
    assert first.context == ""
    assert second.prompt.startswith("Earlier questions about this video, with their answers:\nAt 3s: How many? Two.")
    rows = [{"questions": [PROACTIVE], "video_path": "./videos/sample_17_proactive.mp4"}]
    (item,) = loaded("streamingbench-proactive", rows, tmp_path, "questions_proactive.json")
    assert (item.start, item.end, item.answer, item.scoring) == (1.0, 4.0, "3", "proactive")


@pytest.mark.parametrize(
    ("name", "file", "rows", "message"),
    [
        ("ovobench", "ovo_bench_new.json", [OVO[0], {**OVO[1], "gt": 4}], r"record 1 \(id 1\): gt 4 is none"),
        ("ovobench", "ovo_bench_new.json", [{"id": 7, "task": "EPM"}], r"record 0 \(id 7\): it lacks 'options'"),
        ("ovobench", "ovo_bench_new.json", [OVO[0], OVO[0]], "same id: 0"),
        ("streamingbench", "questions_real.json", [{"questions": [{**CHOICE}]}], "it lacks 'video_path'"),
        (
            "mlvu",
            "test_qa.json",
            [{"id": "x", "question": "Who?\n(A) a", "answer": 3, "video_id": 1}],
            "answer 3 is none",
        ),
        ("rvs-ego", "rvs_ego.json", [{"video_id": "k", "conversations": [{"question": "?"}]}], r"\(video_id 'k'\)"),
        ("nextqa", "test_qa.json", [{"question": "?", "answer": "!"}], "record 0: it lacks 'video_id'"),
        ("nextqa", "test_qa.json", {"a": 1}, "no list of records"),
        (
            "nextqa",
            "test_qa.json",
            [{"video_id": 1, "question": None, "answer": "!"}],
            "record 0 .*question None is no",
        ),
        ("nextqa", "test_qa.json", [{"video_id": 1, "question": "?", "answer": None}], "record 0 .*answer None is no"),
        ("nextqa", "test_qa.json", [{"video_id": 1, "question": " ", "answer": "!"}], "record 0 .*question ' ' is no"),
        ("rvs-ego", "rvs_ego.json", [3], "record 0: it is no object"),
        (
            "rvs-ego",
            "rvs_ego.json",
            [{"video_id": "k", "conversations": [{**ASKED, "end_time": float("nan")}]}],
            r"record 0 \(video_id 'k'\): the end nan is no time",
        ),
        (
            "ovobench",
            "ovo_bench_new.json",
            [{**OVO[0], "options": [1, 2]}],
            r"record 0 \(id 0\): the answer 2 is no text",
        ),
        ("ovobench", "ovo_bench_new.json", [{**OVO[0], "options": "xy"}], "options 'xy' are no list"),
    ],
)
def test_what_is_wrong_with_annotations_is_named_by_record(tmp_path, name, file, rows, message):
    with pytest.raises(UserError, match=message):
        loaded(name, rows, tmp_path, file)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_annotations_in_any_of_jsons_encodings_are_read(tmp_path, encoding):
    rows = [{"video_id": "v", "question": "猫?", "answer": "是"}]
    (tmp_path / "test_qa.json").write_bytes(json.dumps(rows, ensure_ascii=False).encode(encoding))
    assert load_items(BENCHMARKS["nextqa"], tmp_path)[0].question == "猫?"
    (tmp_path / "test_qa.json").write_bytes('[{"question": "für"}]'.encode("latin-1"))
    with pytest.raises(UserError, match="not text in UTF-8"):
        load_items(BENCHMARKS["nextqa"], tmp_path)


def test_subtitles_come_with_the_question_where_the_benchmark_has_them(tmp_path):
    rows = [{"id": "1", "video_id": "v", "question": "Who?\nA. x\nB. y", "answer": 0, "duration": "short"}]
    (tmp_path / "subtitle").mkdir()
    lines = [f"{i}\n00:00:0{i % 9},000 --> 00:00:0{i % 9},500\n<i>line {i}x</i>\n" for i in range(200)]
    (tmp_path / "subtitle" / "v.srt").write_text("\n".join(lines))
    (item,) = loaded("videomme-subtitles", rows, tmp_path, "test_qa.json")
    assert item.prompt.startswith("Subtitles of the video:\nline 0x\nline 3x\n")
    assert item.context.count("\n") == 64
    assert load_items(BENCHMARKS["videomme"], tmp_path)[0].context == ""


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "cp1252"])
def test_subtitles_in_other_encodings_are_read(tmp_path, encoding):
    rows = [{"id": "1", "video_id": "v", "question": "Who?\nA. x\nB. y", "answer": 0, "duration": "short"}]
    (tmp_path / "subtitle").mkdir()
    (tmp_path / "subtitle" / "v.srt").write_bytes("1\n00:00:00,000 --> 00:00:01,000\nVoilà\n".encode(encoding))
    (item,) = loaded("videomme-subtitles", rows, tmp_path, "test_qa.json")
    assert item.context == "Subtitles of the video:\nVoilà"


@pytest.mark.parametrize(
    ("name", "field", "value"), [("videomme", "duration", "medium"), ("mvbench", "task_type", "counting")]
)
def test_rows_of_the_table_are_those_of_the_benchmark(tmp_path, name, field, value):
    row = {"id": "1", "video_id": "v", "question": "Who?\nA. x\nB. y", "answer": 0, field: value}
    (item,) = loaded(name, [row], tmp_path, "test_qa.json")
    assert item.kind == value


def test_published_numbers_name_their_judge_and_protocol():
    for name in ("vs-ego", "vs-movie", "rvs-ego", "rvs-movie"):
        ((what, _),) = BENCHMARKS[name].published.items()
        assert "judged by GPT-3.5" in what
        assert f"protocol {BENCHMARKS[name].protocol}" in what


# --- scoring and totals


@pytest.mark.parametrize(
    ("scoring", "answer", "reply", "right"),
    [
        ("count", "3", "They did it 3 times.", True),
        ("count", "3", "3 of 4", False),
        ("count", "0", "none", False),
        ("yes/no", "Yes", "Yes.", True),
        ("yes/no", "Yes", "Y", True),
        ("yes/no", "No", "Yes", False),
    ],
)
def test_replies_are_scored_by_the_benchmarks_own_rules(scoring, answer, reply, right):
    assert is_right({"scoring": scoring, "answer": answer, "prediction": reply}) is right


@pytest.mark.parametrize(
    ("reply", "answered_at", "right"), [("It is 3 now.", 5.5, True), ("It is 4 now.", 5.5, False), ("3", None, False)]
)
def test_a_proactive_answer_must_contain_what_is_wanted(reply, answered_at, right):
    row = {"scoring": "proactive", "answer": "3", "end": 4.0, "prediction": reply, "answered_at": answered_at}
    assert is_right(row) is right


def answered(task, right, number):
    choices = ["x", "y"]
    return {
        **{"id": str(number), "video": str(number % 7), "kind": task, "choices": choices, "answer": "x", "correct": 0},
        **{"chosen": 0 if right else 1, "error": None, "run": {"memory": "star"}, "prediction": "A" if right else "B"},
    }


def test_totals_are_those_of_the_benchmarks(tmp_path):
    """By hand; tests/test_lmms.py compares with lmms-eval's own aggregation."""
    rows = [answered("EPM", i < 4, i) for i in range(4)] + [answered("HLD", i < 1, 10 + i) for i in range(2)]
    rows += [answered("OCR", False, 20 + i) for i in range(10)]
    report = summary(judged(rows, OfflineJudge()), OfflineJudge(), BENCHMARKS["ovobench"])
    assert report["categories"]["backward tracing"]["accuracy"] == pytest.approx((1 + 0.5) / 2)
    assert report["accuracy"] == pytest.approx((0.75 + 0) / 2)
    assert report["of_questions"] == pytest.approx(5 / 16)
    low, high = report["interval"]
    assert low <= report["accuracy"] <= high
    mlvu = summary(judged(rows, OfflineJudge()), OfflineJudge(), BENCHMARKS["mlvu"])
    assert mlvu["accuracy"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert summary(judged(rows, OfflineJudge()), OfflineJudge(), BENCHMARKS["mvbench"])["accuracy"] == 5 / 16


def test_streaming_benchmarks_show_the_newest_frames_beside_the_memory():
    assert default_memories("ovobench", None) == ["star", "recent:4"]
    assert default_memories("streamingbench", None) == ["star", "recent:4"]
    assert default_memories("mvbench", None) == ["star"]
    assert default_memories("ovobench", Path("one.jsonl")) == ["star"]


# --- proactive answers


class Polled:
    """A generator that says yes to polls from a moment on, which it knows by the frames that it was given."""

    def __init__(self, from_frame: int | None):
        self.from_frame = from_frame
        self.polls: list[int] = []

    def read(self, snapshot, time_stamps=True):
        return 0 if snapshot is None else round(snapshot.time) + 1

    def ask_many(self, prefix, questions, limit):
        (question,) = questions
        if "right time" not in question:
            return ["It is 3 now."]
        self.polls.append(prefix)
        return ["Yes" if self.from_frame is not None and prefix >= self.from_frame else "no"]


@pytest.mark.parametrize(
    ("from_second", "answered_at", "right", "polls"),
    [(4, 4.0, True, 3), (6, 6.0, True, 5), (7, 7.0, False, 6), (0, 2.0, True, 1), (None, None, False, 7)],
)
def test_proactive_answers_are_polled_every_second(tiny, tmp_path, monkeypatch, from_second, answered_at, right, polls):
    rows = [{"questions": [PROACTIVE], "video_path": "./videos/sample_17_proactive.mp4"}]
    items = loaded("streamingbench-proactive", rows, tmp_path, "questions_proactive.json")
    (tmp_path / "videos").mkdir()
    save_file({"feature": torch.randn(12, 64, 32)}, tmp_path / "videos" / "sample_17_proactive.safetensors")
    pipeline = FlashVStream(*tiny)
    pipeline.generator = Polled(None if from_second is None else from_second + 1)  # frame 0 shows second 0
    job = Run("streamingbench-proactive", "tiny", "star", "causal", 1.0)
    benchmark = BENCHMARKS["streamingbench-proactive"]
    rows = run_benchmark(job, benchmark, items, tmp_path, pipeline, tmp_path / "out.jsonl")
    assert rows[0]["answered_at"] == answered_at
    assert judged(rows, OfflineJudge())[0]["correct"] is right
    assert len(pipeline.generator.polls) == polls
    assert pipeline.generator.polls == [3 + i for i in range(polls)]  # seconds 2 to 8: nothing that comes later
    with pytest.raises(UserError, match="--protocol causal"):
        run_benchmark(Run("x", "tiny", "star", "whole", 1.0), benchmark, items, tmp_path, pipeline, tmp_path / "o")


# --- choices by likelihood


def test_likelihoods_are_those_of_the_answers_alone(tiny, goldens):
    model, processor = tiny
    pipeline = FlashVStream(model, processor)
    memory = model.new_memory()
    memory.write(goldens["offline.features"][:5], torch.arange(5))
    snapshot = memory.read()
    answers = ["a dog", "seven red cats", "no"]
    together = pipeline.generator.likelihoods(pipeline.generator.read(snapshot), "What?", answers)
    for answer, value in zip(answers, together, strict=True):
        prompt = processor.prefix_ids(snapshot) + processor.question_ids("What?")
        ids = processor.tokenize(" " + answer, first=False)
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([prompt + ids]), memory_features=[snapshot.tokens()]).logits[0]
        logs = logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
        assert value == pytest.approx(logs.mean().item(), rel=1e-4)


def test_choices_by_likelihood_never_abstain(tiny_folder, tmp_path):
    unasked = {**CHOICE, "question": "", "options": ["One.", "Two."]}  # MLVU has such a record
    rows = [*REAL[:1], {"questions": [unasked], "video_path": "./videos/sample_1_real.mp4"}]
    (tmp_path / "questions_real.json").write_text(json.dumps(rows))
    options = ("--data", tmp_path, "--model", tiny_folder, "--memory", "blind", "--output", tmp_path / "o.jsonl")
    done = run("eval", "streamingbench", *options, "--choice-by", "likelihood", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["abstained"], report["read_by"], report["run"]["choice_by"]) == (0, {"likelihood": 2}, "likelihood")
    row = json.loads((tmp_path / "o.jsonl").read_text().splitlines()[0])
    assert row["chosen"] == row["likelihoods"].index(max(row["likelihoods"]))
    wrong = run("eval", "streamingbench", *options[:4], "--choice-by", "dice")
    assert "--choice-by 'dice' must be reply or likelihood" in wrong.stderr


def test_a_reply_has_room_for_a_sentence_before_its_letter():
    assert runner.MAX_REPLY_TOKENS >= 64
