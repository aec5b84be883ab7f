"""Request and response bodies, as described in the OpenAPI document."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, model_validator

from flash_vstream.models.prompt_limit import MAX_NEW_TOKENS

NAME = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
MOST_QUESTION = 4000


def plain_text(text: str) -> str:
    """Return ``text`` unchanged; raises ``ValueError`` if it has a NUL character or cannot be encoded."""
    if "\0" in text:
        raise ValueError("a NUL character cannot be part of text")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("half of a surrogate pair cannot be part of text")
    return text


Name = Annotated[str, StringConstraints(pattern=NAME)]
Text = Annotated[
    str, StringConstraints(min_length=1, max_length=MOST_QUESTION, pattern=r"\S"), AfterValidator(plain_text)
]
Fps = Annotated[float, Field(gt=0, le=120, description="Frames watched per second of stream time.")]


class ErrorDetail(BaseModel):
    """Why a request was refused."""

    message: str
    type: str
    code: int


class ErrorBody(BaseModel):
    """The format of every error."""

    error: ErrorDetail


class NewStream(BaseModel):
    """A stream to watch. ``source`` is a file, a URL, a camera, a folder, or ``push`` for frames sent to it."""

    model_config = ConfigDict(extra="forbid")
    name: Name
    source: Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(plain_text)]
    fps: Fps = 1.0
    loop: bool = Field(False, description="Restart a file at its end.")
    pace: Literal["real", "fast"] = Field(
        "real", description="Play a file at its own pace, or as fast as it can be read."
    )
    transport: Literal["tcp", "udp"] = Field("tcp", description="RTSP's transport.")
    record: bool = Field(True, description="Keep its frames, on a server that records streams (--record).")


class StreamEdit(BaseModel):
    """Changes to a stream, which keeps its memory and history."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})
    name: Name | None = None
    fps: Fps | None = None
    record: bool | None = None

    @model_validator(mode="after")
    def _something(self) -> "StreamEdit":
        if self.name is None and self.fps is None and self.record is None:
            raise ValueError("name, fps or record must be given")
        return self


class Health(BaseModel):
    """The server's health.

    ``status`` is ``restarting`` while a worker is restarting, and ``degraded`` while there are other ``problems``.
    """

    status: Literal["ok", "restarting", "degraded"]
    problems: list[str]
    workers: dict[str, dict[str, Any]]
    uptime_seconds: float


class StreamInfo(BaseModel):
    """A stream's status; times are in seconds of stream time, ``lag`` in seconds of wall-clock time.

    ``recorded`` is whether its frames are kept on disk.
    """

    name: str
    source: str
    state: Literal["starting", "live", "reconnecting", "ended", "failed"]
    fps: float
    error: str | None
    note: str | None
    time: float | None
    came: int
    kept: int
    skipped: int
    restarts: int
    lag: float | None
    encode_seconds: float | None
    write_seconds: float | None
    gaps: list[tuple[float, float]]
    recorded: bool


class NewQuestion(BaseModel):
    """A question about the current state of a stream."""

    model_config = ConfigDict(extra="forbid")
    question: Text
    max_new_tokens: int = Field(MAX_NEW_TOKENS, ge=1, le=512)
    stream: bool = Field(False, description="Send the answer as server-sent events while it is generated.")


class Slot(BaseModel):
    """A slot of the memory: the times of its frames, how many there are, and one of them as a picture."""

    part: Literal["abstract", "temporal", "retrieved", "spatial"]
    start: float
    end: float
    mean: float
    exemplar: float
    weight: float
    thumbnail: str | None = Field(description="The exemplar frame as a data URL.")


class PartCapacity(BaseModel):
    """How many slots a part of the memory has when full, and how many tokens each slot has."""

    slots: int
    tokens: int


class Capacity(BaseModel):
    """The size of a stream's memory, which is constant."""

    bytes: int
    parts: dict[str, PartCapacity]
    longterm: PartCapacity


class Memory(BaseModel):
    """The contents of a stream's memory at ``time``."""

    time: float | None
    frames: int
    capacity: Capacity
    slots: list[Slot]
    longterm: list[float] = Field(description="The times of the frames in long-term memory, for questions to recall.")


