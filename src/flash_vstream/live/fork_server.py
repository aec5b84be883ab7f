"""The fork server: a process that has already imported what workers need and forks them, so each starts in a second."""

import multiprocessing
import signal
from multiprocessing import forkserver, resource_tracker
from multiprocessing.context import ForkServerContext

PRELOADED = ["flash_vstream.live.frame_worker", "flash_vstream.live.question_worker", "flash_vstream.models.hub"]


def ensure_fork_server() -> ForkServerContext:
    """Start the fork server unless it is running, and return the context for starting workers.

    Call it early: the fork server then imports in parallel with the caller.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    resource_tracker.ensure_running()  # first, because starting it unblocks Ctrl-C
    # The fork server inherits the mask: Ctrl-C belongs to its parent and must not abort the imports with a traceback.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return context
