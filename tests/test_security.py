"""Who may call the server, and what a source may refer to."""

import os

import pytest

from flash_vstream.errors import UserError
from flash_vstream.serve.security import AccessRules, ApiError
from flash_vstream.video import network
from flash_vstream.video.network import ForbiddenSourceError, SourceRules, is_public, parse_url
from flash_vstream.video.sources import Source, watch_source
from helpers.videos import write_video


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("8.8.8.8", True),
        ("2606:4700::1111", True),
        ("::ffff:8.8.8.8", True),
        ("10.0.0.1", False),
        ("127.0.0.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("239.1.2.3", False),
        ("ff0e::1", False),
        ("::1", False),
        ("fe80::1%eth0", False),
        ("fec0::1", False),
        ("fc00::1", False),
        ("::ffff:10.0.0.1", False),
        ("64:ff9b::a00:1", False),  # NAT64
        ("64:ff9b::808:808", False),
        ("64:ff9b:1::a00:1", False),
        ("2002:a00:1::", False),  # 6to4
        ("2001:0:a00:1::", False),  # Teredo
        ("::10.0.0.1", False),  # IPv4-compatible
        ("::8.8.8.8", False),
    ],
)
def test_which_addresses_are_public(address, public):
    assert is_public(address) is public


def test_the_machine_s_own_addresses_are_private(monkeypatch):
    monkeypatch.setattr(network, "own_addresses", lambda: frozenset({"8.8.8.8"}))
    assert not is_public("8.8.8.8")
    assert not is_public("::ffff:8.8.8.8")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://[x", "host is malformed"),
        ("rtsp://a:b]c", "host is malformed"),
        ("rtsp://admin:pa/ss@cam/1", "port is not a number"),
        ("http://host:99999/", "port is not a number"),
        ("http://a\0b/", r"control character \(U\+0000\)"),
        ("http://a\nb/", "control character"),
        ("http://a b/", "space"),
        ("http://a/\ud800", "surrogate"),
        ("http://", "names no host"),
        ("rtsp:///1", "names no host"),
        ("http://a..b/", "looked up"),
        ("http://" + "a" * 70 + "/", "looked up"),
        ("http://a|b/", "no host has"),
    ],
)
def test_a_malformed_url_is_told_everywhere(url, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_url(url)
    assert "pa" not in str(raised.value).split()
    with pytest.raises(UserError, match=f"{message}|write / as %2F"):
        Source(url).checked()
    with pytest.raises(UserError, match=message):
        AccessRules("0.0.0.0", "token").check_source(url)


@pytest.mark.parametrize("name", ["a\0b.mp4", "/tmp/\ud800"])
def test_a_malformed_path_is_told(name):
    for check in (lambda name: Source(name).checked(), AccessRules("0.0.0.0", "token").check_source):
        with pytest.raises(UserError, match=r"control character|surrogate"):
            check(name)


@pytest.mark.parametrize("url", ["udp://:5000", "http://host/é?a=b#c", "rtsp://u:p@[::1]:554/1", "http://ex%61mple/"])
def test_urls_that_are_right(url):
    assert parse_url(url).geturl() == url


@pytest.mark.parametrize(
    "url",
    [
        "tcp://8.8.8.8:7123?listen=1",
        "tcp://8.8.8.8:7123?LISTEN=1",
        "tcp://8.8.8.8:7123?local_port=9",
        "srt://8.8.8.8:9?mode=listener",
        "rtsp://8.8.8.8/1?udp",
        "udp://8.8.8.8:5000",
        "http://169.254.169.254/x",
        "http://2130706433/",
        "rtsp://[64:ff9b::a00:1]/1",
        "ftp://8.8.8.8/x",
        "concat:/etc/passwd",
        "/etc/passwd",
        "/dev/video0",
    ],
)
def test_what_a_guarded_server_refuses(url):
    with pytest.raises(ApiError) as refused:
        AccessRules("0.0.0.0", "token").check_source(url)
    assert refused.value.status == 403
    AccessRules().check_source(url)  # on loopback, the server belongs to its user


def test_udp_is_refused_as_a_transport_too():
    guarded = AccessRules("0.0.0.0", "token", hosts=frozenset({"cam.internal"}))
    with pytest.raises(ApiError, match="UDP opens a port"):
        guarded.check_source("rtsp://8.8.8.8/1", "udp")


def test_what_a_guarded_server_takes(tmp_path, monkeypatch):
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("10.0.0.5", 0))])
    guarded = AccessRules("0.0.0.0", "token", hosts=frozenset({"cam.internal"}), folders=(tmp_path,))
    guarded.check_source("rtsp://CAM.internal/1?profile=2")
    guarded.check_source("udp://cam.internal:5000")
    guarded.check_source("push")
    guarded.check_source(str(tmp_path / "x.mp4"))
    with pytest.raises(ApiError, match="private address"):
        guarded.check_source("rtsp://other.internal/1")


