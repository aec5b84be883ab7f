"""Parsing messy replies, and judging answers by rules, by similarity and through a real endpoint."""

import http.server
import itertools
import json
import sys
import threading
import time
from contextlib import contextmanager

import pytest

from flash_vstream.errors import UserError
from flash_vstream.evaluate.benchmarks import BENCHMARKS
from flash_vstream.evaluate.choices import letter_bias, read_choice
from flash_vstream.evaluate.endpoint import ChatEndpoint
from flash_vstream.evaluate.items import Item
from flash_vstream.evaluate.judges import EndpointJudge, Judgement, OfflineJudge, read_judgement
from flash_vstream.evaluate.report import judged, summary
from flash_vstream.evaluate.similarity import SimilarityJudge, sentence_encoder
from flash_vstream.synthetic.texts import word_f1

# --- replies


OPTIONS = ("a red car", "a blue car", "a bicycle", "none of these")
UGLY = {
    1: [
        *("B", "b", "(B)", "B.", "B)", "b) a blue car", "[B]", "**B**", "`B`", "B: a blue car", " B \n", "(b)", "'B'"),
        *(
            "The answer is B",
            "the answer is: (B).",
            "Answer: B",
            "answer=B",
            "I choose B.",
            "My choice is B",
            "Option B",
        ),
        *(
            "The correct option is (B) a blue car",
            "I would pick option B because it is blue",
            "A blue car",
            "a blue car.",
        ),
        *("It is a blue car", "It's clearly A BLUE CAR!", "I think it shows a blue car, not others", "The best one: B"),
        *("Final answer: **B**", "<B>", "{B}", "B, because of the colour", "B\nExplanation: the car is blue"),
        *("I believe (B) fits", "Selected: B", "select B", "B - a blue car", "The answer would be B", "ANSWER IS B"),
    ],
    0: [*("A", "(A)", "A.", "a", "A) a red car", "The answer is A", "Option A", "A red car", "[A] a red car", "**A**")],
    3: [*("D", "(D) none of these", "None of these", "d.", "answer: d", "I'd say none of these.", "The letter is D.")],
    None: [
        *("", " ", "I do not know", "maybe", "A car is seen", "A man rides", "E", "(E)", "F.", "A or B", "(A) and (B)"),
        *("The answer is A or the answer is B", "a red car and a blue car", "both", "yes", "42", "Be careful", "Bears"),
        *("A person walks by a tree", "!!!", "…", "an apple", "All of them", "Cars", "Did it"),
    ],
}


@pytest.mark.parametrize(("index", "reply"), [(index, reply) for index, replies in UGLY.items() for reply in replies])
def test_ugly_replies(index, reply):
    assert read_choice(reply, OPTIONS).index == index


@pytest.mark.parametrize("letter", "ABCD")
def test_hundreds_of_decorated_letters(letter):
    forms = ["{}", "({})", "[{}]", "{}.", "{})", "{}:", "**{}**", "`{}`", '"{}"', "_{}_"]
    befores = [
        "",
        "Answer: ",
        "The answer is ",
        "the answer is: ",
        "Option ",
        "I choose ",
        "My answer is ",
        "\n\n",
        "Final answer: ",
    ]
    for form, before, after in itertools.product(forms, befores, ("", "\n", " ", "\n\n")):
        reply = before + form.format(letter) + after
        assert read_choice(reply, ("w", "x", "y", "z")).index == "ABCD".index(letter), reply


def test_an_option_within_an_option_is_told_apart():
    assert read_choice("It is dark blue", ("blue", "dark blue")).index == 1
    assert read_choice("blue", ("blue", "dark blue")).index == 0


def test_letter_bias_counts_abstentions_as_nothing_chosen():
    assert letter_bias([0, 0, None, 1], [0, 1, 1, 1]) == {
        "A": {"chosen": 0.5, "right": 0.25},
        "B": {"chosen": 0.25, "right": 0.75},
    }


# --- judges


@pytest.mark.parametrize(
    ("answer", "prediction", "right"),
    [
        ("Yes.", "yes, there is one", True),
        ("Yes.", "There is one", False),
        ("No.", "No", True),
        ("No.", "Yes", False),
        ("A red car.", "the red car", True),
        ("Three.", "There are 3 of them.", True),
        ("Chopping vegetables.", "He is chopping vegetables on a board", True),
        ("Chopping vegetables.", "Washing dishes", False),
        ("In the garden behind the house", "behind the house", True),
        ("It", "Italian food", False),
    ],
)
def test_the_offline_judge_by_hand(answer, prediction, right):
    assert OfflineJudge().judge("?", answer, prediction).correct is right


