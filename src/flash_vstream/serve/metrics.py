"""The metrics at ``/metrics``, in Prometheus' text format. Depends on stream statuses, not on the service."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from flash_vstream.live.streams import StreamStatus

_SECONDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1, 2, 5, 10)
_RATES = (5, 10, 15, 20, 30, 40, 60, 100)
_COUNTERS = {
    "frames_in": ("Frames that arrived at the wanted rate", "came"),
    "frames_kept": ("Frames written to the memory", "kept"),
    "frames_skipped": ("Frames passed over for newer ones", "skipped"),
    "source_restarts": ("How often the source was reopened", "restarts"),
}
_GAUGES = {
    "lag_seconds": ("Age of the newest frame in memory", "lag"),
    "stream_seconds": ("Stream time of the newest frame", "time"),
    "encode_seconds": ("Time to encode a frame", "encode_seconds"),
    "write_seconds": ("Time to write a frame", "write_seconds"),
}


class Metrics:
    """Counts questions, and reads the streams' own figures whenever ``/metrics`` is called.

    ``statuses`` returns every stream's status; ``restarts`` returns how often each worker was restarted.
    """

    def __init__(self, statuses: Callable[[], list[StreamStatus]], restarts: Callable[[], Mapping[str, int]]):
        self._registry = CollectorRegistry()
        self._questions = Counter(
            "flash_vstream_questions", "Questions by outcome", ["outcome"], registry=self._registry
        )
        self._first = Histogram(
            "flash_vstream_first_token_seconds",
            "From a question to the first token of its answer",
            ["prefix"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self._speed = Histogram(
            "flash_vstream_tokens_per_second", "After the first token", buckets=_RATES, registry=self._registry
        )
        self._registry.register(_Streams(statuses, restarts))

    def gauge(self, name: str, what: str, value: Callable[[], float]) -> None:
        """Add a gauge whose ``value`` is read whenever ``/metrics`` is called."""
        Gauge(f"flash_vstream_{name}", what, registry=self._registry).set_function(value)

    def answered(self, details: Mapping[str, Any], error: str | None) -> None:
        """Count a finished question: an answer with its ``details``, or an ``error``."""
        self._questions.labels("failed" if error else "answered").inc()
        if error is None:
            self._first.labels("warm" if details["warm"] else "cold").observe(details["first_token_seconds"])
            if details["tokens_per_second"]:
                self._speed.observe(details["tokens_per_second"])

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _Streams(Collector):
    def __init__(self, statuses: Callable[[], list[StreamStatus]], restarts: Callable[[], Mapping[str, int]]):
        self._statuses, self._restarts = statuses, restarts

    def collect(self) -> Iterator[Metric]:
        statuses = self._statuses()
        for name, (what, field) in _COUNTERS.items():
            yield _family(CounterMetricFamily, name, what, ((s.name, getattr(s, field)) for s in statuses))
        for name, (what, field) in _GAUGES.items():
            rows = ((s.name, getattr(s, field)) for s in statuses if getattr(s, field) is not None)
            yield _family(GaugeMetricFamily, name, what, rows)
        workers = CounterMetricFamily("flash_vstream_worker_restarts", "Worker restarts", labels=["worker"])
        for worker, count in self._restarts().items():
            workers.add_metric([worker], count)
        yield workers


def _family(kind: Any, name: str, what: str, rows: Iterable[tuple[str, float]]) -> Metric:
    family = kind(f"flash_vstream_{name}", what, labels=["stream"])
    for stream, value in rows:
        family.add_metric([stream], value)
    metric: Metric = family
    return metric
