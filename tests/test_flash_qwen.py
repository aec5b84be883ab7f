"""Flash-VStream-Qwen: none of the released code's defects by default, loading, watching in pairs of frames."""

import json
import shutil
from functools import partial

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_vstream.cli.ask import Session
from flash_vstream.errors import UserError
from flash_vstream.live.messages import Describe
from flash_vstream.live.standing_questions import Lookout, Narrator
from flash_vstream.live.watch_rules import WatchRule
from flash_vstream.memory.flash import FlashMemory, split_resolutions
from flash_vstream.memory.flash_release import ReleaseFlashMemory
from flash_vstream.models import download, hub
from flash_vstream.models.event_score import EventScorer
from flash_vstream.models.flash_qwen import FlashQwenProcessor, visual_positions
from flash_vstream.pipeline import FlashVStream
from flash_vstream.video import read_frames
from helpers.flash_qwen import CHANNELS, RELEASE, SMALL, load_tiny, released_memory, write_folder
from helpers.videos import write_video


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint with a tokenizer."""
    return write_folder(tmp_path_factory.mktemp("qwen") / "flash-vstream-qwen")


@pytest.fixture(scope="module")
def pipeline(folder) -> FlashVStream:
    return load_tiny(folder)


def encoded(count: int, noise: float = 1.0, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    scene = torch.randn(1, 16, CHANNELS, generator=generator)
    return scene + noise * torch.randn(count, 16, CHANNELS, generator=generator)


def flash(features: torch.Tensor, times=None) -> FlashMemory:
    memory = FlashMemory(SMALL, CHANNELS)
    memory.write(features, list(range(len(features))) if times is None else times)
    return memory


def test_is_constant_and_knows_true_times():
    features = encoded(300)
    memory = flash(features[:20], [1000.0 + i for i in range(20)])
    size = memory.nbytes
    memory.write(features[20:], [1020.0 + i for i in range(280)])
    assert memory.nbytes == size
    snapshot = memory.read()
    assert float(snapshot.temporal.weight.sum()) == 300
    assert snapshot.temporal.mean.max() > 1100  # the release's never exceed the length of its window
    high, _ = split_resolutions(features)
    for slot in range(len(snapshot.retrieved)):  # real frames
        seen = int(snapshot.retrieved.exemplar[slot]) - 1000
        assert torch.equal(snapshot.retrieved.features[slot], high[seen])


def test_does_not_depend_on_chance_or_chunks():
    features = encoded(60)
    torch.manual_seed(1)
    whole = flash(features).read()
    torch.manual_seed(2)
    memory = flash(features[:7])
    memory.write(features[7:], list(range(7, 60)))
    for ours, theirs in zip(whole.parts(), memory.read().parts(), strict=True):
        assert torch.equal(ours[1].features, theirs[1].features)


@pytest.mark.parametrize("noise", [0.0, 1e-6])
def test_takes_static_scenes(noise):
    snapshot = flash(encoded(60, noise)).read()
    assert snapshot.temporal.features.isfinite().all()
    assert float(snapshot.temporal.weight.sum()) == 60


@pytest.mark.parametrize("count", [1, 2, 3, 9, 150])
def test_no_visual_token_stands_at_or_after_the_question(count):
    snapshot = flash(encoded(count)).read()
    placed = visual_positions(snapshot, 10)
    assert int(placed.positions.max()) < placed.following
    assert int(placed.positions[0, : len(snapshot.retrieved) * 16].max()) < 10 + 120  # no time beyond those trained


def test_the_release_does_put_tokens_after_the_question():
    snapshot = released_memory(encoded(40), torch.randperm(40))
    placed = visual_positions(snapshot, 10)
    assert int(placed.positions.max()) >= placed.following


@pytest.mark.parametrize("frames", [1, 3, 12])
def test_answers_about_pictures_and_any_number_of_frames(pipeline, frames):
    stream = pipeline.new_stream()
    pictures = np.random.default_rng(0).integers(0, 255, (frames, 90, 160, 3), dtype=np.uint8)
    for second, picture in enumerate(pictures):
        stream.write([picture], [float(second)])
    answer = pipeline.ask(stream, "What is this?", max_new_tokens=6).finish()
    assert answer.tokens > 0
    assert sum(slot.share for slot in answer.evidence) == pytest.approx(1.0)
    prefix = pipeline.generator.read(stream.snapshot())
    assert pipeline.ask(prefix, "What is this?", max_new_tokens=6).finish().text == answer.text
    assert pipeline.generator.ask_many(prefix, ["What is this?", "And now?"], 6)[0] == answer.text


def test_positions_do_not_leak_between_questions(pipeline, folder):
    stream = pipeline.new_stream()
    stream.write(np.zeros((6, 56, 56, 3), np.uint8), list(range(6)))
    first = pipeline.ask(stream, "What is this?", max_new_tokens=6).finish().text
    pipeline.ask(None, "Hello?", max_new_tokens=3).finish()
    assert pipeline.ask(stream, "What is this?", max_new_tokens=6).finish().text == first


def test_released_form_answers_too(folder):
    pipeline = load_tiny(folder, RELEASE)
    assert isinstance(pipeline.new_stream().memory, ReleaseFlashMemory)
    assert isinstance(pipeline.processor, FlashQwenProcessor)
    stream = pipeline.new_stream()
    for second in range(12):
        stream.write(np.full((1, 56, 56, 3), 20 * second, np.uint8), [float(second)])
    assert pipeline.ask(stream, "What?", max_new_tokens=4).finish().tokens > 0


# --- loading


def test_sizes_come_from_the_checkpoint(folder):
    config, processor = hub.load_processor(str(folder))
    assert (config.star.temporal_length, config.star.retrieved_length) == (8, 4)
    assert processor.image_processor.size == 448


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_loads_strictly(folder, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    weights = load_file(copy / "model.safetensors")
    name = "visual.merger.mlp.2.bias"
    if change == "missing":
        del weights[name]
    elif change == "unexpected":
        weights["model.layers.7.input_layernorm.weight"] = torch.zeros(64)
    else:
        weights[name] = torch.zeros(3)
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="broken"):
        load_tiny(copy)


def test_refuses_unpublished_methods(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    values = json.loads((copy / "config.json").read_text())
    values["vision_config"]["flash_memory_config"]["flash_memory_temporal_method"] = "sample"
    (copy / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match="kmeans_ordered"):
        FlashVStream.from_pretrained(str(copy), "cpu", torch.float32)


def test_is_loaded_by_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path))
    monkeypatch.setattr(download, "fetch_snapshot", lambda name, patterns: folder)
    config, processor = hub.load_processor("flash-vstream-qwen-7b")
    assert config.star.temporal_length == 8
    assert isinstance(processor, FlashQwenProcessor)
    assert hub.pull("flash-vstream-qwen-7b").parent == tmp_path / "models"


# --- watches


def test_a_watch_reads_the_whole_memory_since_no_slot_is_a_frame(pipeline):
    scorer, stream = EventScorer(pipeline.generator), pipeline.new_stream()
    for second, frame in enumerate(clip(12)):
        stream.write([frame], [float(second)])
    snapshot = stream.snapshot()
    event = scorer.event("a dog")
    expected = scorer.likelihood(event, pipeline.generator.read(snapshot))
    assert scorer.score(event, snapshot) == expected
    assert scorer.confirm(event, snapshot)[0] == expected
    lookout = Lookout(scorer, "a dog", WatchRule(min_seconds=0, threshold=1e-9))
    (alert,) = [alert for alert in lookout.look(snapshot) if alert is not None]
    assert (alert.kind, alert.time) == ("start", 11.0)
    (caption,) = [said for said in Narrator(scorer, Describe(10.0)).look(snapshot) if said is not None]
    assert (caption.kind, caption.time) == ("caption", 11.0)


# --- pairs of frames, as the tower was trained


def clip(count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(1).integers(0, 255, (count, 56, 56, 3), dtype=np.uint8))


def test_frames_of_one_write_are_encoded_in_pairs(pipeline):
    frames = clip(5)
    maps, times = pipeline.encode_steps(frames, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert times == [1.0, 3.0, 4.0]  # a pair has the time of its newer frame
    images = pipeline.processor.image_processor
    pixels = images.pixels(np.stack([images.square(frame) for frame in frames]))
    pairs = pipeline.model.family.encode_clips(pipeline.model.network, pixels[:4].unflatten(0, (2, 2)))
    torch.testing.assert_close(maps[:2], pairs)
    torch.testing.assert_close(maps[2:], pipeline.encode(frames[4:]))  # an odd last frame stands alone
    assert not torch.allclose(maps[0], pipeline.encode(frames[1:2])[0], atol=1e-3)


@pytest.mark.parametrize("times", [[1.0, 0.0], [0.0], [float("nan"), 1.0]])
def test_pairs_need_times_that_do_not_decrease(pipeline, times):
    with pytest.raises(ValueError, match="times"):
        pipeline.new_stream().write(clip(2), times)


def test_a_file_is_watched_in_pairs(pipeline, tmp_path):
    video = write_video(tmp_path / "clip.mp4", 7, rate=1)
    shown = []
    stream = pipeline.watch(video, on_frame=lambda stream, frame: shown.append((frame.time, stream.frames)))
    assert [steps for _, steps in shown] == [1, 1, 2, 2, 3, 3, 4]
    by_hand, maps = pipeline.new_stream(), list(pipeline.encode_file(video))
    for times, features in maps:
        by_hand.memory.write(features, times)
    assert [time for times, _ in maps for time in times] == [1.0, 3.0, 5.0, 6.0]
    for (_, ours), (_, theirs) in zip(stream.snapshot().parts(), by_hand.snapshot().parts(), strict=True):
        torch.testing.assert_close(ours.features, theirs.features)


def test_ask_pairs_frames_and_has_seen_everything_up_to_its_time(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "ask", partial(pipeline.ask, max_new_tokens=2))
    video = write_video(tmp_path / "clip.mp4", 8, rate=1)
    frames = read_frames(video, 1.0, pipeline.processor.image_processor.size)
    report = Session(pipeline, as_json=True).run(frames, [(2.0, ["What?"]), (7.0, ["What?"])], None)
    assert report["frames"] == 8
    assert [answer["stream_time"] for answer in report["answers"]] == [2.0, 7.0]
    # (0, 1), then 2 alone for the first answer, (3, 4), (5, 6), and 7 alone
    weights = [sum(s["weight"] for s in answer["evidence"] if s["part"] == "temporal") for answer in report["answers"]]
    assert weights == [2, 5]
