"""The memory's invariants (docs/design.md) as property tests."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_vstream.memory import SemanticAttention, StarConfig, StarMemory, abstract_memory, pool_grid
from flash_vstream.memory.clustering import cheapest_pair, lloyd, merge_costs, merged_costs
from flash_vstream.memory.flash_release import ReleaseFlashMemory
from flash_vstream.memory.frames import FrameMemory, whole_frames
from flash_vstream.memory.release import ReleaseMemory
from flash_vstream.memory.retrieval import heaviest, nearest_frames

CHANNELS = 6
SMALL = {
    "spatial_size": 4,
    "temporal_size": 2,
    "spatial_length": 2,
    "temporal_length": 5,
    "abstract_length": 4,
    "retrieved_length": 2,
    "buffer_length": 7,
}
VARIANTS = [
    StarConfig(**SMALL, longterm_length=6, longterm_size=2),
    StarConfig(**SMALL, retrieval="buffer"),
    StarConfig(**SMALL, consolidation="lloyd"),
    StarConfig(**SMALL, consolidation="lloyd", retrieval="buffer"),
]


def new_memory(config: StarConfig = VARIANTS[0], channels: int = CHANNELS) -> StarMemory:
    torch.manual_seed(5)
    return StarMemory(config, channels, SemanticAttention(channels, 3))


def stream(frames: int, seed: int = 0, scenes: bool = True) -> torch.Tensor:
    """Features with scenes: near-duplicates around a mean that occasionally jumps."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(frames, 16, CHANNELS, generator=generator)
    if not scenes:
        return noise
    means = torch.randn(frames // 3 + 1, 16, CHANNELS, generator=generator) * 4
    return means.repeat_interleave(3, 0)[:frames] + 0.1 * noise


def assert_same(first: StarMemory, second: StarMemory) -> None:
    mine, yours = first.state_dict(), second.state_dict()
    assert mine.keys() == yours.keys()
    for name in mine:
        assert torch.equal(mine[name].nan_to_num(), yours[name].nan_to_num()), name


@pytest.mark.parametrize("make", [
    lambda: new_memory(channels=10),
    lambda: FrameMemory("recent", 3, whole_frames(4, 3), 10),
    lambda: ReleaseMemory(VARIANTS[0], 10, SemanticAttention(10, 3)),
    lambda: ReleaseFlashMemory(VARIANTS[0], 10),
])  # fmt: skip
def test_every_memory_knows_its_newest_frame_s_time_without_being_read(make):
    memory = make()
    assert memory.time is None
    memory.write(torch.randn(2, 16, 10), [0.5, 1.5])
    assert memory.time == memory.read().time == 1.5


@pytest.mark.parametrize("config", VARIANTS)
@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 60), seed=st.integers(0, 1000))
def test_nothing_is_forgotten(config, frames, seed):
    memory = new_memory(config)
    memory.write(stream(frames, seed), torch.arange(frames))
    snapshot = memory.read()
    assert snapshot.temporal.weight.sum() == frames == snapshot.frames
    assert (snapshot.temporal.weight > 0).all()
    if config.longterm_length:
        assert snapshot.longterm.weight.sum() == frames
        assert len(snapshot.longterm) == min(frames, config.longterm_length)
    assert snapshot.time == frames - 1


@pytest.mark.parametrize("config", VARIANTS[:2])
@settings(max_examples=25, deadline=None)
@given(cuts=st.lists(st.integers(1, 9), min_size=1, max_size=12), seed=st.integers(0, 1000))
def test_chunking_does_not_matter(config, cuts, seed):
    frames = sum(cuts)
    features, times = stream(frames, seed), torch.arange(frames).double() * 0.7
    whole, pieces = new_memory(config), new_memory(config)
    whole.write(features, times)
    for chunk, moments in zip(features.split(cuts), times.split(cuts), strict=True):
        pieces.write(chunk, moments)
    assert_same(whole, pieces)


