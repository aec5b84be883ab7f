"""Broken model folders and changing repositories: each gives one clear error, or none at all."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

from flash_vstream.errors import UserError
from flash_vstream.models import download, hub
from flash_vstream.models.convert import convert_checkpoint
from helpers.cli import run
from helpers.videos import write_video

COMMITS = ["1" * 40, "2" * 40]


def change_config(**values):
    def change(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def change_weights(change_tensors):
    def change(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change_tensors(weights)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def truncate(name: str, size: int):
    def change(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[:size])

    return change


def of_shape(shape: tuple[int, ...]):
    return change_weights(lambda weights: weights.update({"projector.0.bias": torch.zeros(shape)}))


BROKEN = {
    "an empty config": (truncate("config.json", 0), "config.json"),
    "half a config": (truncate("config.json", 40), "config.json"),
    "a config that is a list": (lambda folder: (folder / "config.json").write_text("[]"), "model_type"),
    "a config without a type": (lambda folder: (folder / "config.json").write_text("{}"), "model_type"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "not a model folder"),
    "another model's config": (change_config(model_type="bert"), "those that can be used"),
    "a type that nobody knows": (change_config(model_type="no-such-type"), "no-such-type"),
    "a memory field that nobody knows": (change_config(memory_config={"width": 3}), "width"),
    "a part that is no config": (change_config(text_config=3), "broken"),
    "a dtype that is none": (change_config(dtype="float99", torch_dtype="float99"), "broken"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "broken"),
    "empty weights": (truncate("model.safetensors", 0), "broken"),
    "half of the weights": (truncate("model.safetensors", 20_000), "broken"),
    "a weight missing": (
        change_weights(lambda weights: weights.pop("projector.0.weight")),
        "1 weights are missing, projector.0.weight",
    ),
    "a weight of another shape": (of_shape((7,)), "broken"),
    "no tokenizer": (lambda folder: [path.unlink() for path in folder.glob("tokenizer*")], "broken"),
    "an empty tokenizer": (truncate("tokenizer.json", 0), "broken"),
    "half a processor": (truncate("processor_config.json", 30), "broken"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_model_folder_is_one_clear_error(tiny_folder, tmp_path, what):
    change, message = BROKEN[what]
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change(folder)
    with pytest.raises(UserError) as raised:
        hub.load(str(folder), "cpu", torch.float32)
    assert message in str(raised.value)
    assert str(folder) in str(raised.value)


def test_weights_of_another_dtype_are_refused_or_read_right(tiny_folder, tiny, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    change_weights(lambda w: w.update({n: v.to(torch.float64) for n, v in w.items() if v.is_floating_point()}))(folder)
    model, _ = hub.load(str(folder), "cpu", torch.float32)
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert torch.equal(model.projector[0].weight, tiny[0].projector[0].weight)
    change_weights(lambda w: w.update({"projector.0.weight": w["projector.0.weight"].to(torch.int8)}))(folder)
    with pytest.raises(UserError, match=r"projector\.0\.weight"):
        hub.load(str(folder), "cpu", torch.float32)


def test_the_command_line_says_what_to_do(tiny_folder, tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    truncate("model.safetensors", 100)(folder)
    done = run("ask", video, "what?", "--model", folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"flash-vstream: the model folder {folder} is broken")
    assert "copy or fetch it again" in done.stderr


def test_a_folder_of_the_cache_is_made_again_once_it_is_deleted(published, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path))
    hub.load(str(published), "cpu", torch.float32)
    (converted,) = (tmp_path / "models").glob("converted-*[0-9a-f]")
    truncate("model.safetensors", 100)(converted)
    with pytest.raises(UserError, match="delete it, and it is made again"):
        hub.load(str(published), "cpu", torch.float32)
    shutil.rmtree(converted)
    hub.load(str(published), "cpu", torch.float32)


def test_new_weights_in_an_old_place_are_converted_too(published, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "checkpoint"
    shutil.copytree(published, source)
    hub.load(str(source), "cpu", torch.float32)
    change_weights(lambda w: w.update({"model.mm_projector.0.bias": w["model.mm_projector.0.bias"] + 1}))(source)
    model, _ = hub.load(str(source), "cpu", torch.float32)
    expected = load_file(source / "model.safetensors")["model.mm_projector.0.bias"]
    assert torch.equal(model.projector[0].bias, expected)


def test_a_tower_from_a_whole_clip_is_its_vision_half(published, tiny, tmp_path):
    """The paper's checkpoint refers to openai/clip-vit-large-patch14, which contains both halves of CLIP."""
    source = tmp_path / "checkpoint"
    shutil.copytree(published, source)
    vision = CLIPVisionConfig.from_pretrained(source / "clip_vit_tiny")
    text = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    whole = CLIPModel(CLIPConfig(vision_config=vision.to_dict(), text_config=text, projection_dim=8))
    tower = load_file(source / "clip_vit_tiny" / "model.safetensors")
    missing, unexpected = whole.load_state_dict(tower, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith("vision_model.") and "position_ids" not in name]
    whole.save_pretrained(source / "clip_vit_tiny")
    convert_checkpoint(str(source), tmp_path / "out")
    model, _ = hub.load(str(tmp_path / "out"), "cpu", torch.float32)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.encode(pixels), tiny[0].encode(pixels))


