"""What the fork server imports, once, for the workers that it forks."""

from flash_vstream.imports import no_garbage

with no_garbage():
    import flash_vstream.live.frame_worker
    import flash_vstream.live.question_worker  # noqa: F401