def test_a_name_is_looked_up_once(monkeypatch):
    """A name server that gives a different second answer has no effect (DNS rebinding)."""
    answers = iter(["8.8.8.8", "10.0.0.5"])
    monkeypatch.setattr(network.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (next(answers), 0))])
    from flash_vstream.video.gateway import pinned_request

    request = pinned_request("https://me:pw@rebound.example:8443/a?b=1", SourceRules(), {})
    assert (request.url.host, request.url.port, request.url.raw_path) == ("8.8.8.8", 8443, b"/a?b=1")
    assert request.headers["host"] == "rebound.example:8443"
    assert request.headers["authorization"].startswith("Basic ")
    assert request.extensions["sni_hostname"] == "rebound.example"
    with pytest.raises(ForbiddenSourceError):
        pinned_request("https://rebound.example/", SourceRules(), {})


def test_links_do_not_lead_out_of_an_allowed_folder(tmp_path):
    allowed, closed = tmp_path / "allowed", tmp_path / "closed"
    allowed.mkdir()
    closed.mkdir()
    write_video(closed / "clip.mp4", frames=5)
    rules = SourceRules(folders=(str(allowed),))
    (allowed / "link.mp4").symlink_to(closed / "clip.mp4")
    with pytest.raises(ForbiddenSourceError):
        rules.check(str(allowed / "link.mp4"))
    with pytest.raises(ForbiddenSourceError):
        rules.check(f"{allowed}/../closed/clip.mp4")
    # Readers do not follow a link that is created after the check.
    write_video(allowed / "clip.mp4", frames=5)
    source = Source(str(allowed / "clip.mp4"), 5, pace="fast", rules=rules)
    assert list(watch_source(source))
    os.replace(allowed / "link.mp4", allowed / "clip.mp4")
    with pytest.raises(ForbiddenSourceError):
        list(watch_source(source))


def test_a_folder_s_pictures_do_not_lead_out_of_it(tmp_path):
    from PIL import Image

    allowed, secret = tmp_path / "allowed", tmp_path / "secret.png"
    allowed.mkdir()
    Image.new("RGB", (9, 9)).save(secret)
    (allowed / "1.png").symlink_to(secret)
    rules = SourceRules(folders=(str(allowed),))
    with pytest.raises(ForbiddenSourceError):
        list(watch_source(Source(str(allowed), pace="fast", rules=rules)))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"host": "["}, 400),
        ({"host": "127.0.0.1:8000", "origin": "http://["}, 403),
        ({"host": "127.0.0.1:8000", "origin": "null"}, 403),
        ({}, 403),
    ],
)
def test_malformed_headers_are_refused(headers, status):
    with pytest.raises(ApiError) as refused:
        AccessRules().check_caller(headers)
    assert refused.value.status == status


def test_a_server_answers_to_the_loopback_address_that_it_was_given():
    AccessRules("127.0.0.2").check_caller({"host": "127.0.0.2:8000"})
    AccessRules("127.0.0.2").check_caller({"host": "localhost"})
    AccessRules("127.0.0.1").check_caller({"host": "127.0.0.2:8000"})  # no foreign name can lead here
    with pytest.raises(ApiError):
        AccessRules("127.0.0.1").check_caller({"host": "rebound.example:8000"})
