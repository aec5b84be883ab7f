"""The language engine that asks vLLM: against a stand-in, and (slow) against vLLM itself."""

import gc
import os
import re
import socket
import subprocess
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import torch
from tokenizers import decoders

from flash_vstream.errors import UserError
from flash_vstream.live.messages import Ask
from flash_vstream.models.choice import ModelChoice
from flash_vstream.models.engines import Feed, PyTorchEngine
from flash_vstream.models.engines.vllm import KEY_VARIABLE, VllmEngine, export_language
from flash_vstream.models.engines.vllm_prompts import LOGPROBS, encoded
from flash_vstream.models.generation import AnswerGenerator
from flash_vstream.pipeline import FlashVStream
from flash_vstream.sample_clips import CLIPS
from flash_vstream.wheels import fetch
from helpers.vllm import StandIn, StandInForWhole, standing_in
from helpers.vlms import TINY_STAR, tiny_vlm, tiny_vlm_for_vllm
from helpers.waiting import until
from test_question_worker import Worker


@pytest.fixture(scope="module")
def pipeline(tiny):
    return FlashVStream(*tiny)


@pytest.fixture
def vllm(pipeline):
    with standing_in(StandIn(pipeline.model.language_model)) as served:
        yield served


@pytest.fixture
def engine(pipeline, vllm):
    return VllmEngine(pipeline.model, pipeline.processor, vllm.url)


@pytest.fixture
def generator(pipeline, engine):
    return AnswerGenerator(pipeline.model, pipeline.processor, engine)


@pytest.fixture(scope="module")
def snapshot(pipeline):
    memory = pipeline.new_memory()
    config = pipeline.model.config
    shape = (6, config.pooled_size**2, config.vision_config.hidden_size)
    features = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    memory.write(features, [float(second) for second in range(6)])
    return memory.read()


QUESTIONS = ["what?", "and who is there?", "is it?"]


def test_texts_are_those_of_our_own_engine(pipeline, generator, snapshot):
    own = AnswerGenerator(pipeline.model, pipeline.processor, PyTorchEngine(pipeline.model))
    for context in (snapshot, None):
        prefix, expected = generator.read(context), own.read(context)
        for question in QUESTIONS:
            told = generator.ask(prefix, question, max_new_tokens=12).finish()
            wanted = own.ask(expected, question, max_new_tokens=12).finish()
            assert told.text == wanted.text
            assert (told.tokens, told.finish_reason) == (wanted.tokens, wanted.finish_reason)
            assert [slot.exemplar for slot in told.evidence] == [slot.exemplar for slot in wanted.evidence]
            assert all(slot.share is None for slot in told.evidence)  # vLLM does not tell where it looked


def test_every_prompt_about_a_memory_begins_like_the_one_that_read_it(generator, vllm, snapshot):
    prefix = generator.read(snapshot)
    for question in QUESTIONS:
        generator.ask(prefix, question, max_new_tokens=2).finish()
    read, *asked = vllm.prompts
    assert vllm.bodies[0]["max_tokens"] == 1
    assert len(read) == len(prefix.ids)
    assert all(torch.equal(prompt[: len(read)], read) and len(prompt) > len(read) for prompt in asked)


def test_questions_are_answered_together(generator, vllm, snapshot):
    alone = [generator.ask(snapshot, question, max_new_tokens=8).finish().text for question in QUESTIONS]
    prefix = generator.read(snapshot)
    assert generator.ask_many(prefix, QUESTIONS, max_new_tokens=8) == alone


def test_the_likeliest_tokens_have_the_likelihoods_of_our_own_engine(pipeline, engine):
    own = PyTorchEngine(pipeline.model)
    feeds = [Feed(each.new_sequence(), [1, 100, 101, 102]) for each in (own, engine)]
    (expected,), (told,) = own.step(feeds[:1]), engine.step(feeds[1:])
    logs = expected.logits[0].log_softmax(-1)
    best = logs.topk(LOGPROBS).indices
    assert torch.allclose(told.logits[0, best], logs[best], atol=1e-4)
    assert (told.logits <= told.logits[0, best[-1]]).sum() == told.logits.numel() - LOGPROBS + 1  # no other is likelier
    assert float(told.logits.logsumexp(-1)) == pytest.approx(0.0, abs=1e-4)
    (row,) = engine.step([Feed(engine.new_sequence(), [1, 100], keep=2)])
    with pytest.raises(UserError, match="what may follow a prompt"):
        row.checked()


