"""The training of a vision tower with the small networks, and what is saved of it."""

import json
import random

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from flash_vstream.cli.main import app
from flash_vstream.errors import UserError
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from flash_vstream.models.engines.openvino_tower import OpenVinoTower
from flash_vstream.models.small_networks import TOWER, add_configs, load_networks, weights_file
from flash_vstream.synthetic.captions import PictureSet
from flash_vstream.synthetic.views import picture_crops
from flash_vstream.train import fitting
from flash_vstream.train import tower as training
from flash_vstream.train.prepare import prepare
from flash_vstream.train.tower import TowerConfig, train_tower
from helpers.annotated import annotated_pictures, nano_like

FROZEN = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Pictures of a dark or a bright surface, which their annotations tell apart."""
    return annotated_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory):
    made = tmp_path_factory.mktemp("nano-like")
    nano_like(*tiny, made)
    return made


def config(**changes) -> TowerConfig:
    values = {"steps": 80, "batch_size": 12, "learning_rate": 4e-3, "tower_rate": 1e-3, "average": 0.9}
    return TowerConfig(**{"model": "given", "least_things": 4, "hidden": 32, "answers_width": 64, **values, **changes})


@pytest.fixture(scope="module")
def trained(data, folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("run")
    return output, train_tower(config(), folder, data, output)


def test_the_networks_learn_what_the_annotations_say(trained):
    _, result = trained
    assert result["sight"]["people"] > 0.9
    assert result["short_answers"]["own"] > 0.9


def test_only_the_last_blocks_change_and_only_they_are_saved(trained, folder):
    output, _ = trained
    before = FlashVStreamForConditionalGeneration.from_pretrained(folder).vision_tower.state_dict()
    after = FlashVStreamForConditionalGeneration.from_pretrained(output / "model").vision_tower.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(load_file(output / TOWER))
    assert {int(name.split(".")[1]) for name in changed if name.startswith("blocks")} == set(range(FROZEN, 21))
    assert not any("running" in name for name in changed)


def test_what_was_trained_loads_into_the_model_it_started_from(trained, folder):
    output, _ = trained
    model = FlashVStreamForConditionalGeneration
    settings = model.config_class.from_pretrained(folder)
    add_configs(settings, output)
    made = model.from_pretrained(folder, config=settings)
    load_networks(made, output)
    pixels = torch.rand(2, 3, 64, 64)
    whole = model.from_pretrained(output / "model").encode(pixels)
    torch.testing.assert_close(made.encode(pixels), whole, rtol=1e-2, atol=1e-2)  # the files are in float16


def test_grounding_knows_common_pictures_and_the_words_of_captions(trained):
    output, _ = trained
    grounding = FlashVStreamForConditionalGeneration.from_pretrained(output / "model").grounding
    assert grounding.common.shape == (2, 4, 4, 16)
    assert torch.equal(grounding.common, load_file(output / weights_file("grounding"))["common"])
    lengths = grounding.common.float().norm(dim=-1)
    torch.testing.assert_close(lengths, torch.full((2, 4, 4), 127.0), atol=3.0, rtol=0)
    assert {"dog", "runs"} <= grounding.vocabulary.keys()


def test_prepared_features_are_those_of_train_prepare_with_the_trained_model(trained, data, tmp_path):
    output, _ = trained
    prepare(data, tmp_path, str(output / "model"))
    for split in ("train", "val"):
        made, wanted = (load_file(folder / f"{split}.safetensors") for folder in (output / "prepared", tmp_path))
        assert made.keys() == wanted.keys()
        apart = [float((made[key].float() - own.float()).norm() / own.float().norm()) for key, own in wanted.items()]
        assert max(apart) < 0.1  # the first blocks may be computed in bfloat16
    loaded = PictureSet.load(output / "prepared", "train")
    assert set(loaded.captions) == set(load_file(tmp_path / "train.safetensors"))


def test_a_tower_of_other_weights_is_refused_by_name(folder, tmp_path):
    model = FlashVStreamForConditionalGeneration.from_pretrained(folder)
    save_file({"blocks.99.weight": torch.zeros(1)}, tmp_path / TOWER)
    with pytest.raises(UserError, match=r"has no blocks\.99\.weight"):
        load_networks(model, tmp_path)


def test_a_run_goes_on_where_it_was_stopped(data, folder, tmp_path, monkeypatch):
    for module in (fitting, training):
        monkeypatch.setattr(module, "SAVE_EVERY", 2)
    settings = config(steps=4)
    whole = train_tower(settings, folder, data, tmp_path / "whole")
    lesson, steps = training.Lesson.loss, []

    def stopped(self, learner, rng):
        if len(steps) == 3:
            raise KeyboardInterrupt
        steps.append(0)
        return lesson(self, learner, rng)

    monkeypatch.setattr(training.Lesson, "loss", stopped)
    with pytest.raises(KeyboardInterrupt):
        train_tower(settings, folder, data, tmp_path / "parts")
    monkeypatch.setattr(training.Lesson, "loss", lesson)
    assert train_tower(settings, folder, data, tmp_path / "parts") == whole
    first, second = (load_file(tmp_path / name / TOWER) for name in ("whole", "parts"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_missing_picture_is_named_by_its_folder(data, folder, tmp_path):
    broken = annotated_pictures(tmp_path / "broken")
    next(broken.glob("*.png")).unlink()
    (tmp_path / "tower.yaml").write_text(
        json.dumps({"model": str(folder), "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "tower_rate": 1e-3})
    )
    arguments = ["train", "tower", str(tmp_path / "tower.yaml"), "--data", str(broken), "--output", str(tmp_path / "o")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code != 0
    assert "lacks 1 of" in str(done.exception)


def test_a_tower_is_the_sum_of_its_parts():
    torch.manual_seed(0)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=64, hidden_size=32, width=0.25)).eval()
    pixels = torch.rand(2, 3, 64, 64)
    with torch.inference_mode():
        whole = tower(pixels).last_hidden_state
        middle = tower.first_blocks(pixels, FROZEN)
        torch.testing.assert_close(tower.last_blocks(middle, FROZEN), whole)
        torch.testing.assert_close(
            OpenVinoTower(tower, blocks=FROZEN).first_blocks(pixels), middle, rtol=1e-3, atol=1e-3
        )


def test_crops_depend_on_the_key_alone_and_differ():
    rng = random.Random(0)
    picture = Image.frombytes("RGB", (40, 30), rng.randbytes(3600))
    first, again = (picture_crops(picture, "key", 3, 32) for _ in range(2))
    assert [crop.tobytes() for crop in first] == [crop.tobytes() for crop in again]
    assert len({crop.tobytes() for crop in first}) == 3
    assert {crop.size for crop in first} == {(32, 32)}
