"""For the API reference: examples in docstrings (``>>>``) as Python blocks, which Markdown would take for quotes."""

import re
from typing import Any

from griffe import Extension, Object

_EXAMPLE = re.compile(r"^>>> .*\n?(?:^(?:>>>|\.\.\.)(?: .*)?\n?)*", re.MULTILINE)


class DoctestBlocks(Extension):
    """Puts examples in docstrings into fences."""

    def on_instance(self, *, obj: Object, **_: Any) -> None:
        """Rewrite the docstring of ``obj`` in place."""
        if obj.docstring is not None and ">>> " in obj.docstring.value:
            obj.docstring.value = _EXAMPLE.sub(_fenced, obj.docstring.value)


def _fenced(match: re.Match[str]) -> str:
    lines = [line[4:] for line in match[0].rstrip("\n").splitlines()]
    return "\n".join(["```python", *lines, "```", ""])