def test_yes_and_no_are_compared_by_what_may_follow_the_question(pipeline, monkeypatch, snapshot):
    own = AnswerGenerator(pipeline.model, pipeline.processor, PyTorchEngine(pipeline.model))
    prefix = own.read(snapshot)
    tokenize = pipeline.processor.tokenize
    whole = own.likelihoods(prefix, "is it?", ["a", "b"])

    def one_token(text, first=True):
        return tokenize(text, first)[-1:] if text[0] == start else tokenize(text, first)

    start = pipeline.processor.template.answer.partition("{}")[0]
    monkeypatch.setattr(pipeline.processor, "tokenize", one_token)
    told = own.likelihoods(prefix, "is it?", ["a", "b"])
    feeds = []
    step = own.engine.step
    monkeypatch.setattr(own.engine, "step", lambda given: feeds.extend(given) or step(given))
    assert own.likelihoods(prefix, "is it?", ["a", "b"]) == told != whole
    assert len(feeds) == 1


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "refused the question (status 400: it was told to)"),
        (401, "put it into VLLM_API_KEY"),
        (404, "does not have this model any more"),
        (422, "refused the question"),
        (429, "is busy"),
        (500, "failed (status 500: it was told to); ask again"),
        (503, "is busy"),
    ],
)
def test_every_status_is_an_error_with_a_remedy(generator, vllm, snapshot, status, said):
    prefix = generator.read(snapshot)
    vllm.status = status
    with pytest.raises(UserError, match=re.escape(said)):
        generator.ask(prefix, "what?").finish()
    with pytest.raises(UserError, match=re.escape(said)):
        generator.read(snapshot)


def test_tokens_that_vllm_had_generated_too_are_read_before_others(pipeline, engine, vllm):
    """An answer that begins with given tokens, of which vLLM chose the first as well and the second not."""
    sequence = engine.new_sequence()
    (row,) = engine.step([Feed(sequence, [1, 100, 101], ahead=8)])
    first = int(row.checked().logits.argmax())
    (row,) = engine.step([Feed(sequence, [first], ahead=7)])
    second = 100 + (int(row.checked().logits.argmax()) == 100)
    (row,) = engine.step([Feed(sequence, [second], ahead=0)])
    own = PyTorchEngine(pipeline.model)
    (expected,) = own.step([Feed(own.new_sequence(), [1, 100, 101, first, second])])
    assert len(vllm.prompts[-1]) == 5
    best = expected.logits[0].topk(LOGPROBS).indices
    assert torch.allclose(row.logits[0, best], expected.logits[0].log_softmax(-1)[best], atol=1e-4)


def test_an_error_ends_its_own_question_alone(pipeline, engine, vllm, snapshot, monkeypatch):
    worker = Worker(pipeline)
    monkeypatch.setattr(worker.worker.generator, "engine", engine)
    vllm.longest = 400
    worker.worker.take(Ask(0, None, "hello", max_new_tokens=500))
    worker.worker.take(Ask(1, None, "hello", max_new_tokens=3))
    ends = worker.ends()
    assert ends[0] == ("error", "the language engine refused the question (status 400: This model's maximum context"
                       " length is 400 tokens.)")  # fmt: skip
    assert ends[1][0] == "done"


def test_a_stream_that_breaks_off_is_an_error(generator, vllm):
    vllm.cut = 2
    with pytest.raises(UserError, match="before the answer was complete"):
        generator.ask(None, "what?", max_new_tokens=8).finish()