@pytest.mark.parametrize("config", VARIANTS)
def test_same_frames_same_memory(config):
    memories = [new_memory(config) for _ in range(2)]
    for seed, memory in zip((1, 2), memories, strict=True):
        torch.manual_seed(seed)  # the result must not depend on the global random state
        memory.write(stream(50), torch.arange(50))
    assert_same(*memories)


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 60), seed=st.integers(0, 1000))
def test_retrieved_frames_are_real_and_nearest(frames, seed):
    features = stream(frames, seed, scenes=False)
    memory = new_memory()
    memory.write(features, torch.arange(frames))
    snapshot = memory.read()
    for slot in range(len(snapshot.retrieved)):
        time = int(snapshot.retrieved.start[slot])
        assert torch.equal(snapshot.retrieved.features[slot], features[time])
    # Exemplars are real frames from their slot's span.
    assert (
        (snapshot.temporal.start <= snapshot.temporal.exemplar) & (snapshot.temporal.exemplar <= snapshot.temporal.end)
    ).all()


@settings(max_examples=25, deadline=None)
@given(frames=st.integers(1, 60), seed=st.integers(0, 1000))
def test_the_longterm_memory_holds_real_frames(frames, seed):
    """In half precision, at the times at which they were seen, oldest first, and each within its slot."""
    memory = new_memory()
    features = stream(frames, seed)
    memory.write(features, torch.arange(frames))
    slots = memory.read().longterm
    seen = pool_grid(features, 2).half()
    assert slots.features.dtype == torch.float16
    assert torch.equal(slots.features, seen[slots.exemplar.long()])
    assert (slots.start.diff() > 0).all()
    assert (slots.start <= slots.exemplar).all()
    assert (slots.exemplar <= slots.end).all()


def test_the_longterm_memory_merges_what_is_most_alike():
    """Of eleven frames in six slots, the ten of five scenes are joined in pairs and the single one stays."""
    memory = new_memory()
    scenes = torch.randn(6, 1, CHANNELS) * 9
    features = torch.cat([scenes[:5].repeat_interleave(2, 0), scenes[5:]]).repeat(1, 16, 1)
    memory.write(features + 0.01 * torch.randn(11, 16, CHANNELS), torch.arange(11))
    slots = memory.read().longterm
    assert slots.weight.tolist() == [2, 2, 2, 2, 2, 1]
    assert slots.end.tolist() == [1, 3, 5, 7, 9, 10]


def test_a_merge_keeps_the_nearer_exemplar():
    config = StarConfig(
        spatial_size=1, temporal_size=1, temporal_length=1, retrieved_length=1, abstract_length=0, spatial_length=1
    )
    memory = StarMemory(config, 1)
    values = [0.0, 0.2, 5.0, 2.0]
    for time, value in enumerate(values):
        memory.write(torch.tensor([[[value]]]), [float(time)])
    # The mean goes from 0.1 to 1.73 (5.0 joins, 0.2 stays) to 1.8, where frame 2.0 is nearer.
    snapshot = memory.read()
    assert snapshot.temporal.features.item() == pytest.approx(1.8)
    assert snapshot.retrieved.features.item() == 2.0
    assert snapshot.temporal.exemplar.item() == 3.0
    assert snapshot.temporal.mean.item() == 1.5


def test_buffer_retrieves_the_nearest_of_the_newest_frames():
    config = StarConfig(**SMALL, retrieval="buffer")
    memory = new_memory(config)
    features = stream(40, seed=3)
    memory.write(features, torch.arange(40))
    snapshot = memory.read()
    chosen = heaviest(snapshot.temporal.weight, 2)
    expected = nearest_frames(pool_grid(features[-7:], 2), snapshot.temporal.features[chosen])
    assert torch.equal(snapshot.retrieved.start, (33 + expected).double())
    assert torch.equal(snapshot.retrieved.features, features[-7:][expected])


@settings(max_examples=30, deadline=None)
@given(frames=st.integers(1, 40), later=st.integers(1, 20), seed=st.integers(0, 1000))
def test_a_snapshot_holds_nothing_later(frames, later, seed):
    features = stream(frames + later, seed)
    memory, other = new_memory(), new_memory()
    memory.write(features[:frames], torch.arange(frames))
    before = memory.read()
    kept = before.tokens().clone()
    memory.write(features[frames:], torch.arange(frames, frames + later))
    other.write(features[:frames], torch.arange(frames))
    assert torch.equal(before.tokens(), kept)
    assert torch.equal(other.read().tokens(), kept)
    assert before.time == frames - 1
    assert all((slots.end <= before.time).all() for _, slots in before.parts())


