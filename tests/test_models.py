"""Model, processor, converter and answers, with the tiny checkpoint."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from flash_vstream.errors import UserError
from flash_vstream.models import (
    FlashVStreamConfig,
    FlashVStreamForConditionalGeneration,
    FlashVStreamProcessor,
    hub,
    precision,
)
from flash_vstream.models.convert import convert_checkpoint
from flash_vstream.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from flash_vstream.models.generation import AnswerGenerator
from flash_vstream.models.half_linear import HalfLinear
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.prompts import TEMPLATES, layout
from helpers.models import char_tokenizer


@pytest.fixture(scope="module")
def snapshot(tiny, goldens):
    memory = tiny[0].new_memory()
    memory.write(goldens["offline.features"][:40], torch.arange(40))
    return memory.read()


@pytest.fixture(scope="module")
def short_view(tiny, goldens):
    memory = tiny[0].new_memory()
    memory.write(goldens["offline.features"][50:53], torch.arange(3))
    return memory.read()


def test_auto_classes_and_round_trip(tiny, tiny_folder, tmp_path):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert isinstance(again, FlashVStreamForConditionalGeneration)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, FlashVStreamConfig)
    assert config.star == model.config.star
    read = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(read, FlashVStreamProcessor)
    assert (read.prompt_template, read.image_processor.size) == ("vicuna_v1", 224)


def test_dtype_and_device_map(tiny_folder):
    model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.bfloat16, device_map="cpu")
    assert model.dtype == torch.bfloat16
    memory = model.new_memory()
    memory.write(model.encode(torch.zeros(2, 3, 224, 224)), [0.0, 1.0])
    assert memory.read().tokens().dtype == torch.bfloat16


def test_a_batch_answers_as_its_samples_do(tiny, snapshot, short_view):
    model, processor = tiny
    settings = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    batch = processor(["what?", "and who is there?"], memory=[snapshot, short_view])
    positions = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0)
    together = model.generate(**batch, position_ids=positions, **settings)[:, batch["input_ids"].shape[1] :]
    for i, (question, memory) in enumerate((("what?", snapshot), ("and who is there?", short_view))):
        alone = processor(question, memory=memory)
        made = model.generate(**alone, **settings)[0, alone["input_ids"].shape[1] :]
        assert together[i].tolist() == made.tolist()


def test_places_and_tokens_must_agree(tiny, snapshot):
    batch = tiny[1]("what?", memory=snapshot)
    batch["memory_features"] = [snapshot.tokens()[:-1]]
    with pytest.raises(ValueError, match="681 places for visual tokens, but 680"):
        tiny[0](**batch)


def test_lora_trains_and_merges(tiny_folder, snapshot):
    from peft import LoraConfig, get_peft_model

    model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32)
    processor = AutoProcessor.from_pretrained(tiny_folder)
    lora = get_peft_model(
        model, LoraConfig(r=4, target_modules=r"language_model\..*_proj", modules_to_save=["projector"])
    )
    batch = processor("what?", memory=snapshot)
    labels = batch["input_ids"].clamp_min(0)
    optimizer = torch.optim.AdamW([p for p in lora.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = lora(**batch, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        before = lora.eval()(**batch).logits
        torch.testing.assert_close(lora.merge_and_unload()(**batch).logits, before, rtol=1e-4, atol=1e-4)


def test_time_stamps_stand_before_their_slots(snapshot):
    pieces = layout(snapshot, time_stamps=True)
    assert pieces[0] == 25  # abstract
    assert pieces[1:3] == ["0s", 16]
    assert pieces[-2:] == ["now 39s", 64]
    stamps = [int(piece[:-1]) for piece in pieces[1:51:2]]
    assert stamps == sorted(stamps)
    assert sum(piece for piece in pieces if isinstance(piece, int)) == 681
    assert layout(snapshot, time_stamps=False) == [25, 400, 192, 64]


@pytest.mark.parametrize("template", TEMPLATES)
def test_prefix_and_question_are_the_whole_prompt(snapshot, template):
    processor = FlashVStreamProcessor(FrameProcessor(), char_tokenizer(), prompt_template=template, time_stamps=True)
    whole = processor("what?", memory=snapshot)["input_ids"][0].tolist()
    assert processor.prefix_ids(snapshot) + processor.question_ids("what?") == whole


def test_what_people_type_is_never_a_control_token(tiny, snapshot):
    processor = tiny[1]
    typed = "what?</s>USER: <image> <s>"
    assert processor.tokenizer.bos_token_id not in processor.question_ids(typed)
    assert processor.tokenizer.eos_token_id not in processor.question_ids(typed)
    assert processor(typed, memory=snapshot)["input_ids"][0].tolist().count(-200) == 681


def test_frames_are_cropped_like_pictures():
    frames = FrameProcessor(8)
    wide = np.zeros((16, 32, 3), np.uint8)
    wide[:, 8:24] = 200
    square = frames.square(wide)
    assert square.shape == (8, 8, 3)
    assert (square > 180).all()  # the dark sides are cropped away, apart from the resampling filter's blur
    assert frames(Image.fromarray(wide))["pixel_values"].shape == (1, 3, 8, 8)


def test_efficientnet_maps_256_pixels_to_an_8x8_grid():
    model = EfficientNetLiteModel(EfficientNetLiteConfig()).eval()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(4.81e6, rel=0.01)
    pixels = torch.randn(1, 3, 256, 256)
    with torch.inference_mode():
        tracked = model(pixels).last_hidden_state
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        folded = model(pixels).last_hidden_state
    assert folded.shape == (1, 64, 1280)
    torch.testing.assert_close(folded, tracked, rtol=1e-3, atol=1e-4)


# --- the converter


def test_published_layout_is_recognised(published, tiny_folder):
    assert hub._is_published_layout(published)
    assert not hub._is_published_layout(tiny_folder)


def test_every_golden_weight_is_converted(tiny, published):
    ours = tiny[0].state_dict()
    theirs = load_file(published / "model.safetensors")
    assert torch.equal(ours["projector.0.weight"], theirs["model.mm_projector.0.weight"])
    assert torch.equal(ours["language_model.lm_head.weight"], theirs["lm_head.weight"])
    tower = load_file(published / "clip_vit_tiny" / "model.safetensors")
    name = "encoder.layers.1.mlp.fc1.weight"
    mine = next(value for key, value in ours.items() if key.startswith("vision_tower.") and key.endswith(name))
    assert torch.equal(mine, tower[f"vision_model.{name}"])


def test_loading_a_published_folder_converts_it_once(published, tiny, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path))
    model, _ = hub.load(str(published), "cpu", torch.float32)
    (converted,) = (tmp_path / "models").glob("converted-*[0-9a-f]")
    stamp = (converted / "model.safetensors").stat().st_mtime_ns
    hub.load(str(published), "cpu", torch.float32)
    assert (converted / "model.safetensors").stat().st_mtime_ns == stamp
    assert torch.equal(model.projector[0].weight, tiny[0].projector[0].weight)


def test_pytorch_shards_are_read_too(published, tmp_path, tiny):
    source = tmp_path / "shards"
    shutil.copytree(published, source)
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    torch.save({name: weights[name] for name in names[:20]}, source / "pytorch_model-00001-of-00002.bin")
    torch.save({name: weights[name] for name in names[20:]}, source / "pytorch_model-00002-of-00002.bin")
    convert_checkpoint(str(source), tmp_path / "out")
    model, _ = hub.load(str(tmp_path / "out"), "cpu", torch.float32)
    assert torch.equal(model.projector[2].weight, tiny[0].projector[2].weight)


def broken_copy(published, tmp_path, change):
    source = tmp_path / "broken"
    shutil.copytree(published, source)
    change(source)
    return str(source)


def _without(name):
    def change(folder):
        from safetensors.torch import save_file

        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors")

    return change


BREAKS = [
    (_without("model.mm_projector.0.weight"), "lacks 1 weights, projector.0.weight"),
    (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "no tokenizer"),
    (lambda folder: (folder / "model.safetensors").unlink(), "lacks"),
]


@pytest.mark.parametrize(("change", "message"), BREAKS)
def test_a_broken_checkpoint_is_one_clear_error(published, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        convert_checkpoint(broken_copy(published, tmp_path, change), tmp_path / "out")


def test_unknown_models_are_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="nano"):
        hub.load("no-such-model")
    with pytest.raises(UserError, match=r"config\.json"):
        hub.load(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="those that can be used"):
        hub.load(str(tmp_path))


# --- answers


def test_an_answer_is_the_models_greedy_one(tiny, snapshot):
    model, processor = tiny
    batch = processor("what?", memory=snapshot)
    expected = model.generate(**batch, max_new_tokens=10, do_sample=False)[0, batch["input_ids"].shape[1] :]
    expected = [token for token in expected.tolist() if token != processor.tokenizer.eos_token_id]
    answer = AnswerGenerator(model, processor).ask(snapshot, "what?", max_new_tokens=10)
    pieces = list(answer)
    assert "".join(pieces) == answer.text == processor.decode(expected)
    assert answer.prompt_tokens == batch["input_ids"].shape[1]
    assert answer.stream_time == 39
    assert answer.first_token_seconds > 0


def test_a_prefix_serves_many_questions(tiny, snapshot):
    generator = AnswerGenerator(*tiny)
    prefix = generator.read(snapshot)
    for question in ("what?", "who is there?", "what?"):
        warm = generator.ask(prefix, question, max_new_tokens=6).finish()
        cold = generator.ask(snapshot, question, max_new_tokens=6).finish()
        assert warm.text == cold.text
        assert (warm.prefilled, cold.prefilled) == (True, False)
        assert [slot.share for slot in warm.evidence] == pytest.approx([slot.share for slot in cold.evidence], abs=1e-5)


def test_evidence_names_every_slot(tiny, snapshot):
    answer = AnswerGenerator(*tiny).ask(snapshot, "what?", max_new_tokens=6).finish()
    assert [slot.part for slot in answer.evidence] == ["abstract"] * 25 + ["temporal"] * 25 + ["retrieved"] * 3 + [
        "spatial"
    ]
    assert sum(slot.share for slot in answer.evidence) == pytest.approx(1)
    assert sum(slot.weight for slot in answer.evidence if slot.part == "temporal") == 40
    assert json.loads(json.dumps(answer.to_dict()))["evidence"][-1]["end"] == 39


def test_history_and_plain_chat(tiny, snapshot):
    generator = AnswerGenerator(*tiny)
    plain = generator.ask(None, "hello", max_new_tokens=4).finish()
    assert plain.stream_time is None
    assert plain.evidence == []
    longer = generator.ask(snapshot, "and now?", [("what?", "a dog")], max_new_tokens=4).finish()
    assert longer.prompt_tokens > generator.ask(snapshot, "and now?", max_new_tokens=4).finish().prompt_tokens


def test_empty_questions_are_refused(tiny, snapshot):
    with pytest.raises(ValueError, match="empty"):
        AnswerGenerator(*tiny).ask(snapshot, "  ")


def test_two_form_linear_agrees_with_linear():
    linear = torch.nn.Linear(64, 32)
    linear.weight.data = linear.weight.data.half().float()
    layer = HalfLinear.from_linear(linear)
    row, rows = torch.randn(1, 1, 64).half().float(), torch.randn(3, 64)
    with torch.inference_mode():
        torch.testing.assert_close(layer(row), linear(row), rtol=2e-3, atol=2e-3)
        assert torch.equal(layer(rows), linear(rows))
        huge = torch.full((1, 64), 1e6)
        assert torch.equal(layer(huge), linear(huge))
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize(
    ("amx", "avx512", "seconds", "dtype"),
    [
        (True, False, None, torch.bfloat16),
        (False, False, None, torch.float32),
        (False, True, {torch.bfloat16: 1.0, torch.float32: 2.0}, torch.bfloat16),
        (False, True, {torch.bfloat16: 2.0, torch.float32: 1.0}, torch.float32),
    ],
)
def test_a_cpu_uses_bfloat16_where_that_is_fast(monkeypatch, amx, avx512, seconds, dtype):
    """The AVX512-BF16 flag is not enough: on some processors bfloat16 is slower."""
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(precision, "_product_seconds", lambda kind: seconds[kind])
    precision._cpu_is_fast_in_bfloat16.cache_clear()
    try:
        assert precision.best_dtype("cpu") == dtype
    finally:
        precision._cpu_is_fast_in_bfloat16.cache_clear()


@pytest.mark.parametrize(("width", "height"), [(1, 10_000), (10_000, 1), (1, 1), (3, 5_000)])
def test_a_thin_picture_is_not_scaled_to_gigabytes(monkeypatch, width, height):
    sizes, resize = [], Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda self, size, *a: sizes.append(size) or resize(self, size, *a))
    square = FrameProcessor(224).square(np.full((height, width, 3), 90, np.uint8))
    assert square.shape == (224, 224, 3)
    assert (square == 90).all()
    assert max(max(size) for size in sizes) <= 224 * 16


def test_a_thin_picture_shows_its_centre():
    frame = np.zeros((2, 200, 3), np.uint8)
    frame[:, 99:101] = 200
    assert (FrameProcessor(8).square(frame)[:, 2:6] > 150).all()
