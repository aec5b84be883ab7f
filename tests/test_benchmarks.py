"""Benchmarks: file formats, protocols, replies, judging and statistics."""

import hashlib
import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flash_vstream.bench.efficiency import plot as plot_efficiency
from flash_vstream.cli.evaluate import BENCHMARK_NAMES
from flash_vstream.errors import UserError
from flash_vstream.evaluate import mini
from flash_vstream.evaluate.baselines import MemoryMethod
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.choices import read_choice
from flash_vstream.evaluate.constant_baselines import constant_baselines
from flash_vstream.evaluate.items import Item, split_options
from flash_vstream.evaluate.judges import OfflineJudge
from flash_vstream.evaluate.loading import load_items, sharded
from flash_vstream.evaluate.mini import CAPTIONS, KINDS, MiniJudge, build_mini
from flash_vstream.evaluate.report import compare, judged, summary
from flash_vstream.evaluate.runner import MAX_REPLY_TOKENS, Run, run_benchmark
from flash_vstream.evaluate.statistics import bootstrap_interval, format_interval, paired_difference
from flash_vstream.pipeline import FlashVStream
from helpers.cli import run
from helpers.videos import write_video

RVS = [
    {
        "video_id": "kitchen",
        "video_path": "/data/elsewhere/kitchen.mp4",
        "duration": 6.0,
        "conversations": [
            {"question": "What is shown?", "answer": "A box.", "start_time": 0, "end_time": 2},
            {"question": "Is it dark?", "answer": "Yes.", "start_time": 1, "end_time": 2},
            {"question": "What now?", "answer": "Two boxes.", "start_time": 2, "end_time": 4},
        ],
    },
    {
        "video_id": "lost",
        "video_path": "/data/elsewhere/lost.mp4",
        "duration": 6.0,
        "conversations": [{"question": "Where?", "answer": "Here.", "start_time": 0, "end_time": 2}],
    },
]


@pytest.fixture
def data(tmp_path) -> Path:
    folder = tmp_path / "rvs"
    (folder / "videos").mkdir(parents=True)
    write_video(folder / "videos" / "kitchen.mp4", frames=60)
    (folder / "rvs_ego.json").write_text(json.dumps(RVS))
    return folder


def evaluated(model, data, tmp_path, method="star", protocol="causal", name="rvs-ego"):
    items = load_items(BENCHMARKS[name], data)
    job = Run(name, "tiny", method, protocol, 2.0)
    path = tmp_path / f"{method}-{protocol}.jsonl".replace(":", "-")
    return run_benchmark(job, BENCHMARKS[name], items, data, FlashVStream(*model), path), path


# --- files


def test_every_benchmark_explains_itself():
    assert set(BENCHMARK_NAMES) == set(BENCHMARKS)
    for benchmark in BENCHMARKS.values():
        assert benchmark.metric in ("open", "choice")
        assert benchmark.protocol in ("causal", "clip", "whole")
        assert benchmark.files
        assert benchmark.source
        assert benchmark.size
        assert benchmark.licence
    done = run("eval", "--list")
    assert done.returncode == 0
    assert all(name in done.stdout for name in BENCHMARKS)


def test_official_and_packed_vstream_qa_are_both_read(tmp_path):
    official = [{"video_id": "000246", "id": 7, "question": "Who?", "answer": "C.", "answer_type": "Scene"}]
    read = BENCHMARKS["vs-ego"].read
    assert read(official) == [Item("7", "000246", "Who?", "C.", "Scene")]
    packed = read(RVS)
    assert [item.id for item in packed] == ["kitchen/0", "kitchen/1", "kitchen/2", "lost/0"]
    assert packed[1] == Item("kitchen/1", "kitchen", "Is it dark?", "Yes.", "yes/no", (), None, 1.0, 2.0)


@pytest.mark.parametrize(
    ("text", "question", "choices"),
    [
        (
            "Select the best answer to it.\nQuestion: Who?\n(A) x\n(B) y\nOnly give the best option.",
            "Who?",
            ("x", "y\nO"),
        ),
        ("Who?\nOptions:\n(A) x\n(B) y\n", "Who?", ("x", "y")),
        ("Which?\nA. one.\nB. two.", "Which?", ("one.", "two.")),
        ("Is (B) right?\n(A) yes\n(B) no", "Is (B) right?", ("yes", "no")),
    ],
)
def test_options_are_parted_from_their_question(text, question, choices):
    found = split_options(text)
    assert found[0] == question
    assert [choice[:1] for choice in found[1]] == [choice[:1] for choice in choices]
    assert all("\n" not in choice for choice in found[1])


