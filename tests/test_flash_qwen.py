"""Flash-VStream-Qwen: agreement with the released code (golden files, float32), and none of its defects by default.

The goldens hold the random orders that k-means started from. Slots whose two nearest steps are equally far from a
centroid are left out: there rounding decides.
"""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from flash_vstream.errors import UserError
from flash_vstream.memory import StarConfig
from flash_vstream.memory.flash import FlashMemory, join_resolutions, split_resolutions
from flash_vstream.memory.flash_release import ReleaseFlashMemory, ordered_kmeans
from flash_vstream.models import download, hub
from flash_vstream.models.am_rope import real_time_positions, release_am_rope
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.flash_qwen import FlashQwenProcessor, visual_positions
from flash_vstream.models.interface import VIDEO_TOKEN
from flash_vstream.pipeline import FlashVStream
from helpers.models import GOLDENS
from helpers.vlms import marked_tokenizer

FOLDER = GOLDENS / "qwen"
SIZES = {"temporal_length": 8, "retrieved_length": 4, "spatial_length": 0, "abstract_length": 0, "abstract_size": 1}
SMALL = StarConfig(spatial_size=4, temporal_size=2, **SIZES)
RELEASE = StarConfig(spatial_size=4, temporal_size=2, compat="release", **SIZES)
CHANNELS = 160
VIDEO_ID = 506


@pytest.fixture(scope="module")
def notes() -> dict:
    return json.loads((FOLDER / "goldens.json").read_text())


