"""Numerical agreement with the released code (golden files, float32, 1e-5 relative).

The goldens were recorded with a stable sort in the release's cluster ranking. With PyTorch's unstable
sort, the retrieved frames depend on the build, so there is nothing fixed to compare with.
"""

from collections.abc import Iterator

import pytest
import torch

from flash_vstream.memory import StarConfig, abstract_memory, pool_grid
from flash_vstream.memory.release import ReleaseMemory, kmeans_feature
from flash_vstream.models.image_processing import FrameProcessor
from flash_vstream.models.processing import FlashVStreamProcessor
from flash_vstream.models.prompt_layout import pad_rows
from flash_vstream.models.prompts import TEMPLATES, layout
from helpers.goldens import EVERY, GOLDENS, close
from helpers.models import char_tokenizer

RELEASE = StarConfig(compat="release")
NO_DRAWS: Iterator[int] = iter(())


def drawn(notes: dict) -> Iterator[int]:
    return iter([draw[2] for draw in notes["randint_draws"]])


KMEANS = ["wkm_scene_40to8_weighted", "wkm_duplicates_26to12", "wkm_two_clusters_12to2"]


@pytest.mark.parametrize("case", KMEANS)
def test_weighted_kmeans(goldens, golden_notes, case):
    notes, tensors = (
        golden_notes["compress"][case],
        {k.split(".")[2]: v for k, v in goldens.items() if f".{case}." in k},
    )
    rows = drawn(notes)
    centroids, weights = kmeans_feature(
        tensors["input"],
        notes["video_max_frames"],
        lambda n: tensors["randperm_full"],
        lambda n: next(rows),
        tensors.get("weights"),
    )
    close(centroids, tensors["output"], EVERY)
    close(weights, tensors["output_2nd"])


@pytest.mark.parametrize("case", ["att_60to25_P1", "att_20to6_P4"])
def test_semantic_attention(goldens, golden_notes, tiny, case):
    notes = golden_notes["compress"][case]
    ours = abstract_memory(
        goldens[f"compress.{case}.input"], notes["video_max_frames"], tiny[0].semantic_attention, notes["update_ratio"]
    )
    close(ours, goldens[f"compress.{case}.output"], EVERY)


def test_spatial_pooling(goldens):
    features = goldens["spatial.input"]
    close(pool_grid(features, 8), goldens["spatial.size8"], EVERY)
    close(pool_grid(features, 4), goldens["spatial.size4"], EVERY)
    close(pool_grid(pool_grid(features, 8), 4), goldens["spatial.from64_to4"], EVERY)
    close(pool_grid(pool_grid(features, 8), 1), goldens["spatial.from64_to1"], EVERY)


def offline(goldens, tiny, frames: int, permutation: torch.Tensor | None, draws: Iterator[int] = NO_DRAWS):
    memory = ReleaseMemory(
        RELEASE, 32, tiny[0].semantic_attention, offline=True, permute=lambda n: permutation, draw=lambda n: next(draws)
    )
    memory.write(goldens["offline.features"][:frames], torch.arange(frames))
    return memory.read()


@pytest.mark.parametrize("case", ["T1", "T2", "T10", "T27", "T51"])
def test_offline_memory(goldens, golden_notes, tiny, case):
    notes = golden_notes["offline"][case]
    snapshot = offline(goldens, tiny, notes["T"], goldens.get(f"offline.{case}.randperm"), drawn(notes))
    close(snapshot.tokens(), goldens[f"offline.{case}.memory"], EVERY)


def test_streaming_memory(goldens, tiny):
    frames = goldens["stream.features"]
    call = 0
    memory = ReleaseMemory(
        RELEASE, 32, tiny[0].semantic_attention, permute=lambda n: goldens[f"stream.call{call}.randperm_full"]
    )
    for i in range(len(frames)):
        call = i + 1
        memory.write(frames[i : i + 1], [float(i)])
        if f"stream.call{call}.cur" not in goldens:
            continue
        snapshot = memory.read()
        close(
            torch.cat([snapshot.retrieved.features, snapshot.spatial.features]),
            goldens[f"stream.call{call}.cur"],
            EVERY,
        )
        close(snapshot.temporal.features, goldens[f"stream.call{call}.long"], EVERY)
        close(snapshot.abstract.features, goldens[f"stream.call{call}.turing"], EVERY)


