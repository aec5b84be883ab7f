"""Training: packing, data, both kinds of stage, and resuming after a kill."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from flash_vstream.errors import UserError
from flash_vstream.evaluate.captioning import QUESTION, bleu4, caption_features
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.adapters import BASE, name_base, read_adapter_settings
from flash_vstream.models.catalog import NANO_BASE, model_folder
from flash_vstream.models.small_networks import SMALL_NETWORKS
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.captions import PictureSet, play, sentence
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.plans import StreamStyle, plan_stream
from flash_vstream.synthetic.questions import Turn, caption_questions
from flash_vstream.synthetic.views import VIEWS, picture_views
from flash_vstream.train.averaging import average_adapters
from flash_vstream.train.config import StageConfig
from flash_vstream.train.datasets import Collator, Mixture, Sample, StreamSamples
from flash_vstream.train.export import WEIGHTS, export_adapter
from flash_vstream.train.llava import LlavaSamples, turns_of
from flash_vstream.train.media import media_encoder
from flash_vstream.train.packing import collate, pack
from flash_vstream.train.prepare import prepare
from flash_vstream.train.stage import last_checkpoint, run_stage
from helpers.annotated import annotated_pictures, nano_like
from helpers.videos import write_video

SCRIPT = Path(__file__).parent.parent / "scripts" / "train_nano.sh"
TURNS = (Turn("what?", ("a dog", "a big cat")), Turn("who is there?", ("nobody",)))


@pytest.fixture
def features(goldens):
    return goldens["offline.features"][:40]


def asked_alone(model, processor, view, turns, history=()):
    """The log-probability of each answer when its question is asked separately, as at inference."""
    scores = []
    template = processor.template
    answer_form = template.answer.partition(template.stop)[0] + template.stop
    for turn in turns:
        for answer in turn.answers:
            prompt = processor.prefix_ids(view) + processor.question_ids(turn.question, history)
            ids = processor.tokenize(answer_form.format(answer), first=False)
            with torch.inference_mode():
                logits = model(input_ids=torch.tensor([prompt + ids]), memory_features=[view.tokens()]).logits[0]
            rows = logits[len(prompt) - 1 : -1].log_softmax(-1)
            scores.append(rows.gather(1, torch.tensor(ids)[:, None]).sum().item())
    return scores


def test_packed_answers_are_trained_as_they_are_asked(tiny, features):
    model, processor = tiny
    memory = model.new_memory()
    memory.write(features, torch.arange(40))
    view = memory.read()
    batch = collate([pack(processor, view, TURNS)], pad=0)
    model.language_model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(**batch, memory_features=[view.tokens()]).logits[0, :-1].log_softmax(-1)
    labels = batch["labels"][0, 1:]
    rows = torch.where(labels >= 0, logits.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
    assert rows.sum().item() == pytest.approx(sum(asked_alone(model, processor, view, TURNS)), rel=1e-4)


@pytest.mark.parametrize("template", ["vicuna_v1", "chatml"])
def test_dialogues_see_the_answer_before(tiny, features, monkeypatch, template):
    model, processor = tiny
    monkeypatch.setattr(processor, "prompt_template", template)
    memory = model.new_memory()
    memory.write(features[:5], torch.arange(5))
    view = memory.read()
    turns = (Turn("what?", ("a dog",)), Turn("and?", ("a cat",)))
    batch = collate([pack(processor, view, turns, independent=False)], pad=0)
    with torch.inference_mode():
        logits = model(**batch, memory_features=[view.tokens()]).logits[0, :-1].log_softmax(-1)
    labels = batch["labels"][0, 1:]
    packed = torch.where(labels >= 0, logits.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0).sum().item()
    first = asked_alone(model, processor, view, turns[:1])[0]
    second = asked_alone(model, processor, view, turns[1:], [("what?", "a dog")])[0]
    assert packed == pytest.approx(first + second, rel=1e-4)


def test_collator_leaves_the_abstract_memory_to_the_model(tiny, features):
    model, processor = tiny
    memory = model.new_memory()
    memory.write(features, torch.arange(40))
    batch = Collator(processor, model.config.star)([Sample(features, torch.arange(40).double(), TURNS)])
    with torch.inference_mode():
        embeds = model.embed(batch["input_ids"], batch["memory_features"], batch["abstract_frames"])
        expected = model.projector(memory.read().tokens())
    places = batch["input_ids"] == -200
    torch.testing.assert_close(embeds[places], expected, rtol=1e-4, atol=1e-5)


# --- streams


def test_plans_are_seeded_and_in_order():
    keys = [f"p{i}" for i in range(30)]
    style = StreamStyle(scenes=(2, 9), frames=(1, 6), repeat=0.3, blank=0.3, offset=20)
    for seed in range(40):
        plan = plan_stream(keys, style, random.Random(seed))
        assert plan == plan_stream(keys, style, random.Random(seed))
        times = [shot.time for shot in plan.shots]
        assert times == sorted(set(times))
        for scene in plan.scenes:
            shown = {shot.key for shot in plan.shots if scene.start <= shot.time <= scene.end}
            assert shown == {scene.key}
        cut = plan.until(plan.duration / 2)
        assert all(shot.time <= plan.duration / 2 for shot in cut.shots)
        assert all(scene.end <= plan.duration / 2 for scene in cut.scenes)


def test_views_of_a_picture_are_the_same_everywhere():
    picture = Image.linear_gradient("L").resize((90, 60))
    views = picture_views(picture, "a.jpg", 32)
    assert len(views) == VIEWS
    assert [view.tobytes() for view in views] == [view.tobytes() for view in picture_views(picture, "a.jpg", 32)]
    assert views[2].tobytes() != views[4].tobytes()


def test_prepared_pictures_play_as_streams(pictures):
    loaded = PictureSet.load(pictures, "train")
    assert loaded.captions["red.png"] == ["All red.", "It is red."]
    plan = plan_stream(sorted(loaded.captions), StreamStyle(scenes=(3, 3), frames=(2, 2)), random.Random(0))
    features, times = play(plan, loaded)
    assert features.shape == (6, 64, 32)
    assert times.tolist() == [0, 1, 2, 3, 4, 5]
    turns = caption_questions(plan, Events(loaded.captions), random.Random(0))
    assert turns[0].answers == tuple(loaded.captions[plan.scenes[-1].key])
    assert len(turns) == 3


def test_preparing_again_changes_nothing_and_gaps_are_named(pictures, tmp_path, tiny_folder):
    source = tmp_path / "source"
    source.mkdir()
    with pytest.raises(UserError, match=r"captions\.json"):
        prepare(source, tmp_path / "out", str(tiny_folder))
    (source / "captions.json").write_text(json.dumps({"a.png": ["x"]}))
    (source / "splits.json").write_text(json.dumps({"train": ["a.png"]}))
    with pytest.raises(UserError, match="lacks 1 of the 1 pictures of train"):
        prepare(source, tmp_path / "out", str(tiny_folder))


def _captions_of(pictures, plan, rng):
    return [question.turn for question in caption_questions(plan, Events(pictures.captions), rng)]


def test_samples_of_a_batch_share_a_style(pictures):
    styles = [(1.0, StreamStyle(scenes=(1, 1), frames=(1, 1))), (1.0, StreamStyle(scenes=(4, 4), frames=(1, 1)))]
    loaded = PictureSet.load(pictures, "train")
    samples = StreamSamples(loaded, styles, lambda plan, rng: _captions_of(loaded, plan, rng), 40, "s", batch=4)
    sizes = [len(samples[i].times) for i in range(40)]
    assert all(len(set(sizes[i : i + 4])) == 1 for i in range(0, 40, 4))
    assert set(sizes) == {1, 4}


TURN = Turn("What is happening?", ("x",))


def test_a_stream_that_allows_no_question_is_drawn_again(pictures):
    loaded, streams = PictureSet.load(pictures, "train"), [(1.0, StreamStyle((1, 2), (1, 1)))]
    samples = StreamSamples(loaded, streams, lambda plan, rng: [TURN] * (len(plan.scenes) - 1), 40, "s")
    assert all(len(samples[i].times) == 2 and samples[i].turns for i in range(40))
    with pytest.raises(UserError, match="50 streams in a row allow no question"):
        _ = StreamSamples(loaded, streams, lambda plan, rng: [], 1, "s")[0]


def test_a_mixture_keeps_shares_and_reads_all(pictures):
    loaded = PictureSet.load(pictures, "train")
    drawn = StreamSamples(loaded, [(1.0, StreamStyle((1, 1), (1, 1)))], lambda plan, rng: [TURN], 4000, "s", batch=4)
    read = [Sample(None, torch.zeros(0), (Turn(str(i), ("x",)),)) for i in range(10)]
    mixture = Mixture([drawn, read], [3.0, 1.0], 4000, 4, seed=0)
    samples = [mixture[i] for i in range(4000)]
    from_read = [sample.turns[0].question for sample in samples if sample.features is None]
    assert 0.2 < len(from_read) / 4000 < 0.3
    assert sorted(from_read[:10]) == sorted(map(str, range(10)))
    assert from_read[:10] != from_read[10:20]
    kinds = [sample.features is None for sample in samples]
    assert all(len(set(kinds[i : i + 4])) == 1 for i in range(0, 4000, 4))


def test_sentence():
    assert sentence(" a dog runs , fast . ") == "A dog runs, fast."


def test_bleu_is_sacrebleus():
    references = [["A dog runs over the grass.", "The dog is running."], ["Two men are sitting on a bench."]]
    assert bleu4(["A dog runs over the grass.", "Two men are sitting on a bench."], references) == pytest.approx(1)
    # By hand for one pair: 4-gram 1/2, 3-gram 2/3, 2-gram 3/4, 1-gram 4/5; equal lengths.
    value = bleu4(["a dog runs over there"], [["a dog runs over grass"]])
    assert value == pytest.approx((4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25)


def test_captioning_in_a_batch_equals_asking_one_by_one(pictures, tiny):
    model, loaded = FlashVStream(*tiny), PictureSet.load(pictures, "train")
    features = [loaded.features(key)[:1] for key in sorted(loaded.captions)]
    together = caption_features(model, features)
    for frame, text in zip(features, together, strict=True):
        memory = model.model.new_memory()
        memory.write(frame.float(), [0.0])
        assert model.ask(memory.read(), QUESTION, max_new_tokens=40).finish().text == text


def test_beam_search_keeps_each_picture_with_its_beams(pictures, tiny):
    model, loaded = FlashVStream(*tiny), PictureSet.load(pictures, "train")
    features = [loaded.features(key)[:1] * 20 for key in sorted(loaded.captions)]
    alone = [caption_features(model, [frame], beams=3)[0] for frame in features]
    assert len(set(alone)) > 1  # otherwise this test proves nothing
    assert caption_features(model, features, beams=3) == alone


# --- LLaVA data


@pytest.fixture
def llava(tmp_path, features) -> Path:
    """LLaVA-format data with every kind of stream."""
    save_file({"a": features[:30].contiguous(), "a.times": torch.arange(30).double() * 2}, tmp_path / "f.safetensors")
    Image.new("RGB", (50, 50), (200, 0, 0)).save(tmp_path / "red.png")
    write_video(tmp_path / "clip.mp4")

    def said(*turns):
        return [{"from": who, "value": text} for who, text in zip(("human", "gpt") * 4, turns, strict=False)]

    entries = [
        {"id": "f", "features": "f.safetensors:a", "conversations": said("<image>\nwhat?", "a dog", "and?", "a cat")},
        {"id": "i", "image": "red.png", "conversations": said("<image>\nwhat?", "all red")},
        {"id": "v", "video": "clip.mp4", "conversations": said("<image>\nwhat?", "it brightens")},
        {"id": "t", "conversations": said("hello", "hello to you")},
    ]
    (tmp_path / "data.json").write_text(json.dumps(entries))
    return tmp_path


def config_file(folder: Path, **changes) -> Path:
    values = {
        "stage": 1,
        "model": "given on the command line",
        "data": [{"kind": "llava", "file": "data.json"}],
        "steps": 6,
        "batch_size": 2,
        "learning_rate": 5e-3,
        "save_every": 2,
        "dtype": "float32",
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_llava_data_of_every_kind(llava, tiny_folder):
    samples = LlavaSamples(llava / "data.json", llava, media_encoder(tiny_folder))
    assert [None if s.features is None else tuple(s.features.shape) for s in samples] == [
        (30, 64, 32),
        (1, 64, 32),
        (3, 64, 32),
        None,
    ]
    assert samples[0].times[-1] == 58
    assert [turn.question for turn in samples[0].turns] == ["what?", "and?"]


def test_frames_of_a_video_are_encoded_in_batches(tiny, tmp_path, monkeypatch):
    write_video(tmp_path / "clip.mp4", frames=100)
    pipeline, sizes = FlashVStream(*tiny), []
    encode = pipeline.encode
    monkeypatch.setattr(pipeline, "encode", lambda frames: (sizes.append(len(frames)), encode(frames))[1])
    times = [time for part, _ in pipeline.encode_file(tmp_path / "clip.mp4", 2.0) for time in part]
    assert sizes == [8, 8, 4]
    assert len(times) == 20


@pytest.mark.parametrize(
    ("roles", "texts", "turns"),
    [
        (("human", "gpt"), ("what?", "a dog"), [("what?", "a dog")]),
        (("gpt", "human", "gpt"), ("hello", "what?", "a dog"), [("what?", "a dog")]),
        (("system", "user", "assistant"), ("be kind", "what?", "a dog"), [("what?", "a dog")]),
        (("human", "human", "gpt"), ("look", "what?", "a dog"), [("look\nwhat?", "a dog")]),
        (("human", "gpt", "gpt", "human"), ("what?", "a dog", "a big one", "and?"), [("what?", "a dog\na big one")]),
    ],
)
def test_roles_count_by_their_names(roles, texts, turns):
    said = [{"from": role, "value": text} for role, text in zip(roles, texts, strict=True)]
    found = turns_of({"conversations": said}, "1")
    assert [(turn.question, turn.answers[0]) for turn in found] == turns


def test_unknown_roles_and_missing_answers_are_named():
    for role, message in (("narrator", "narrator"), ("human", "no question with an answer")):
        with pytest.raises(UserError, match=message):
            turns_of({"conversations": [{"from": role, "value": "x"}]}, "1")


def test_two_runs_of_one_config_are_bit_equal(llava, tiny_folder, tmp_path):
    config = StageConfig.load(config_file(llava, tune={"lora": {"rank": 4, "alpha": 8}}, steps=2))
    states = []
    for name in ("first", "second"):
        torch.manual_seed(hash(name) % 1000)  # the earlier random state must not matter
        states.append(
            load_file(run_stage(config, tiny_folder, llava, tmp_path / name, media_encoder(tiny_folder)) / WEIGHTS)
        )
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_media_that_cannot_be_read_are_named(llava, tiny_folder):
    (llava / "red.png").write_text("no picture")
    with pytest.raises(UserError, match=r"red\.png is not a picture"):
        media_encoder(tiny_folder)(llava / "red.png")


def test_plain_chat_alone_is_a_batch(llava, tiny_folder, tmp_path):
    config = StageConfig.load(
        config_file(llava, data=[{"kind": "chat", "questions": 3}], steps=1, tune={"language_model": True})
    )
    run_stage(config, tiny_folder, llava, tmp_path / "run")
    losses = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert losses[-1]["train_loss"] > 0


@pytest.mark.parametrize("stage", [1, 2])
def test_a_stage_trains_what_it_says(llava, tiny_folder, tmp_path, stage):
    tune = {"projector": True, "semantic_attention": True, "language_model": stage == 2}
    config = StageConfig.load(config_file(llava, stage=stage, tune=tune))
    result = run_stage(config, tiny_folder, llava, tmp_path / "run", media_encoder(tiny_folder))
    before = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder).state_dict()
    after = FlashVStreamForConditionalGeneration.from_pretrained(result).state_dict()
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}
    # Thirty frames exceed the abstract memory, so its attention is trained too.
    expected = {"projector", "semantic_attention"} | ({"language_model"} if stage == 2 else set())
    assert changed == expected
    assert list((tmp_path / "run" / "logs").glob("events.out.tfevents.*"))


def test_adapters_of_two_stages_are_averaged(llava, tiny_folder, tmp_path):
    tune = {"lora": {"rank": 4, "alpha": 8}}
    first = run_stage(
        StageConfig.load(config_file(llava, tune=tune)), tiny_folder, llava, tmp_path / "1", media_encoder(tiny_folder)
    )
    onward = StageConfig.load(config_file(llava, tune=tune, adapter=str(first)))
    second = run_stage(onward, tiny_folder, llava, tmp_path / "2", media_encoder(tiny_folder))
    average = average_adapters(first, second, 0.25, tmp_path / "average" / "result")
    before, after, mixed = (load_file(folder / WEIGHTS) for folder in (first, second, average))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    for name, value in mixed.items():
        torch.testing.assert_close(value, 0.75 * before[name] + 0.25 * after[name])
    assert export_adapter(average, tmp_path / "adapter")["bytes"] > 0
    with pytest.raises(UserError, match="between 0 and 1"):
        average_adapters(first, second, 1.5, tmp_path / "no")
    with pytest.raises(UserError, match="holds no adapter"):
        average_adapters(tmp_path, second, 0.5, tmp_path / "no")
    with pytest.raises(UserError, match="one of the two"):
        average_adapters(first, second, 0.5, second)
    other = StageConfig.load(config_file(llava, tune={"lora": {"rank": 2, "alpha": 8}}))
    smaller = run_stage(other, tiny_folder, llava, tmp_path / "3", media_encoder(tiny_folder))
    with pytest.raises(UserError, match="not of one shape"):
        average_adapters(first, smaller, 0.5, tmp_path / "no")


def test_a_lora_stage_can_be_exported(llava, tiny_folder, tmp_path):
    config = StageConfig.load(config_file(llava, tune={"lora": {"rank": 4, "alpha": 8}}))
    result = run_stage(config, tiny_folder, llava, tmp_path / "run", media_encoder(tiny_folder))
    card = export_adapter(result, tmp_path / "adapter")
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert any("projector" in name for name in weights)
    assert any("lora_A" in name for name in weights)
    # The base is what the config names, not the folder that this name has on the machine that trained.
    assert read_adapter_settings(result)[BASE] == read_adapter_settings(tmp_path / "adapter")[BASE] == config.model
    assert json.loads((tmp_path / "adapter" / "card.json").read_text()) == card
    merged = FlashVStream.from_pretrained(str(tmp_path / "run" / "model"))
    assert merged.ask(None, "hello", max_new_tokens=3).finish().tokens <= 3
    name_base(result, str(model_folder(NANO_BASE)))  # as adapters of 0.1.0 have it
    export_adapter(result, tmp_path / "older")
    assert read_adapter_settings(tmp_path / "older")[BASE] == NANO_BASE


def test_a_killed_run_goes_on_to_the_same_end(llava, tiny_folder, tmp_path):
    """kill -9 halfway, then the same command again: same result as an uninterrupted run."""
    config = config_file(llava, steps=8)
    command = [sys.executable, "-c", RUN, str(config), str(tiny_folder), str(llava)]
    killed = tmp_path / "killed"
    process = subprocess.Popen([*command, str(killed)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while last_checkpoint(killed) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert last_checkpoint(killed) is not None
    # A checkpoint that the kill left incomplete is skipped.
    (killed / "checkpoint-9").mkdir()
    (killed / "checkpoint-9" / "model.safetensors").write_bytes(b"half")
    parsed = StageConfig.load(config)
    resumed = run_stage(parsed, tiny_folder, llava, killed, media_encoder(tiny_folder))
    whole = run_stage(parsed, tiny_folder, llava, tmp_path / "whole", media_encoder(tiny_folder))
    first, second = (load_file(folder / "model.safetensors") for folder in (resumed, whole))
    for name in first:  # the first steps ran in another process, where sums may be rounded otherwise
        torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5)


RUN = """
import sys
from pathlib import Path
from flash_vstream.train.config import StageConfig
from flash_vstream.train.llava import LlavaSamples, turns_of
from flash_vstream.train.media import media_encoder
from flash_vstream.train.stage import run_stage
config, model, data, output = map(Path, sys.argv[1:])
run_stage(StageConfig.load(config), model, data, output, media_encoder(model))
"""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tempo": 3}, "tempo"),
        ({"tune": {"lora": {"rank": 4}}}, "alpha"),
        ({"data": [{"kind": "dream"}]}, "dream"),
        ({"data": [{"kind": "llava", "file": "none.json"}]}, r"none\.json"),
        ({"tune": {"projector": False, "semantic_attention": False}}, "trains nothing"),
    ],
)
def test_bad_configs_are_one_clear_error(llava, tiny_folder, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_stage(StageConfig.load(config_file(llava, **changes)), tiny_folder, llava, tmp_path / "run")


# --- the script that repeats nano's training, at toy size


@pytest.fixture
def toy(tiny, tmp_path) -> tuple[Path, Path]:
    """A folder of annotated pictures, and a tiny model like nano."""
    nano_like(*tiny, tmp_path / "model")
    return annotated_pictures(tmp_path / "pictures"), tmp_path / "model"


def run_script(pictures: Path, output: Path, *options: str | Path) -> subprocess.CompletedProcess:
    command = output.parent / "flash-vstream"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m flash_vstream "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "FLASH_VSTREAM": str(command), "OMP_NUM_THREADS": "1"}
    arguments = [str(SCRIPT), str(pictures), str(output), *map(str, options)]
    return subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_every_step_runs_and_finished_ones_are_not_repeated(toy, tmp_path):
    pictures, model = toy
    output = tmp_path / "out"
    done = run_script(pictures, output, "--tiny", model)
    assert done.returncode == 0, done.stderr[-4000:]
    weights = load_file(output / "adapter" / "adapter_model.safetensors")
    assert any("lora_B" in name and value.any() for name, value in weights.items())
    for network in (*SMALL_NETWORKS, "tower"):
        assert (output / "adapter" / f"{network}.safetensors").exists()
    again = run_script(pictures, output, "--tiny", model)
    assert again.returncode == 0
    assert again.stderr.count("is finished") == 4


@pytest.mark.parametrize("arguments", [["/none"], ["--tiny"], ["--what", "x"]])
def test_a_wrong_call_says_what_is_wanted(arguments):
    done = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "captions.json" in done.stderr
