"""Alerts delivered to webhooks: signed, retried with back-off, at least once.

Requests follow the Standard Webhooks specification: ``webhook-id`` is the alert's id, the same at every try, and
``webhook-signature`` is ``v1,`` and the base64 of the HMAC-SHA256 of ``ID.TIMESTAMP.BODY`` under the target's secret.
"""

import asyncio
import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from contextlib import suppress
from typing import Any

import anyio
import anyio.to_thread
import httpx
from anyio.abc import TaskGroup

from flash_vstream.backoff import backoff_seconds
from flash_vstream.errors import UserError
from flash_vstream.serve.alert_store import AlertStore, Delivery
from flash_vstream.video.gateway import pinned_request, tls_context
from flash_vstream.video.network import SourceRules
from flash_vstream.video.pictures import data_url

AT_ONCE = 4
"""How many deliveries are under way at once; of these, one for each target."""
TIMEOUT_SECONDS = 10.0
"""How long a call may take, from looking up the host to the answer's head."""
RETRY_SECONDS = (1.0, 300.0)
"""The shortest and longest delay between tries; it doubles each time, with jitter."""
MOST_TRIES = 300
"""After so many tries, about a day, a delivery is given up."""
POLL_SECONDS = 1.0
CLOSE_SECONDS = 5.0
"""How long closing waits at most, for a lookup that does not end."""
log = logging.getLogger("flash_vstream.serve")


def signature(secret: str, alert: str, timestamp: int, body: bytes) -> str:
    """The ``webhook-signature`` of a request."""
    signed = hmac.new(secret.encode(), f"{alert}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()


class Webhooks:
    """Delivers what ``store`` has to deliver, under ``rules``, until closed; ``wake`` says that there is something new.

    A target that does not answer delays no other. ``failed`` counts tries, ``given_up`` the alerts that targets missed.
    """

    def __init__(self, store: AlertStore, rules: SourceRules | None):
        self._store, self._rules, self._tls = store, rules, tls_context()
        self.failed = self.given_up = 0
        self._waiting: dict[tuple[int, str], float] = {}  # when (monotonic seconds) a delivery is tried again
        self._called: dict[str, float] = {}  # when a target was called last
        self._busy: set[str] = set()  # the targets that are being called
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="webhooks", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for deliveries now."""
        if self._loop is not None:
            with suppress(RuntimeError):  # it has ended
                self._loop.call_soon_threadsafe(self._news.set)

    async def _run(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with anyio.create_task_group() as calls:
            while not self._is_closed:
                self._news.clear()
                try:
                    self._start_due(calls)
                except Exception as error:  # this thread must survive, and the next try may succeed
                    log.error("webhooks cannot be delivered", extra={"reason": str(error)})
                with anyio.move_on_after(POLL_SECONDS):
                    await self._news.wait()
            calls.cancel_scope.cancel()

    def _start_due(self, calls: TaskGroup) -> None:
        now = time.monotonic()
        self._waiting = {key: due for key, due in self._waiting.items() if due > now}
        due = self._store.next_deliveries(self._waiting, self._busy)
        due.sort(key=lambda own: self._called.get(own.target["url"], 0.0))  # targets that hang must not always be first
        for delivery in due[: AT_ONCE - len(self._busy)]:
            url = delivery.target["url"]
            self._busy.add(url)
            self._called[url] = now
            calls.start_soon(self._deliver, delivery)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            self._note(delivery, await self._try(delivery))
        finally:
            self._busy.discard(delivery.target["url"])
            self._news.set()

    def _note(self, delivery: Delivery, reason: str | None) -> None:
        """Note the outcome of a try: why it failed, or None."""
        give_up = reason is not None and delivery.tries + 1 >= MOST_TRIES
        if reason is not None:
            self.failed += 1
            self.given_up += give_up
            self._wait(delivery, backoff_seconds(delivery.tries + 1, *RETRY_SECONDS))
            log.warning("a webhook was not delivered", extra={"alert": delivery.alert.id, "reason": reason})
        try:
            self._store.tried(delivery, done=reason is None or give_up)
        except Exception as error:  # delivered again later: at least once
            log.error("a delivery cannot be noted", extra={"alert": delivery.alert.id, "reason": str(error)})
            self._wait(delivery, RETRY_SECONDS[0])

    def _wait(self, delivery: Delivery, seconds: float) -> None:
        """Try a delivery again after so many seconds."""
        self._waiting[delivery.alert.number, delivery.target["url"]] = time.monotonic() + seconds

    async def _try(self, delivery: Delivery) -> str | None:
        """Call a target; None if it acknowledged the alert, else the reason why not."""
        try:
            with anyio.fail_after(TIMEOUT_SECONDS):
                status = await self._call(delivery)
        except TimeoutError:
            return f"it did not answer within {TIMEOUT_SECONDS:.0f} s"
        except UserError as error:
            return str(error)
        except Exception as error:  # whatever it is, the next try may succeed
            return f"{type(error).__name__}: {error}"[:200]
        return None if 200 <= status < 300 else f"HTTP {status}"

    async def _call(self, delivery: Delivery) -> int:
        """Send a delivery; returns the HTTP status."""
        # In a thread, since a name server may not respond.
        request = await anyio.to_thread.run_sync(self._request, delivery, abandon_on_cancel=True)
        async with httpx.AsyncClient(timeout=None, trust_env=self._rules is None, verify=self._tls) as client:
            response = await client.send(request, stream=True)
            await response.aclose()
        return response.status_code

    def _request(self, delivery: Delivery) -> httpx.Request:
        payload: dict[str, Any] = {"type": "alert", "data": delivery.alert.to_dict()}
        if delivery.picture is not None:
            payload["data"]["picture"] = data_url(delivery.picture)
        body, timestamp = json.dumps(payload).encode(), int(time.time())
        headers = {"content-type": "application/json", "webhook-id": delivery.alert.id}
        headers["webhook-timestamp"] = str(timestamp)
        if secret := delivery.target.get("secret"):
            headers["webhook-signature"] = signature(secret, delivery.alert.id, timestamp, body)
        return pinned_request(delivery.target["url"], self._rules, headers, "POST", body)

    def close(self) -> None:
        """Stop delivering; what is not acknowledged stays in the store. Safe to call twice."""
        self._is_closed = True
        self.wake()
        self._thread.join(CLOSE_SECONDS)
