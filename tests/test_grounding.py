"""Grounding: events in a question are marked, looked up in the memory, and annotated in the question."""

import json
import random
import re
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from flash_vstream.cli.main import app
from flash_vstream.errors import UserError
from flash_vstream.memory import StarMemory
from flash_vstream.models import FlashVStreamForConditionalGeneration
from flash_vstream.models.grounding import Mention, _runs, annotate
from flash_vstream.models.guidance import Guided
from flash_vstream.models.hints import Hinter, Hints
from flash_vstream.models.small_networks import load_networks, weights_file
from flash_vstream.pipeline import FlashVStream
from flash_vstream.synthetic.captions import PictureSet
from flash_vstream.synthetic.events import Events
from flash_vstream.synthetic.questions import Turn
from flash_vstream.train import fitting
from flash_vstream.train import grounding as training
from flash_vstream.train.config import Lora, StageConfig, Tune
from flash_vstream.train.datasets import Collator, Sample
from flash_vstream.train.grounding import GroundingConfig, train_grounding
from flash_vstream.train.stage import run_stage

COLOURS = ("red", "blue", "green", "white")

GROUNDING = weights_file("grounding")


@pytest.fixture(scope="module")
def grounded_folder(tiny, tmp_path_factory):
    """The tiny model with an untrained grounding."""
    model, processor = tiny
    folder = tmp_path_factory.mktemp("grounded")
    config = FlashVStreamForConditionalGeneration.config_class(
        **{**model.config.to_dict(), "grounding_config": {"width": 64, "members": 2, "common": 8}, "time_stamps": True}
    )
    torch.manual_seed(0)
    made = FlashVStreamForConditionalGeneration(config)
    made.load_state_dict(model.state_dict(), strict=False)
    made.save_pretrained(folder)
    processor.save_pretrained(folder)
    settings = json.loads((folder / "processor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps(settings | {"time_stamps": True}))
    return folder


def config_of(folder, **changes):
    values = {"model": "given", "steps": 450, "batch_size": 64, "learning_rate": 3e-3, "checked_on": "train"}
    path = folder / "grounding.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return GroundingConfig.load(path)


@pytest.fixture(scope="module")
def trained(grounded_folder, pictures, tmp_path_factory):
    """The model's grounding trained on four single-colour pictures, and the result of the check."""
    output = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "LEAST_CAPTIONS", 1)
        patch.setattr(training, "PARTS_OF_CAPTIONS", 0.0)
        patch.setattr(training, "DROPPED_WORDS", 0.0)
        found = train_grounding(config_of(output), grounded_folder, pictures, output)
    return output, found


@pytest.fixture
def pipeline(grounded_folder, trained):
    """A pipeline that uses the trained grounding."""
    pipeline = FlashVStream.from_pretrained(str(grounded_folder), dtype=torch.float32)
    load_networks(pipeline.model, trained[0])
    return pipeline


def colour_memory(pipeline, pictures, shown):
    loaded = PictureSet.load(pictures, "train")
    memory = StarMemory(pipeline.model.config.star, 32, pipeline.model.semantic_attention)
    for time, name in shown:
        memory.write(loaded.features(f"{name}.png")[:1].float(), [time])
    return memory.read()


def test_notes_stand_behind_their_events():
    question = "Did a dog run before a cat slept?"
    mentions = [Mention("a dog run", 4, 13, 12.0, 1.5), Mention("a cat slept", 21, 32, 3.0, -2.0)]
    assert annotate(question, mentions) == "Did a dog run (12s) before a cat slept (3s?, earlier)?"
    assert annotate(question, []) == question


def test_what_was_trained_is_found(trained, pipeline, pictures):
    assert trained[1]["picked"] == 1.0
    assert trained[1]["occurrence"] > 0.9
    snapshot = colour_memory(pipeline, pictures, [(3, "red"), (8, "blue"), (15, "green")])
    question = "Did you see it is blue before you saw all red?"
    mentions, absent = pipeline.generator.hinter.grounder.mentions([question, "Did you see all white?"], snapshot)
    assert [(mention.text, mention.time) for mention in mentions] == [("it is blue", 8.0), ("all red", 3.0)]
    assert [question[mention.begin : mention.end] for mention in mentions] == ["it is blue", "all red"]
    assert [(mention.text, mention.seen) for mention in absent] == [("all white", False)]
    assert all(mention.seen for mention in mentions)


@pytest.mark.parametrize(
    ("marked", "named"),
    [
        ([(8, 17)], ["the dog's"]),
        ([(8, 22)], ["the dog's ball"]),
        ([(8, 11)], []),  # "the" names nothing
        ([(12, 13), (18, 22)], ["ball"]),  # of a word, a letter is not enough
        ([(8, 16), (32, 39)], ["the dog's", "t-shirt"]),
        ([(28, 31), (18, 22)], ["ball"]),
        ([], []),
    ],
)
def test_an_event_is_whole_words_and_more_than_small_ones(marked, named):
    text = "Did you the dog's ball, for the t-shirt?"
    marks = [any(begin <= place < end for begin, end in marked) for place in range(len(text))]
    places = [(place, place + 1) for place in range(len(text))]
    assert [text[begin:end] for begin, end in _runs(text, marks, places)] == named


def test_members_differ_and_their_mean_counts(pipeline):
    grounding = pipeline.model.grounding
    first, second = grounding.each()
    assert not torch.equal(first.sight[2].weight, second.sight[2].weight)
    embeddings, there = pipeline.generator.hinter.grounder.words.embed(["all red", "it is blue"])
    features = torch.randn(3, 4, 32)
    each = [member.compare(member.events(embeddings, there), member.sights(features)) for member in (first, second)]
    differences = grounding.compare(embeddings, there, [features]) - (each[0] + each[1]) / 2
    torch.testing.assert_close(differences, differences[:, :1].expand(-1, 3))  # what is common counts for all alike
    assert (each[0] - each[1]).abs().max() > 0.1


def test_an_event_is_found_by_how_much_more_it_fits_than_common_pictures(pipeline, pictures):
    grounding, loaded = pipeline.model.grounding, PictureSet.load(pictures, "train")
    features = torch.cat([loaded.features(f"{name}.png")[:1].float() for name in ("red", "blue")])
    embedded = pipeline.generator.hinter.grounder.words.embed(["all red"])
    of_four = grounding.compare(*embedded, [features])
    # A red picture alone: red is nothing special.
    grounding.choose_common(features[:1], pipeline.generator.hinter.grounder.words, [])
    of_red = grounding.compare(*embedded, [features])
    torch.testing.assert_close(of_red[0, 0], torch.tensor(0.0), atol=0.2, rtol=0)  # eight bits
    torch.testing.assert_close(of_red[0, 0] - of_red[0, 1], of_four[0, 0] - of_four[0, 1])
    assert of_four[0, 0] > of_red[0, 0] + 1


def test_a_model_in_bfloat16_finds_the_same(grounded_folder, trained, pictures):
    """Words and slots are compared in float32, whatever the model's dtype."""
    pipeline = FlashVStream.from_pretrained(str(grounded_folder), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in pipeline.model.grounding.parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in pipeline.model.language_model.parameters()} == {torch.bfloat16}
    load_networks(pipeline.model, trained[0])
    memory = pipeline.model.new_memory(torch.float32)
    loaded = PictureSet.load(pictures, "train")
    for time, name in ((3, "red"), (8, "blue"), (15, "green")):
        memory.write(loaded.features(f"{name}.png")[:1].to(torch.bfloat16), [time])
    answer = pipeline.ask(memory.read(), "Did you see it is blue before you saw all red?", max_new_tokens=2).finish()
    assert [mention.time for mention in answer.mentions] == [8.0, 3.0]
    # Common pictures lose nothing by being compared with, whatever dtype Transformers loads them in.
    precise = FlashVStream.from_pretrained(str(grounded_folder), dtype=torch.float32)
    load_networks(precise.model, trained[0])
    embedded = precise.generator.hinter.grounder.words.embed(["all red"])
    expected = precise.model.grounding.read(*embedded).usual
    for _ in range(2):
        torch.testing.assert_close(pipeline.model.grounding.read(*embedded).usual, expected)


def test_a_stage_in_bfloat16_leaves_grounding_as_it_was(grounded_folder, trained, pictures, tmp_path):
    style = {"share": 1.0, "scenes": [1, 2], "frames": [1, 1]}
    config = StageConfig(
        stage=2,
        model="given",
        networks=(str(trained[0]),),
        data=({"kind": "captions", "share": 1.0, "split": "train", "past_answers": 1, "styles": [style]},),
        tune=Tune(lora=Lora(rank=4, alpha=8)),
        steps=1,
        batch_size=1,
        learning_rate=1e-3,
        dtype="bfloat16",
    )
    result = run_stage(config, grounded_folder, pictures, tmp_path)
    before, after = load_file(trained[0] / GROUNDING), load_file(result / GROUNDING)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_questions_without_events_stay_as_they_are(pipeline, pictures):
    snapshot = colour_memory(pipeline, pictures, [(3, "red")])
    questions = ["What is happening now?", "What happened at 12s?"]
    assert pipeline.generator.hinter.grounder.mentions(questions, snapshot) == [[], []]


def test_an_answer_is_asked_with_notes_and_tells_them(pipeline, pictures):
    snapshot = colour_memory(pipeline, pictures, [(3, "red"), (8, "blue")])
    plain = pipeline.generator.read(snapshot, time_stamps=False)
    prefix = pipeline.generator.read(snapshot)
    answer = pipeline.ask(prefix, "When did this happen: all blue?", max_new_tokens=1).finish()
    assert [mention.time for mention in answer.mentions] == [8.0]
    note = len(pipeline.processor.tokenize(" (8s)", first=False))
    bare = len(prefix.ids) + len(pipeline.processor.question_ids("When did this happen: all blue?"))
    assert answer.prompt_tokens == bare + note
    assert json.loads(json.dumps(answer.to_dict()))["mentions"][0]["seen"] is True
    # No times in the prompt means none in the question; without a video, nothing is looked up.
    assert pipeline.ask(plain, "When did this happen: all blue?", max_new_tokens=1).finish().mentions == []
    assert pipeline.ask(None, "When did this happen: all blue?", max_new_tokens=1).finish().mentions == []


def test_asking_together_notes_as_asking_alone_does(pipeline, pictures):
    snapshot = colour_memory(pipeline, pictures, [(3, "red"), (8, "blue")])
    questions = ["When did this happen: all blue?", "Did you see all white?"]
    together = pipeline.ask_batch([snapshot, snapshot], questions, max_new_tokens=8)
    assert together == [pipeline.ask(snapshot, question, max_new_tokens=8).finish().text for question in questions]
    assert pipeline.generator.ask_many(pipeline.generator.read(snapshot), questions, max_new_tokens=8) == together
    assert pipeline.generator.ask_many(pipeline.generator.read(snapshot), []) == []


class Insisting:
    """Guidance that allows one token."""

    def lean(self, logits, generated):
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor([100]), 0.0)