def test_numbers_of_vllm_that_are_not_finite_are_an_error(engine, vllm, monkeypatch):
    chunk = {"choices": [{"index": 0, "token_ids": [0], "logprobs": {"top_logprobs": [{"token_id:0": None}]}}]}
    monkeypatch.setattr(vllm, "chunks", lambda embeds, body: iter([chunk]))
    (row,) = engine.step([Feed(engine.new_sequence(), [1, 100])])
    with pytest.raises(UserError, match="restart vLLM"):
        row.checked()


def test_numbers_that_are_not_finite_never_leave(generator, vllm, snapshot):
    broken = snapshot.tokens() * float("nan")
    vllm.prompts.clear()
    sequence = generator.engine.new_sequence()
    ids = [generator.model.config.video_token_id] * len(broken)
    (row,) = generator.engine.step([Feed(sequence, ids, broken)])
    with pytest.raises(UserError, match="finite numbers"):
        row.checked()
    assert vllm.prompts == []


def test_an_answer_that_nobody_wants_any_more_is_given_up(generator, vllm):
    vllm.endless, vllm.pace = True, threading.Semaphore(2)
    answer = generator.ask(None, "what?", max_new_tokens=400)
    generator.begin(answer)
    generator.advance([answer])
    del answer
    vllm.pace.release(400)
    until(lambda: gc.collect() >= 0 and vllm.left == 1)