BROKEN_CHECKPOINTS = {
    "no vision tower named": change_config(mm_vision_tower=None),
    "a dtype that is none": change_config(torch_dtype="float99"),
    "a dtype of integers": change_config(torch_dtype="int8"),
    "half of the weights": truncate("model.safetensors", 2_000),
    "half of the tower": truncate("clip_vit_tiny/model.safetensors", 2_000),
    "an empty tower config": truncate("clip_vit_tiny/config.json", 0),
    "sizes that do not nest": change_config(compress_long_memory_size=3),
}


@pytest.mark.parametrize("what", BROKEN_CHECKPOINTS)
def test_a_broken_published_checkpoint_is_one_clear_error(published, monkeypatch, tmp_path, what):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "checkpoint"
    shutil.copytree(published, source)
    BROKEN_CHECKPOINTS[what](source)
    with pytest.raises(UserError):
        hub.load(str(source), "cpu", torch.float32)
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


# --- a fake hub, with one folder per commit


class Repository:
    """A fake repository with one folder per commit, whose main branch is at ``newest``."""

    def __init__(self, root: Path, source: Path):
        self.root, self.newest, self.asked = root, COMMITS[0], []
        for number, commit in enumerate(COMMITS):
            shutil.copytree(source, root / "snapshots" / commit)
            (root / "snapshots" / commit / "README.md").write_text(str(number))

    def snapshot_download(self, hub_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append((hub_id, revision))
        commit = {None: self.newest, "main": self.newest, "v2": COMMITS[1]}.get(revision, revision)
        if hub_id != "org/model" or commit not in COMMITS:
            raise OSError(f"404: {hub_id} at {revision}")
        return str(self.root / "snapshots" / commit)


@pytest.fixture
def repository(published, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path / "cache"))
    repository = Repository(tmp_path / "hub", published)
    monkeypatch.setattr(download, "snapshot_download", repository.snapshot_download)
    return repository


def origin(folder: Path) -> dict:
    return json.loads((folder / "source.json").read_text())["checkpoint"]


def test_a_repository_stays_at_the_commit_of_its_first_fetch(repository, tmp_path):
    first = hub.fetch_model("org/model")
    assert origin(first) == {"name": "org/model", "commit": COMMITS[0]}
    repository.newest = COMMITS[1]  # someone pushes different weights
    assert hub.fetch_model("org/model") == first
    shutil.rmtree(first)
    assert origin(hub.fetch_model("org/model"))["commit"] == COMMITS[0]
    assert json.loads((tmp_path / "cache" / "models" / "revisions.json").read_text()) == {"org/model": COMMITS[0]}


@pytest.mark.parametrize("revision", [COMMITS[1], "v2"])
def test_a_revision_can_be_named(repository, revision):
    first = hub.fetch_model("org/model")
    named = hub.fetch_model(f"org/model@{revision}")
    assert named != first
    assert origin(named) == {"name": f"org/model@{revision}", "commit": COMMITS[1]}
    assert hub.fetch_model("org/model") == first


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("org/model@", "names no revision"),
        ("org/model@nowhere", "org/model at nowhere"),
        ("org/absent", "could not fetch org/absent"),
    ],
)
def test_what_the_hub_has_not_is_one_clear_error(repository, name, message):
    with pytest.raises(UserError, match=message):
        hub.fetch_model(name)


def test_damaged_records_are_not_ignored(repository, tmp_path):
    hub.fetch_model("org/model")
    (tmp_path / "cache" / "models" / "revisions.json").write_text("{")
    with pytest.raises(UserError, match=r"revisions\.json cannot be read; delete it"):
        hub.fetch_model("org/model")


def test_the_papers_model_is_pulled_at_a_recorded_commit(repository, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "HUB_7B", "org/model")
    folder = hub.pull("flash-vstream-7b")
    assert origin(folder)["commit"] == COMMITS[0]
    assert json.loads((tmp_path / "cache" / "models" / "revisions.json").read_text()) == {"org/model": COMMITS[0]}