def test_an_answer_in_a_batch_is_guided_and_objects_as_alone(pipeline, pictures, monkeypatch):
    snapshot, hinter = colour_memory(pipeline, pictures, [(3, "red")]), pipeline.generator.hinter
    monkeypatch.setattr(hinter, "guidance", lambda hints: Insisting())
    guided = pipeline.ask_batch([snapshot], ["What is happening now?"], max_new_tokens=3)
    assert guided == [pipeline.processor.decode([100] * 3)]
    monkeypatch.setattr(hinter, "hints", lambda questions, snapshot: [Hints(objection="There is no dog.")])
    assert pipeline.ask_batch([snapshot], ["What color is the dog?"]) == ["There is no dog."]


def test_an_answer_in_a_batch_ends_where_it_ends_alone(pipeline, pictures):
    snapshot = colour_memory(pipeline, pictures, [(3, "red"), (8, "blue")])
    questions = ["When did this happen: all blue?", "Hello?", "Did you see all white before all red?"]
    longest = [pipeline.ask(snapshot, question, max_new_tokens=12).finish().text for question in questions]
    word = longest[0].split()[3]
    vocabulary = range(pipeline.model.config.text_config.vocab_size)
    stop = next(i for i in vocabulary if pipeline.processor.decode([i]) == word)
    pipeline.generator._stops |= {stop}
    alone = [pipeline.ask(snapshot, question, max_new_tokens=12).finish().text for question in questions]
    together = pipeline.generator.ask_many(pipeline.generator.read(snapshot), questions, max_new_tokens=12)
    pipeline.generator._stops -= {stop}
    assert together == alone != longest