class AnswerBody(BaseModel):
    """An answer, its stream time, and its evidence."""

    model_config = ConfigDict(extra="allow")
    id: int
    question: str
    text: str
    stream_time: float | None
    evidence: list[dict[str, Any]]
    mentions: list[dict[str, Any]] = Field(description="Events named in the question, and when they were seen.")
    first_token_seconds: float
    tokens_per_second: float | None
    warm: bool


class HistoryEntry(BaseModel):
    """A question and its outcome; ``asked`` is the Unix time of the question."""

    id: int
    asked: float
    question: str
    answer: str | None
    stream_time: float | None
    error: str | None
    details: dict[str, Any]


When = Literal["starts", "ends", "every", "lasts"]
Seconds = Annotated[float, Field(ge=0, le=86400, allow_inf_nan=False)]
Threshold = Annotated[float, Field(gt=0, lt=1)]


class Target(BaseModel):
    """Where alerts go: a webhook (http, https) with the secret that it is signed with, or an MQTT broker.

    A broker is ``mqtt[s]://[USER[:PASSWORD]@]HOST[:PORT][/PREFIX]``; ``PREFIX`` begins its topics.
    """

    model_config = ConfigDict(extra="forbid")
    url: Annotated[str, StringConstraints(min_length=1, max_length=2000), AfterValidator(plain_text)]
    secret: Annotated[str, StringConstraints(max_length=200), AfterValidator(plain_text)] | None = None


Targets = Annotated[list[Target], Field(max_length=8)]


class NewWatch(BaseModel):
    """An event to be told of; durations are in seconds of stream time."""

    model_config = ConfigDict(extra="forbid")
    id: Name | None = None
    event: Text = Field(description="A phrase, a sentence or a question: 'a dog', 'somebody is at the door'.")
    when: When = "starts"
    min_seconds: Seconds = Field(2.0, description="How long the event must be there.")
    cooldown_seconds: Seconds = Field(60.0, description="How long nothing is told after an alert.")
    threshold: Threshold = Field(0.5, description="The confidence from which the event is there.")
    targets: Targets = Field([], description="Webhooks and MQTT brokers.")
    paused: bool = False


class WatchEdit(BaseModel):
    """Changes to a watch."""

    model_config = ConfigDict(extra="forbid", json_schema_extra={"minProperties": 1})
    event: Text = ""
    when: When = "starts"
    min_seconds: Seconds = 0.0
    cooldown_seconds: Seconds = 0.0
    threshold: Threshold = 0.5
    targets: Targets = []
    paused: bool = False

    @model_validator(mode="after")
    def _something(self) -> "WatchEdit":
        if not self.model_fields_set:
            raise ValueError("something must be changed")
        return self


class ShownTarget(BaseModel):
    """A target without its secrets. ``error`` says why an MQTT broker is not reached."""

    url: str
    signed: bool
    error: str | None


class WatchInfo(BaseModel):
    """A watch and what it has seen.

    ``phase`` is ``away``, ``coming``, ``asking``, ``there``, ``refused`` (the language model did not agree) or
    ``paused``. ``looks`` counts the frames looked at, ``missed`` those that it came too late for, ``suppressed`` the
    events that its cooldown kept quiet. ``look_seconds`` is what a look costs, ``newest_alert`` an alert's id.
    """

    id: str
    stream: str
    event: str
    when: When
    min_seconds: float
    cooldown_seconds: float
    threshold: float
    targets: list[ShownTarget]
    paused: bool
    phase: str
    time: float | None
    confidence: float | None
    error: str | None
    look_seconds: float | None
    newest_alert: str | None
    events: int
    refused: int
    suppressed: int
    looks: int
    missed: int


class AlertInfo(BaseModel):
    """What is told of an event; its picture is at ``/v1/alerts/ID/picture``.

    ``began`` and ``time`` are in seconds of stream time, ``clock`` in Unix time. ``confidence`` is the cheap score of
    the frame, ``confirmation`` the language model's; ``evidence`` lists the times of the frames that it read. ``clip``
    is the address on this server of a video of the seconds around it, if its stream was recorded.
    """

    id: str
    watch: str
    stream: str
    event: str
    when: When
    state: Literal["start", "update", "end"]
    began: float
    time: float
    clock: float
    confidence: float
    confirmation: float | None
    sentence: str
    evidence: list[float]
    clip: str | None = None


class Caption(BaseModel):
    """What was said of a stream at ``time`` (seconds of stream time) and ``clock`` (Unix time)."""

    id: int
    stream: str
    time: float
    clock: float
    text: str
