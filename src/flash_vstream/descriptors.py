"""The limit on open file descriptors, which the system sets low by default."""

import sys

MOST_DESCRIPTORS = 65536


def allow_open_files() -> int:
    """Raise the limit on file descriptors as far as allowed, to at most ``MOST_DESCRIPTORS``; returns the limit."""
    if sys.platform == "win32":  # knows no such limit
        return MOST_DESCRIPTORS
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < MOST_DESCRIPTORS:
        wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
        soft = max(soft, wanted)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return MOST_DESCRIPTORS if soft == resource.RLIM_INFINITY else soft
