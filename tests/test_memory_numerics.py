"""The memory's numerics at their limits: large values, long streams, ties, half precision, threads."""

import copy
import pickle
import threading

import pytest
import torch

from flash_vstream.memory import SemanticAttention, StarConfig, StarMemory
from flash_vstream.memory.checks import LARGEST_FEATURE
from flash_vstream.memory.release import ReleaseMemory

CHANNELS = 4
CONFIG = StarConfig(
    spatial_size=2, temporal_size=1, temporal_length=3, abstract_length=2, retrieved_length=1, buffer_length=5
)
ONE_SLOT = StarConfig(
    spatial_size=1, temporal_size=1, temporal_length=1, abstract_length=0, retrieved_length=1, spatial_length=1
)


def new_memory(dtype: torch.dtype = torch.float32, kind: type = StarMemory, **changes):
    torch.manual_seed(0)
    attention = SemanticAttention(CHANNELS, 3).to(dtype)
    return kind(StarConfig(**{**CONFIG.to_dict(), **changes}), CHANNELS, attention, dtype)


def frames(count: int, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(count, 4, CHANNELS, generator=torch.Generator().manual_seed(1)) * scale


@pytest.mark.parametrize("kind", [StarMemory, ReleaseMemory])
@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e19, torch.float32, "beyond the 1e\\+09"),
        (-1e19, torch.float32, "beyond the 1e\\+09"),
        (1e19, torch.bfloat16, "beyond the 1e\\+09"),
        (1e5, torch.float16, "beyond the 65504 that a float16 memory takes; make the memory with dtype=torch.float32"),
        (float("nan"), torch.float32, "NaN or infinity"),
        (float("-inf"), torch.float32, "NaN or infinity"),
    ],
)
def test_values_that_the_arithmetic_cannot_hold_are_refused(kind, value, dtype, message):
    compat = {"compat": "release"} if kind is ReleaseMemory else {}
    memory = new_memory(dtype, kind, **compat)
    memory.write(frames(2), [0.0, 1.0])
    before = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    bad = frames(2)
    bad[1, 2, 3] = value
    with pytest.raises(ValueError, match=message):
        memory.write(bad, [2.0, 3.0])
    assert all(torch.equal(before[name], tensor) for name, tensor in memory.state_dict().items())


def test_what_the_longterm_memory_cannot_hold_is_refused_with_its_remedy():
    with pytest.raises(ValueError, match=r"65504 that the long-term memory takes, .*; set longterm_length=0"):
        new_memory(longterm_length=4).write(frames(2).sign() * 1e5, [0.0, 1.0])
    new_memory().write(frames(2).sign() * 1e5, [0.0, 1.0])


@pytest.mark.parametrize(
    ("bad", "times", "message"),
    [
        (torch.zeros(1, 4, CHANNELS), [float("nan")], "times must be finite"),
        (torch.zeros(1, 4, CHANNELS, dtype=torch.long), [0.0], "floating-point"),
        (torch.zeros(1, 0, CHANNELS), [0.0], "0x0 feature map does not pool"),
    ],
)
def test_other_input_without_a_meaning_is_refused(bad, times, message):
    with pytest.raises(ValueError, match=message):
        new_memory().write(bad, times)


@pytest.mark.parametrize("consolidation", ["merge", "lloyd"])
@pytest.mark.parametrize("retrieval", ["exemplar", "buffer"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, LARGEST_FEATURE), (torch.bfloat16, LARGEST_FEATURE), (torch.float16, 65504.0)],
)
def test_the_largest_values_keep_every_invariant(dtype, scale, consolidation, retrieval):
    features = frames(30).clamp(-1, 1) * scale
    memory = new_memory(dtype, consolidation=consolidation, retrieval=retrieval)
    memory.write(features, torch.arange(30))
    snapshot = memory.read()
    assert torch.isfinite(snapshot.tokens()).all()
    assert snapshot.temporal.weight.sum() == 30 == snapshot.frames
    real = features.to(dtype)
    for slot, time in enumerate(snapshot.retrieved.start.tolist()):
        assert torch.equal(snapshot.retrieved.features[slot], real[int(time)])
    again = new_memory(dtype, consolidation=consolidation, retrieval=retrieval)
    again.write(features, torch.arange(30))
    assert torch.equal(snapshot.tokens(), again.read().tokens())


@pytest.mark.parametrize("seed", range(20))
def test_the_older_of_two_single_frames_stands_for_both(seed):
    """Both are equally far from their mean, so rounding must not decide."""
    generator = torch.Generator().manual_seed(seed)
    config = StarConfig(**{**ONE_SLOT.to_dict(), "spatial_size": 4, "temporal_size": 2})
    memory = StarMemory(config, 8)
    memory.write(torch.randn(2, 16, 8, generator=generator), [0.0, 1.0])
    assert memory.read().retrieved.start.tolist() == [0.0]