def test_streaming_choices_are_read():
    row = {"video_id": 3, "video_path": "/x/y/sample_4.mp4", "task": "OCR"}
    turn = {"question": "What?", "answer": "b", "choices": ["a", "b"], "end_time": 9.5}
    (item,) = BENCHMARKS["ovobench"].read([{**row, "conversations": [turn]}])
    assert (item.video, item.correct, item.end, item.kind) == ("sample_4", 1, 9.5, "OCR")
    assert item.prompt == "What?\n(A) a\n(B) b\nAnswer with the letter of the right option."


@pytest.mark.parametrize("answer", [1, "1", 1.0])
def test_an_answers_number_may_be_text(answer):
    row = {"id": 1, "video_id": "v", "question": "Who?\n(A) x\n(B) y", "answer": answer}
    (item,) = BENCHMARKS["mvbench"].read([row])
    assert (item.answer, item.correct) == ("y", 1)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', '[{"video_id": 1}]', json.dumps([RVS[0], RVS[0]])])
def test_odd_annotations_are_told(tmp_path, text):
    (tmp_path / "rvs_ego.json").write_text(text)
    with pytest.raises(UserError, match=r"rvs_ego\.json"):
        load_items(BENCHMARKS["rvs-ego"], tmp_path)


def test_shards_part_videos():
    items = [Item(f"{video}/{i}", str(video), "?", "!") for video in range(7) for i in range(2)]
    parts = [sharded(items, f"{i}/3", None) for i in (1, 2, 3)]
    assert sorted(item.id for part in parts for item in part) == sorted(item.id for item in items)
    assert all(not {a.video for a in x} & {b.video for b in y} for x, y in itertools.combinations(parts, 2))
    assert len(sharded(items, None, 3)) == 3
    for wrong in ("0/3", "4/3", "x", "1/", "/2"):
        with pytest.raises(UserError, match="--shard"):
            sharded(items, wrong, None)


# --- protocols


@pytest.mark.parametrize("memory", ["star", "recent:2", "uniform:3", "all"])
def test_an_answer_is_the_same_whatever_comes_after(tiny, data, tmp_path, memory):
    """Causality: the same beginning with three different endings gives the same answers."""
    features = torch.randn(10, 64, 32, generator=torch.Generator().manual_seed(1))
    outcomes = []
    for end in range(3):
        changed = features.clone()
        changed[5:] = torch.randn(5, 64, 32, generator=torch.Generator().manual_seed(100 + end))
        (data / "videos" / "kitchen.mp4").unlink(missing_ok=True)
        save_file({"feature": changed}, data / "videos" / "kitchen.safetensors")
        rows, path = evaluated(tiny, data, tmp_path, memory)
        outcomes.append([(row["id"], row["prediction"], row["stream_time"], row["frames"]) for row in rows])
        path.unlink()
    assert outcomes[0] == outcomes[1] == outcomes[2]
    assert [row[2:] for row in outcomes[0][:3]] == [(2.0, 3), (2.0, 3), (4.0, 5)]


def test_protocols_show_what_they_say(tiny, data, tmp_path):
    seen = {}
    for protocol in ("causal", "clip", "whole"):
        rows, _ = evaluated(tiny, data, tmp_path, "star", protocol)
        seen[protocol] = [(row["frames"], row["stream_time"]) for row in rows[:3]]
    assert seen["causal"] == [(5, 2.0), (5, 2.0), (9, 4.0)]
    assert seen["clip"] == [(5, 2.0), (3, 2.0), (5, 4.0)]
    assert seen["whole"] == [(12, 5.5)] * 3


def test_missing_media_are_wrong_and_told(tiny, data, tmp_path):
    (data / "videos" / "broken.mp4").write_text("no video" * 50)
    rows = json.loads((data / "rvs_ego.json").read_text())
    rows[0]["video_path"] = "broken.mp4"
    (data / "rvs_ego.json").write_text(json.dumps(rows))
    got, _ = evaluated(tiny, data, tmp_path)
    report = summary(judged(got, OfflineJudge()), OfflineJudge(), BENCHMARKS["rvs-ego"])
    assert (report["failed"], report["accuracy"], report["questions"]) == (4, 0.0, 4)
    assert any("no medium called lost" in error for error in report["failures"])
    assert any("not a video" in error for error in report["failures"])


def test_the_blind_memory_needs_no_media(tiny, data, tmp_path):
    rows, _ = evaluated(tiny, data, tmp_path, "blind")
    assert all(row["error"] is None and row["prediction"] is not None for row in rows)
    model = FlashVStream(*tiny)
    for row in rows:
        alone = model.ask(None, row["prompt"], max_new_tokens=MAX_REPLY_TOKENS).finish().text
        assert row["prediction"] == alone


