"""Transformers' vision-language models behind the memory: tiny ones of every family, with random weights."""

import json
import multiprocessing
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flash_vstream.errors import UserError
from flash_vstream.live.frame_worker import FrameWorker, state_layout
from flash_vstream.live.messages import Add, Ask
from flash_vstream.live.published import save_state
from flash_vstream.live.question_worker import QuestionWorker
from flash_vstream.live.shared_tensors import SharedTensors
from flash_vstream.live.stream_state import read_snapshot
from flash_vstream.memory import StarConfig
from flash_vstream.models import vlm_loading
from flash_vstream.models.catalog import VLM_FAMILIES
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.interface import VIDEO_TOKEN
from flash_vstream.models.vlm_families import FAMILIES, NEWLINE_TOKEN
from flash_vstream.pipeline import FlashVStream, Stream
from flash_vstream.video import Frame
from flash_vstream.video.capture import FrameRing
from flash_vstream.video.sources import PUSH, Source
from helpers.cli import run
from helpers.videos import write_video
from helpers.vlms import CONFIGS, TINY_STAR, tiny_pair, tiny_vlm
from helpers.waiting import until

QUESTION = "What is on the table?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return {name: tiny_vlm(name, tmp_path_factory.mktemp(name)) for name in CONFIGS}


@pytest.fixture(scope="module")
def pipelines(folders) -> dict[str, FlashVStream]:
    return {name: load(folder) for name, folder in folders.items()}


def load(folder: Path, **options) -> FlashVStream:
    choice = ModelChoice(str(folder), device="cpu", dtype="float32", **{"star": TINY_STAR, **options})
    return FlashVStream.from_pretrained(choice)


def frames(count: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (count, 48, 64, 3), dtype=np.uint8)


def watched(pipeline: FlashVStream, count: int = 10) -> Stream:
    stream = pipeline.new_stream()
    for second, frame in enumerate(frames(count)):
        stream.write([frame], [float(second)])
    return stream


def native_inputs(name: str, pipeline: FlashVStream, ids: list[int], shown: np.ndarray) -> dict:
    """What Transformers' own forward takes for a prompt of ours with these frames."""
    config = pipeline.model.network.config
    token = config.video_token_id if name == "llava_onevision" else config.image_token_id
    places = torch.tensor([ids])
    places = torch.where((places == VIDEO_TOKEN) | (places == NEWLINE_TOKEN), token, places)
    processor = pipeline.processor.image_processor
    pixels = processor.pixels(np.stack([processor.square(frame) for frame in shown]))
    if name.startswith("qwen"):
        patches, grid = pipeline.model.family._grid(pixels)
        kinds = (places == token).int()
        return {"input_ids": places, "pixel_values": patches, "image_grid_thw": grid, "mm_token_type_ids": kinds}
    if name == "llava_onevision":
        return {"input_ids": places, "pixel_values_videos": pixels[:, None]}
    if name == "smolvlm":
        return {"input_ids": places, "pixel_values": pixels[None]}
    if name == "gemma3":
        return {"input_ids": places, "pixel_values": pixels, "token_type_ids": (places == token).long()}
    return {"input_ids": places, "pixel_values": pixels}


@pytest.mark.parametrize("name", CONFIGS)
def test_reads_frames_as_transformers_does(pipelines, name):
    pipeline, shown = pipelines[name], frames(2)
    stream = watched(pipeline, 2)
    prefix = pipeline.generator.read(stream.snapshot())
    question = pipeline.processor.question_ids(QUESTION)
    ids = [*prefix.ids, *question]
    with torch.inference_mode():
        ours = pipeline.model(torch.tensor([question]), past_key_values=prefix.sequence).logits[0, -1]
        native = pipeline.model.network(**native_inputs(name, pipeline, ids, shown)).logits[0, -1]
    torch.testing.assert_close(ours, native, rtol=1e-4, atol=1e-4 * float(native.abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_recalls_the_frames_that_fit(pipelines, name):
    pipeline = pipelines[name]
    snapshot = watched(pipeline, 8).snapshot()
    assert snapshot.spatial.exemplar.tolist() == [6.0, 7.0]
    assert float(snapshot.longterm.weight.sum()) == 8
    answer = pipeline.ask(snapshot, QUESTION, max_new_tokens=2).finish()
    times = [slot.exemplar for slot in answer.evidence if slot.part == "longterm"]
    assert len(times) == 4
    assert times == sorted(times)
    assert max(times) < 6  # the newest are shown anyway
    assert sum(slot.share for slot in answer.evidence) == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "smolvlm"])