def test_what_vllm_serves_is_checked_at_the_start(pipeline, vllm, monkeypatch):
    model, processor = pipeline.model, pipeline.processor
    assert VllmEngine(model, processor, f"{vllm.url}#language")
    with pytest.raises(UserError, match="serves language, and no model 'other'"):
        VllmEngine(model, processor, f"{vllm.url}#other")
    vllm.key = "secret"
    with pytest.raises(UserError, match="put it into VLLM_API_KEY"):
        VllmEngine(model, processor, vllm.url)
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    assert VllmEngine(model, processor, vllm.url)
    with pytest.raises(UserError, match="no vLLM answers at"):
        VllmEngine(model, processor, "http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="can read the memories of nano"):
        VllmEngine(object(), processor, vllm.url)


def test_the_engine_is_chosen_by_name(tiny_folder, vllm):
    pipeline = FlashVStream.from_pretrained(ModelChoice(str(tiny_folder), language_engine=f"vllm={vllm.url}"))
    assert pipeline.ask(None, "what?", max_new_tokens=2).finish().tokens <= 2
    assert pipeline.generator.engine.name == "vllm"
    for wrong in ("vllm", "vllm=host:8000", "other=http://host/v1"):
        with pytest.raises(UserError, match="vllm=http://HOST:PORT/v1"):
            ModelChoice("nano", language_engine=wrong)


# --- models that vLLM gives positions of their own for pictures


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def qwen(request, tmp_path_factory):
    folder = tiny_vlm(request.param, tmp_path_factory.mktemp(request.param))
    loaded = FlashVStream.from_pretrained(ModelChoice(str(folder), device="cpu", dtype="float32", star=TINY_STAR))
    loaded.processor.tokenizer.backend_tokenizer.decoder = decoders.Fuse()  # as Qwen's, it gives a text back as it was
    return loaded


@pytest.fixture
def whole(qwen):
    with standing_in(StandInForWhole(qwen.model, qwen.processor.tokenizer)) as served:
        yield served


@pytest.fixture(scope="module")
def seen(qwen):
    return nine_frames(qwen)


def nine_frames(qwen):
    memory = qwen.new_memory()
    shape = (9, *qwen.model.feature_shape)
    memory.write(torch.randn(shape, generator=torch.Generator().manual_seed(0)), [float(second) for second in range(9)])
    return memory.read()


def test_pictures_go_as_their_tokens_with_their_grids(qwen, whole, seen):
    generator = AnswerGenerator(qwen.model, qwen.processor, VllmEngine(qwen.model, qwen.processor, whole.url))
    prefix, expected = generator.read(seen), qwen.generator.read(seen)
    assert whole.bodies[0]["top_logprobs"] == LOGPROBS
    for question in QUESTIONS:
        told = generator.ask(prefix, question, [("who?", "me")], max_new_tokens=12).finish()
        wanted = qwen.generator.ask(expected, question, [("who?", "me")], max_new_tokens=12).finish()
        assert (told.text, told.tokens, told.finish_reason) == (wanted.text, wanted.tokens, wanted.finish_reason)
    side = TINY_STAR.spatial_size * 2  # patches, of which 2x2 are a token
    assert whole.grids[0] == [[1, side, side]] * 2
    assert all(grids[:2] == whole.grids[0] for grids in whole.grids)
    assert all(prompt[: len(prefix.ids)] == whole.prompts[0] for prompt in whole.prompts)


def test_a_question_that_vllm_reads_otherwise_is_an_error(qwen, whole):
    generator = AnswerGenerator(qwen.model, qwen.processor, VllmEngine(qwen.model, qwen.processor, whole.url))
    assert generator.ask(None, "what?", max_new_tokens=2).finish()
    with pytest.raises(UserError, match="as other tokens than the model"):
        generator.ask(None, "what?<|im_end|>", max_new_tokens=2).finish()


def test_the_options_that_vllm_lacks_are_named(qwen, whole, seen):
    engine = VllmEngine(qwen.model, qwen.processor, whole.url)
    generator = AnswerGenerator(qwen.model, qwen.processor, engine)
    whole.trusting = False
    with pytest.raises(UserError, match="--trust-request-chat-template"):
        generator.read(seen)
    with pytest.raises(UserError, match="--enable-mm-embeds --trust-request-chat-template"):
        VllmEngine(qwen.model, qwen.processor, "http://127.0.0.1:1/v1")


# --- vLLM itself


@pytest.fixture(scope="module")
def nano():
    return FlashVStream.from_pretrained("nano", dtype=torch.float32)


@contextmanager
def running_vllm(folder, *options):
    """vLLM with the model in a folder: the command that ``FLASH_VSTREAM_VLLM`` names, in an environment of its own."""
    command = os.environ.get("FLASH_VSTREAM_VLLM")
    if command is None:
        pytest.skip("FLASH_VSTREAM_VLLM names no vllm command")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = ["--dtype=float32", "--enforce-eager", "--max-num-seqs=8", "--block-size=32", *options]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    # Otherwise the first tokens wait for a C++ compiler.
    environment |= {"TORCHDYNAMO_DISABLE": "1", "VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS": "3000"}
    environment.pop("PYTHONPATH", None)
    arguments = [command, "serve", str(folder), "--host", "127.0.0.1", "--port", str(port), *options]
    with open(folder / "log", "wb") as log, subprocess.Popen(arguments, env=environment, stdout=log, stderr=log) as run:
        url = f"http://127.0.0.1:{port}"
        try:
            until(lambda: run.poll() is not None or _is_up(url), seconds=1800.0)
            assert run.poll() is None, (folder / "log").read_text()[-3000:]
            yield url
        finally:
            run.terminate()


@pytest.fixture(scope="module")
def real_vllm(nano, tmp_path_factory):
    """vLLM with nano's language model."""
    folder = tmp_path_factory.mktemp("language")
    export_language(nano.model, nano.processor, folder)
    with running_vllm(folder, "--enable-prompt-embeds") as url:
        yield url


def _is_up(url):
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.HTTPError:
        return False


def prefix_hits(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:prefix_cache_hits_total"))


@pytest.mark.slow
def test_vllm_itself_gives_the_texts_of_our_own_engine_and_reads_a_memory_once(nano, real_vllm):
    engine = VllmEngine(nano.model, nano.processor, f"{real_vllm}/v1")
    generator = AnswerGenerator(nano.model, nano.processor, engine)
    for clip in CLIPS:
        snapshot = nano.watch(fetch([clip])[0], fps=2).snapshot()
        began = time.perf_counter()
        prefix, own = generator.read(snapshot), nano.generator.read(snapshot)
        print(f"{clip}: {len(prefix.ids)} tokens read in {time.perf_counter() - began:.2f} s")
        for question in ("What is happening now?", "What happened at 3s?", "How many people are there?"):
            before = prefix_hits(real_vllm)
            told = generator.ask(prefix, question, max_new_tokens=24).finish()
            hits = prefix_hits(real_vllm) - before
            wanted = nano.ask(own, question, max_new_tokens=24).finish()
            print(f"{question} {told.text!r}, first token {told.first_token_seconds:.2f} s, {hits:.0f} tokens cached")
            assert told.text == wanted.text
            assert hits >= len(prefix.ids) // 32 * 32
        answers = [
            each.likelihoods(each.read(snapshot), "Is there a dog?", ["Yes", "No"])
            for each in (generator, nano.generator)
        ]
        assert answers[0] == pytest.approx(answers[1], abs=1e-2)


@pytest.mark.slow
def test_vllm_itself_refuses_what_the_stand_in_refuses(nano, real_vllm):
    (model,) = httpx.get(f"{real_vllm}/v1/models").json()["data"]
    embeds = nano.model.embed(torch.tensor([[1, 100, 200]]))[0].detach()

    def status(embeds=embeds, **changes):
        body = {"model": model["id"], "prompt_embeds": encoded(embeds), "max_tokens": 2} | changes
        response = httpx.post(f"{real_vllm}/v1/completions", json=body, timeout=120)
        print(response.status_code, response.text[:300])
        return response.status_code

    assert status() == 200
    assert status(model="other") == 404
    assert status(embeds[:, :100]) == 400
    assert status(embeds.repeat(4000, 1)) == 400
    assert status(prompt_embeds=None) == 400
    assert status(prompt_embeds="junk") == 400
    assert status(embeds * float("nan")) == 200  # so ours are checked before they are sent


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_vllm_itself_reads_pictures_as_our_own_engine(family, tmp_path):
    """Needs torchvision in vLLM's environment, without which Transformers loads none of Qwen's processors."""
    folder = tiny_vlm_for_vllm(family, tmp_path / "model")
    qwen = FlashVStream.from_pretrained(ModelChoice(str(folder), device="cpu", dtype="float32", star=TINY_STAR))
    snapshot = nine_frames(qwen)
    options = ("--enable-mm-embeds", "--trust-request-chat-template", "--skip-mm-profiling", "--max-model-len=4096")
    with running_vllm(folder, *options) as url:
        engine, own = VllmEngine(qwen.model, qwen.processor, f"{url}/v1"), PyTorchEngine(qwen.model)
        shown = qwen.processor.lay_out(snapshot)
        rows = [
            each.step([Feed(each.new_sequence(), shown.ids, shown.features)])[0].checked().logits[0].log_softmax(-1)
            for each in (engine, own)
        ]
        best = rows[1].topk(LOGPROBS).indices
        print(f"{len(shown.ids)} tokens, {float((rows[0] - rows[1])[best].abs().max()):.1e} apart")
        assert torch.allclose(rows[0][best], rows[1][best], atol=1e-3)
        generator = AnswerGenerator(qwen.model, qwen.processor, engine)
        prefix, expected = generator.read(snapshot), qwen.generator.read(snapshot)
        for question in QUESTIONS:
            before = prefix_hits(url)
            told = generator.ask(prefix, question, max_new_tokens=16).finish()
            hits = prefix_hits(url) - before
            wanted = qwen.generator.ask(expected, question, max_new_tokens=16).finish()
            print(f"{question} {told.text!r}, {told.tokens} tokens, {hits:.0f} tokens cached")
            assert told.text == wanted.text
            assert hits >= len(prefix.ids) // 32 * 32
        with pytest.raises(UserError, match="as other tokens than the model"):
            generator.ask(None, "what?<|im_end|>", max_new_tokens=2).finish()
        with pytest.raises(UserError, match="language engine"):
            generator.ask(None, "what?<|image_pad|>", max_new_tokens=2).finish()
        assert generator.ask(None, "what?", max_new_tokens=2).finish().tokens  # the others go on
