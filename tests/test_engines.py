"""Engines: the fast one against PyTorch, sequence by sequence and in batches."""

import gc
import logging
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from flash_vstream.memory import pool_grid
from flash_vstream.models.efficientnet import EfficientNetLiteConfig, EfficientNetLiteModel
from flash_vstream.models.engines import Feed, PyTorchEngine, choice, fastest_engine, openvino
from flash_vstream.models.engines.openvino_graph import is_supported, quantized
from flash_vstream.models.engines.openvino_tower import OpenVinoTower
from flash_vstream.models.generation import AnswerGenerator
from flash_vstream.pipeline import FlashVStream

WIDTH, LAYERS = 128, 2


@pytest.fixture(scope="module")
def model(tiny):
    """The tiny model with a larger language model, whose weights 8 bits can hold exactly."""
    torch.manual_seed(0)
    whole = tiny[0]
    sizes = {"vocab_size": whole.config.text_config.vocab_size, "max_position_embeddings": 2048}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    text = LlamaConfig(hidden_size=WIDTH, intermediate_size=192, rope_theta=1e4, **sizes, **heads)
    language = LlamaForCausalLM(text).eval()
    with torch.no_grad():
        for layer in language.modules():
            if isinstance(layer, torch.nn.Linear):
                values, scales = quantized(4 * layer.weight)
                layer.weight.copy_((values.float() * scales.float()).view_as(layer.weight))

    class Model:
        """What an engine needs of a model."""

        device, dtype, attention_is_chosen, language_model = torch.device("cpu"), torch.float32, False, language
        config = SimpleNamespace(text_config=text)

        def embed(self, ids, features=None):
            return language.get_input_embeddings()(ids)

        def __call__(self, input_ids, memory_features, **options):
            options[whole._cache_name] = options.pop("past_key_values")
            return language(input_ids, **options)

    return Model()


@pytest.fixture(scope="module")
def engines(model):
    return PyTorchEngine(model), openvino.OpenVinoEngine(model)


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 90, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits agree up to what rounding a layer's inputs to 8 bits may change."""
    return float((one - other).std()) < 0.05 * float(one.std())


def test_both_engines_read_and_attend_alike(engines):
    reference, fast = engines
    ours, theirs = fast.new_sequence(), reference.new_sequence()
    for ids in (tokens(70), tokens(1, 1), tokens(3, 2)):
        (row,) = fast.step([Feed(ours, ids, attention=True)])
        (expected,) = reference.step([Feed(theirs, ids, attention=True)])
        assert alike(row.logits, expected.logits)
        torch.testing.assert_close(row.attention, expected.attention, atol=0.02, rtol=0.1)
    assert len(row.attention) == 74
    assert float(row.attention.sum()) == pytest.approx(LAYERS, rel=1e-3)


def test_the_last_logits_that_are_wanted_come_back(engines):
    rows = [engine.step([Feed(engine.new_sequence(), tokens(9), keep=4)])[0].logits for engine in engines]
    assert rows[1].shape == rows[0].shape == (4, engines[0].model.language_model.config.vocab_size)
    assert alike(*rows)


def test_a_long_text_is_read_in_chunks(engines):
    rows = [engine.step([Feed(engine.new_sequence(), tokens(1100), keep=2)])[0].logits for engine in engines]
    assert alike(*rows)


def test_forks_share_what_was_read_and_go_their_own_ways(engines):
    _, fast = engines
    prefix = fast.new_sequence()
    fast.step([Feed(prefix, tokens(40))])
    forks = [fast.fork(prefix) for _ in range(3)]
    assert forks[0].blocks == prefix.blocks
    ends = [tokens(length, length) for length in (2, 5, 30)]
    together = fast.step([Feed(*pair) for pair in zip(forks, ends, strict=True)])
    assert forks[0].blocks[0] == prefix.blocks[0]
    assert len({fork.blocks[1] for fork in (prefix, *forks)}) == 4
    for row, end in zip(together, ends, strict=True):
        (alone,) = fast.step([Feed(fast.new_sequence(), tokens(40) + end)])
        assert alike(row.logits, alone.logits)
    (again,) = fast.step([Feed(fast.fork(prefix), ends[0])])
    torch.testing.assert_close(again.logits, together[0].logits, atol=1e-3, rtol=1e-3)


def test_blocks_are_reused_and_the_pool_grows(model, monkeypatch):
    monkeypatch.setattr(openvino, "FIRST_BLOCKS", 2)
    fast = openvino.OpenVinoEngine(model)
    kept = fast.new_sequence()
    fast.step([Feed(kept, tokens(40))])
    (expected,) = fast.step([Feed(fast.fork(kept), tokens(2, 5))])
    gc.collect()
    many = [fast.new_sequence() for _ in range(6)]
    fast.step([Feed(sequence, tokens(33)) for sequence in many])
    blocks = len(fast._pool.users)
    assert blocks >= 2 + 12
    (after,) = fast.step([Feed(fast.fork(kept), tokens(2, 5))])
    torch.testing.assert_close(after.logits, expected.logits, atol=1e-3, rtol=1e-3)
    del many
    gc.collect()
    assert len(fast._pool.free) == blocks - len(kept.blocks)


