"""Hosts on other machines and the server's side of them, without a cluster: hosts are called in this process."""

import pickle
import queue
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

from flash_vstream.errors import UserError
from flash_vstream.live import remote
from flash_vstream.live.hosts import About, FrameHost, HostAwayError, HostDiedError, Published, QuestionHost
from flash_vstream.live.messages import Report, Watch
from flash_vstream.live.published import frames_seen, read_memory_table, read_picture, save_state
from flash_vstream.live.question_client import Event
from flash_vstream.live.remote import BUSY, RemoteQuestions, RemoteStreams
from flash_vstream.live.stream_state import read_memory
from flash_vstream.live.watch_rules import WatchRule
from flash_vstream.models.choice import ModelChoice
from flash_vstream.serve.clips import Clips
from flash_vstream.video import Frame
from flash_vstream.video.sources import Source
from helpers.asynchronous import run_async
from helpers.videos import write_video
from helpers.waiting import until


class CalledHere:
    """A host of this process that travels by pickle, can die, and is replaced."""

    def __init__(self, make):
        self.make, self.host, self.unreachable = make, make(), False

    def call(self, method, *arguments, seconds=None):
        if self.host is None:
            raise HostDiedError("it is dead")
        if self.unreachable:
            raise HostAwayError("it does not answer")
        arguments = tuple(argument if hasattr(argument, "host") else travelled(argument) for argument in arguments)
        return travelled(getattr(self.host, method)(*arguments))

    def die(self):
        self.host.close()
        self.host = None

    def come_back(self):
        self.host = self.make()


def travelled(value):
    return pickle.loads(pickle.dumps(value, protocol=5))


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("watched") / "clip.mp4", frames=20)


@pytest.fixture(scope="module")
def hosts(tiny_folder):
    made = [CalledHere(lambda: FrameHost(ModelChoice(str(tiny_folder)))) for _ in range(2)]
    yield made
    for host in made:
        if host.host is not None:
            host.die()


@pytest.fixture
def streams(hosts):
    running = RemoteStreams(hosts, 60.0, lambda: None)
    yield running
    for name in running.names():
        running.remove(name)
    running.close()


@pytest.fixture(scope="module")
def answering(tiny_folder):
    host = QuestionHost(ModelChoice(str(tiny_folder)))
    yield host
    host.close()


@pytest.fixture
def questions(answering, streams):
    asked = RemoteQuestions(answering.ask, lambda: pytest.fail("no watch was set"), streams.about)
    yield asked
    asked.close()


def watch_to_the_end(streams, name, source, saved=None):
    streams.add(name, source, saved)
    until(lambda: streams.status(name).state == "ended")


def test_the_host_with_the_fewest_streams_gets_the_next(streams, hosts, video):
    for name in ("a", "b", "c"):
        streams.add(name, Source(str(video), 5.0, pace="fast"))
    assert sorted(len(host.host.pulse().statuses) for host in hosts) == [1, 2]
    until(lambda: all(streams.status(name).state == "ended" for name in streams.names()))
    table = read_memory_table(streams.shared_state("a"))
    assert table.frames == streams.status("a").kept == 10
    assert read_picture(streams.shared_state("b")).jpeg[:2] == b"\xff\xd8"
    assert list(streams.workers()) == ["frame-1", "frame-2"]
    streams.remove("b")
    assert sum(len(host.host.pulse().statuses) for host in hosts) == 2
    for call in (streams.status, streams.remove, streams.source, streams.sink, streams.shared_state):
        with pytest.raises(UserError, match="no stream is called 'b'"):
            call("b")


def test_a_name_is_given_once(streams, video):
    streams.add("door", Source(str(video)))
    with pytest.raises(UserError, match="already"):
        streams.add("door", Source(str(video)))


def test_a_host_that_refuses_a_stream_leaves_nothing_of_it(streams, hosts, monkeypatch, video):
    def refuse(order):
        raise UserError("there is no room")

    for host in hosts:
        monkeypatch.setattr(host.host, "add", refuse)
    with pytest.raises(UserError, match="no room"):
        streams.add("door", Source(str(video)))
    assert streams.names() == []


