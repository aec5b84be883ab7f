"""The paper's recipe at toy size: two models joined, then the 7B's two stages, by two processes under FSDP."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from flash_vstream.models import FlashVStreamForConditionalGeneration, hub
from flash_vstream.models.joining import join
from flash_vstream.pipeline import FlashVStream
from flash_vstream.train.arguments import accumulation, training_arguments
from flash_vstream.train.config import StageConfig
from flash_vstream.train.media import media_encoder
from flash_vstream.train.stage import last_checkpoint, run_stage
from helpers.models import char_tokenizer
from helpers.two_processes import by_two

CONFIGS = Path(__file__).parent.parent / "configs"


@pytest.fixture(scope="module")
def parts(tmp_path_factory) -> tuple[Path, Path]:
    """A tiny Llama with a tokenizer, and a tiny CLIP."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=520, **sizes)).save_pretrained(folder / "llama")
    char_tokenizer().save_pretrained(folder / "llama")
    CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=4, **sizes)).save_pretrained(folder / "clip")
    return folder / "llama", folder / "clip"


@pytest.fixture(scope="module")
def joined(parts, tmp_path_factory) -> Path:
    return join(str(parts[0]), str(parts[1]), tmp_path_factory.mktemp("joined") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Fourteen videos as stored features, as the authors store them, with answers of different lengths; and text."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "video_features").mkdir()
    entries = []
    for i in range(14):
        save_file({"feature": torch.randn(3 + 2 * i, 64, 32)}, folder / "video_features" / f"{i}.safetensors")
        turns = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a thing " * (1 + i % 5)}]
        entries.append({"id": str(i), "video": f"{i}.mp4", "conversations": turns})
    entries += [{"id": f"t{i}", "conversations": turns} for i in range(2)]
    for name in ("llava_558k_with_webvid.json", "llava_v1_5_mix665k_with_video_chatgpt.json"):
        (folder / name).write_text(json.dumps(entries))
    return folder


def recipe(stage: int, folder: Path, model: Path, **changes) -> Path:
    """A config of the 7B at toy size: everything but the model's place, sizes and intervals is as it is shipped."""
    values = yaml.safe_load((CONFIGS / f"flash-vstream-7b-stage{stage}.yaml").read_text())
    values |= {"model": str(model), "batch_size": 1, "total_batch_size": 4, "save_every": 2, "max_length": 1024}
    values |= {"dtype": "float32", **changes}
    values["trainer"]["dataloader_num_workers"] = 0  # each would import everything again
    path = folder / f"stage{stage}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.parametrize(("stage", "samples", "rate"), [(1, 256, 1e-3), (2, 128, 2e-5)])
def test_the_configs_hold_the_papers_numbers(stage, samples, rate, tmp_path, monkeypatch):
    config = StageConfig.load(CONFIGS / f"flash-vstream-7b-stage{stage}.yaml")
    plain = {name: value for name, value in config.trainer.items() if not name.startswith("fsdp")}  # needs its launcher
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert config.batch_size * 8 * accumulation(config) == samples
    monkeypatch.setenv("WORLD_SIZE", "1")
    settings = training_arguments(replace(config, trainer=plain, dtype="float32"), 1000, tmp_path)
    assert (settings.learning_rate, config.epochs) == (rate, 1)
    assert (settings.lr_scheduler_type, settings.get_warmup_steps(1000)) == ("cosine", 30)
    assert (settings.gradient_checkpointing, settings.dataloader_num_workers) == (True, 4)
    assert config.template == ("plain" if stage == 1 else "vicuna_v1")
    assert (config.tune.projector, config.tune.semantic_attention, config.tune.language_model) == (
        True,
        True,
        stage == 2,
    )


RANKS = """
from pathlib import Path
from flash_vstream.train import stage
from flash_vstream.train.config import StageConfig
from flash_vstream.train.media import media_encoder

config, data, output = map(Path, sys.argv[2:])
config = StageConfig.load(config)
model = Path(config.model)
stage.run_stage(config, model, data, output, media_encoder(model))
"""


@pytest.mark.slow  # a minute; test_train_processes.py has two processes without FSDP
def test_both_stages_by_two_processes_under_fsdp_end_as_one_process_does(joined, data, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    model = {"one": joined, "two": joined}
    for stage in (1, 2):
        config = recipe(stage, tmp_path, model["two"])
        if stage == 1:  # killed at its first checkpoint, and resumed
            assert by_two(RANKS, tmp_path, "kill", config, data, two / "1").returncode != 0
            checkpoint = last_checkpoint(two / "1")
            assert checkpoint is not None
            assert (checkpoint / "trained.safetensors").stat().st_size < 40_000  # nothing that is frozen
        done = by_two(RANKS, tmp_path, "run", config, data, two / str(stage))
        assert done.returncode == 0, done.stderr[-4000:]
        alone = StageConfig.load(recipe(stage, tmp_path, model["one"], batch_size=2, trainer={"logging_steps": 1}))
        run_stage(alone, model["one"], data, one / str(stage), media_encoder(joined))
        model = {"one": one / str(stage) / "result", "two": two / str(stage) / "result"}
        first, second = (load_file(folder / "model.safetensors") for folder in model.values())
        before = FlashVStreamForConditionalGeneration.from_pretrained(joined).state_dict()
        changed = {name.partition(".")[0] for name in first if not torch.equal(first[name], before[name])}
        assert changed == {"projector", "semantic_attention"} | ({"language_model"} if stage == 2 else set())
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-3, atol=1e-5)
    log = json.loads((two / "1" / "trainer_state.json").read_text())["log_history"]
    assert log[-1]["step"] == 4  # sixteen samples, four a step, one epoch
    answer = FlashVStream(*hub.load(str(model["two"]))).ask(None, "hello", max_new_tokens=3).finish()
    assert answer.tokens <= 3