def test_weights_keep_their_size_in_8_bits():
    weight = torch.randn(48, 192)
    weight[3] = 0
    values, scales = quantized(weight)
    assert (values.dtype, scales.dtype, values.shape) == (torch.int8, torch.float16, (48, 3, 64))
    back = (values.float() * scales.float()).view_as(weight)
    assert (back - weight).abs().max() <= weight.abs().max() / 250
    assert quantized(torch.randn(4, 7))[0].shape == (4, 1, 7)


@pytest.mark.parametrize("largest", [1.0, 0.0077, 0.001])
def test_small_weights_keep_their_size_too(largest):
    weight = torch.linspace(-largest, largest, 64)[None]
    values, scales = quantized(weight)
    back = (values.float() * scales.float()).view_as(weight)
    assert (back - weight).abs().max() <= largest / 250


def test_weights_too_small_for_a_scale_are_zero():
    values, scales = quantized(torch.full((1, 64), 3e-6))
    assert not values.any()
    assert not scales.any()


def test_only_llamas_of_the_plain_kind_are_built(model):
    config = model.language_model.config
    assert is_supported(config)
    for change in ({"attention_bias": True}, {"hidden_act": "gelu"}, {"model_type": "qwen2"}):
        other = LlamaConfig(**(config.to_dict() | change))
        other.model_type = change.get("model_type", "llama")
        assert not is_supported(other)


# --- which engine is used


def test_the_fast_engine_answers_unless_something_was_chosen(tiny_folder, tiny):
    assert FlashVStream.from_pretrained(str(tiny_folder), "cpu").generator.engine.name == "openvino"
    chosen = FlashVStream.from_pretrained(str(tiny_folder), "cpu", torch.float32)
    assert chosen.generator.engine.name == FlashVStream(*tiny).generator.engine.name == "pytorch"


def test_where_openvino_fails_pytorch_answers(tiny, monkeypatch, caplog):
    def broken(*_: object) -> None:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(openvino, "_compile", broken)
    monkeypatch.setattr(choice, "add_float16_copies", lambda language_model: None)
    with caplog.at_level(logging.WARNING):
        assert isinstance(fastest_engine(tiny[0]), PyTorchEngine)
    assert "no such instruction" in caplog.text


def test_a_graph_is_built_once_and_again_when_it_is_damaged(model, engines, monkeypatch, tmp_path):
    built = []
    build = openvino.build_graph
    monkeypatch.setattr(openvino, "build_graph", lambda language_model: built.append(1) or build(language_model))
    monkeypatch.setenv("FLASH_VSTREAM_CACHE", str(tmp_path))
    (expected,) = engines[1].step([Feed(engines[1].new_sequence(), tokens(9))])
    for _ in range(2):
        fast = openvino.OpenVinoEngine(model)
        (row,) = fast.step([Feed(fast.new_sequence(), tokens(9))])
        torch.testing.assert_close(row.logits, expected.logits, atol=1e-3, rtol=1e-3)
    assert len(built) == 1
    (stored,) = tmp_path.glob("graphs/*/graph.xml")
    stored.write_text("<net")
    openvino.OpenVinoEngine(model)
    openvino.OpenVinoEngine(model)
    assert len(built) == 2


# --- answers


@pytest.fixture(scope="module")
def generator(tiny):
    """The tiny model's generator on the fast engine."""
    return AnswerGenerator(*tiny, fastest_engine(tiny[0]))


def test_answers_that_are_generated_together_are_those_of_each_alone(generator):
    assert generator.engine.name == "openvino"
    prefix = generator.read(None)
    questions = ["what?", "who is there, and why?", "where?"]
    alone = [generator.ask(prefix, question, max_new_tokens=6).finish() for question in questions]
    assert generator.ask_many(prefix, questions, max_new_tokens=6) == [answer.text for answer in alone]
    assert max(answer.tokens for answer in alone) == 6


def test_a_late_comer_joins_answers_in_progress(generator):
    prefix = generator.read(None)
    first = generator.ask(prefix, "what?", max_new_tokens=8)
    generator.begin(first)
    generator.advance([first])
    second = generator.ask(prefix, "who?", max_new_tokens=2)
    generator.begin(second)
    sizes = []
    while still := [answer for answer in (first, second) if generator.is_open(answer)]:
        sizes.append(len(still))
        generator.advance(still)
    assert sizes == [2, 2, 1, 1, 1, 1, 1]
    assert second.text == generator.ask(prefix, "who?", max_new_tokens=2).finish().text


# --- the vision tower


def test_the_fast_tower_sees_the_same():
    torch.manual_seed(0)
    tower = EfficientNetLiteModel(EfficientNetLiteConfig(image_size=64, hidden_size=48)).eval()
    tower.requires_grad_(False)
    for module in tower.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 2.0)
    pixels = torch.randn(6, 3, 64, 64)  # more than go through it at once
    expected, seen = tower(pixels).last_hidden_state, OpenVinoTower(tower)(pixels).last_hidden_state
    assert seen.shape == expected.shape == (6, 4, 48)
    torch.testing.assert_close(seen, expected, atol=1e-4, rtol=1e-3)
    pooled = OpenVinoTower(tower, 1)(pixels).last_hidden_state
    torch.testing.assert_close(pooled, pool_grid(expected, 1), atol=1e-4, rtol=1e-3)