def test_vision_tower_and_projector(goldens, tiny):
    model, processor = tiny
    pixels = goldens["pixels.lowres_frames"].repeat_interleave(7, -1).repeat_interleave(7, -2)
    close(model.encode(pixels), goldens["stream.features"][:3])
    with torch.inference_mode():
        close(model.projector(goldens["vision.encode_images"]), goldens["vision.projected"], EVERY)
    ours = processor.image_processor(list(goldens["vision.frames"].numpy()))["pixel_values"]
    close(ours[:, :, ::7, ::7], goldens["vision.preprocessed_every7"])


def expanded(row: torch.Tensor, snapshot) -> list[int]:
    """A golden prompt with its single image token replaced by one placeholder per visual token."""
    tokens = sum(layout(snapshot, time_stamps=False)) if snapshot is not None else 0
    ids = []
    for token in row.tolist():
        ids += [-200] * tokens if token == -200 else [token]
    return ids


CASES = [("features_T1", 1), ("features_T10", 10), ("features_T40", 40)]


@pytest.mark.parametrize(("case", "frames"), CASES)
def test_logits(goldens, tiny, case, frames):
    snapshot = offline(goldens, tiny, frames, goldens.get(f"forward.{case}.randperm_full.0"))
    ids = torch.tensor([expanded(goldens["forward.input_ids_A"][0], snapshot)])
    with torch.inference_mode():
        logits = tiny[0](input_ids=ids, memory_features=[snapshot.tokens()]).logits
    close(logits[:, -8:], goldens[f"forward.{case}.logits_last8"], EVERY)


def test_text_only_logits(goldens, tiny):
    ids = goldens["forward.input_ids_A"]
    with torch.inference_mode():
        logits = tiny[0](input_ids=ids[ids != -200][None]).logits
    close(logits[:, -8:], goldens["forward.text_only.logits_last8"], EVERY)


def test_truncated_prompt(goldens, tiny):
    snapshot = offline(goldens, tiny, 40, goldens["forward.truncated300_T40.randperm_full.0"])
    ids = torch.tensor([expanded(goldens["forward.input_ids_A"][0], snapshot)[:300]])
    kept = snapshot.tokens()[: int((ids == -200).sum())]
    with torch.inference_mode():
        logits = tiny[0](input_ids=ids, memory_features=[kept]).logits
    close(logits[:, -8:], goldens["forward.truncated300_T40.logits_last8"], EVERY)


def batch(goldens, tiny, case: str, spans: list[slice], side: str):
    memories = []
    for i, span in enumerate(spans):
        start = goldens.get(f"forward.{case}.randperm_full.{i}")
        memory = ReleaseMemory(
            RELEASE, 32, tiny[0].semantic_attention, offline=True, permute=lambda n, start=start: start
        )
        frames = goldens["offline.features"][span]
        memory.write(frames, torch.arange(len(frames)))
        memories.append(memory.read())
    masks = goldens["forward.batch_attention_mask"].bool()
    rows, labels = [], []
    for snapshot, ids, asked, mask in zip(
        memories, goldens["forward.batch_input_ids"], goldens["forward.batch_labels"], masks, strict=True
    ):
        rows.append(expanded(ids[mask], snapshot))
        row = expanded(torch.where(ids == -200, -200, asked)[mask], snapshot)
        labels.append([-100 if label == -200 else label for label in row])
    padded = pad_rows(rows, 0, side)
    targets = pad_rows([[label + 200 for label in row] for row in labels], 100, side)["input_ids"] - 200
    return padded, targets, [snapshot.tokens() for snapshot in memories]


def test_right_padding(goldens, tiny):
    # The release's second sample is features[50:78] of a longer recording than we store, so a different
    # sample takes its place and only the first, longer one is compared.
    padded, targets, features = batch(goldens, tiny, "batch2", [slice(30), slice(50, 60)], "right")
    with torch.inference_mode():
        logits = tiny[0](**padded, memory_features=features, labels=targets).logits
    close(logits[0, -8:], goldens["forward.batch2.logits_last8"][0], EVERY)