def test_training_reads_questions_as_answering_does(pipeline, pictures):
    loaded = PictureSet.load(pictures, "train")
    features = torch.cat([loaded.features(f"{name}.png")[:1] for name in ("red", "blue")]).float()
    sample = Sample(features, torch.tensor([3.0, 8.0]).double(), (Turn("Did you see all blue?", ("Yes.",)),))
    hinter = Hinter.from_model(pipeline.model, pipeline.processor.tokenizer)
    batch = Collator(pipeline.processor, pipeline.model.config.star, hinter)([sample])
    tokens = [token for token in batch["input_ids"][0].tolist() if token > 0]
    shown = "".join(pipeline.processor.tokenizer.decode([token]) for token in tokens)
    assert "Did you see all blue (8s)?" in shown


def test_rivals_are_different_other_pictures_and_the_same_each_time():
    of = torch.tensor([0, 0, 3, 9])
    torch.manual_seed(1)
    others = training._others(of, 10, seed=0)
    assert others.shape == (4, 7)
    assert all(len(set(row)) == 7 and own not in row for own, row in zip(of.tolist(), others.tolist(), strict=True))
    torch.manual_seed(2)
    assert torch.equal(training._others(of, 10, seed=0), others)
    assert training._others(of[:3], 4, seed=0).sort().values.tolist() == [[1, 2, 3], [1, 2, 3], [0, 1, 2]]
    assert training._others(of[:2], 1, seed=0).shape == (2, 0)


