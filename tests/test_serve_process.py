"""``serve`` as a process: shutdown, HTTPS, and conflicting options."""

import json
import os
import re
import signal
import ssl
import urllib.request
from pathlib import Path

import pytest
import trustme

from helpers.cli import run
from helpers.server import Server, serving
from helpers.videos import write_video
from helpers.waiting import until


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> Path:
    return write_video(tmp_path_factory.mktemp("served") / "clip.mp4", frames=20)


def shared_memory(server: Server) -> set[str]:
    """Our shared memory folders that the server's workers have mapped files from."""
    folders = set()
    for worker in server.call("GET", "/healthz")[1]["workers"].values():
        for line in Path(f"/proc/{worker['pid']}/maps").read_text().splitlines():
            if found := re.search(r"(/\S*flash-vstream-[^/\s]+)/", line):
                folders.add(found[1])
    return folders


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_it_as_ctrl_c_does(quick_folder, video, tmp_path, number):
    options = ("--stream", f"door={video}", "--fps", "5", "--state", str(tmp_path))
    with serving(str(quick_folder), *options) as server:
        server.wait_for("/v1/streams/door", lambda _, body: body["time"] is not None)
        folders, children = shared_memory(server), [pid for pids in server.children().values() for pid in pids]
        assert folders
        server.process.send_signal(number)
        server.process.wait(timeout=60)
        assert not [folder for folder in folders if os.path.exists(folder)]
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert list((tmp_path / "memories").glob("door.safetensors"))


def test_https_with_ones_own_certificate(quick_folder, tmp_path):
    authority = trustme.CA()
    issued = authority.issue_cert("127.0.0.1")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    issued.private_key_pem.write_to_path(key)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with serving(str(quick_folder), "--tls-cert", str(cert), "--tls-key", str(key)) as server:
        assert server.url.startswith("https://")
        with urllib.request.urlopen(f"{server.url}/healthz", context=context, timeout=60) as response:
            assert json.loads(response.read())["status"] == "ok"
    other = trustme.CA().issue_cert("127.0.0.1")
    other.private_key_pem.write_to_path(tmp_path / "other.pem")
    for options, message in (
        (("--tls-cert", cert), "go together"),
        (("--tls-cert", cert, "--tls-key", tmp_path / "none"), "is not a file"),
        (("--tls-cert", cert, "--tls-key", tmp_path / "other.pem"), "cannot be used"),
        (("--tls-cert", key, "--tls-key", key), "cannot be used"),
    ):
        done = run("serve", "--port", "0", "--model", quick_folder, *options)
        assert (done.returncode, message in done.stderr, "Traceback" in done.stderr) == (2, True, False)


def test_what_a_worker_logs_is_json_too(quick_folder, video, tmp_path):
    options = ("--stream", f"door={video}", "--fps", "5", "--state", str(tmp_path))
    (tmp_path / "memories").mkdir()
    with serving(str(quick_folder), *options) as server:
        server.wait_for("/v1/streams/door", lambda _, body: body["time"] is not None)
    (tmp_path / "memories" / "door.safetensors").write_bytes(b"damaged")
    with serving(str(quick_folder), "--state", str(tmp_path)) as server:
        until(lambda: "set aside" in server.log.read_text())
        lines = [json.loads(line) for line in server.log.read_text().splitlines() if "set aside" in line]
    assert any("set aside" in line["event"] and line["level"] == "warning" for line in lines)


def test_two_streams_of_one_name_are_refused(quick_folder, video):
    done = run("serve", "--port", "0", "--model", quick_folder, "--stream", f"d={video}", "--stream", "d=push")
    assert (done.returncode, "two --stream options name 'd'" in done.stderr) == (2, True)