@pytest.fixture(scope="module")
def qwen() -> dict[str, torch.Tensor]:
    return load_file(FOLDER / "goldens.safetensors")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The tiny checkpoint with a tokenizer."""
    folder = tmp_path_factory.mktemp("qwen") / "flash-vstream-qwen"
    shutil.copytree(FOLDER / "tiny", folder)
    marked_tokenizer().save_pretrained(folder)
    return folder


def load(folder, star: StarConfig = SMALL, attn: str | None = None) -> FlashVStream:
    return FlashVStream.from_pretrained(ModelChoice(str(folder), "cpu", "float32", attn, star=star))


@pytest.fixture(scope="module")
def pipeline(folder) -> FlashVStream:
    return load(folder)


def close(ours: torch.Tensor, golden: torch.Tensor) -> None:
    torch.testing.assert_close(ours.to(golden), golden, rtol=1e-5, atol=1e-5 * float(golden.abs().max()))


@pytest.mark.parametrize(
    "case", ["kmeans_ordered_30to8_weights_times", "kmeans_ordered_9to8", "kmeans_ordered_few_unique"]
)
def test_ordered_kmeans(qwen, case):
    own = {name.split(".")[2]: value for name, value in qwen.items() if name.startswith(f"compress.{case}.")}
    ours = ordered_kmeans(own["input"], 8, lambda n: own["randperm_full"], own.get("weights"))
    close(ours.features, own["output"])
    close(ours.weights, own["weights_out"])
    close(ours.stamps, own["timestamps"])


def steps(hidden: torch.Tensor, count: int) -> torch.Tensor:
    """Encoded frames from the release's tokens: all of them in high resolution, then all in low."""
    high, low = hidden[: len(hidden) * 4 // 5], hidden[len(hidden) * 4 // 5 :]
    return join_resolutions(high.reshape(count, -1, 128), low.reshape(count, -1, 128))


def written(features: torch.Tensor, permutation: torch.Tensor | None):
    memory = ReleaseFlashMemory(RELEASE, CHANNELS, offline=True, permute=lambda n: permutation)
    memory.write(features, [float(i) for i in range(len(features))])
    return memory.read()


@pytest.mark.parametrize("case", ["t9_one_over", "t3_shorter"])
def test_offline_memory(qwen, notes, case):
    count, rows, columns = notes["memory"][case]["thw"]
    features = steps(qwen[f"memory.{case}.input_x"], count)
    snapshot = written(features, qwen.get(f"memory.{case}.randperm_full.0"))
    close(snapshot.temporal.features.reshape(-1, 32), qwen[f"memory.{case}.csm_x"])
    close(snapshot.temporal.weight, qwen[f"memory.{case}.csm_weights"])
    golden, ties = qwen[f"memory.{case}.dam_positions"], notes["memory"][case].get("dam_tie_sensitive_slots", [])
    settled = [slot for slot in range(len(golden)) if slot not in ties]
    assert snapshot.retrieved.mean[settled].tolist() == golden[settled].tolist()
    visual = qwen[f"memory.{case}.visual_position_ids"][0] >= 0
    stamps = qwen[f"memory.{case}.csm_timestamps"].double()
    start = int(visual.nonzero()[0, 0])
    grids = (rows // 2, columns // 2), (rows // 4, columns // 4)
    placed = release_am_rope(golden, grids[0], stamps, grids[1], start)
    output = qwen[f"memory.{case}.output_position_ids"][:, 0]
    assert torch.equal(placed.positions, output[:, visual])
    assert placed.following == int(output[0, int(visual.nonzero()[-1, 0]) + 1])


def test_real_time_memory(qwen, notes, pipeline):
    features = steps(torch.cat([qwen["realtime.call28.x_bank"], qwen["realtime.call28.small_x_bank"]]), 40)
    call, at = 0, 0
    memory = ReleaseFlashMemory(RELEASE, CHANNELS, permute=lambda n: qwen[f"realtime.call{call}.randperm_full"])
    for frames in notes["realtime"]["clips"]:
        call, clip = call + 1, features[at : at + max(1, frames // 2)]
        memory.write(clip, [float(at + i) for i in range(len(clip))])
        at += len(clip)
        if f"realtime.call{call}.tem_x" not in qwen:
            continue
        snapshot = memory.read()
        close(snapshot.temporal.features.reshape(-1, 32), qwen[f"realtime.call{call}.tem_x"])
        close(snapshot.temporal.weight, qwen[f"realtime.call{call}.tem_weights"])
        close(snapshot.temporal.mean, qwen[f"realtime.call{call}.tem_timestamp"])
        golden, ties = qwen[f"realtime.call{call}.spa_positions"], notes["realtime"]["ties"][str(call)]
        settled = [slot for slot in range(len(golden)) if slot not in ties]
        assert snapshot.retrieved.mean[settled].tolist() == golden[settled].tolist()
    ids = qwen["realtime.call28.query_input_ids"][0]
    ours, _, positions = logits(pipeline, ids, snapshot, (2, 4), real_time=True)
    assert torch.equal(positions, qwen["realtime.call28.query_position_ids_in"][:, 0])
    close(ours[:, -8:], qwen["realtime.call28.query_logits_last8"])


def logits(pipeline, ids, snapshot, grid, real_time=False, **options):
    """Our logits for one of the release's prompts, its memory and AM-RoPE; also the ids and positions."""
    start, count = int((ids == VIDEO_ID).nonzero()[0, 0]), int((ids == VIDEO_ID).sum())
    low = grid[0] // 2, grid[1] // 2
    placed = release_am_rope(snapshot.retrieved.mean, grid, snapshot.temporal.mean, low, start)
    if real_time:
        placed = real_time_positions(len(snapshot.retrieved), grid, len(snapshot.temporal), low, start)
    after = torch.arange(len(ids) - start - count) + placed.following
    positions = torch.cat([torch.arange(start).expand(3, -1), placed.positions, after.expand(3, -1)], 1)
    own = torch.where(ids == VIDEO_ID, VIDEO_TOKEN, ids)[None]
    tokens = torch.cat([part.features.flatten(0, 1) for part in (snapshot.retrieved, snapshot.temporal)])
    with torch.inference_mode():
        output = pipeline.model(own, [tokens], position_ids=positions[:, None], **options)
    return output.logits, output.loss, positions


def test_vision_tower(qwen, pipeline):
    frames = pipeline.processor.image_processor.pixels(qwen["forward.frames"].numpy())
    with torch.inference_mode():
        high, low = split_resolutions(pipeline.model.family.encode_clips(pipeline.model.network, frames[None]))
    golden = qwen["forward.main.vision_hidden_before_memory"]
    close(high.reshape(-1, 32), golden[:96])
    close(low.reshape(-1, 32), golden[1920 : 1920 + 24])


def test_forward_and_loss(qwen, notes, pipeline):
    features = steps(qwen["forward.main.vision_hidden_before_memory"], 20)
    snapshot = written(features, qwen["forward.main.randperm_full.0"])
    labels = qwen["forward.main_labels.labels"]
    ours, loss, positions = logits(pipeline, qwen["forward.main.input_ids"][0], snapshot, (4, 6), labels=labels)
    assert torch.equal(positions, qwen["forward.main.position_ids_after_am_rope"][:, 0])
    close(ours[:, -10:], qwen["forward.main.logits_last10"])
    assert loss.item() == pytest.approx(notes["forward"]["loss"], rel=1e-5)
    short = written(features[:6], None)
    ours, _, positions = logits(pipeline, qwen["forward.t6.input_ids"][0], short, (4, 6))
    assert torch.equal(positions, qwen["forward.t6.position_ids_after_am_rope"][:, 0])
    close(ours[:, -10:], qwen["forward.t6.logits_last10"])
    with torch.inference_mode():
        text = pipeline.model(qwen["forward.text_only.input_ids"]).logits
    close(text[:, -4:], qwen["forward.text_only.logits_last4"])


def test_generation(qwen, notes, pipeline):
    from transformers import DynamicCache

    features = steps(qwen["forward.main.vision_hidden_before_memory"], 20)
    snapshot = written(features, qwen["forward.generate.randperm_full.0"])
    cache = DynamicCache(config=pipeline.model.language_model.config)
    ids, generated = qwen["forward.main.input_ids"][0], []
    last = logits(pipeline, ids, snapshot, (4, 6), past_key_values=cache)[0]
    for _ in range(12):
        generated.append(int(last[0, -1].argmax()))
        with torch.inference_mode():
            last = pipeline.model(torch.tensor([[generated[-1]]]), past_key_values=cache).logits
    assert generated == notes["forward"]["new_tokens"]


# --- the default has none of the release's defects


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
    snapshot = written(encoded(40), torch.randperm(40))
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
    pipeline = load(folder, RELEASE)
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
        load(copy)


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