def test_streams_of_a_dead_host_return_with_their_memories(streams, hosts, video, tmp_path):
    saved = tmp_path / "door.safetensors"
    watch_to_the_end(streams, "door", Source(str(video), 5.0, pace="fast"), saved)
    host = streams.about(streams.shared_state("door").path).host
    assert save_state(streams.shared_state("door"), saved)
    before = read_memory(streams.shared_state("door"))
    host.die()
    until(lambda: streams.status("door").state == "reconnecting")
    assert "last snapshot" in streams.status("door").error
    assert streams.status("door").kept == 10
    assert read_memory_table(streams.shared_state("door")).frames == 10  # of the snapshot
    host.come_back()
    until(lambda: streams.status("door").state == "ended")
    after = read_memory(streams.shared_state("door"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert sorted(worker.restarts for worker in streams.workers().values()) == [0, 1]


@pytest.fixture
def spare(tiny_folder, streams):
    host = CalledHere(lambda: FrameHost(ModelChoice(str(tiny_folder))))
    streams.add_spare(host)
    until(lambda: streams.spares_ready == 1)
    yield host
    if host.host is not None:
        host.die()


def test_a_spare_host_takes_a_dead_ones_place_and_that_is_the_spare_when_it_is_back(
    streams, spare, hosts, video, tmp_path
):
    saved = tmp_path / "door.safetensors"
    watch_to_the_end(streams, "door", Source(str(video), 5.0, pace="fast"), saved)
    streams.add("pushed", Source("push", 100.0))
    state, sink = streams.shared_state("door"), streams.sink("pushed")
    assert save_state(state, saved)
    before = read_memory(state)
    dead = streams.about(state.path).host
    dead.die()
    until(lambda: streams.about(state.path).host is spare)
    until(lambda: streams.status("door").state == "ended")
    assert all(torch.equal(value, read_memory(state)[name]) for name, value in before.items())
    assert sorted(streams.workers()) == ["frame-1", "frame-2"]
    assert sorted(worker.restarts for worker in streams.workers().values()) == [0, 1]
    assert streams.spares_ready == 0
    dead.come_back()
    until(lambda: streams.spares_ready == 1)
    assert dead.host.pulse().statuses == {}
    for host in {*hosts, spare} - {dead}:
        host.die()
    until(lambda: dead.host.pulse().statuses)  # of either
    for host in {*hosts, spare} - {dead}:
        host.come_back()
    until(lambda: all(worker.alive for worker in streams.workers().values()))
    until(lambda: all(streams.status(name).error is None for name in ("door", "pushed")))
    sink.write(1, Frame(0.0, np.zeros((streams.source("pushed").size,) * 2 + (3,), np.uint8)))
    until(lambda: streams.status("pushed").kept == 1)


def test_a_silent_host_is_waited_for_before_a_spare_one_takes_its_place(streams, spare, video, monkeypatch):
    streams.add("door", Source(str(video), 5.0, loop=True))
    path = streams.shared_state("door").path
    silent = streams.about(path).host
    silent.unreachable = True
    until(lambda: streams.status("door").state == "reconnecting")
    assert streams.about(path).host is silent
    monkeypatch.setattr(remote, "SILENT_SECONDS", 0.5)
    until(lambda: streams.about(path).host is spare)
    until(lambda: streams.status("door").state == "live")
    assert silent.host.pulse().statuses  # it goes on by itself, until it can be told
    silent.unreachable = False
    until(lambda: not silent.host.pulse().statuses)
    assert streams.status("door").state == "live"


def test_a_stream_that_is_refused_on_its_return_is_offered_again(streams, video, tiny_folder, monkeypatch):
    monkeypatch.setattr(remote, "REFUSED_SECONDS", 0.5)
    streams.add("door", Source(str(video), 5.0, pace="fast"))
    host = streams.about(streams.shared_state("door").path).host
    host.die()
    room = []

    class Full(FrameHost):
        def add(self, order):
            if not room:
                raise UserError("there is no room")
            super().add(order)

    make, host.make = host.make, lambda: Full(ModelChoice(str(tiny_folder)))
    host.come_back()
    until(lambda: streams.status("door").state == "failed")
    assert streams.status("door").error == "there is no room"
    room.append(True)
    until(lambda: streams.status("door").state == "ended")
    host.make = make


def test_a_stream_removed_while_its_host_is_away_does_not_return(streams, hosts, video):
    streams.add("door", Source(str(video)))
    host = streams.about(streams.shared_state("door").path).host
    host.die()
    streams.remove("door")
    host.come_back()
    until(lambda: all(worker.alive for worker in streams.workers().values()))
    assert host.host.pulse().statuses == {}


def test_a_stream_removed_while_its_host_cannot_be_reached_is_dropped_later(streams, hosts, video):
    streams.add("door", Source(str(video)))
    host = streams.about(streams.shared_state("door").path).host
    host.unreachable = True
    streams.remove("door")
    streams.add("door", Source(str(video), 5.0))  # the name is free again
    assert len(host.host.pulse().statuses) == 1
    host.unreachable = False
    until(lambda: sum(len(each.host.pulse().statuses) for each in hosts) == 1)
    until(lambda: streams.status("door").time is not None)
    assert streams.status("door").name == "door"


def test_a_stream_added_while_no_host_answers_is_watched_when_one_does(streams, hosts, video):
    for host in hosts:
        host.die()
    until(lambda: not any(worker.alive for worker in streams.workers().values()))
    streams.add("door", Source(str(video), 5.0, pace="fast"))
    assert streams.status("door").state == "reconnecting"
    assert streams.shared_state("door").read_raw() is None
    for host in hosts:
        host.come_back()
    until(lambda: streams.status("door").state == "ended")


def test_clips_travel_to_their_host(streams, video):
    clips = Clips(streams)
    name = clips.add(video.read_bytes(), 5.0)
    run_async(lambda: clips.watched(name))
    assert streams.status(name).kept == 10
    clips.remove(name)
    pictures = clips.add([_picture(shade) for shade in (0, 100, 200)], 1.0)
    run_async(lambda: clips.watched(pictures))
    assert streams.status(pictures).kept == 3
    clips.remove(pictures)
    clips.close()


def _picture(shade):
    from PIL import Image

    return Image.new("RGB", (32, 32), (shade, shade, shade))


def test_pushed_frames_travel_to_their_host(streams):
    streams.add("pushed", Source("push", 100.0))
    sink, size = streams.sink("pushed"), streams.source("pushed").size
    for number in (1, 2):
        sink.write(number, Frame(0.0, np.zeros((size, size, 3), np.uint8)))
        until(lambda number=number: streams.status("pushed").kept == number)
    assert sink.taken == 2


# --- questions


def ask(questions, path, tokens=3):
    return list(questions.ask(path, "what?", (), tokens))


def test_a_question_is_answered_from_the_newest_state(streams, questions, video):
    watch_to_the_end(streams, "door", Source(str(video), 5.0, pace="fast"))
    path = streams.shared_state("door").path
    *pieces, done = ask(questions, path)
    assert done.kind == "done"
    assert "".join(piece.value for piece in pieces) == done.value["text"]
    assert done.value["stream_time"] == pytest.approx(streams.status("door").time)
    assert ask(questions, path)[-1].value["warm"]  # it had nothing to read again
    assert ask(questions, None)[-1].value["stream_time"] is None


def test_a_question_about_a_stream_whose_host_is_away_gets_an_answer_or_an_error(streams, questions, video):
    watch_to_the_end(streams, "door", Source(str(video), 5.0, pace="fast"))
    watch_to_the_end(streams, "yard", Source(str(video), 5.0, pace="fast"))
    door, yard = (streams.about(streams.shared_state(name).path) for name in ("door", "yard"))
    assert ask(questions, door.path)[-1].kind == "done"
    for about in (door, yard):
        about.host.die()
    assert ask(questions, door.path)[-1].kind == "done"  # from the copy that was read before
    assert ask(questions, yard.path) == [Event("error", "it is dead")]
    for about in (door, yard):
        about.host.come_back()
    until(lambda: ask(questions, yard.path)[-1].kind == "done")


def test_a_question_about_a_stream_that_is_gone_is_an_error(streams, questions, video):
    streams.add("door", Source(str(video)))
    path = streams.shared_state("door").path
    streams.remove("door")
    assert ask(questions, path) == [Event("error", "the stream is not watched any more")]


@pytest.mark.parametrize(("fault", "event"), [("away", "gone"), ("broken", "please ask again"), ("short", "ask again")])
def test_a_question_ends_whatever_its_host_does(fault, event):
    def ask_host(*question):
        yield Event("text", "so")
        if fault == "away":
            raise HostAwayError("gone")
        if fault == "broken":
            raise ValueError("broken")

    asked = RemoteQuestions(ask_host, lambda: None, lambda path: None)
    *_, last = asked.ask(None, "what?")
    assert last.kind == "error"
    assert event in last.value
    asked.close()


def test_a_question_that_no_host_takes_ends(monkeypatch):
    monkeypatch.setattr(remote, "QUESTION_SECONDS", 0.0)
    monkeypatch.setattr(remote, "HANG_SECONDS", 0.05)
    forever = queue.SimpleQueue()

    def ask_host(*question):
        yield forever.get()

    asked = RemoteQuestions(ask_host, lambda: None, lambda path: None)
    assert list(asked.ask(None, "what?")) == [BUSY]
    forever.put(Event("done", {}))
    asked.close()


# --- watches


class Watcher:
    """A host of watches that records what it is told."""

    def __init__(self):
        self.id, self.calls, self.news = "first", [], queue.SimpleQueue()

    def call(self, method, *arguments, seconds=None):
        if method != "reports":
            self.calls.append((method, arguments))
            return None
        try:
            return self.id, [self.news.get(timeout=0.01)]
        except queue.Empty:
            return self.id, []


def test_watches_are_set_again_with_their_newest_state(monkeypatch):
    monkeypatch.setattr(remote, "REPORTS_SECONDS", 0.01)
    watcher, reports = Watcher(), []
    where = [object()]
    asked = RemoteQuestions(lambda *question: None, lambda: watcher, lambda path: About(path, where[-1]))
    asked.on_report = reports.append
    watch = Watch("w", "x/1", "a dog", WatchRule())
    asked.set_watch(watch)
    until(lambda: watcher.calls == [("set_watch", (watch, About("x/1", where[0])))])
    watcher.news.put(Report("w", {"events": 1}))
    watcher.news.put(Report("of nobody", {}))
    until(lambda: reports == [Report("w", {"events": 1})])
    watcher.calls.clear()
    watcher.id = "second"
    newest = replace(watch, state={"events": 1})
    until(lambda: watcher.calls == [("set_watch", (newest, About("x/1", where[0])))])
    assert asked.workers()["watch"].restarts == 1
    watcher.calls.clear()
    where.append(object())  # its stream has moved to another host
    until(lambda: watcher.calls == [("set_watch", (newest, About("x/1", where[1])))])
    watcher.calls.clear()
    asked.drop_watch("w")
    until(lambda: watcher.calls == [("drop_watch", ("w",))])
    asked.close()


def test_a_watch_is_worked_on_where_its_stream_is_copied_to(streams, answering, video):
    watch_to_the_end(streams, "door", Source(str(video), 5.0, pace="fast"))
    called = CalledHere(lambda: answering)
    asked, reports = RemoteQuestions(answering.ask, lambda: called, streams.about), []
    asked.on_report = reports.append
    asked.set_watch(Watch("w", streams.shared_state("door").path, "a dog", WatchRule()))
    until(lambda: reports)
    assert reports[0].watch == "w"
    assert reports[0].state["time"] == pytest.approx(streams.status("door").time)
    asked.drop_watch("w")
    until(lambda: not answering._watched)
    asked.close()


# --- what travels


def test_a_state_travels_bit_for_bit_and_its_clock_becomes_this_machines():
    tensors = {
        "half": torch.randn(3, 2).bfloat16(),
        "count": torch.tensor(7),
        "none": torch.zeros(0, 4, dtype=torch.float64),
    }
    elsewhere = 1e6
    published = Published(("host", 3), tensors, {"monotonic": elsewhere - 5.0, "kept": 7}, elsewhere)
    arrived = travelled(published)
    assert arrived.stamp == ("host", 3)
    for name, value in tensors.items():
        assert arrived.tensors[name].dtype == value.dtype
        assert torch.equal(arrived.tensors[name], value)
    arrived.tensors["count"].add_(1)  # it can be written to
    assert arrived.local_notes()["monotonic"] == pytest.approx(time.monotonic() - 5.0, abs=1.0)
    assert replace(published, notes={"kept": 0}).local_notes() == {"kept": 0}


def test_a_copy_is_as_old_as_its_original(streams, answering, video):
    watch_to_the_end(streams, "door", Source(str(video), 5.0, pace="fast"))
    about = streams.about(streams.shared_state("door").path)
    answering._mirror.refresh(about)
    copy, _ = answering._mirror._copies[about.path]
    frames, age = frames_seen(copy)
    assert frames == 10
    assert age == pytest.approx(streams.status("door").lag, abs=1.0)
