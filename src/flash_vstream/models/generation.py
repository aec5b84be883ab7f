"""Generates answers to questions about a memory.

A snapshot is read once into a ``Prefix``, which serves any number of questions. An ``Answer`` is
generated as it is iterated over. This module is independent of streams, processes and HTTP.
"""

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from flash_vstream.memory import MemorySnapshot
from flash_vstream.models.answer import Answer, Evidence, Prefix, cut
from flash_vstream.models.direct_question import asks_about_model
from flash_vstream.models.engines import Engine, Feed, PyTorchEngine, Row
from flash_vstream.models.hints import Hinter, Hints
from flash_vstream.models.interface import Layout, StreamModel, StreamProcessor
from flash_vstream.models.prompt_layout import pad_rows
from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS, PromptLimit
from flash_vstream.models.prompt_text import Typed
from flash_vstream.models.question_fit import fit_of, recalled
from flash_vstream.models.story import say, tell

TOGETHER = 32
"""How many answers are generated in one batch."""


class AnswerGenerator:
    """Reads memories and answers questions about them; decoding is greedy and deterministic.

    ``read`` a snapshot, then ``ask`` one question to stream its answer, or ``ask_many`` to answer many
    questions about the same memory in a batch. Answers to any questions about any memories can be generated together:
    ``begin`` each, then ``advance`` all that are open, until none ``is_open``.
    """

    def __init__(self, model: StreamModel, processor: StreamProcessor, engine: Engine | None = None):
        """``engine`` runs the language model; PyTorch by default."""
        self.model = model
        self.processor = processor
        self.prompt_limit = PromptLimit(model.config, processor)
        self.engine = engine or PyTorchEngine(model)
        self.hinter = Hinter.from_model(model, processor.tokenizer)
        self.fit = fit_of(model, processor.tokenizer)
        self._stops = processor.stop_ids

    @torch.inference_mode()
    def read(self, snapshot: MemorySnapshot | None, time_stamps: bool = True) -> Prefix:
        """Read a memory with the language model (None: no video); this is most of a question's cost.

        ``time_stamps=False`` is for measuring the benefit of the slots' times. It also turns off hints,
        which would put times into the prompt.
        """
        shown = self._lay_out(snapshot, time_stamps)
        sequence = self.engine.new_sequence()
        self.engine.step([Feed(sequence, shown.ids, shown.features, shown.positions)])[0].checked()
        return Prefix(snapshot, sequence, shown.ids, shown.slot_of_token, time_stamps)

    def _lay_out(self, snapshot: MemorySnapshot | None, time_stamps: bool = True) -> Layout:
        """A prompt up to its question."""
        cue = ""
        if self.hinter is not None and snapshot is not None and time_stamps:
            cue = self.hinter.cue(snapshot)
            self.hinter.grounder.look(snapshot)
        return self.processor.lay_out(snapshot, time_stamps, cue)

    def prompt(self, snapshot: MemorySnapshot | None, question: str) -> tuple[list[int], Tensor | None]:
        """A whole prompt: its ids, and the visual tokens ``[n, D]`` among them (None: there are none)."""
        shown = self._lay_out(snapshot)
        (hints,) = self.hints([question], snapshot)
        recalled = self._lay_out_recalled(snapshot, hints)
        features = [own.features for own in (shown, recalled) if own.features is not None]
        ids = [*shown.ids, *recalled.ids, *self.processor.question_ids(hints.annotate(question))]
        return ids, torch.cat([own.to(features[0]) for own in features]) if features else None

    def hints(self, questions: Sequence[str], snapshot: MemorySnapshot | None, time_stamps: bool = True) -> list[Hints]:
        """What is found for each question before the language model reads it: notes, and frames that it recalls.

        A model without hints recalls the frames of the long-term memory that fit a question best, except
        those that the newest frames show anyway.
        """
        if snapshot is None:
            return [Hints() for _ in questions]
        if self.hinter is not None:
            return self.hinter.hints(questions, snapshot) if time_stamps else [Hints() for _ in questions]
        past = snapshot.longterm
        if len(snapshot.spatial):
            past = past[past.exemplar < snapshot.spatial.start.min()]
        if self.fit is None or not len(past):
            return [Hints() for _ in questions]
        count = self.model.config.recalled
        return [Hints(recalled=recalled(self.fit, question, past, count)) for question in questions]

    def _lay_out_recalled(self, snapshot: MemorySnapshot | None, hints: Hints, time_stamps: bool = True) -> Layout:
        """The frames that a question recalls, as the beginning of its part of the prompt; empty if there are none."""
        slots = sum(len(part) for _, part in snapshot.parts()) if snapshot is not None else 0
        return hints.lay_out_recalled(self.processor, slots, time_stamps)

    def ask(
        self,
        context: MemorySnapshot | Prefix | None,
        question: str,
        history: Sequence[tuple[str, str]] = (),
        max_new_tokens: int = MAX_NEW_TOKENS,
        stop: Sequence[str] = (),
    ) -> Answer:
        """Ask ``question`` about a snapshot, a prefix, or nothing (plain chat).

        ``history`` holds earlier questions and answers of the same conversation. Nothing is computed
        until the answer is iterated over. The text ends before the first of the ``stop`` strings. Raises
        ``ValueError`` for an empty question, ``PromptTooLongError`` if it does not fit the model.
        """
        if not question.strip():
            raise ValueError("the question is empty")
        self.prompt_limit.check(question, history, max_new_tokens)
        started = time.perf_counter()
        snapshot = context.snapshot if isinstance(context, Prefix) else context
        answer = Answer(question, snapshot, isinstance(context, Prefix))
        answer._work = self._generate(answer, context, history, max_new_tokens, stop, started)
        answer._pieces = self._alone(answer)
        return answer

    def _alone(self, answer: Answer) -> Iterator[str]:
        self.begin(answer)
        while self.is_open(answer):
            (outcome,) = self.advance([answer])
            if isinstance(outcome, BaseException):
                raise outcome
            yield from outcome

    @torch.inference_mode()
    def begin(self, answer: Answer) -> int:
        """Read what an answer's question is about, as far as it has not been read; the answer is open from now on.

        Returns how many tokens its first step will read.
        """
        answer._feed = self._next_feed(answer, None, answer._said)
        return len(answer._feed.ids) if answer._feed is not None else 0

    def is_open(self, answer: Answer) -> bool:
        """Whether there is more to generate of an answer that was begun."""
        return answer._feed is not None or bool(answer._said)

    @torch.inference_mode()
    def advance(self, answers: Sequence[Answer]) -> list[list[str] | BaseException]:
        """Generate a token of every one of ``answers``, all of them open, in one step, or say what needs no model.

        Returns the new pieces of each one's text, or the error that ended it.
        """
        feeds = [answer._feed for answer in answers if answer._feed is not None]
        # Where nothing is gained by one step for all, an error in one's own shall not end the others.
        together = self.engine.together and bool(feeds)
        rows: Iterator[Row | None] = iter(self.engine.step(feeds) if together else [None] * len(feeds))
        outcomes: list[list[str] | BaseException] = []
        for answer in answers:
            pieces, answer._said = answer._said, []
            feed, row = answer._feed, None if answer._feed is None else next(rows)
            try:
                if feed is not None:
                    answer._feed = self._next_feed(answer, row or self.engine.step([feed])[0], pieces)
                outcomes.append(pieces)
            except (KeyboardInterrupt, SystemExit):
                raise
            except BaseException as error:  # a panic in tokenizers is not an Exception
                answer._feed = None
                outcomes.append(error)
        return outcomes

    def _next_feed(self, answer: Answer, row: Row | None, pieces: list[str]) -> Feed | None:
        """What an answer needs next, after ``row`` if it has asked before; adds to its ``pieces`` of text."""
        try:
            event = answer._work.send(row)
            while isinstance(event, str):
                pieces.append(event)
                event = next(answer._work)
            return event
        except StopIteration:
            return None

    @torch.inference_mode()
    def ask_many(self, prefix: Prefix, questions: Sequence[str], max_new_tokens: int = MAX_NEW_TOKENS) -> list[str]:
        """Answer ``questions`` about one memory in one batch.

        Up to rounding, the answers are the same as from ``ask``. A step for all questions costs little
        more than a step for one, but nothing is returned before the longest answer ends.
        """
        if not questions:
            return []
        if not isinstance(self.engine, PyTorchEngine):
            return self.finish_together([self.ask(prefix, text, (), max_new_tokens) for text in questions])
        hints = self.hints(questions, prefix.snapshot, prefix.time_stamps)
        # A story is made of several answers, a description guided by a frame of its own, and an objection no answer.
        alone = [any(part is not None for part in (own.scenes, own.frame, own.objection)) for own in hints]
        if any(alone) or any(asks_about_model(text) for text in questions):
            return self.finish_together([self.ask(prefix, text, (), max_new_tokens) for text in questions])
        shown = [self._lay_out_recalled(prefix.snapshot, own, prefix.time_stamps) for own in hints]
        rows = [
            [*recalled.ids, *self.processor.question_ids(own.annotate(text))]
            for text, own, recalled in zip(questions, hints, shown, strict=True)
        ]
        features = [recalled.features for recalled in shown if recalled.features is not None]
        # All questions end in the same column; shorter ones are padded between memory and question.
        padded = pad_rows(rows, 0, "left")
        ids = padded["input_ids"]
        mask = torch.cat([torch.ones(len(rows), len(prefix.ids), dtype=torch.long), padded["attention_mask"]], 1)
        positions = (mask.cumsum(1) - 1)[:, len(prefix.ids) :]
        cache = self.engine.fork(prefix.sequence)
        cache.batch_repeat_interleave(len(rows))
        generated: list[list[int]] = [[] for _ in rows]
        open_rows = set(range(len(rows)))
        openings = [self._opening(own) for own in hints]
        for at in range(max_new_tokens):
            logits = self.model(
                input_ids=ids.to(self.model.device),
                memory_features=features,
                attention_mask=mask.to(self.model.device),
                position_ids=positions.to(self.model.device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
            ids = logits[:, -1].argmax(-1, keepdim=True).cpu()
            for row, own in enumerate(openings):
                if at < len(own):
                    ids[row] = own[at]
            for row in tuple(open_rows):
                if int(ids[row]) in self._stops:
                    open_rows.remove(row)
                else:
                    generated[row].append(int(ids[row]))
            if not open_rows:
                break
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
            positions, features = positions[:, -1:] + 1, []
        return [self.processor.decode(row) for row in generated]

    def _opening(self, hints: Hints) -> list[int]:
        """The tokens that an answer begins with, whatever the language model makes of them: a verdict's."""
        return [] if hints.verdict is None else self._answer_ids(hints.verdict.capitalize())

    def _answer_ids(self, text: str) -> list[int]:
        """The tokens of an answer that follow its question."""
        start = self.processor.template.answer.partition("{}")[0]
        return self.processor.tokenize([start, Typed(text)], first=False)

    def drop_unused(self) -> None:
        """Free weights that the engine has a copy of, in a process that only answers."""
        if not isinstance(self.engine, PyTorchEngine) and hasattr(self.model.language_model, "get_decoder"):
            self.model.language_model.get_decoder().layers = nn.ModuleList()

    def finish_together(self, answers: Sequence[Answer]) -> list[str]:
        """The texts of answers, generated as many at a time as ``TOGETHER``."""
        for start in range(0, len(answers), TOGETHER):
            batch = answers[start : start + TOGETHER]
            for answer in batch:
                self.begin(answer)
            while still := [answer for answer in batch if self.is_open(answer)]:
                for outcome in self.advance(still):
                    if isinstance(outcome, BaseException):
                        raise outcome
        return [answer.text for answer in answers]

    @torch.inference_mode()
    def likelihoods(self, prefix: Prefix, question: str, answers: Sequence[str]) -> list[float]:
        """The mean log-likelihood per token of each of ``answers`` to ``question``, none of them empty."""
        (hints,) = self.hints([question], prefix.snapshot, prefix.time_stamps)
        shown = self._lay_out_recalled(prefix.snapshot, hints, prefix.time_stamps)
        asked = [*shown.ids, *self.processor.question_ids(hints.annotate(question))]
        rows = [self._answer_ids(answer.strip()) for answer in answers]
        if all(len(row) == 1 for row in rows):  # such as yes and no: what may follow the question tells all
            (step,) = self.engine.step([Feed(self.engine.fork(prefix.sequence), asked, shown.features)])
            (log,) = step.checked().logits.log_softmax(-1)
            return [float(log[token]) for (token,) in rows]
        feeds = [
            Feed(self.engine.fork(prefix.sequence), [*asked, *row], shown.features, keep=len(row) + 1) for row in rows
        ]
        # The first row of logits follows the question's last token.
        logs = [step.checked().logits.log_softmax(-1)[:-1] for step in self.engine.step(feeds)]
        return [log.gather(1, torch.tensor(row)[:, None]).mean().item() for log, row in zip(logs, rows, strict=True)]

    def _generate(
        self,
        answer: Answer,
        context: MemorySnapshot | Prefix | None,
        history: Sequence[tuple[str, str]],
        max_new_tokens: int,
        stop: Sequence[str],
        started: float,
    ) -> Generator[Feed | str, Row | None, None]:
        """An answer's work: yields what is to be read, which is answered by its row, and pieces of text."""
        if self.hinter is not None and asks_about_model(answer.question):
            context, answer.prefilled = None, False
        prefix = context if isinstance(context, Prefix) else self.read(context)
        if answer.prefilled:  # it must stay unchanged for the next question
            prefix = replace(prefix, sequence=self.engine.fork(prefix.sequence))
        (hints,) = self.hints([answer.question], prefix.snapshot, prefix.time_stamps)
        if hints.scenes is not None:
            yield from tell(partial(self.ask, prefix), answer, hints.scenes, max_new_tokens, stop, started)
            return
        if hints.objection is not None:
            yield from self._object(answer, prefix, hints.objection, stop, started)
            return
        answer.mentions = hints.mentions
        shown = self._lay_out_recalled(prefix.snapshot, hints, prefix.time_stamps)
        features = shown.features
        ids = [*shown.ids, *self.processor.question_ids(hints.annotate(answer.question), history)]
        answer.prompt_tokens = len(prefix.ids) + len(ids)
        slot_of_token = torch.cat([prefix.slot_of_token, shown.slot_of_token])
        prefix = replace(prefix, ids=[*prefix.ids, *shown.ids], slot_of_token=slot_of_token, recalled=hints.recalled)
        guided = self.hinter.guidance(hints) if self.hinter is not None else None
        opening = self._opening(hints)
        attention = torch.zeros(len(prefix.ids))
        generated: list[int] = []
        steps = 0  # after the first token
        while True:
            ahead = max_new_tokens - len(generated) - 1
            row = yield Feed(prefix.sequence, ids, features, attention=bool(generated), ahead=ahead)
            assert row is not None
            features = None
            logits = row.checked().logits[-1]
            token = int((guided.lean(logits, generated) if guided is not None else logits).argmax())
            if len(generated) < len(opening):
                token = opening[len(generated)]
            if row.attention is not None:
                attention += row.attention[: len(attention)]
            if not generated:
                first = time.perf_counter()
                answer.first_token_seconds = first - started
            else:
                steps += 1
            if token in self._stops:
                text, _ = cut(self.processor.decode(generated), stop, True)
                piece, answer.text = text[len(answer.text) :], text
                if piece:  # text held back because it could have been the start of a stop string
                    yield piece
                break
            generated.append(token)
            answer.tokens = len(generated)
            text = self.processor.decode(generated)
            full = len(generated) >= max_new_tokens
            if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character
                text, stopped = cut(text, stop, full)
                piece, answer.text = text[len(answer.text) :], text
                if piece:
                    yield piece
                if stopped:
                    break
            if full:
                answer.finish_reason = "length"
                break
            ids = [token]
        answer.tokens_per_second = steps / (time.perf_counter() - first) if steps else None
        answer.evidence = self._evidence(prefix, attention)

    def _object(
        self, answer: Answer, prefix: Prefix, objection: str, stop: Sequence[str], started: float
    ) -> Generator[str, None, None]:
        """The work of an answer that the language model is not asked for."""
        answer.prompt_tokens = len(prefix.ids)
        answer.first_token_seconds = time.perf_counter() - started
        answer.evidence = self._evidence(prefix, torch.zeros(len(prefix.ids)))
        yield from say(answer, objection, stop, True)

    def _evidence(self, prefix: Prefix, attention: Tensor) -> list[Evidence]:
        if prefix.snapshot is None:
            return []
        shown = prefix.slot_of_token >= 0
        total = float(attention[shown].sum())
        count = sum(len(part) for _, part in prefix.parts())
        shares = torch.zeros(count).index_add(0, prefix.slot_of_token[shown], attention[shown])
        evidence: list[Evidence] = []
        for name, part in prefix.parts():
            rows = zip(*(getattr(part, f).tolist() for f in ("start", "end", "exemplar", "weight")), strict=True)
            for start, end, exemplar, weight in rows:
                share = float(shares[len(evidence)]) / total if total > 0 else None
                evidence.append(Evidence(name, start, end, exemplar, weight, share))
        return evidence
