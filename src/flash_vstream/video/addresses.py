"""Source names: splitting logins out of URLs, and hiding secrets before a name is shown or logged."""

import os
import re

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_URL_IN_TEXT = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://\S+")
_PLAIN_HOST = re.compile(r"(\[[^\]]*\]|[^:@\[\]]*)(:\d*)?")
_BARE_LOGIN = re.compile(r"[^/\\@:]+:[^@]*@")
_SECRET_IN_PATH = re.compile(
    r"(?i)(?:user|login|pass|pwd|token|key|secret|auth|sig)[a-z]*(?==|%3d)"  # of XM cameras: /user=admin_password=…
)


def scheme_of(name: str) -> str:
    """The scheme of a URL in lower case, or "" for anything else. Never raises."""
    match = _SCHEME.match(name)
    return match[0][:-3].lower() if match else ""


def split_login(address: str) -> tuple[str, str, bool]:
    """Split what follows a URL's ``://`` into login (user and password) and rest; also whether the split is certain.

    A password may contain ``/``, ``?``, ``#`` and ``@`` although it should not, so everything before the last ``@`` may
    be secret. The split is uncertain if the part before the first ``/``, ``?`` or ``#`` could be a complete host
    (``media.example/@name/clip.mp4``).
    """
    login, at, rest = address.rpartition("@")
    first = re.split(r"[/?#]", login, maxsplit=1)[0]
    certain = first == login or "@" in first or _PLAIN_HOST.fullmatch(first) is None
    return login, rest if at else address, certain


def hide_secrets(name: str) -> str:
    """A source's name for people and logs: a URL without its login, its query, and anything secret in its path.

    A name that is not a URL is returned unchanged, except for ``user:password@host``.

    >>> hide_secrets("rtsp://admin:pa/ss@cam:554/1?token=x")
    'rtsp://cam:554/1?…'
    >>> hide_secrets("rtsp://cam/user=admin_password=secret_channel=1")
    'rtsp://cam/user=…'
    """
    match = _SCHEME.search(name)
    if match is None:
        bare = _BARE_LOGIN.match(name)
        return "…@" + name.rpartition("@")[2] if bare and not os.path.exists(name) else name
    login, rest, certain = split_login(name[match.end() :])
    if _SECRET_IN_PATH.search(login):  # a password in the path that contains an @
        return name[: match.end()] + "…"
    place = re.split(r"[?#]", rest, maxsplit=1)[0]
    host, slash, path = place.partition("/")
    shown = name[: match.end()] + ("" if certain or not login else "…@") + host + slash + _hide_in_path(path)
    return shown + ("?…" if "?" in rest else "")


def _hide_in_path(path: str) -> str:
    """A path cut off at the first ``password=`` or similar, and with ``…`` for segments such as ``user:password``."""
    secret = _SECRET_IN_PATH.search(path)
    if secret is not None:
        return _hide_in_path(path[: secret.start()]) + secret[0] + "=…"
    return "/".join("…" if ":" in segment or "%3a" in segment.lower() else segment for segment in path.split("/"))


def hide_secrets_in_text(text: str) -> str:
    """A message with ``hide_secrets`` applied to every URL in it."""
    return _URL_IN_TEXT.sub(lambda match: hide_secrets(match[0]), text)