def test_word_f1_by_hand():
    assert word_f1("a red car", "the red bus") == pytest.approx(0.5)
    assert word_f1("red red car", "red car") == pytest.approx(2 * 2 / 5)
    assert word_f1("", "") == 1.0
    assert word_f1("x", "") == 0.0


@pytest.mark.parametrize(
    ("reply", "correct", "score", "parsed"),
    [
        ('{"correct": true, "score": 4}', True, 4, True),
        ("Sure! {'pred': 'no', 'score': 1} Bye", False, 1, True),
        ('```json\n{"correct": False, "score": 0}\n```', False, 0, True),
        ('{"correct": true, "score": 9}', True, 5, True),
        ('{"correct": true, "score": 5, "reason": "it\'s the same"}', True, 5, True),
        ("{'correct': True, 'score': 5, 'reason': \"it's the same\"}", True, 5, True),
        ("{'correct': true, 'score': 4}", True, 4, True),
        ('{"correct": true,\n\t"score": 4}', True, 4, True),
        ('{"correct": true, "score": }', False, 0, False),
        ("{correct}: ]", False, 0, False),
        ("{[1]: 2}", False, 0, False),
        ('{"correct": true}', False, 0, False),
        ("It is right.", False, 0, False),
        ('{"correct": "maybe", "score": 3}', False, 0, False),
    ],
)
def test_judges_replies_are_read(reply, correct, score, parsed):
    judgement = read_judgement(reply)
    assert (judgement.correct, judgement.score, judgement.parsed, judgement.reply) == (correct, score, parsed, reply)


@pytest.fixture
def endpoint():
    """An OpenAI-compatible endpoint that fails once and then judges by a rule."""
    seen: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["content-length"])))
            seen.append({**request, "key": self.headers.get("authorization")})
            if len(seen) == 1:
                self.send_error(500)
                return
            said = (
                '{"correct": true, "score": 5}'
                if "Predicted answer: A box" in request["messages"][1]["content"]
                else "?"
            )
            body = json.dumps({"choices": [{"message": {"content": said}}], "usage": {"total_tokens": 3}}).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen
        server.shutdown()


def test_an_endpoint_judges_at_temperature_zero_and_is_not_asked_twice(endpoint, tmp_path):
    url, seen = endpoint
    judge = EndpointJudge(ChatEndpoint(url, "judge-1", "key"))
    items = [Item("1", "v", "What?", "A box."), Item("2", "v", "What?", "A dog.")]
    said = ["A box", "A cat"]
    rows = [
        {**vars(item), "choices": [], "prediction": text, "error": None, "run": {}}
        for item, text in zip(items, said, strict=True)
    ]
    results = judged(rows, judge, tmp_path / "judged.jsonl")
    assert [row["correct"] for row in results] == [True, False]
    assert [row["judgement"]["parsed"] for row in results] == [True, False]
    assert all(call["temperature"] == 0 and call["key"] == "Bearer key" for call in seen)
    assert len(seen) == 3  # one of them failed
    assert judged(rows, judge, tmp_path / "judged.jsonl")[0]["judgement"]["reply"]
    assert len(seen) == 3
    with pytest.raises(UserError, match="did not answer"):
        EndpointJudge(ChatEndpoint("http://127.0.0.1:9", "x", retries=0)).judge("?", "!", "!")


@contextmanager
def answering(status: int, seconds: float = 0.0):
    """An endpoint that always returns one status after a delay; yields its URL and the requests it received."""
    seen: list[str] = []
    together = [0, 0]
    lock = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            with lock:
                seen.append(self.path)
                together[0] += 1
                together[1] = max(together)
            time.sleep(seconds)
            with lock:
                together[0] -= 1
            message = {"content": '{"correct": true, "score": 5}'}
            body = json.dumps({"choices": [{"message": message}], "usage": {"total_tokens": 7}}).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", seen, together
        server.shutdown()