def test_batches_answer_as_single_questions_do(pipelines, name):
    generator = pipelines[name].generator
    prefix = generator.read(watched(pipelines[name], 8).snapshot())
    questions = [QUESTION, "And now?"]
    alone = [generator.ask(prefix, text, max_new_tokens=3).finish().text for text in questions]
    assert generator.ask_many(prefix, questions, 3) == alone
    likely = generator.likelihoods(prefix, QUESTION, ["a cup", "no"])
    singly = [generator.likelihoods(prefix, QUESTION, [text])[0] for text in ("a cup", "no")]
    assert likely == pytest.approx(singly, rel=1e-4)


def test_a_fit_of_ones_own_decides(pipelines):
    pipeline = pipelines["smolvlm"]
    snapshot = watched(pipeline).snapshot()
    kept = pipeline.generator.fit
    try:
        pipeline.generator.fit = lambda question, slots: -slots.exemplar
        chosen = recalled(pipeline, QUESTION, snapshot)
    finally:
        pipeline.generator.fit = kept
    assert chosen == sorted(snapshot.longterm.exemplar.tolist())[:4]


def recalled(pipeline: FlashVStream, question: str, snapshot) -> list[float]:
    """The times of the frames that a question recalls."""
    (hints,) = pipeline.generator.hints([question], snapshot)
    return hints.recalled.exemplar.tolist()


# --- served: the workers of a server in this process, without HTTP


def worked(pipeline: FlashVStream, shared: SharedTensors, folder: Path, saved: Path | None, shown: np.ndarray) -> None:
    """Run a frame worker that watches pushed frames until it has published all of them."""
    orders, theirs = multiprocessing.Pipe()
    worker, size = FrameWorker(pipeline, theirs), pipeline.processor.image_processor.size
    ring = FrameRing(str(folder / "pushed"), size, create=not (folder / "pushed").exists())
    source = Source(PUSH, fps=120, size=size)
    orders.send(Add("door", source, shared.path, str(saved) if saved else None, str(folder / "pushed")))
    worker.step()
    before = worker.watched["door"].memory.frames
    for number, frame in enumerate(shown, start=1):
        square = pipeline.processor.image_processor.square(frame)
        ring.write(ring.taken + 1, Frame(time.monotonic(), square))
        until(lambda count=before + number: worker.step() and worker.watched["door"].memory.frames == count)
        time.sleep(0.02)  # slower than the stream's rate, so that none is skipped
    orders.close()
    worker.run()


def answered(pipeline: FlashVStream, shared: SharedTensors) -> dict:
    """A question worker's answer about a shared state."""
    ours, theirs = multiprocessing.Pipe()
    worker = QuestionWorker(pipeline, theirs)
    worker.take(Ask(1, shared.path, QUESTION, max_new_tokens=2))
    while worker.step() or worker.waiting:
        pass
    events = []
    while ours.poll():
        events.append(ours.recv())
    assert events[-1][1] == "done", events[-1]
    return events[-1][2]


@pytest.mark.parametrize("name", CONFIGS)
def test_is_served_saved_and_restored(pipelines, tmp_path, name):
    pipeline, shown = pipelines[name], frames(8)
    layout = state_layout(pipeline.new_stream().memory)
    states = []
    for place in ("first", "second"):
        (tmp_path / place).mkdir()
        states.append(SharedTensors.create(str(tmp_path / place / "state"), layout))
    saved = tmp_path / "saved.safetensors"
    worked(pipeline, states[0], tmp_path / "first", None, shown[:6])
    assert save_state(states[0], saved)
    worked(pipeline, states[1], tmp_path / "second", saved, shown[6:])
    snapshot = read_snapshot(states[1], pipeline)
    assert snapshot.frames == 8
    assert float(snapshot.longterm.weight.sum()) == 8
    answer = answered(pipeline, states[1])
    assert [slot["part"] for slot in answer["evidence"]].count("longterm") == 4