def test_the_older_frame_wins_where_rows_are_out_of_order():
    """After a merge, the newest frame may be in an earlier row than the older one."""
    memory = StarMemory(StarConfig(**{**ONE_SLOT.to_dict(), "temporal_length": 2, "retrieved_length": 2}), 1)
    # 0 and 0.1 merge, which frees a row for 50; then 50 and 52 are the closest pair.
    memory.write(torch.tensor([0.0, 0.1, 50.0, 52.0]).reshape(4, 1, 1), [0.0, 1.0, 2.0, 3.0])
    assert memory.read().retrieved.start.tolist() == [0.0, 2.0]


def test_still_scenes_of_equal_length_are_a_tie_too():
    memory = StarMemory(ONE_SLOT, 1)
    state = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    # A slot with one picture seen twice, then the other picture twice: weights 2 and 1, then 3 and 1.
    memory.write(torch.tensor([1.0, 1.0, 4.0]).reshape(3, 1, 1), [0.0, 1.0, 2.0])
    assert memory.read().retrieved.start.tolist() == [0.0]
    assert state.keys() == memory.state_dict().keys()


def test_centroids_still_move_after_two_to_the_25_frames():
    weight = 2**25
    memory = StarMemory(ONE_SLOT, 1)
    memory.write(torch.ones(1, 1, 1), [0.0])
    state = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    state["temporal.stats"][4, 0] = weight  # as if this one frame had been shown that many times
    state["frames"].fill_(weight)
    memory.load_state_dict(state)
    for number in range(64):
        memory.write(torch.full((1, 1, 1), 2.0), [1.0 + number])
    snapshot = memory.read()
    assert snapshot.temporal.weight.tolist() == [weight + 64]
    expected = (weight * 1.0 + 64 * 2.0) / (weight + 64)
    assert snapshot.temporal.features.item() == pytest.approx(expected, abs=1.2e-7)
    assert snapshot.temporal.features.item() > 1.0


def test_a_centroid_of_many_frames_is_their_mean():
    memory = StarMemory(ONE_SLOT, 3)
    features = torch.randn(3000, 1, 3, generator=torch.Generator().manual_seed(2)) + 100.0
    memory.write(features, torch.arange(3000.0))
    state = memory.state_dict()
    row = 1 - int(state["temporal.free"])
    centroid = state["temporal.centroids"][row].double() + state["temporal.remainders"][row].double()
    # A float32 mean, updated frame by frame, is off by 1e-4.
    torch.testing.assert_close(centroid, features.double().mean((0, 1)), rtol=0.0, atol=1e-7)


def test_a_float16_attention_over_large_features_stays_a_mean():
    attention = SemanticAttention(CHANNELS, 3).half()
    memory = StarMemory(CONFIG, CHANNELS, attention, torch.float16)
    features = torch.full((5, 4, CHANNELS), 6e4)
    memory.write(features, torch.arange(5))
    torch.testing.assert_close(memory.read().abstract.features, torch.full((2, 1, CHANNELS), 6e4).half())


@pytest.mark.parametrize("kind", [StarMemory, ReleaseMemory])
def test_threads_that_write_at_once_lose_no_frame(kind):
    memory = new_memory(kind=kind, **({"compat": "release"} if kind is ReleaseMemory else {}))
    features, start = frames(1), threading.Barrier(5)
    snapshots, errors = [], []

    def write() -> None:
        start.wait()
        try:
            for _ in range(60):
                memory.write(features, [0.0])
        except Exception as error:
            errors.append(error)

    def read() -> None:
        start.wait()
        try:
            for _ in range(60):
                if memory.frames:
                    snapshots.append(memory.read())
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)] + [threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert errors == []
    assert memory.frames == 240
    if kind is StarMemory:
        assert memory.read().temporal.weight.sum() == 240
        assert all(snapshot.temporal.weight.sum() == snapshot.frames for snapshot in snapshots)


@pytest.mark.parametrize("kind", [StarMemory, ReleaseMemory])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_a_copy_goes_its_own_way(kind, duplicate):
    memory = new_memory(kind=kind, **({"compat": "release"} if kind is ReleaseMemory else {}))
    memory.write(frames(3), [0.0, 1.0, 2.0])
    other = duplicate(memory)
    other.write(frames(1), [3.0])
    assert (memory.frames, other.frames) == (3, 4)


@pytest.mark.parametrize("written", [2, 9])
def test_a_state_of_version_0_1_is_restored(written):
    """It had squared distances instead of costs, and no remainders."""
    memory, restored = new_memory(), new_memory()
    memory.write(frames(written), torch.arange(written))
    state = {name: tensor.clone() for name, tensor in memory.state_dict().items()}
    costs, weights = state.pop("temporal.costs"), state["temporal.stats"][4]
    shares = weights[:, None] * weights / (weights[:, None] + weights)
    state["temporal.distances"] = torch.where(costs.isinf(), 123.0, costs / shares).float()
    state.pop("temporal.remainders")
    restored.load_state_dict(state)
    assert torch.equal(restored.read().tokens(), memory.read().tokens())
    assert torch.allclose(restored.state_dict()["temporal.costs"], costs)
