"""The fork server: a process that has imported what workers need and forks them, so that each starts in a second."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

PRELOADED = ["flash_vstream.live.frame_worker", "flash_vstream.live.question_worker", "flash_vstream.models.hub"]


def ensure_fork_server() -> ForkServerContext:
    """See to it that the fork server runs; returns the context to start workers in.

    Called early, its imports go on beside the caller's own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # which unblocks Ctrl-C when it starts
    # The fork server inherits this: Ctrl-C is for the process that it serves, not to break its imports with an outcry.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
