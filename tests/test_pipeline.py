"""The Python API on real files, with the tiny model."""

import numpy as np
import pytest
import torch

from flash_vstream import FlashVStream
from flash_vstream.video import Frame
from helpers.videos import write_video


@pytest.fixture(scope="module")
def pipeline(tiny):
    return FlashVStream(*tiny)


def test_watching_a_file_equals_writing_its_frames(pipeline, tmp_path):
    video = write_video(tmp_path / "clip.mp4", size=(32, 32))
    seen = []
    stream = pipeline.watch(video, fps=2, on_frame=lambda _, frame: seen.append(frame))
    assert [frame.time for frame in seen] == pytest.approx([0, 0.5, 1, 1.5, 2, 2.5])
    other = pipeline.new_stream()
    other.write([frame.image for frame in seen], [frame.time for frame in seen])
    torch.testing.assert_close(stream.snapshot().tokens(), other.snapshot().tokens(), rtol=1e-4, atol=1e-4)
    assert (stream.frames, stream.time) == (6, 2.5)


def test_watching_goes_on_where_it_was(pipeline, tmp_path):
    video = write_video(tmp_path / "clip.mp4")
    stream = pipeline.watch(video, until=1.0)
    assert stream.frames == 2
    pipeline.watch(video, stream=stream)
    assert stream.frames == 3
    assert torch.equal(stream.snapshot().tokens(), pipeline.watch(video).snapshot().tokens())


def test_any_iterable_of_frames_can_be_watched(pipeline):
    frames = [Frame(i * 0.5, np.full((20, 30, 3), 40 * i, np.uint8)) for i in range(4)]
    stream = pipeline.watch(iter(frames))
    assert stream.snapshot().temporal.start.tolist() == [0, 0.5, 1.0, 1.5]


def test_answers_stream_and_tell_of_their_moment(pipeline, tmp_path):
    stream = pipeline.watch(write_video(tmp_path / "clip.mp4"))
    answer = pipeline.ask(stream, "what?", max_new_tokens=5)
    text = "".join(answer)
    assert answer.text == text
    assert answer.stream_time == stream.time
    assert pipeline.ask(stream.snapshot(), "what?", max_new_tokens=5).finish().text == text


def test_a_stream_that_saw_nothing_cannot_be_asked(pipeline):
    assert pipeline.new_stream().time is None
    with pytest.raises(ValueError, match="empty"):
        pipeline.ask(pipeline.new_stream(), "what?")