@pytest.mark.parametrize("status", [400, 401, 403, 404])
def test_a_wrong_key_or_url_is_not_tried_again(status):
    with answering(status) as (url, seen, _):
        with pytest.raises(UserError, match=str(status)):
            ChatEndpoint(url, "x", "wrong").complete("judge", "this")
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("", "/v1/chat/completions"),
        ("/v1/", "/v1/chat/completions"),
        ("/v1beta/openai", "/v1beta/openai/chat/completions"),
        ("/api/paas/v4", "/api/paas/v4/chat/completions"),
        ("/v1/chat/completions", "/v1/chat/completions"),
        (
            "/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
            "/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
        ),
        ("/openai/deployments/gpt/?a=1&b=2", "/openai/deployments/gpt/chat/completions?a=1&b=2"),
    ],
)
def test_urls_of_every_service_work(path, asked):
    with answering(200) as (url, seen, _):
        assert ChatEndpoint(url + path, "x").complete("judge", "this")[1] == {"total_tokens": 7}
        assert seen == [asked]


def test_a_judgement_counts_for_its_question_and_answer_alone(endpoint, tmp_path):
    url, seen = endpoint
    judge, store = EndpointJudge(ChatEndpoint(url, "judge-1", "key")), tmp_path / "judged.jsonl"
    (row,) = open_rows(1)
    assert not judged([row], judge, store)[0]["correct"]
    with store.open("a") as file:
        file.write('{"id": "cut off by a ki')
    count = len(seen)
    judged([row], judge, store)
    assert len(seen) == count
    judged([{**row, "answer": "Another."}], judge, store)
    assert len(seen) == count + 1
    assert len([json.loads(line) for line in store.read_text().splitlines()]) == 2


def test_without_the_client_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r"flash-vstream\[eval\]"):
        ChatEndpoint("http://x", "x")


def open_rows(count: int) -> list[dict]:
    items = [Item(str(i), "v", "What?", f"Thing {i}.") for i in range(count)]
    return [{**vars(item), "choices": [], "prediction": "It", "error": None, "run": {}} for item in items]


def test_judgements_run_in_parallel_up_to_a_cap_and_tell_their_cost(tmp_path):
    with answering(200, seconds=0.2) as (url, seen, together):
        rows = judged(open_rows(12), EndpointJudge(ChatEndpoint(url, "x")), tmp_path / "j.jsonl", workers=4)
        assert [row["id"] for row in rows] == [str(i) for i in range(12)]
        assert 1 < together[1] <= 4
        assert len(seen) == 12
    report = summary(rows, EndpointJudge(ChatEndpoint(url, "x")), BENCHMARKS["rvs-ego"])
    assert report["judge_tokens"] == 12 * 7


def test_a_judge_that_fails_keeps_what_it_judged(tmp_path):
    class Failing:
        name = "failing"

        def judge(self, question, answer, prediction):
            if answer == "Thing 5.":
                raise UserError("the model did not answer")
            return Judgement(True, 5.0)

    store = tmp_path / "j.jsonl"
    with pytest.raises(UserError, match="did not answer"):
        judged(open_rows(6), Failing(), store, workers=2)
    assert len(store.read_text().splitlines()) >= 4


# --- sentence similarity


def test_paraphrases_are_right_where_words_differ():
    judge, rules = SimilarityJudge(), OfflineJudge()
    example = ("What is happening?", "A young boy is running along the beach.", "A kid runs on the sand by the sea.")
    assert not rules.judge(*example).correct
    assert judge.judge(*example).correct
    assert not judge.judge("What is happening?", "A young boy is running along the beach.", "A car is parked.").correct
    assert judge.judge("What?", "A dog.", "A dog.").score == 5
    assert not judge.judge("What?", "A dog.", " ").correct


def test_yes_and_no_are_never_similar():
    judge = SimilarityJudge()
    assert not judge.judge("Did it rain?", "Yes.", "No.").correct
    assert judge.judge("Did it rain?", "No.", "No, it did not.").correct


def test_sentence_vectors_do_not_depend_on_their_batch():
    encode = sentence_encoder()
    sentences = ["A dog runs.", "Two men in red shirts are sitting on a bench in front of a shop."]
    together = encode(sentences)
    for sentence, row in zip(sentences, together, strict=True):
        assert encode([sentence])[0] == pytest.approx(row, abs=1e-5)
    assert together.norm(dim=1).tolist() == pytest.approx([1, 1])