@settings(max_examples=40, deadline=None)
@given(frames=st.integers(1, 40), seed=st.integers(0, 1000))
def test_streaming_abstract_memory_equals_offline(frames, seed):
    features = stream(frames, seed)
    memory = new_memory()
    for i in range(frames):
        memory.write(features[i : i + 1], [float(i)])
    with torch.no_grad():
        offline = abstract_memory(pool_grid(features, 1), 4, memory.attention, memory.config.update_ratio)
    torch.testing.assert_close(memory.read().abstract.features, offline)


def test_abstract_slots_are_distinct_where_the_release_collapses():
    config = StarConfig(**{**SMALL, "abstract_length": 25})
    memory, release = new_memory(config), ReleaseMemory(config, CHANNELS, new_memory(config).attention)
    features = stream(200)
    memory.write(features, torch.arange(200))
    for i in range(200):
        release.write(features[i : i + 1], [float(i)])
    ours, theirs = (torch.pdist(each.read().abstract.features.flatten(1)).max() for each in (memory, release))
    assert theirs < 1e-5
    assert ours > 0.1


@settings(max_examples=20, deadline=None)
@given(frames=st.integers(0, 40), later=st.integers(1, 20), which=st.integers(0, len(VARIANTS) - 1))
def test_restored_state_goes_on_bit_for_bit(frames, later, which):
    features = stream(frames + later)
    memory, restored = new_memory(VARIANTS[which]), new_memory(VARIANTS[which])
    if frames:
        memory.write(features[:frames], torch.arange(frames))
    restored.load_state_dict({name: value.clone() for name, value in memory.state_dict().items()})
    for each in (memory, restored):
        each.write(features[frames:], torch.arange(frames, frames + later))
    assert_same(memory, restored)


def test_a_state_of_another_memory_is_refused():
    other = new_memory(replace(VARIANTS[0], temporal_length=6))
    with pytest.raises(ValueError, match="StarConfig"):
        new_memory().load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="buffer"):
        new_memory().load_state_dict(new_memory(VARIANTS[1]).state_dict())


