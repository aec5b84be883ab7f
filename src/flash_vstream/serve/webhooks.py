"""Alerts delivered to webhooks: signed, retried with back-off, at least once.

Requests follow the Standard Webhooks specification: ``webhook-id`` is the alert's id, the same at every try, and
``webhook-signature`` is ``v1,`` and the base64 of the HMAC-SHA256 of ``ID.TIMESTAMP.BODY`` under the target's secret.
"""

import base64
import hashlib
import hmac
import json
import logging
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from flash_vstream.errors import UserError
from flash_vstream.serve.alert_store import AlertStore, Delivery
from flash_vstream.serve.store import StoreError
from flash_vstream.video.gateway import pinned_request, tls_context
from flash_vstream.video.network import SourceRules

AT_ONCE = 4
"""How many deliveries are under way at once; of these, one for each target."""
TIMEOUT_SECONDS = 10.0
RETRY_SECONDS = (1.0, 300.0)
"""The shortest and longest delay between tries; it doubles each time, with jitter."""
MOST_TRIES = 300
"""After so many tries, about a day, a delivery is given up."""
POLL_SECONDS = 1.0
log = logging.getLogger("flash_vstream.serve")


def signature(secret: str, alert: str, timestamp: int, body: bytes) -> str:
    """The ``webhook-signature`` of a request."""
    signed = hmac.new(secret.encode(), f"{alert}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return "v1," + base64.b64encode(signed).decode()


class Webhooks:
    """Delivers what ``store`` has to deliver, under ``rules``, until closed; ``wake`` says that there is something new.

    A target that does not answer delays no other.
    """

    def __init__(self, store: AlertStore, rules: SourceRules | None):
        self._store, self._rules = store, rules
        self.delivered = self.failed = self.given_up = 0
        self._due: dict[tuple[int, str], float] = {}  # when (monotonic seconds) a delivery is tried again
        self._busy: set[str] = set()  # the targets that are being called
        self._lock = threading.Lock()
        self._stopping, self._news = threading.Event(), threading.Event()
        self._client = httpx.Client(
            timeout=TIMEOUT_SECONDS, trust_env=rules is None, verify=tls_context(), follow_redirects=False
        )
        self._pool = ThreadPoolExecutor(AT_ONCE, "webhook")
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """Look for deliveries now."""
        self._news.set()

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._news.wait(POLL_SECONDS)
            self._news.clear()
            try:
                self._start_due()
            except Exception as error:  # this thread must survive, and the next try may succeed
                if not self._stopping.is_set():
                    log.error("webhooks cannot be delivered", extra={"reason": str(error)})

    def _start_due(self) -> None:
        now = time.monotonic()
        with self._lock:
            waiting = [key for key, due in self._due.items() if due > now]
        for delivery in self._store.deliveries(skip=waiting):
            url = delivery.target["url"]
            with self._lock:
                if self._stopping.is_set() or url in self._busy or len(self._busy) >= AT_ONCE:
                    continue
                self._busy.add(url)
            self._pool.submit(self._deliver, delivery)

    def _deliver(self, delivery: Delivery) -> None:
        key = delivery.alert.number, delivery.target["url"]
        reason = self._try(delivery)
        give_up = reason is not None and delivery.tries + 1 >= MOST_TRIES
        with self._lock:
            self.delivered += reason is None
            self.failed += reason is not None
            self.given_up += give_up
            self._due.pop(key, None)
            if reason is not None and not give_up:
                first, longest = RETRY_SECONDS
                wait = min(longest, first * 2.0 ** min(delivery.tries, 20)) * random.uniform(0.7, 1.0)
                self._due[key] = time.monotonic() + wait
        if reason is not None:
            log.warning("a webhook was not delivered", extra={"alert": delivery.alert.id, "reason": reason})
        try:
            self._store.tried(delivery, done=reason is None or give_up)
        except (StoreError, ValueError) as error:  # delivered again later: at least once
            log.error("a delivery cannot be noted", extra={"alert": delivery.alert.id, "reason": str(error)})
            with self._lock:
                self._due.setdefault(key, time.monotonic() + RETRY_SECONDS[0])
        with self._lock:
            self._busy.discard(key[1])
        self._news.set()

    def _try(self, delivery: Delivery) -> str | None:
        """Call a target; None if it acknowledged the alert, else the reason why not."""
        try:
            response = self._client.send(self._request(delivery), stream=True)
            response.close()
        except UserError as error:
            return str(error)
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            return f"{type(error).__name__}: {error}"[:200]
        return None if response.is_success else f"HTTP {response.status_code}"

    def _request(self, delivery: Delivery) -> httpx.Request:
        payload: dict[str, Any] = {"type": "alert", "data": delivery.alert.to_dict()}
        if delivery.picture is not None:
            payload["data"]["picture"] = "data:image/jpeg;base64," + base64.b64encode(delivery.picture).decode()
        body, timestamp = json.dumps(payload).encode(), int(time.time())
        headers = {"content-type": "application/json", "webhook-id": delivery.alert.id}
        headers["webhook-timestamp"] = str(timestamp)
        if secret := delivery.target.get("secret"):
            headers["webhook-signature"] = signature(secret, delivery.alert.id, timestamp, body)
        return pinned_request(delivery.target["url"], self._rules, headers, "POST", body)

    def close(self) -> None:
        """Stop delivering; what is not acknowledged stays in the store. Safe to call twice."""
        self._stopping.set()
        self._news.set()
        self._thread.join(timeout=5)
        self._pool.shutdown(wait=True, cancel_futures=True)
        with suppress(RuntimeError):
            self._client.close()