def test_a_batch_may_be_all_pictures():
    captions = {f"{i}.jpg": ["a dog runs"] for i in range(14)} | {"x.jpg": ["rain falls"]}  # which none is similar to
    pictures = training.DescribedPictures.__new__(training.DescribedPictures)
    pictures.keys = sorted(captions)
    pictures.index, pictures.events = {key: row for row, key in enumerate(pictures.keys)}, Events(captions)
    for seed in range(5):
        assert sorted(pictures.batch(64, random.Random(seed))) == list(range(15))


@pytest.mark.parametrize("stopped_after", [6, 13])
def test_a_run_that_was_stopped_goes_on_to_the_same_end(
    grounded_folder, pictures, tmp_path, monkeypatch, stopped_after
):
    """The run is interrupted during training of the first member, or of the second."""
    monkeypatch.setattr(fitting, "SAVE_EVERY", 4)
    monkeypatch.setattr(training, "LEAST_CAPTIONS", 1)
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    config = config_of(tmp_path, steps=8)
    train_grounding(config, grounded_folder, pictures, whole)
    draw, drawn = training.LoadedPictures.batch, []

    def stop(self, size, rng):
        drawn.append(size)
        if len(drawn) > stopped_after:
            raise KeyboardInterrupt
        return draw(self, size, rng)

    monkeypatch.setattr(training.LoadedPictures, "batch", stop)
    with pytest.raises(KeyboardInterrupt):
        train_grounding(config, grounded_folder, pictures, stopped)
    monkeypatch.setattr(training.LoadedPictures, "batch", draw)
    train_grounding(config, grounded_folder, pictures, stopped)
    assert len(list(stopped.glob("checkpoint-*.pt"))) == 2
    assert (whole / GROUNDING).read_bytes() == (stopped / GROUNDING).read_bytes()


def test_a_grounding_that_does_not_fit_is_named(pipeline, tiny, tmp_path):
    (tmp_path / GROUNDING).write_bytes(b"nothing")
    with pytest.raises(UserError, match=re.escape(str(tmp_path / GROUNDING))):
        load_networks(pipeline.model, tmp_path)
    with pytest.raises(UserError, match="has no grounding"):
        load_networks(tiny[0], tmp_path)


@pytest.mark.parametrize(("text", "message"), [("steps: 3", "model"), ("a: [", "YAML"), (None, "No such file")])
def test_bad_configs_are_one_clear_error(tmp_path, text, message):
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    result = CliRunner().invoke(app, ["train", "grounding", str(path), "--data", ".", "--output", str(tmp_path)])
    assert result.exit_code != 0
    assert message in str(result.exception) or message in result.output


def test_parts_of_captions_are_true_of_other_pictures_too(pictures, pipeline):
    data = training.LoadedPictures(PictureSet.load(pictures, "train"), pipeline.generator.hinter.grounder.words)
    assert set(data.batch(4, training.random.Random(0))) == {0, 1, 2, 3}
    part = training.part_of("a man in a red shirt rides a bicycle down a hill", training.random.Random(1))
    assert 2 <= len(part.split()) <= 7


def test_an_answer_leans_where_its_question_asks_for_a_description(pipeline, monkeypatch):
    generator = pipeline.generator
    memory = pipeline.model.new_memory(torch.float32)
    memory.write(torch.randn(2, *pipeline.model.feature_shape), [0.0, 1.0])
    prefix = generator.read(memory.read())
    described, asked = "What is happening now?", "When did it rain?"
    plain = [generator.ask_many(prefix, [text], max_new_tokens=3)[0] for text in (described, asked)]
    count = generator.model.get_input_embeddings().weight.shape[0]
    added = torch.zeros(count)
    (wanted,) = generator.processor.tokenizer("z", add_special_tokens=False).input_ids
    added[wanted] = 100.0
    pipeline.model.grounding.vocabulary = {"z": 0.0}
    guide = SimpleNamespace(about=lambda frame: Guided(torch.arange(count), added))
    monkeypatch.setattr(generator.hinter, "_guide", guide)
    leaning = [generator.ask_many(prefix, [text], max_new_tokens=3)[0] for text in (described, asked)]
    assert leaning[0].startswith("z")
    assert not plain[0].startswith("z")
    assert leaning[1] == plain[1]


def test_a_question_about_the_model_is_not_asked_of_what_it_sees(pipeline, pictures):
    generator, question = pipeline.generator, "Who are you?"
    prefix = generator.read(colour_memory(pipeline, pictures, [(3, "red"), (8, "blue")]))
    alone = pipeline.ask(None, question, max_new_tokens=6).finish()
    about = generator.ask(prefix, question, max_new_tokens=6).finish()
    assert (about.text, about.evidence, about.prompt_tokens) == (alone.text, [], alone.prompt_tokens)
    assert generator.ask_many(prefix, [question], max_new_tokens=6) == [alone.text]
