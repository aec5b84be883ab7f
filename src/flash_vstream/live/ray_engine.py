"""The engine on a Ray cluster: frame workers are actors, question workers a Ray Serve deployment.

Ray places the hosts of ``hosts`` on its machines and starts them again when they or their machines die; ``remote``
gives them their streams again. They hold nothing that must live on. Frame workers belong to the server's process and
end with it, like the local engine's: nothing may go on watching a camera after its server has gone.
"""

import asyncio
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Generator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from flash_vstream.errors import UserError
from flash_vstream.live.engine import Engine, StartEngine
from flash_vstream.live.fork_server import end_fork_server
from flash_vstream.live.hosts import READ_SECONDS, About, HostAwayError, HostDiedError, QuestionHost
from flash_vstream.live.question_client import Event
from flash_vstream.live.question_worker import AT_ONCE, KEPT_STATES
from flash_vstream.live.ray_actor import HostActor
from flash_vstream.live.remote import AskHost, RemoteQuestions, RemoteStreams
from flash_vstream.models.choice import ModelChoice

log = logging.getLogger("flash_vstream.live")

try:
    import ray
    from ray import serve
    from ray.exceptions import GetTimeoutError, NodeDiedError, RayActorError, RayError, RayTaskError
    from ray.serve.exceptions import BackPressureError, RayServeException
    from ray.serve.schema import ApplicationStatus
except ImportError:
    raise UserError("--engine ray needs Ray; install flash-vstream[ray]") from None

START_SECONDS = 600.0
"""How long a worker may take to start; the first on a machine may have to fetch the model."""
LOOK_SECONDS = 0.2
READY_SECONDS, END_SECONDS = 2.0, 10.0
"""How long a worker may take to say that it is there, and to end and remove its shared memory, before it is killed."""
THREADS = 16
"""How many calls a host serves at once, most of which wait."""
ONGOING = 16
"""Questions in progress in each question worker above which Ray starts another, as far as it may."""


@dataclass(frozen=True)
class RayChoice:
    """What is placed on the cluster: ``frame_workers``, up to ``question_workers``, each with ``gpus`` and ``cpus``.

    ``spare_workers`` are frame workers that stand by for one that dies: of the cluster's cores they count as none.
    ``name`` is that of the question workers' application, one for each state folder.
    """

    name: str
    frame_workers: int = 1
    question_workers: int = 1
    spare_workers: int = 1
    gpus: float = 0.0
    cpus: float = 1.0


@dataclass(frozen=True)
class RayHost:
    """A ``HostActor`` as a ``RemoteHost``."""

    actor: Any

    def call(self, method: str, *arguments: Any, seconds: float = READ_SECONDS) -> Any:
        """See ``RemoteHost``; nothing is tried again here, since whoever calls knows what is still wanted."""
        called = self.actor.call.remote(method, *arguments)
        try:
            return ray.get(called, timeout=seconds)
        except RayTaskError as error:
            raise error.cause from None
        except GetTimeoutError as error:
            ray.cancel(called)  # otherwise calls pile up for an actor that has no place yet
            raise HostAwayError(_reason(error)) from None
        except (RayActorError, NodeDiedError) as error:
            raise HostDiedError(_reason(error)) from None
        except RayError as error:
            raise HostAwayError(_reason(error)) from None


class QuestionReplica:
    """A ``QuestionHost`` as Ray Serve calls it."""

    def __init__(self, model: ModelChoice):
        self._host = QuestionHost(model)

    @serve.multiplexed(max_num_models_per_replica=KEPT_STATES)  # type: ignore[untyped-decorator]
    async def _has_read(self, path: str) -> str:
        """Tells Ray Serve, by its means for replicas with models of their own, whose memory was read here."""
        return path

    async def ask(self, about: About | None, *question: Any) -> AsyncIterator[Event]:
        """``QuestionHost.ask``; ends when its caller leaves."""
        if about is not None:
            await self._has_read(about.path)
        loop, events, left = asyncio.get_running_loop(), asyncio.Queue[Event](), threading.Event()

        def pump() -> None:
            try:
                for event in self._host.ask(about, *question):
                    if left.is_set():
                        break
                    loop.call_soon_threadsafe(events.put_nowait, event)
            except Exception as error:  # whatever happens, there is a last event
                log.error("a question could not be asked", exc_info=error)
                loop.call_soon_threadsafe(events.put_nowait, Event("error", _reason(error)))

        threading.Thread(target=pump, name="answer", daemon=True).start()
        event = Event("text", "")
        try:
            while event.kind == "text":
                event = await events.get()
                yield event
        finally:
            left.set()

    def __del__(self) -> None:  # what Ray Serve calls to end a replica
        with suppress(AttributeError):  # it has not started
            self._host.close()
            end_fork_server()