def test_workers_need_only_their_half(folders):
    watching, asking = load(folders["qwen3_vl"]), load(folders["qwen3_vl"])
    expected = watched(watching, 4).snapshot()
    watching.model.drop_language()
    asking.generator.ask(expected, QUESTION)  # built with everything in place
    asking.model.drop_vision()
    seen = watched(watching, 4).snapshot()
    assert torch.equal(seen.spatial.features, expected.spatial.features)
    assert asking.ask(seen, QUESTION, max_new_tokens=3).finish().tokens > 0


# --- the command line, and what can be chosen


@pytest.mark.parametrize(
    ("memory", "times"),
    [("recent:3", [7, 8, 9]), ("uniform:3", [0, 4, 9]), ("all", list(range(10)))],
)
def test_frames_can_be_kept_instead(pipelines, memory, times):
    loaded = pipelines["smolvlm"]
    pipeline = FlashVStream(loaded.model, loaded.processor, memory)
    stream = watched(pipeline)
    assert stream.snapshot().spatial.exemplar.tolist() == times
    size = stream.memory.nbytes
    stream.write(frames(1), [10.0])
    assert (stream.memory.nbytes == size) == (memory != "all")
    answer = pipeline.ask(stream, QUESTION, max_new_tokens=3).finish()
    assert [slot.part for slot in answer.evidence] == ["spatial"] * (11 if memory == "all" else 3)
    copy = pipeline.new_stream()
    copy.memory.load_state_dict(stream.memory.state_dict())
    assert torch.equal(copy.snapshot().spatial.features, stream.snapshot().spatial.features)


def test_asks_on_the_command_line(folders, tmp_path):
    video = write_video(tmp_path / "clip.mp4", frames=12)
    options = ["--model", str(folders["smolvlm"]), "--memory", "recent:3", "--device", "cpu", "--dtype", "float32"]
    report = json.loads(run("ask", str(video), QUESTION, "--fps", "5", "--json", *options).stdout)
    (answer,) = report["answers"]
    assert [slot["part"] for slot in answer["evidence"]] == ["spatial"] * 3
    assert answer["evidence"][-1]["start"] == answer["stream_time"]


def test_evaluates(folders, tmp_path):
    output = tmp_path / "predictions.jsonl"
    options = ["--model", str(folders["internvl"]), "--device", "cpu", "--memory", "recent:2", "--limit", "2"]
    report = json.loads(run("eval", "vstream-qa-mini", "--output", str(output), "--json", *options).stdout)
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert report["predictions"] == str(output)
    assert [row["error"] for row in rows] == [None, None]


def test_a_pair_finds_what_a_question_asks_for(folders, tmp_path):
    pipeline = load(folders["smolvlm"], pair=str(tiny_pair(tmp_path / "pair")))
    snapshot = watched(pipeline).snapshot()
    pair = pipeline.model.pair
    processor = pipeline.processor.image_processor
    pixels = processor.pixels(np.stack([processor.square(frame) for frame in frames(10)]))
    times = snapshot.longterm.exemplar.long()
    scores = pipeline.generator.fit(QUESTION, snapshot.longterm)
    torch.testing.assert_close(scores, pair.see(pixels)[times] @ pair.read(QUESTION), rtol=0, atol=2e-3)
    assert pipeline.ask(snapshot, QUESTION, max_new_tokens=3).finish().tokens > 0
    pipeline.model.drop_vision()
    assert torch.equal(scores, pipeline.generator.fit(QUESTION, snapshot.longterm))


