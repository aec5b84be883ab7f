"""``bench load``: streams and questions for a running server, of whatever engine, and what became of them."""

import statistics
import time
from collections import Counter
from contextlib import suppress
from typing import Any

import anyio
import httpx
from rich.console import Console

from flash_vstream.errors import UserError
from flash_vstream.sample_clips import CLIPS
from flash_vstream.wheels import fetch

QUESTION = "What is happening now?"
PREFIX = "load-"
POLL_SECONDS = 0.5
START_SECONDS = 300.0
"""How long the streams may take to show their first frames."""


def run_load(server: str, streams: int, fps: float, rate: float, seconds: float, token: str | None) -> dict[str, Any]:
    """Create ``streams`` streams of looped clips, ask ``rate`` questions a second for ``seconds``, and delete them.

    The clips are files of this machine, so every machine that watches must have them at the same place. Raises
    ``UserError`` if the server does not do as it is told.
    """
    headers = {"authorization": f"Bearer {token}"} if token else {}
    try:
        return anyio.run(_Load(server.rstrip("/"), headers, streams, fps).run, rate, seconds)
    except httpx.HTTPError as error:
        raise UserError(f"the server at {server} does not answer ({error or type(error).__name__})") from None


class _Load:
    def __init__(self, server: str, headers: dict[str, str], streams: int, fps: float):
        # Callers are many and patient: nothing here may limit how many questions are under way.
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(base_url=f"{server}/v1", headers=headers, timeout=180, limits=limits)
        self.streams = streams
        self.names: list[str] = []  # of the streams that were created here
        self.fps = fps
        self.outcomes: Counter[str] = Counter()
        self.firsts: list[float] = []
        self.wholes: list[float] = []
        self.lags: list[float] = []

    async def run(self, rate: float, seconds: float) -> dict[str, Any]:
        async with self.client:
            try:
                await self._begin()
                before = await self._statuses()
                started = time.monotonic()
                async with anyio.create_task_group() as under_way:
                    under_way.start_soon(self._ask_often, rate, seconds)
                    under_way.start_soon(self._look_often, seconds)
                took = time.monotonic() - started
                return self._result(before, await self._statuses(), took)
            finally:
                for name in self.names:
                    await self.client.delete(f"/streams/{name}")

    async def _begin(self) -> None:
        clips = fetch(list(CLIPS))
        for number in range(self.streams):
            name = f"{PREFIX}{number}"
            source = {"source": str(clips[number % len(clips)]), "fps": self.fps, "loop": True}
            response = await self.client.post("/streams", json={"name": name, **source})
            if response.is_error:
                raise UserError(
                    f"the server refuses stream {name} (status {response.status_code}: {response.text[:300]})"
                )
            self.names.append(name)
        deadline = time.monotonic() + START_SECONDS
        while waiting := [each for each in (await self._statuses()).values() if each["time"] is None]:
            if failed := [each for each in waiting if each["state"] == "failed"]:
                raise UserError(f"the server cannot watch stream {failed[0]['name']}: {failed[0]['error']}")
            if time.monotonic() > deadline:
                raise UserError(f"not every stream has shown a frame after {START_SECONDS:.0f} s")
            await anyio.sleep(POLL_SECONDS)

    async def _statuses(self) -> dict[str, dict[str, Any]]:
        found = (await self.client.get("/streams")).json()
        return {status["name"]: status for status in found if status["name"] in self.names}

    async def _ask_often(self, rate: float, seconds: float) -> None:
        """Ask at a fixed rate, however long answers take: callers do not wait for one another."""
        count = int(rate * seconds)
        with Console(stderr=True).status(f"{len(self.names)} streams, {count} questions"):
            async with anyio.create_task_group() as asking:
                started = time.monotonic()
                for number in range(count):
                    await anyio.sleep(max(0.0, started + number / rate - time.monotonic()))
                    asking.start_soon(self._ask, self.names[number % len(self.names)])

    async def _ask(self, name: str) -> None:
        try:
            await self._answered(name)
        except httpx.HTTPError as error:  # one lost connection must not end the others
            self.outcomes[f"lost ({type(error).__name__})"] += 1

    async def _answered(self, name: str) -> None:
        started = time.monotonic()
        body = {"question": QUESTION, "max_new_tokens": 40, "stream": True}
        async with self.client.stream("POST", f"/streams/{name}/questions", json=body) as response:
            if response.is_error:
                self.outcomes[f"status {response.status_code}"] += 1
                return
            first, last = None, "no end"
            async for line in response.aiter_lines():
                if line.startswith("event:"):
                    last = line.removeprefix("event:").strip()
                    first = first or time.monotonic() - started
        self.outcomes[last] += 1
        if last == "done":
            self.firsts.append(first or 0.0)
            self.wholes.append(time.monotonic() - started)

    async def _look_often(self, seconds: float) -> None:
        started = time.monotonic()
        while time.monotonic() - started < seconds:
            with suppress(httpx.HTTPError):
                self.lags += [each["lag"] for each in (await self._statuses()).values() if each["lag"] is not None]
            await anyio.sleep(POLL_SECONDS)

    def _result(self, before: dict[str, Any], after: dict[str, Any], seconds: float) -> dict[str, Any]:
        kept = [after[name]["kept"] - before[name]["kept"] for name in self.names]
        return {
            "streams": len(self.names),
            "seconds": round(seconds, 1),
            "frames_per_second": round(sum(kept) / seconds, 2),
            "slowest_stream_frames_per_second": round(min(kept) / seconds, 2),
            "frames_skipped": sum(after[name]["skipped"] - before[name]["skipped"] for name in self.names),
            "lag_seconds": _quantiles(self.lags),
            "questions": dict(self.outcomes),
            "first_token_seconds": _quantiles(self.firsts),
            "answer_seconds": _quantiles(self.wholes),
        }


def _quantiles(values: list[float]) -> dict[str, float] | None:
    """Median and 95th percentile; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    return {"median": round(statistics.median(values), 3), "p95": round(ordered[int(0.95 * (len(ordered) - 1))], 3)}