def test_a_killed_run_goes_on(tiny, data, tmp_path):
    rows, path = evaluated(tiny, data, tmp_path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join(lines[:2]) + "\n" + lines[2][:40])  # cut off mid-line
    again, _ = evaluated(tiny, data, tmp_path)
    assert [row["prediction"] for row in again] == [row["prediction"] for row in rows]
    assert len(path.read_text().splitlines()) == 4
    with pytest.raises(UserError, match="another run"):
        run_benchmark(
            Run("rvs-ego", "x", "star", "causal", 2.0), BENCHMARKS["rvs-ego"], [], data, FlashVStream(*tiny), path
        )


def test_every_frame_is_a_slot_of_the_memory_all(tiny, goldens):
    method = MemoryMethod("all", tiny[0])
    for i in range(30):
        method.write(float(i), goldens["offline.features"][i])
    snapshot = method.snapshot()
    assert len(snapshot.spatial) == 30
    assert len(snapshot.tokens()) == 30 * tiny[0].config.star.spatial_size ** 2


# --- numbers


def test_accuracy_agrees_with_scikit_learn(tiny):
    from sklearn.metrics import accuracy_score

    rng = random.Random(0)
    options = ["w", "x", "y", "z"]
    truths, replies = zip(*[(rng.randrange(4), rng.randrange(4)) for _ in range(200)], strict=True)
    rows = [
        {
            **vars(Item(str(i), str(i // 5), "?", options[truth], "all", tuple(options), truth)),
            "chosen": read_choice("ABCD"[reply], options).index,
            "error": None,
            "run": {"memory": "star"},
        }
        for i, (truth, reply) in enumerate(zip(truths, replies, strict=True))
    ]
    report = summary(judged(rows, OfflineJudge()), OfflineJudge(), BENCHMARKS["mlvu"])
    assert report["accuracy"] == pytest.approx(accuracy_score(truths, replies))
    assert report["interval"][0] < report["accuracy"] < report["interval"][1]
    assert report["abstained"] == 0


def test_constant_baselines_by_hand():
    items = [Item(str(i), str(i), "?", "x", "all", ("x", "y"), i % 3 % 2) for i in range(9)]
    baselines = constant_baselines(BENCHMARKS["mlvu"], items)["baselines"]
    assert baselines["always A"]["accuracy"] == pytest.approx(6 / 9)
    assert baselines["majority (A)"]["accuracy"] == pytest.approx(6 / 9)
    assert baselines["uniform guess"]["accuracy"] == 0.5
    opened = constant_baselines(BENCHMARKS["rvs-ego"], BENCHMARKS["rvs-ego"].read(RVS))["baselines"]
    assert opened["always 'Yes.'"]["accuracy"] == 0.25


def test_videos_are_resampled_not_questions():
    values = [1.0] * 50 + [0.0] * 50
    wide = bootstrap_interval(values, [str(i // 17) for i in range(100)])
    narrow = bootstrap_interval(values, [str(i) for i in range(100)])
    assert wide[0] < 0.2 < 0.8 < wide[1]
    assert 0.35 < narrow[0] < 0.5 < narrow[1] < 0.65
    assert bootstrap_interval([0.5] * 100, [str(i % 5) for i in range(100)]) == (0.5, 0.5)


def test_fewer_than_five_videos_have_no_interval():
    assert bootstrap_interval([1.0, 0.0, 1.0, 0.0], list("abcd")) is None
    assert bootstrap_interval([1.0, 0.0, 1.0, 0.0, 1.0], list("abcde")) is not None
    assert paired_difference([1.0, 0.0], [1.0, 1.0], ["a", "b"]) == (0.5, None, None)
    assert format_interval(None) == "-"


def test_comparisons_are_paired():
    rng = np.random.default_rng(0)
    first = (rng.random(300) < 0.5).astype(float)
    second = first.copy()
    second[:30] = 1.0
    difference, (low, high), p = paired_difference(first, second, [str(i) for i in range(300)])
    assert 0 < low < difference < high < 0.12
    assert p < 0.01
    asked = {"question": "?", "answer": "!"}
    rows = [{**asked, "id": str(i), "video": str(i), "correct": bool(value)} for i, value in enumerate(first)]
    others = [{**row, "correct": bool(value)} for row, value in zip(rows, second, strict=True)]
    comparison = compare(rows, others[:-1])
    assert comparison["lost"] == []
    assert len(comparison["gained"]) == int((second - first).sum())
    assert (comparison["questions"], comparison["only_in_first"]) == (299, 1)
    for other in ({**rows[0], "id": "other"}, {**rows[0], "question": "Another?"}):
        with pytest.raises(UserError, match="share no question"):
            compare(rows, [other])


# --- VStream-QA-mini


@pytest.mark.parametrize("in_cache", [True, False])
def test_the_mini_benchmark_says_that_its_folder_cannot_be_written(tmp_path, monkeypatch, in_cache):
    monkeypatch.setattr(mini, "fetch", lambda *_: [Path()] * len(mini.SCENES))
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "file" / "cache"))
    (tmp_path / "file").write_text("in the way, also of root")
    with pytest.raises(UserError, match="cannot be used" if in_cache else "cannot be written"):
        build_mini(None if in_cache else tmp_path / "file" / "mini")


def test_the_mini_benchmark_is_made_by_its_seed(tmp_path):
    folder = build_mini(tmp_path / "mini")
    records = json.loads((folder / "vstream_qa_mini.json").read_text())
    items = load_items(BENCHMARKS["vstream-qa-mini"], folder)
    assert len(records) == 16
    assert len(items) == 240
    assert {item.kind for item in items} == set(KINDS.values())
    again = build_mini(tmp_path / "again")
    assert json.loads((again / "vstream_qa_mini.json").read_text()) == records
    digest = hashlib.sha256(json.dumps(records, sort_keys=True).encode()).hexdigest()
    assert digest.startswith("8a968afcad9a1026")  # if the questions change, the README's table is invalid
    yes = [item.answer.startswith("Yes") for item in items if item.answer.startswith(("Yes", "No"))]
    assert 0.35 < sum(yes) / len(yes) < 0.65
    for item in items:
        assert MiniJudge().judge(item.question, item.answer, item.answer).correct, item
        assert not MiniJudge().judge(item.question, item.answer, "Wood").correct


def test_captions_of_the_mini_benchmark_name_one_scene_each():
    every = [caption for captions in CAPTIONS.values() for caption in captions]
    assert len(every) == len(set(every)) == 51


# --- the command


def test_eval_from_the_command_line(tiny_folder, data, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    options = ("--data", data, "--model", tiny_folder, "--fps", "2")
    done = run("eval", "rvs-ego", *options, "--output", one, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["questions"], report["failed"], report["run"]["protocol"]) == (4, 1, "causal")
    output = run("eval", "rvs-ego", *options, "--output", one).stdout
    assert "INCOMPLETE: 1 of 4 questions failed" in output
    assert "do not compare with published" in output
    run("eval", "rvs-ego", *options, "--memory", "recent:1", "--output", two)
    compared = json.loads(run("eval", "compare", one, two, "--json").stdout)
    assert compared["questions"] == 4
    assert json.loads(run("eval", "constant-baselines", "rvs-ego", "--data", data, "--json").stdout)["questions"] == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("rvs-ego",), "--data is needed"),
        (("rvs-ego", "--data", "/none"), "holds no annotations"),
        (("rvs-ego", "--data", "{data}", "--memory", "some"), "no memory"),
        (("rvs-ego", "--data", "{data}", "--protocol", "some"), "no protocol"),
        (("rvs-ego", "--data", "{data}", "--judge", "gpt"), "--judge"),
        (("rvs-ego", "--data", "{data}", "--judge", "http://x"), "--judge-model"),
        (("compare", "/none/a", "/none/b"), "cannot read"),
        (("constant-baselines", "none"), "no benchmark"),
    ],
)
def test_eval_says_what_is_wrong(tiny_folder, data, tmp_path, arguments, message):
    more = ("--model", tiny_folder, "--output", tmp_path / "out.jsonl") if arguments[0] == "rvs-ego" else ()
    done = run("eval", *(str(argument).replace("{data}", str(data)) for argument in arguments), *more)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_ablations_stand_side_by_side(tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    plot = tmp_path / "plot.png"
    chosen = (
        "--variant",
        "full",
        "--variant",
        "no spatial",
        "--variant",
        "Lloyd's consolidation",
        "--variant",
        "blind",
    )
    done = run("ablate", "rvs-ego", "--data", data, "--model", tiny_folder, *chosen, "--output", plot, "--json")
    assert done.returncode == 0, done.stderr
    assert list(json.loads(done.stdout)) == ["full", "no spatial", "Lloyd's consolidation", "blind"]
    assert plot.stat().st_size > 1000
    assert run("ablate", "rvs-ego", "--data", data, "--model", tiny_folder, "--variant", "x").returncode == 2


def test_efficiency_is_measured_and_plotted(tiny_folder, tmp_path):
    plot = tmp_path / "plot.svg"
    done = run("bench", "efficiency", "--model", tiny_folder, "--frames", "1", "--output", plot)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["efficiency"]
    assert [(row["memory"], row["frames"]) for row in rows] == [
        (method, count) for method in ("star", "uniform:8", "all") for count in (1,)
    ]
    assert all(row["measured"] and row["first_token_seconds"] > 0 for row in rows)
    assert plot.read_text().startswith("<?xml")
    plot_efficiency([{**row, "measured": False} for row in rows], tmp_path / "none.png")
    assert (tmp_path / "none.png").exists()