@settings(max_examples=30, deadline=None)
@given(count=st.integers(2, 5), seed=st.integers(0, 1000))
def test_the_cheapest_merge_is_the_optimal_clustering(count, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    weights = torch.randint(1, 9, (count,), generator=generator).double()
    distances, sizes = torch.cdist(points, points).square().numpy(), weights.numpy()
    pairs = np.stack([merge_costs(row, sizes, own) for row, own in zip(distances, sizes, strict=True)])
    np.fill_diagonal(pairs, np.inf)
    costs = {}
    for labels in itertools.product(range(count - 1), repeat=count):
        if len(set(labels)) < count - 1:
            continue
        cost = 0.0
        for label in set(labels):
            rows = [i for i, own in enumerate(labels) if own == label]
            centre = (points[rows] * weights[rows, None]).sum(0) / weights[rows].sum()
            cost += float((weights[rows] * (points[rows] - centre).square().sum(1)).sum())
        costs[labels] = cost
    first, second = cheapest_pair(pairs)
    assert float(pairs[first, second]) == pytest.approx(min(costs.values()), rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(count=st.integers(3, 6), seed=st.integers(0, 1000))
def test_what_a_merged_pair_costs_follows_from_what_its_points_cost(count, seed):
    generator = torch.Generator().manual_seed(seed)
    points = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    sizes = torch.randint(1, 9, (count,), generator=generator).double().numpy()
    distances = torch.cdist(points, points).square().numpy()
    pairs = np.stack([merge_costs(row, sizes, own) for row, own in zip(distances, sizes, strict=True)])
    np.fill_diagonal(pairs, np.inf)
    first, second = cheapest_pair(pairs)
    mean = (sizes[first] * points[first] + sizes[second] * points[second]) / (sizes[first] + sizes[second])
    measured = merge_costs((points - mean).square().sum(1).numpy(), sizes, sizes[first] + sizes[second])
    others = [row for row in range(count) if row not in (first, second)]
    np.testing.assert_allclose(merged_costs(pairs, sizes, first, second)[others], measured[others], rtol=1e-9)


def test_lloyd_restarts_empty_clusters():
    points = torch.tensor([[0.0], [0.0], [0.0], [9.0]])
    clusters = lloyd(points, torch.ones(4), torch.tensor([0, 1]))
    assert sorted(clusters.centroids.flatten().tolist()) == [0.0, 9.0]
    assert clusters.weights.sum() == 4


def test_slots_are_in_time_order_and_cover_the_stream():
    memory = new_memory()
    features = stream(90)
    memory.write(features, torch.arange(90) * 0.5)
    temporal = memory.read().temporal
    assert torch.equal(temporal.start, temporal.start.sort().values)
    assert temporal.start.min() == 0
    assert temporal.end.max() == 44.5
    assert ((temporal.start <= temporal.mean) & (temporal.mean <= temporal.end)).all()


@pytest.mark.parametrize(
    ("features", "times", "message"),
    [
        (torch.zeros(1, 16, CHANNELS + 1), [0.0], "write takes features"),
        (torch.zeros(0, 16, CHANNELS), [], "at least 1"),
        (torch.zeros(1, 16, CHANNELS), [0.0, 1.0], "write takes features"),
        (torch.zeros(1, 15, CHANNELS), [0.0], "square"),
        (torch.zeros(1, 9, CHANNELS), [0.0], "does not pool"),
        (torch.full((1, 16, CHANNELS), float("nan")), [0.0], "finite"),
        (torch.zeros(1, 16, CHANNELS), [float("inf")], "finite"),
        (torch.zeros(2, 16, CHANNELS), [1.0, 0.5], "goes back"),
    ],
)
def test_bad_writes_are_refused_and_change_nothing(features, times, message):
    memory = new_memory()
    memory.write(stream(3), [0.0, 0.1, 0.2])
    before = {name: value.clone() for name, value in memory.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        memory.write(features, times)
    assert all(torch.equal(before[name], value) for name, value in memory.state_dict().items())


def test_reading_an_empty_memory_is_refused():
    with pytest.raises(ValueError, match="empty"):
        new_memory().read()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temporal_size": 3}, "divide"),
        ({"temporal_length": -1}, "0 or more"),
        ({"update_ratio": 1.5}, "between"),
        ({"consolidation": "magic"}, "choose"),
        ({"temporal_length": 0}, "retrieve"),
    ],
)
def test_bad_configs_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        StarConfig(**fields)


@pytest.mark.parametrize("off", ["spatial", "temporal", "abstract", "retrieved"])
def test_each_part_can_be_left_out(off):
    lengths = {f"{off}_length": 0} | ({"retrieved_length": 0} if off == "temporal" else {})
    memory = new_memory(StarConfig(**{**SMALL, **lengths}))
    memory.write(stream(20), torch.arange(20))
    snapshot = memory.read()
    assert len(getattr(snapshot, off)) == 0
    assert len(snapshot.tokens()) == memory.config.max_tokens


def test_paper_sizes_are_681_tokens():
    assert StarConfig.paper().max_tokens == StarConfig().max_tokens == 681


def test_ten_thousand_frames_in_constant_space():
    config = StarConfig(
        spatial_size=2, temporal_size=1, temporal_length=8, abstract_length=4, retrieved_length=2, buffer_length=5
    )
    torch.manual_seed(0)
    memory = StarMemory(config, 4, SemanticAttention(4, 2))
    size = memory.nbytes
    pool = torch.randn(64, 4, 4)
    for start in range(0, 10_000, 1000):
        rows = torch.randint(64, (1000,))
        memory.write(pool[rows] + torch.randn(1000, 1, 1) * 0.1, torch.arange(start, start + 1000))
    assert memory.nbytes == size
    snapshot = memory.read()
    assert snapshot.temporal.weight.sum() == 10_000 == snapshot.frames
    assert len(snapshot.tokens()) == config.max_tokens


def test_times_keep_the_precision_of_float64():
    """Slots are matched to their frames by time, so a time must be returned exactly as written."""
    config = StarConfig(spatial_size=2, temporal_size=1, temporal_length=4, abstract_length=3, retrieved_length=1)
    memory = StarMemory(config, 8, SemanticAttention(8, 4))
    times = [100_000 + 0.1 * i for i in range(20)]
    memory.write(torch.randn(20, 4, 8), times)
    for _, slots in memory.read().parts():
        assert set(slots.exemplar.tolist()) <= set(times)
