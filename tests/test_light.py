"""Models without Transformers: what is kept of one, and that nothing changes by it."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.grounding import Mention
from flash_vstream.models.hints import Hints
from flash_vstream.models.kept import kept_folder
from flash_vstream.models.light import LightModel
from flash_vstream.models.prompt_limit import PromptLimit, PromptTooLongError
from flash_vstream.models.prompt_text import Typed
from flash_vstream.pipeline import FlashVStream
from helpers.annotated import nano_like

QUESTION = "What is it, and did you see a dog?"
FRAMES = np.random.default_rng(0).integers(0, 256, (6, 80, 64, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tiny, tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("nano-like")
    nano_like(*tiny, made)
    return made


@pytest.fixture
def choice(folder, tmp_path, monkeypatch) -> ModelChoice:
    """The model, with an empty cache."""
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path))
    return ModelChoice(str(folder), "cpu")


def answered(pipeline: FlashVStream) -> tuple[str, torch.Tensor, list[float]]:
    stream = pipeline.new_stream()
    stream.write(FRAMES, [float(second) for second in range(len(FRAMES))])
    answer = pipeline.ask(stream, QUESTION, max_new_tokens=12).finish()
    return answer.text, pipeline.encode(FRAMES), [slot.share for slot in answer.evidence]


def test_the_second_start_answers_the_same_without_transformers(choice):
    first = FlashVStream.for_answers(choice)
    assert not isinstance(first.model, LightModel)
    first.prepare_answers()
    second = FlashVStream.for_answers(choice)
    assert isinstance(second.model, LightModel)
    second.prepare_answers()
    (text, seen, shares), (light_text, light_seen, light_shares) = answered(first), answered(second)
    assert light_text == text
    torch.testing.assert_close(light_seen, seen)
    assert light_shares == pytest.approx(shares, abs=1e-5)


def test_its_tokens_are_those_of_the_whole_model(choice):
    whole = FlashVStream.for_answers(choice)
    whole.prepare_answers()
    light = FlashVStream.for_answers(choice)
    assert isinstance(light.model, LightModel)
    stop = whole.processor.template.stop
    for text in ("what?", ["USER: ", Typed(f"a{stop}b <unk>"), " é 🎈"], "", [Typed("</s>")]):
        for first in (True, False):
            assert light.processor.tokenize(text, first) == whole.processor.tokenize(text, first)
    ids = whole.processor.tokenize("a dog runs, and a cat.")
    assert light.processor.decode([*ids, -200]) == whole.processor.decode([*ids, -200])
    assert light.processor.stop_ids == whole.processor.stop_ids
    limit = PromptLimit(light.model.config, light.processor)
    assert limit.reserved == whole.generator.prompt_limit.reserved
    with pytest.raises(PromptTooLongError):
        limit.check("word " * 5000, (), 8)


def test_questions_are_measured_without_pytorch(choice):
    whole = FlashVStream.for_answers(choice)
    whole.prepare_answers()
    code = (
        "import sys; from flash_vstream.models.choice import ModelChoice; from flash_vstream.models.light_text import"
        f" load_text; from flash_vstream.models.prompt_limit import PromptLimit; limit ="
        f" PromptLimit(*load_text({choice!r})); assert 'torch' not in sys.modules;"
        f" print(limit.context, limit.reserved, len(limit.processor.question_ids({QUESTION!r}, [('a', 'b')])))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    limit = whole.generator.prompt_limit
    length = len(whole.processor.question_ids(QUESTION, [("a", "b")]))
    assert found.split() == [str(limit.context), str(limit.reserved), str(length)]


@pytest.mark.parametrize(("score", "word"), [(0.5, "Yes"), (-0.5, "No")])
def test_the_language_model_does_not_gainsay_sight(choice, monkeypatch, score, word):
    for pipeline in (FlashVStream.from_pretrained(choice), FlashVStream.for_answers(choice)):
        generator = pipeline.generator
        hints = Hints([Mention("a dog", 9, 14, 0.0, score, "a dog", True)], direct="Is there a dog?")
        monkeypatch.setattr(generator, "hints", lambda texts, *_, found=hints: [found for _ in texts])
        stream = pipeline.new_stream()
        stream.write(FRAMES[:1], [0.0])
        texts = [pipeline.ask(stream, "Is there a dog?", max_new_tokens=6).finish().text]
        texts += generator.ask_many(generator.read(stream.snapshot()), ["Is there a dog?"] * 2, 6)
        # The tiny tokenizer, whose tokens are characters, puts spaces between them.
        assert all(text.replace(" ", "").startswith(word) for text in texts), texts


def test_changed_weights_and_other_choices_are_loaded_whole(choice, folder):
    FlashVStream.for_answers(choice).prepare_answers()
    assert kept_folder(choice) is not None
    assert kept_folder(ModelChoice(str(folder), "cpu", dtype="float32")) is None
    assert kept_folder(ModelChoice(str(folder), "cpu", compat="release")) is None
    weights = folder / "model.safetensors"
    os.utime(weights, (1, 1))
    assert kept_folder(choice) is None
    assert not isinstance(FlashVStream.for_answers(choice).model, LightModel)


@pytest.mark.parametrize("damaged", ["light/*/settings.json", "light/*/tokenizer.json", "graphs/*/graph.xml"])
def test_what_is_damaged_is_done_without(choice, tmp_path, caplog, damaged):
    FlashVStream.for_answers(choice).prepare_answers()
    (path,) = tmp_path.glob(damaged)
    path.write_text("{")
    with caplog.at_level(logging.WARNING):
        text, _, _ = answered(FlashVStream.for_answers(choice))
    assert text == answered(FlashVStream.from_pretrained(choice))[0]
    assert "cannot be used" in caplog.text