def ray_engine(choice: RayChoice) -> StartEngine:
    """Starts the engine on the cluster that ``RAY_ADDRESS`` names, else on this machine's, else on a new one."""

    def start(model: ModelChoice) -> Engine:
        if not ray.is_initialized():
            # For a Ray that starts here: at Ray's own 15, workers get nothing beside other work.
            os.environ.setdefault("RAY_worker_niceness", "0")
            ray.init(log_to_driver=False, configure_logging=False)
        actors: list[Any] = []
        try:
            return _started(model, choice, actors)
        except BaseException as error:
            _end(choice, actors)
            if isinstance(error, RayError | RayServeException | HostAwayError):
                reason = _reason(error)
                raise UserError(f"the workers did not start on the Ray cluster ({reason})") from None
            raise

    return start


def _started(model: ModelChoice, choice: RayChoice, actors: list[Any]) -> Engine:
    """The engine; ``actors`` gets every actor as it is created."""
    room = {"num_cpus": choice.cpus, "num_gpus": choice.gpus}
    # A call to a dead actor is not repeated: it could give a stream back that was removed in the meantime.
    lasting = {"max_restarts": -1, "max_task_retries": 0, "max_concurrency": THREADS, "scheduling_strategy": "SPREAD"}

    def place(kind: str, **more: Any) -> RayHost:
        actors.append(ray.remote(HostActor).options(**{**room, **lasting, **more}).remote(kind, model))
        return RayHost(actors[-1])

    hosts = [place("FrameHost") for _ in range(choice.frame_workers)]
    replicas = serve.deployment(
        QuestionReplica,
        name="questions",
        ray_actor_options=room,
        max_ongoing_requests=AT_ONCE,
        max_queued_requests=AT_ONCE,
        autoscaling_config={
            "min_replicas": 1, "max_replicas": choice.question_workers, "target_ongoing_requests": ONGOING,
        },
        health_check_period_s=2,
        health_check_timeout_s=10,
        graceful_shutdown_wait_loop_s=0.1,  # for questions, which a server that ends does not wait for either
        graceful_shutdown_timeout_s=END_SECONDS,
    )  # fmt: skip
    serve.start(proxy_location="Disabled")
    application = serve.RunTarget(replicas.bind(model), name=choice.name, route_prefix=None)
    (handle,) = serve.run_many([application], wait_for_applications_running=False)
    streams = RemoteStreams(hosts, START_SECONDS, lambda: _end(choice, actors))
    _wait_for(choice.name)
    for _ in range(choice.spare_workers):  # last, and at no core: it must not take another worker's place
        streams.add_spare(place("FrameHost", num_cpus=0))
    return Engine(streams, RemoteQuestions(_asking(handle), lambda: place("QuestionHost"), streams.about))


def _wait_for(application: str) -> None:
    """Wait until an application runs; raises ``UserError`` if it does not."""
    deadline = time.monotonic() + START_SECONDS
    while (found := serve.status().applications[application]).status != ApplicationStatus.RUNNING:
        if found.status == ApplicationStatus.DEPLOY_FAILED or time.monotonic() > deadline:
            raise UserError(f"the question workers did not start on the Ray cluster ({found.message or found.status})")
        time.sleep(LOOK_SECONDS)


def _asking(handle: Any) -> AskHost:
    """Asks the deployment; questions about a stream go where its memory was read before, as far as there is room."""

    def ask(about: About | None, *question: Any) -> Generator[Event, None, None]:
        stream = about.path if about is not None else ""
        events = handle.options(stream=True, multiplexed_model_id=stream).ask.remote(about, *question)
        try:
            yield from events
        except BackPressureError:
            yield Event("error", "too many questions are waiting; ask again in a moment")
        except (RayError, RayServeException) as error:
            raise HostAwayError(
                f"the question worker stopped while it answered ({_reason(error)}); ask again"
            ) from None
        finally:
            events.cancel()

    return ask


def _end(choice: RayChoice, actors: list[Any]) -> None:
    """End every worker; one that has started removes what it keeps in shared memory."""
    there = {actor.__ray_ready__.remote(): actor for actor in actors}  # a spare one may have found no place
    answered, _ = ray.wait(list(there), num_returns=len(there), timeout=READY_SECONDS) if there else ([], [])
    ending = [there[answer].end.remote() for answer in answered]
    with suppress(RayError, RayServeException):
        serve.delete(choice.name)
    with suppress(RayError):
        ray.wait(ending, num_returns=len(ending), timeout=END_SECONDS) if ending else None
    for actor in actors:
        with suppress(RayError):
            ray.kill(actor)


def _reason(error: BaseException) -> str:
    """An error's last line, which is where Ray puts the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:300]
