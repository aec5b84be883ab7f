"""Training in two processes: each sample is used once, and the weights match a single process."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from flash_vstream.train.config import StageConfig
from flash_vstream.train.stage import last_checkpoint, run_stage
from helpers.two_processes import by_two

RANK = """
import json
from pathlib import Path
from flash_vstream.train import stage
from flash_vstream.train.config import StageConfig

config, model, data, output = map(Path, sys.argv[2:])
built = stage.build_dataset

def recorded(*arguments):
    dataset = built(*arguments)
    get = type(dataset).__getitem__
    def noting(self, index):
        with (output / f"read-{os.environ['RANK']}.jsonl").open("a") as file:
            file.write(f"{index}\\n")
        return get(self, index)
    type(dataset).__getitem__ = noting
    return dataset

stage.build_dataset = recorded
output.mkdir(parents=True, exist_ok=True)
stage.run_stage(StageConfig.load(config), model, data, output)
"""


def config_file(folder: Path, batch_size: int) -> Path:
    values = {
        "stage": 1,
        "model": "given",
        "data": [{"kind": "llava", "file": "data.json", "share": 2}, {"kind": "llava", "file": "more.json"}],
        "steps": 4,
        "batch_size": batch_size,
        "learning_rate": 5e-3,
        "save_every": 2,
        "dtype": "float32",
    }
    path = folder / f"config-{batch_size}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def data(tmp_path, goldens) -> Path:
    """Two stream sources with answers of equal length, so the mean over tokens equals the mean over samples."""
    features = goldens["offline.features"]
    save_file({f"s{i}": features[i : i + 12].clone() for i in range(20)}, tmp_path / "f.safetensors")
    for name, begin in (("data.json", 0), ("more.json", 12)):
        entries = [
            {
                "features": f"f.safetensors:s{begin + i}",
                "conversations": [{"from": "human", "value": "what?"}, {"from": "gpt", "value": f"a thing {i % 8}"}],
            }
            for i in range(8)
        ]
        (tmp_path / name).write_text(json.dumps(entries))
    return tmp_path


def train(tmp_path: Path, how: str, config: Path, model: Path, data: Path, output: Path) -> bool:
    """Train in two processes; returns whether they ended well."""
    done = by_two(RANK, tmp_path, how, config, model, data, output)
    assert how == "kill" or done.returncode == 0, done.stderr[-3000:]
    return done.returncode == 0


def assert_as_one_process(data: Path, model: Path, tmp_path: Path) -> None:
    """The two processes' result is that of one with the same global batch, within rounding."""
    one = run_stage(StageConfig.load(config_file(data, 4)), model, data, tmp_path / "one")
    first, second = (load_file(folder / "model.safetensors") for folder in (one, tmp_path / "two" / "result"))
    before = load_file(model / "model.safetensors")
    assert any(not torch.equal(before[name], first[name]) for name in first)
    for name in first:
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


def test_two_processes_end_as_one_with_the_same_global_batch(data, tiny_folder, tmp_path):
    assert train(tmp_path, "run", config_file(data, 2), tiny_folder, data, tmp_path / "two")
    read = [(tmp_path / "two" / f"read-{rank}.jsonl").read_text().split() for rank in range(2)]
    assert sorted(map(int, [*read[0], *read[1]])) == list(range(16))
    assert_as_one_process(data, tiny_folder, tmp_path)


def test_two_processes_that_are_killed_and_resumed_end_as_one(data, tiny_folder, tmp_path):
    assert not train(tmp_path, "kill", config_file(data, 2), tiny_folder, data, tmp_path / "two")
    checkpoint = last_checkpoint(tmp_path / "two")
    assert checkpoint is not None
    assert checkpoint.name == "checkpoint-2"
    assert train(tmp_path, "run", config_file(data, 2), tiny_folder, data, tmp_path / "two")
    assert_as_one_process(data, tiny_folder, tmp_path)
