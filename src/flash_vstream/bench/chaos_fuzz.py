"""Schemathesis over the server's OpenAPI document, for ``bench chaos``."""

import threading
import time
from pathlib import Path
from typing import Any

from flash_vstream.bench.chaos_callers import HOSTILE_SOURCES, Tally
from flash_vstream.bench.chaos_server import ANSWER_SECONDS
from flash_vstream.errors import UserError

EXAMPLES = 12
"""Requests per operation and round; rounds follow each other with new seeds."""
PAUSE_SECONDS = 0.02
"""After each request, so that other callers get their turn."""


def check_installed() -> None:
    """Raise ``UserError`` unless schemathesis is installed."""
    try:
        import hypothesis  # noqa: F401
        import schemathesis  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"bench chaos needs {error.name}, which is not installed; install it with: pip install schemathesis"
        ) from None


def fuzz(tally: Tally, seed: int, folder: Path, over: threading.Event) -> None:
    """Send generated requests, valid and invalid, for every operation, until ``over``."""
    import hypothesis.configuration
    import schemathesis
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as seeded

    hypothesis.configuration.set_hypothesis_home_dir(folder)
    while (document := tally.server.get("/openapi.json")) is None:
        if over.wait(0.5):
            return
    schema = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=tally.server.url)
    # A response without an end is left to the other callers, who hang up.
    found: Any = schema.get_all_operations()
    operations = [result.ok() for result in found]
    operations = [operation for operation in operations if not operation.path.endswith("/live")]
    rules = settings(max_examples=EXAMPLES, deadline=None, database=None, phases=[Phase.generate])
    rules = settings(rules, suppress_health_check=list(HealthCheck))
    round_number = 0

    def send(case: Any) -> None:
        if not over.is_set():
            _send(tally, case)
            over.wait(PAUSE_SECONDS)
            tally.server.wait_until_up(over)

    while not over.is_set():
        for operation in operations:
            if not over.is_set():
                test = given(case=operation.as_strategy())(send)
                seeded(1000 * seed + round_number)(rules(test))()
        round_number += 1


def _send(tally: Tally, case: Any) -> None:
    from requests.exceptions import RequestException

    if "source" in (body := case.body if isinstance(case.body, dict) else {}) and isinstance(body["source"], str):
        # Generated names must not open anything on this machine.
        choices = ("push", *HOSTILE_SOURCES)
        case.body = {**body, "source": choices[len(body["source"]) % len(choices)]}
    _name_a_stream(case)
    if str(body.get("name", "")).startswith("witness"):
        return
    started = time.monotonic()
    what = f"{case.method} {case.path}"
    try:
        response = case.call(timeout=ANSWER_SECONDS)
    except RequestException as error:
        tally.lost(f"{what} ({case.as_curl_command()[:200]})", started, error)
        return
    body = response.content[:300].decode(errors="replace")
    tally.note(response.status_code, f"{what} ({case.as_curl_command()[:300]})", body)


def _name_a_stream(case: Any) -> None:
    """Let half of the requests name a stream that there is; only callers' streams are edited and deleted."""
    parameters = case.path_parameters or {}
    if (name := parameters.get("name")) is None or "models" in case.path:
        return
    streams = ["caller0-pushed", "caller1-pushed"]
    if case.method.upper() not in ("PATCH", "DELETE"):
        streams += ["witness-file", "witness-push"]
    choice = sum(str(name).encode(errors="replace")) % (2 * len(streams))
    if choice < len(streams):
        case.path_parameters = {**parameters, "name": streams[choice]}
