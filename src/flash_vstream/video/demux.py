"""Decodes an opened recording into timed pictures: handles jumping clocks, seeking and truncated recordings.

Files, picture sizes and frame rates are handled in reader.py.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain
from typing import cast

import av
from av.error import FFmpegError
from av.format import Flags

from flash_vstream.video.packet_gate import Packet, PacketGate, Window

MAX_BROKEN_PACKETS = 300
"""After this many consecutive packets that do not decode, a recording counts as broken from there on."""
JUMP_SECONDS = 10.0
"""Where the clock may restart, a larger step counts as a jump, not a pause; the ffmpeg command's own threshold."""
MAX_HELD_BYTES = 64 * 2**20
"""The most bytes of packets to hold while looking for the key frame before a position."""


def clock_may_jump(container: av.container.InputContainer) -> bool:
    """Whether the format's clock may restart within a recording, as in MPEG-TS and HLS."""
    return bool(container.format.flags & cast(int, Flags.ts_discont.value))


class BrokenOffError(Exception):
    """A recording ended before its declared length; ``final`` if reopening it cannot help."""

    def __init__(self, message: str, final: bool):
        super().__init__(message)
        self.final = final


class Playback:
    """One pass over an opened recording; ``stream`` is the video stream in ``container``.

    ``beat`` is called for every packet read, so that a supervisor can tell work from a hang. ``error`` is why reading
    or decoding broke off, None unless it did.
    """

    def __init__(
        self,
        container: av.container.InputContainer,
        stream: av.VideoStream,
        beat: Callable[[], None] = lambda: None,
    ):
        self.container = container
        self.stream = stream
        self.error: str | None = None
        self._beat = beat
        self._step = float(1 / stream.average_rate) if stream.average_rate else 1 / 25
        self._clock_may_jump = clock_may_jump(container)
        self._shift = 0  # added to every time stamp, in the stream's time base
        self._last_dts: int | None = None
        self._end = 0.0  # the latest end of any packet, in seconds of the container's clock
        self._held: deque[Packet] = deque()  # packets already read, to be delivered again
        self._origin: Fraction | None = None  # the time stamp of stream time 0, in seconds
        self._gate: PacketGate | None = None

    def decode_for(self, window: Window, clock: Callable[[], float | None] | None = None) -> None:
        """From now on, decode only what frames picked in ``window`` need (see ``PacketGate``).

        Its times are those of the recording, or of ``clock`` when packets arrive.
        """
        time_of = self._time_of if clock is None else lambda _: clock()
        self._gate = PacketGate(window, time_of, self._step, self.stream.codec_context.flush_buffers)

    def _time_of(self, packet: Packet) -> float | None:
        if self._origin is None or packet.pts is None or packet.time_base is None:
            return None
        return float(packet.pts * packet.time_base - self._origin)

    def timed(self, begin: float = 0.0) -> Iterator[tuple[float, av.VideoFrame]]:
        """Yield decoded frames with times that never decrease, from 0 at the recording's first frame.

        Frames well before ``begin`` may be omitted; this does not change the times of the others.
        """
        packets = self._packets()
        frames = self.decoded(packets)
        head = next(frames, None)
        if head is None:
            return
        if head.pts is not None and head.time_base is not None:
            self._origin = head.pts * head.time_base
        frames = chain([head], frames)
        if begin > 0 and self._origin is not None:
            frames = self._from_key_frame(frames, packets, float(self._origin) + begin)
        last = -math.inf
        for frame in frames:
            moment = 0.0 if last == -math.inf else last + self._step
            if frame.pts is not None and frame.time_base is not None:
                stamped = frame.pts * frame.time_base
                if self._origin is None:
                    self._origin = stamped - Fraction(moment).limit_denominator(10**6)
                if float(stamped - self._origin) > last:
                    moment = max(float(stamped - self._origin), 0.0)
            last = moment
            yield moment, frame

    def check_end(self) -> None:
        """Raise ``BrokenOffError`` if the recording ended before its declared length."""
        declared = (self.container.duration or 0) / av.time_base
        reached = self._end - (self.container.start_time or 0) / av.time_base
        if self.error is None and not self._clock_may_jump and reached < declared - max(2.0, 0.05 * declared):
            raise BrokenOffError(f"broke off at {reached:.1f} s of {declared:.1f} s", final=True)
        # FFmpeg reports an error when a server closes without having declared a length, although everything arrived.
        if self.error is not None and (not declared or reached < declared - 0.5 or self._clock_may_jump):
            of = f" of {declared:.1f} s" if declared > reached else ""
            raise BrokenOffError(f"broke off at {max(reached, 0.0):.1f} s{of} ({self.error})", final=False)

    def decoded(
        self, packets: Iterator[Packet] | None = None, patience_seconds: float = 0.0
    ) -> Iterator[av.VideoFrame]:
        """Yield the frames that decode, skipping packets that do not, up to a limit.

        The limit is ``MAX_BROKEN_PACKETS`` in a row over at least ``patience_seconds``: some cameras send a key frame
        only twice a minute, and nothing decodes before it.
        """
        broken, broken_since = 0, 0.0
        packets = packets if packets is not None else self._packets()
        for packet in self._gate.passed(packets) if self._gate is not None else packets:
            try:
                frames = packet.decode()
            except (FFmpegError, ValueError):
                broken_since = time.monotonic() if not broken else broken_since
                broken += 1
                if broken >= MAX_BROKEN_PACKETS and time.monotonic() - broken_since >= patience_seconds:
                    self.error = "nothing more of it decodes"
                    return
                continue
            for frame in frames:
                broken = 0
                is_whole = self._gate is None or self._gate.accepts(frame)
                if is_whole and frame.width and frame.height:
                    yield frame

    def _packets(self) -> Iterator[Packet]:
        """Yield the video's packets until the container ends; a clock that restarts is shifted to continue."""
        packets = cast(Iterator[Packet], self.container.demux())
        while True:
            if self._held:
                yield self._held.popleft()
                continue
            try:
                packet = next(packets)
            except StopIteration:
                return
            except (FFmpegError, ValueError, OSError) as error:
                self.error = (getattr(error, "strerror", None) or type(error).__name__).lower()
                return
            if packet.pts is not None and packet.time_base:
                self._end = max(self._end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream.index != self.stream.index:
                continue
            self._beat()
            if self._clock_may_jump and packet.dts is not None and packet.time_base:
                self._smooth(packet)
            yield packet

    def _smooth(self, packet: Packet) -> None:
        """Shift the packet's time stamps so that its clock continues from the last packet's."""
        assert packet.dts is not None
        step = round(self._step / packet.time_base)
        dts = packet.dts + self._shift
        if self._last_dts is not None:
            seconds = float((dts - self._last_dts - step) * packet.time_base)
            if seconds > JUMP_SECONDS or (seconds < -0.1 and dts <= self._last_dts):
                self._shift += self._last_dts + step - dts
                dts = self._last_dts + step
        self._last_dts = dts
        packet.dts = dts
        if packet.pts is not None:
            packet.pts += self._shift

    def _from_key_frame(
        self, frames: Iterator[av.VideoFrame], packets: Iterator[Packet], target: float
    ) -> Iterator[av.VideoFrame]:
        """Frames from the key frame at or before ``target``, in seconds of the video's clock.

        Seeks by the container's index. Where clocks may jump that does not work, so packets are skipped without being
        decoded. Falls back to reading from the start.
        """
        if self._gate is not None:
            self._gate.forget()
        if self._clock_may_jump:
            self._skip(packets, target)
            return frames
        assert self.stream.time_base is not None
        try:
            self.container.seek(int(target / self.stream.time_base), stream=self.stream, backward=True)
        except (FFmpegError, OSError, ValueError):
            return frames
        resumed = self.decoded()
        head = next(resumed, None)
        if head is not None and head.pts is not None and head.time_base and head.pts * head.time_base <= target + 1e-6:
            return chain([head], resumed)
        try:
            self.container.seek(0, stream=self.stream, backward=True)
        except (FFmpegError, OSError, ValueError):
            return iter(())
        self.error = None
        return self.decoded()

    def _skip(self, packets: Iterator[Packet], target: float) -> None:
        """Skip packets up to the last key frame at or before ``target``, if there is another one."""
        held: list[Packet] = []
        found, size = False, 0
        for packet in packets:
            moment = float(packet.pts * packet.time_base) if packet.pts is not None and packet.time_base else math.inf
            if packet.is_keyframe and moment <= target:
                held, size, found = [], 0, True
            held.append(packet)
            size += packet.size
            if moment > target or size > MAX_HELD_BYTES:
                break
        if found:
            self.stream.codec_context.flush_buffers()
        self._held.extend(held)
