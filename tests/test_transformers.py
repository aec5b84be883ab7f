"""A Flash-VStream model among Transformers' own: Auto classes, pipelines, chat templates, ways to generate."""

import importlib

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from flash_vstream.errors import UserError
from flash_vstream.models import FlashVStreamConfig, FlashVStreamForConditionalGeneration
from flash_vstream.models.pictures import read_messages
from flash_vstream.pipeline import FlashVStream

QUESTION = "what is it?"
RED, BLUE = (Image.new("RGB", (40, 30), colour) for colour in ("red", "blue"))


@pytest.fixture(scope="module")
def model(tiny_folder) -> FlashVStreamForConditionalGeneration:
    return FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(tiny_folder):
    return AutoProcessor.from_pretrained(tiny_folder)


def message(*content, role: str = "user") -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}
             for part in content]  # fmt: skip
    return {"role": role, "content": parts}


def test_auto_classes_find_it(tiny_folder):
    for auto in (AutoModel, AutoModelForImageTextToText):
        assert isinstance(auto.from_pretrained(tiny_folder), FlashVStreamForConditionalGeneration)


def test_a_folder_loads_where_transformers_image_processors_need_torchvision(tiny_folder, monkeypatch):
    def missing(*_, **__):
        raise ImportError("AutoImageProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoImageProcessor, "from_pretrained", missing)
    loaded = FlashVStream.from_pretrained(str(tiny_folder))
    assert loaded.encode([RED]).shape[0] == 1


def test_a_saved_folder_loads_as_remote_code_or_names_the_package(tiny_folder, monkeypatch):
    found = get_class_from_dynamic_module("flash_vstream_auto.FlashVStreamConfig", tiny_folder)
    assert found is FlashVStreamConfig
    really = importlib.import_module

    def without(name, *more):
        if name == "flash_vstream":
            raise ImportError("No module named flash_vstream")
        return really(name, *more)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match="flash_vstream"):
        get_class_from_dynamic_module("flash_vstream_auto.FlashVStreamConfig", tiny_folder)


def test_pictures_of_a_pipeline_are_seen(model, processor, tiny_folder):
    describe = pipeline("image-text-to-text", model=model, processor=processor)
    ours = FlashVStream(model, processor)
    for pictures in ([RED], [RED, BLUE]):
        stream = ours.new_stream()
        stream.write(pictures, [float(second) for second in range(len(pictures))])
        expected = ours.ask(stream, QUESTION, max_new_tokens=6).finish().text
        shown = {"images": [pictures], "text": [QUESTION]} if len(pictures) > 1 else {"images": RED, "text": QUESTION}
        (told,) = describe(**shown, max_new_tokens=6, do_sample=False, return_full_text=False)
        assert told["generated_text"].strip() == expected.strip()
        chat = [message(*pictures, QUESTION)]
        (told,) = describe(text=chat, max_new_tokens=6, do_sample=False, return_full_text=False)
        assert told["generated_text"].strip() == expected.strip()


def test_chats_become_prompts(processor):
    chat = [message(RED, "what?"), message("a cat", role="assistant"), {"role": "user", "content": "where?"}]
    text = processor.apply_chat_template(chat)
    assert text.endswith("USER: <image>\nwhat? ASSISTANT: a cat</s>USER: where? ASSISTANT:")
    batch = processor.apply_chat_template([chat, [message("hello")]], tokenize=True)
    assert batch["picture_counts"].tolist() == [1, 0]
    assert len(batch["input_ids"]) == len(batch["attention_mask"]) == 2


REFUSED = {
    "a system message": ([{"role": "system", "content": "be brief"}], "system message"),
    "a late picture": ([message("a"), message("b", role="assistant"), message(RED)], "first message"),
    "an open answer": ([message("a"), message("b", role="assistant")], "must be a question"),
    "a video": ([{"role": "user", "content": [{"type": "video", "path": "a.mp4"}]}], "watched instead"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_a_chat_cannot_hold_is_named(what):
    chat, reason = REFUSED[what]
    with pytest.raises(UserError, match=reason):
        read_messages(chat)


def test_too_many_pictures_and_videos_are_refused(processor):
    with pytest.raises(UserError, match="watch them as a stream"):
        processor(QUESTION, images=[RED] * 26)
    with pytest.raises(UserError, match="watch"):
        processor(QUESTION, videos="clip.mp4")
    with pytest.raises(UserError, match="2 prompts"):
        processor([QUESTION, QUESTION], images=[RED])


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"no_repeat_ngram_size": 2},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 2},
        {"return_dict_in_generate": True},
    ],
    ids=str,
)
def test_ways_to_generate(model, processor, options):
    batch = processor(QUESTION, images=RED)
    torch.manual_seed(0)
    output = model.generate(**batch, max_new_tokens=6, **{"do_sample": False, **options})
    sequences = output if isinstance(output, torch.Tensor) else output.sequences
    prompt = batch["input_ids"].shape[1]
    assert len(sequences) == options.get("num_return_sequences", 1)
    assert torch.equal(sequences[0, :prompt], batch["input_ids"][0])


def test_a_config_without_a_padding_token_generates(model, processor, monkeypatch):
    monkeypatch.setattr(model, "config", FlashVStreamConfig.from_dict({**model.config.to_dict(), "pad_token_id": None}))
    batch = processor(QUESTION, images=RED)
    assert model.generate(**batch, max_new_tokens=2).shape[1] > batch["input_ids"].shape[1]
    settings = FlashVStreamConfig().to_dict()
    del settings["pad_token_id"]
    assert FlashVStreamConfig.from_dict(settings).pad_token_id is None


def test_prompt_lookup_is_refused_by_name(model, processor):
    batch = processor(QUESTION, images=RED)
    with pytest.raises(UserError, match="prompt_lookup_num_tokens"):
        model.generate(**batch, max_new_tokens=2, prompt_lookup_num_tokens=3)


def test_prompts_can_be_read_in_chunks(model, processor):
    batch = processor([QUESTION, "and what is that over there?"], images=[[RED, BLUE], [BLUE]])  # one is padded
    whole = model.generate(**batch, max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**batch, max_new_tokens=6, do_sample=False, prefill_chunk_size=16), whole)


def test_the_vocabulary_can_grow(tiny_folder, processor, tmp_path):
    model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32).eval()
    batch = processor(QUESTION, images=RED)
    before = model(**batch).logits
    model.resize_token_embeddings(520, mean_resizing=False)
    after = model(**batch).logits
    assert after.shape[-1] == 520
    torch.testing.assert_close(after[..., :512], before)
    model.save_pretrained(tmp_path)
    again = FlashVStreamForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float32).eval()
    torch.testing.assert_close(again(**batch).logits, after)


def test_gradient_checkpointing_changes_no_gradient(tiny_folder, processor):
    gradients = []
    for checkpointing in (False, True):
        model = FlashVStreamForConditionalGeneration.from_pretrained(tiny_folder, dtype=torch.float32).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing
        batch = processor(QUESTION, images=RED)
        model(**batch, labels=batch["input_ids"].clamp_min(-100)).loss.backward()
        gradients.append(model.projector[0].weight.grad)
    assert gradients[0].abs().max() > 0
    torch.testing.assert_close(gradients[1], gradients[0])


def test_attention_by_sdpa_answers_alike(model, processor):
    batch = processor(QUESTION, images=RED)
    logits = {}
    for attention in ("eager", "sdpa"):
        model.language_model.set_attn_implementation(attention)
        with torch.inference_mode():
            logits[attention] = model(**batch).logits
    torch.testing.assert_close(logits["sdpa"], logits["eager"], rtol=1e-4, atol=1e-4)