def test_left_padding_and_loss(goldens, golden_notes, tiny):
    case = "batch2_leftpad_difflen"
    padded, targets, features = batch(goldens, tiny, case, [slice(30), slice(50, 60)], "left")
    with torch.inference_mode():
        output = tiny[0](**padded, memory_features=features, labels=targets)
    close(output.logits[:, -8:], goldens[f"forward.{case}.logits_last8"], EVERY)
    assert output.loss.item() == pytest.approx(golden_notes["forward"][case]["loss"], rel=1e-5)


def test_loss_and_gradients(goldens, golden_notes, tiny_folder):
    from flash_vstream.models import FlashVStreamForConditionalGeneration

    model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32).train()
    features = goldens["offline.features"]
    memory = ReleaseMemory(
        RELEASE,
        32,
        model.semantic_attention,
        offline=True,
        permute=lambda n: goldens["forward.grad_T60.randperm_full.0"],
    )
    memory.write(features, torch.arange(60))
    snapshot = memory.read()
    rest = snapshot.tokens()[len(snapshot.abstract) :]
    ids = torch.tensor([expanded(goldens["forward.batch_input_ids"][0, :27], snapshot)])
    labels = goldens["forward.batch_labels"][0, :27]
    row = expanded(torch.where(goldens["forward.batch_input_ids"][0, :27] == -200, -200, labels), snapshot)
    targets = torch.tensor([[-100 if label == -200 else label for label in row]])
    frames = pool_grid(features[:-1], 1)
    loss = model(input_ids=ids, memory_features=[rest], abstract_frames=[frames], labels=targets).loss
    loss.backward()
    assert loss.item() == pytest.approx(golden_notes["forward"]["grad_T60"]["loss"], rel=1e-5)
    names = {
        "model.attention_model.k_proj.weight": "semantic_attention.k_proj.weight",
        "model.attention_model.q_proj.weight": "semantic_attention.q_proj.weight",
        "model.mm_projector.0.weight": "projector.0.weight",
        "model.mm_projector.2.bias": "projector.2.bias",
        "model.norm.weight": "language_model.model.norm.weight",
    }
    parameters = dict(model.named_parameters())
    for theirs, ours in names.items():
        golden = goldens[f"forward.grad_T60.{theirs}"]
        torch.testing.assert_close(parameters[ours].grad, golden, rtol=1e-4, atol=1e-5 * float(golden.abs().max()))


def test_greedy_generation(goldens, golden_notes, tiny):
    snapshot = offline(goldens, tiny, 40, goldens["forward.generate_T40.randperm_full.0"])
    ids = torch.tensor([expanded(goldens["forward.input_ids_A"][0], snapshot)])
    output = tiny[0].generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        memory_features=[snapshot.tokens()],
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
    )
    assert output[0, ids.shape[1] :].tolist() == golden_notes["forward"]["generate_T40"]["new_tokens"]


@pytest.mark.parametrize("name", ["v0", "vicuna_v1", "llama_2"])
def test_prompts(golden_notes, name):
    prompts, template = golden_notes["prompts"], TEMPLATES[name]
    assert template.render([("what is in the video?", None)]) == prompts[f"{name}.q"]
    if f"{name}.qaqa" in prompts:
        assert template.render([("q1", "a1"), ("q2", "a2")]) == prompts[f"{name}.qaqa"]
    if f"{name}.qaq" in prompts:
        assert template.render([("q1", "a1"), ("q2", None)]) == prompts[f"{name}.qaq"]


TEXTS = [(bos, text) for bos in ("bos", "nobos") for text in ("<image>\nhi", "ab<image>cd", "no image", "<image>")]


@pytest.mark.parametrize(("bos", "text"), [*TEXTS, ("bos", "x<image>")])
def test_prompt_tokens(golden_notes, text, bos):
    golden = golden_notes["prompts"][f"tokenizer_image_token|{bos}|{text}"]
    processor = FlashVStreamProcessor(FrameProcessor(), char_tokenizer(bos == "bos"))
    assert processor.prompt_ids(text, [1] if "<image>" in text else ()) == golden


def test_the_goldens_stay_small():
    assert sum(path.stat().st_size for path in GOLDENS.rglob("*") if path.is_file()) < 3_000_000