def test_words_find_the_frames_whose_tokens_are_like_them(pipelines):
    pipeline = pipelines["internvl"]
    snapshot = watched(pipeline).snapshot()
    table = pipeline.model.network.get_input_embeddings().weight
    ids = pipeline.processor.tokenizer(" table", add_special_tokens=False).input_ids
    snapshot.longterm.features[2, 1] = 1000 * table[ids].float().mean(0)  # projectors make vectors this much larger
    scores = pipeline.generator.fit(QUESTION, snapshot.longterm)
    assert int(scores.argmax()) == 2
    assert pipeline.generator.fit("What happened?", snapshot.longterm) is None
    assert recalled(pipeline, "What happened?", snapshot)[0] == 0.0


def test_positions_do_not_leak_between_questions(pipelines):
    pipeline = pipelines["qwen2_5_vl"]
    prefix = pipeline.generator.read(watched(pipeline).snapshot())
    first, second = (pipeline.ask(prefix, text, max_new_tokens=6) for text in (QUESTION, "Who is in the garden?"))
    alone = [pipeline.ask(prefix, answer.question, max_new_tokens=6).finish().text for answer in (first, second)]
    pieces = [iter(first), iter(second)]
    while pieces:  # one token each in turn, as a server answers
        pieces = [own for own in pieces if next(own, None) is not None]
    assert [first.text, second.text] == alone


def test_attention_can_be_chosen(folders):
    answers = {}
    for attn in (None, "sdpa"):
        pipeline = load(folders["qwen3_vl"], attn=attn)
        answers[attn] = pipeline.ask(watched(pipeline), QUESTION, max_new_tokens=4).finish()
    assert answers[None].text == answers["sdpa"].text
    assert {slot.share for slot in answers["sdpa"].evidence} == {None}


def test_paper_sizes_stay_possible(folders):
    star = StarConfig(spatial_size=4, temporal_size=2, temporal_length=5, abstract_length=2, retrieved_length=2)
    pipeline = load(folders["smolvlm"], star=star)
    answer = pipeline.ask(watched(pipeline), QUESTION, max_new_tokens=3).finish()
    parts = [slot.part for slot in answer.evidence]
    assert parts == ["temporal"] * 5 + ["retrieved"] * 2 + ["spatial"]  # no semantic attention, so nothing abstract


def test_quantized_loading_names_what_is_missing(folders, monkeypatch):
    monkeypatch.setattr(vlm_loading, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="bitsandbytes or torchao"):
        load(folders["smolvlm"], bits=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "cuda:7"}, "no device cuda:7"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"bits": 3}, "4 or 8"),
        ({"memory": "newest"}, "recent:N"),
        ({"memory": "recent:0"}, "recent:N"),
        ({"star": StarConfig(spatial_size=3, temporal_size=1)}, "4x4 tokens"),
        ({"attn": "no_such_attention"}, "no_such_attention"),
    ],
)
def test_what_cannot_be_chosen_is_one_clear_error(folders, options, message):
    values = {"device": "cpu", "dtype": "float32", **options}
    with pytest.raises(UserError, match=message):
        FlashVStream.from_pretrained(ModelChoice(str(folders["smolvlm"]), **values))


@pytest.mark.parametrize("damage", ["template", "pixels", "weights"])
def test_a_damaged_folder_is_one_clear_error(folders, tmp_path, damage):
    folder = tmp_path / "model"
    shutil.copytree(folders["smolvlm"], folder)
    if damage == "template":
        (folder / "chat_template.jinja").write_text("{{ messages[0]['nothing'] }}")
    else:
        (folder / {"pixels": "preprocessor_config.json", "weights": "model.safetensors"}[damage]).unlink()
    with pytest.raises(UserError):
        load(folder).generator  # noqa: B018 - builds the prompt limit, which needs the template


def test_the_listed_families_are_those_that_are_tested():
    listed = {family.model_type: family.name for family in VLM_FAMILIES}
    assert listed.keys() == CONFIGS.keys() == FAMILIES.keys()
    titles = {name: family.title for name, family in FAMILIES.items() if name != "qwen2_vl"}
    assert {name: listed[name] for name in titles} == titles
