"""Spares the decoder what no picked frame needs.

A camera sends 25 frames a second and, every second or two, a key frame, from which decoding can begin. Only one frame a
second is picked. Decoding the others serves nothing but the frames that refer to them, and in 1080p it costs several
times as much as everything else that is done with a stream.
"""

import math
from collections.abc import Callable, Iterator
from typing import Protocol, TypeAlias

import av
from av.video.frame import PictureType

Packet: TypeAlias = "av.Packet[av.VideoStream]"
TRUSTED_KEY_FRAMES = 2
"""Packets are dropped only once so many key frames have turned out to be whole pictures."""


class Window(Protocol):
    """When the next frame is picked, in seconds: from ``earliest`` on; ``latest`` is how long a key frame may take."""

    @property
    def earliest(self) -> float: ...
    @property
    def latest(self) -> float: ...


class PacketGate:
    """Holds packets back while the next picked frame is expected to be a key frame, and drops them when it comes.

    If it does not come in time, they are delivered after all. So the frames picked are those without a gate, except
    that a key frame before ``latest`` is preferred, and that frames which show before a key frame but refer to earlier
    ones (an open group of pictures) are left out. ``time_of`` is a packet's time on the clock of ``window``, None if
    unknown, ``step`` the time between two frames; ``restart`` is called before a key frame that follows dropped
    packets.

    Some encoders never send whole pictures but refresh them bit by bit, and mark where that begins as a key frame.
    Key frames are therefore checked as they are decoded, and nothing is dropped from a stream with a false one.
    """

    def __init__(
        self, window: Window, time_of: Callable[[Packet], float | None], step: float, restart: Callable[[], object]
    ):
        self._window, self._time_of, self._step, self._restart = window, time_of, step, restart
        self._held: list[Packet] = []
        self._newest_passed = -math.inf
        self._key_times: tuple[float, float] | None = None  # of the newest two
        self._key_frames: set[int] = set()  # time stamps of key frames that are being decoded
        self._passed_over: set[int] = set()  # and of frames that are decoded only because later ones refer to them
        self._restarted_at = -math.inf  # the time stamp of the key frame after dropped packets, until it shows
        self._trusted, self._is_deceived = 0, False

    def passed(self, packets: Iterator[Packet]) -> Iterator[Packet]:
        """The packets to decode, in order."""
        for packet in packets:
            time = self._time_of(packet) if packet.size and packet.pts is not None else None
            if time is not None and packet.is_keyframe:
                self._meet_key_frame(packet, time)
            self._held.append(packet)
            if time is not None and self._may_wait(time, packet.is_keyframe):
                continue
            if time is not None:
                self._newest_passed = max(self._newest_passed, time)
            held, self._held = self._held, []
            self._key_frames |= {own.pts for own in held if own.is_keyframe and own.pts is not None}
            self._passed_over |= {own.pts for own in held[:-1] if own.pts is not None}
            yield from held

    def accepts(self, frame: av.VideoFrame) -> bool:
        """Whether a decoded frame is whole, and not an old one that was held back; the gate must see every frame."""
        if frame.pts is None:
            return True
        if frame.pts in self._key_frames:
            self._key_frames.discard(frame.pts)
            self._trusted += 1
            self._is_deceived |= frame.pict_type != PictureType.I
        if frame.pts in self._passed_over:
            self._passed_over.discard(frame.pts)
            return False
        if frame.pts < self._restarted_at:
            return False
        self._restarted_at = -math.inf  # from here on time stamps may run backwards, as those of cameras do
        return True

    def forget(self) -> None:
        """Forget where in the recording it is: another place was sought."""
        self._drop()
        self._newest_passed, self._key_times, self._restarted_at = -math.inf, None, -math.inf

    def _drop(self) -> None:
        """Drop what is held, and what is still in the decoder."""
        self._held = []
        self._key_frames.clear()
        self._passed_over.clear()

    @property
    def _can_drop(self) -> bool:
        return self._trusted >= TRUSTED_KEY_FRAMES and not self._is_deceived

    def _meet_key_frame(self, packet: Packet, time: float) -> None:
        self._restarted_at = -math.inf
        if self._held and self._can_drop:
            self._drop()
            self._restart()
            assert packet.pts is not None
            self._restarted_at = packet.pts
        self._key_times = (self._key_times or (time, time))[1], time

    def _may_wait(self, time: float, is_key_frame: bool) -> bool:
        earliest, latest = self._window.earliest, self._window.latest
        if not self._can_drop or self._key_times is None or self._newest_passed >= earliest:
            return False
        before, newest = self._key_times
        expected = 2 * newest - before
        if not newest < expected < latest + self._step:
            return False
        return time < earliest or (time < expected - self._step / 2 and not is_key_frame and earliest < latest)
