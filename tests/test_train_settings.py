"""What a stage's config may ask for: templates, lengths, validation, adapters, and what is refused by name."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, SiglipConfig, SiglipModel

from flash_vstream.errors import UserError
from flash_vstream.models import hub
from flash_vstream.models.adapters import read_adapter_settings
from flash_vstream.models.hints import Hints
from flash_vstream.models.joining import join
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.questions import Turn
from flash_vstream.train import arguments
from flash_vstream.train.averaging import average_adapters
from flash_vstream.train.config import StageConfig
from flash_vstream.train.datasets import Collator, Sample
from flash_vstream.train.export import export_adapter
from flash_vstream.train.media import media_encoder
from flash_vstream.train.packing import IGNORE, collate, pack
from flash_vstream.train.stage import run_stage
from helpers.models import char_tokenizer

LORA = {"rank": 4, "alpha": 8}


@pytest.fixture
def snapshot(tiny, goldens):
    memory = tiny[0].new_memory()
    memory.write(goldens["offline.features"][:5], torch.arange(5))
    return memory.read()


@pytest.fixture
def data(tmp_path, goldens) -> Path:
    save_file({"a": goldens["offline.features"][:3].contiguous()}, tmp_path / "f.safetensors")
    Image.new("RGB", (50, 50), (200, 0, 0)).save(tmp_path / "red.png")
    turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "all red"}]
    entries = [{"features": "f.safetensors:a", "conversations": turns}, {"image": "red.png", "conversations": turns}]
    entries += [{"conversations": turns}] * 2
    (tmp_path / "data.json").write_text(json.dumps(entries))
    (tmp_path / "held.json").write_text(json.dumps(entries[:2]))
    return tmp_path


def config(folder: Path, **changes) -> StageConfig:
    values = {"stage": 1, "model": "given", "data": [{"kind": "llava", "file": "data.json"}], "steps": 2}
    values |= {"batch_size": 2, "learning_rate": 5e-3, "save_every": 10, "dtype": "float32", **changes}
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
    return StageConfig.load(path)


def train(folder: Path, start: Path, output: Path, **changes) -> list[dict]:
    """Runs a stage from the model in ``start``; returns its log."""
    run_stage(config(folder, **changes), start, folder, output, media_encoder(start))
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


# --- templates and lengths


def test_plain_captions_follow_the_memory_at_once(tiny_folder, snapshot):
    processor = FlashVStreamProcessor.from_pretrained(tiny_folder)
    processor.prompt_template = "plain"
    turns = (Turn("Describe it.", ("a dog",)),)
    packed = pack(processor, snapshot, turns, independent=False)
    memory = [processor.tokenizer.bos_token_id, *[-200] * len(snapshot.tokens())]
    caption = processor.tokenize("a dog\n", first=False)
    assert packed.ids == memory + caption  # as LLaVA's plain template has it
    assert packed.labels == [IGNORE] * len(memory) + caption
    assert packed.is_chain


def test_chains_train_the_same_without_a_mask(tiny, tiny_folder, goldens):
    model, processor = tiny
    samples = [
        Sample(
            goldens["offline.features"][: 2 + i], torch.arange(2.0 + i), (Turn("what?", ("a " * (i + 1),)),) * 2, False
        )
        for i in range(2)
    ]
    losses = []
    for chains in (False, True):
        batch = Collator(processor, model.config.star, chains=chains)(samples)
        assert (batch["attention_mask"].ndim == 2) == chains
        del batch["problems"], batch["truncated"]
        with torch.inference_mode():
            losses.append(model(**batch).loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    tree = [Sample(samples[0].features, samples[0].times, samples[0].turns, independent=True)]
    with pytest.raises(UserError, match="attention: sdpa"):
        Collator(processor, model.config.star, chains=True)(tree)


@pytest.mark.parametrize("independent", [True, False])
def test_what_is_too_long_loses_answers_and_never_memory(tiny, snapshot, independent):
    processor = tiny[1]
    turns = tuple(Turn(f"what {i}?", ("a dog " * 4, "a cat " * 4)) for i in range(3))
    whole = pack(processor, snapshot, turns, independent)
    prefix = processor.prefix_ids(snapshot)
    for length in range(len(prefix) + 60, len(whole.ids) + 1):
        packed = pack(processor, snapshot, turns, independent, max_length=length)
        assert len(packed.ids) <= length
        assert packed.ids[: len(prefix)] == prefix
        assert packed.ids.count(-200) == len(snapshot.tokens())
        assert any(label != IGNORE for label in packed.labels)
        assert packed.truncated == (packed.ids != whole.ids)
    assert not packed.truncated
    with pytest.raises(UserError, match="max_length 40 leaves no room"):
        pack(processor, snapshot, turns, independent, max_length=40)
    collate([packed], 0)


class Recalling:
    """Stands in for a hinter: every question recalls the newest frame."""

    def cue(self, snapshot):
        return ""

    def hints(self, questions, snapshot):
        return [Hints(recalled=snapshot.spatial) for _ in questions]


def test_what_a_turn_recalls_is_left_out_with_it(tiny, goldens):
    model, processor = tiny
    turns = tuple(Turn(f"what {i}?", ("a dog",)) for i in range(3))
    sample = Sample(goldens["offline.features"][:5], torch.arange(5.0), turns)
    whole = Collator(processor, model.config.star, Recalling())([sample])
    length = whole["input_ids"].shape[1] - 8  # which is a multiple of 8, so the last answer does not fit
    cut = Collator(processor, model.config.star, Recalling(), length)([sample])
    frame = model.config.star.spatial_size**2
    assert len(whole["memory_features"][0]) - len(cut["memory_features"][0]) == frame
    assert (whole["input_ids"] == -200).sum() - (cut["input_ids"] == -200).sum() == frame
    assert cut["truncated"] == 1


def test_the_log_says_how_many_were_cut_and_left_out(tiny_folder, data, tmp_path):
    log = train(data, tiny_folder, tmp_path / "whole", trainer={"logging_steps": 1})
    assert (log[-1]["truncated"], log[-1]["skipped"]) == (0, 0)
    prefix = 500  # the tiny model's tokens are characters, and its system text has some 200
    (data / "red.png").write_bytes(b"no picture")
    rows = json.loads((data / "data.json").read_text())
    rows[3]["conversations"] = [rows[3]["conversations"][0], {"from": "gpt", "value": "all red " * 100}]
    (data / "data.json").write_text(json.dumps(rows))
    log = train(
        data, tiny_folder, tmp_path / "cut", max_length=prefix, trainer={"logging_steps": 1}, epochs=1, steps=None
    )
    assert (log[-1]["truncated"], log[-1]["skipped"]) == (1, 1)
    assert log[-1]["step"] == 2  # the plan is the same


def test_more_unreadable_media_than_allowed_end_the_run(tiny_folder, data, tmp_path):
    (data / "red.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"max_skipped is 0; the last was: sample 1: .*red\.png"):
        train(data, tiny_folder, tmp_path / "run", max_skipped=0)


def test_loader_processes_make_the_same_batches(tiny_folder, data, tmp_path):
    for name, count in (("none", 0), ("one", 1)):
        train(data, tiny_folder, tmp_path / name, trainer={"dataloader_num_workers": count})
    none, one = (load_file(tmp_path / name / "result" / "model.safetensors") for name in ("none", "one"))
    assert all(torch.equal(none[name], one[name]) for name in none)


def test_text_alone_is_a_batch_where_only_the_projector_is_trained(tiny_folder, data, tmp_path):
    log = train(data, tiny_folder, tmp_path / "run", data=[{"kind": "chat", "questions": 2}])
    assert log[-1]["train_loss"] > 0


# --- epochs, validation, TrainingArguments


def test_an_epoch_uses_each_sample_once_and_validation_is_logged(tiny_folder, data, tmp_path):
    validation = [{"kind": "llava", "file": "held.json"}, {"kind": "chat", "questions": 2, "samples": 3}]
    changes = {"steps": None, "epochs": 2, "total_batch_size": 4, "batch_size": 2, "save_every": 1}
    log = train(
        data, tiny_folder, tmp_path / "run", validation=validation, **changes, trainer={"gradient_checkpointing": True}
    )
    assert log[-1]["step"] == 2  # four samples twice, four a step
    assert len([entry for entry in log if "eval_loss" in entry]) == 2
    with pytest.raises(UserError, match="share has no meaning"):
        train(data, tiny_folder, tmp_path / "x", **changes, data=[{"kind": "llava", "file": "data.json", "share": 2}])
    with pytest.raises(UserError, match="say how many"):
        train(data, tiny_folder, tmp_path / "x", **changes, data=[{"kind": "chat", "questions": 2}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 1}, "either steps or epochs"),
        ({"steps": None}, "either steps or epochs"),
        ({"total_batch_size": 3}, "no multiple of 2 samples in each of 1 processes"),
        ({"total_batch_size": 4, "accumulate": 2}, "either follows from the other"),
        ({"trainer": {"max_steps": 3}}, "trainer.max_steps is set by the config itself; use steps"),
        ({"trainer": {"tempo": 3}}, "tempo"),
        ({"trainer": {"optim": "adamw_8bit"}}, "bitsandbytes"),
        ({"attention": "slow"}, "attention 'slow'"),
        ({"attention": "flash_attention_2"}, "flash"),
        ({"template": "fancy"}, "no prompt template is called 'fancy'"),
        ({"adapter": "runs/x"}, "starts from an adapter but trains none"),
        ({"fsdp": True}, "those of TrainingArguments go under trainer"),
    ],
)
def test_settings_that_cannot_be_met_are_named(tiny_folder, data, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train(data, tiny_folder, tmp_path / "run", **changes)


def test_a_missing_tensorboard_is_named(tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.setattr(arguments.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"install flash-vstream\[train\]"):
        train(data, tiny_folder, tmp_path / "run")


def test_a_resumed_run_says_what_changed(tiny_folder, data, tmp_path):
    train(data, tiny_folder, tmp_path / "run", save_every=1)
    train(data, tiny_folder, tmp_path / "run", save_every=2, max_skipped=3)  # nothing that matters
    with pytest.raises(UserError, match=r"learning_rate was 0\.005 and is 0\.1"):
        train(data, tiny_folder, tmp_path / "run", learning_rate=0.1)
    with pytest.raises(UserError, match="a step had 2 samples and has 1"):
        train(data, tiny_folder, tmp_path / "run", batch_size=1)


# --- adapters


def test_adapters_load_as_models_and_other_settings_are_refused(tiny_folder, data, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    tune = {"lora": LORA}
    train(data, tiny_folder, tmp_path / "run", model=str(tiny_folder), tune=tune)
    result = tmp_path / "run" / "result"
    assert read_adapter_settings(result)["base_model_name_or_path"] == str(tiny_folder.resolve())
    export_adapter(result, tmp_path / "exported")
    average_adapters(result, result, 0.5, tmp_path / "averaged")
    merged = load_file(tmp_path / "run" / "model" / "model.safetensors")
    for folder in (result, tmp_path / "averaged", tmp_path / "exported"):
        loaded = load_file(hub.fetch_model(str(folder)) / "model.safetensors")
        loose = {"rtol": 0.02, "atol": 0.01} if folder.name == "exported" else {"rtol": 1e-5, "atol": 1e-6}  # bfloat16
        for name in merged:
            torch.testing.assert_close(loaded[name], merged[name], **loose)
    answer = FlashVStream.from_pretrained(str(tmp_path / "averaged"), "cpu").ask(None, "hello", max_new_tokens=2)
    assert answer.finish().tokens <= 2
    for lora, message in (({"rank": 8, "alpha": 8}, "rank is 4 there and 8 here"), ({**LORA, "alpha": 16}, "alpha")):
        with pytest.raises(UserError, match=message):
            train(data, tiny_folder, tmp_path / "next", adapter=str(result), tune={"lora": lora})
    with pytest.raises(UserError, match="fully trained"):
        train(data, tiny_folder, tmp_path / "next", adapter=str(result), tune={**tune, "projector": False})
    train(data, tiny_folder, tmp_path / "next", adapter=str(result), tune=tune)


def test_other_towers_and_language_models_join_and_train(data, tmp_path):
    """SigLIP has no class token and no second-last layer to take; GPT-NeoX's layers have other names than Llama's."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 24, "patch_size": 4}
    SiglipModel(SiglipConfig(vision_config=vision, text_config=sizes)).save_pretrained(tmp_path / "siglip")
    GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=520, **sizes)).save_pretrained(tmp_path / "neox")
    char_tokenizer().save_pretrained(tmp_path / "neox")
    model = join(str(tmp_path / "neox"), str(tmp_path / "siglip"), tmp_path / "model", "chatml")
    star = hub.load_processor(str(model))[0].star
    assert (star.spatial_size, star.temporal_size) == (6, 3)  # of a grid of 6, which 8 does not divide
    rows = json.loads((data / "data.json").read_text())
    (data / "data.json").write_text(json.dumps([row for row in rows if "features" not in row]))
    train(data, model, tmp_path / "run", model=str(model), tune={"lora": LORA})
    adapter = load_file(tmp_path / "run" / "result" / "adapter_model.safetensors")
    assert any("query_key_value.lora_B" in name and value.any() for name, value in adapter.items())


def test_parts_that_cannot_be_joined_are_named(tiny_folder, tmp_path):
    with pytest.raises(UserError, match="no causal language model"):
        join(str(tmp_path), str(tiny_folder), tmp_path / "out")
    with pytest.raises(UserError, match="exists already"):
        join(str(tiny_folder), str(tiny_folder), tmp_path)
