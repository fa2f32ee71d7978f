"""deploy/preemption.sh hears of a notice from Google's metadata server (here: one of ours) and tells Ray."""

import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.parse
from pathlib import Path

import pytest

from tests.cluster.conftest import add_node, cluster  # noqa: F401 - a fixture

SCRIPT = Path(__file__).parents[2] / "deploy" / "preemption.sh"
WHERE = "/computeMetadata/v1/instance/preempted"


class Metadata:
    """Google's metadata server, as far as this goes: an answer with its ETag; who waits for a change is answered when
    there is one, or at once if his last answer is not what it is now."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.refuse = 0
        self.notice_after_asking = 0
        """The notice comes right after so many questions were answered."""
        self._noticed = threading.Event()

    def notice(self) -> None:
        self._noticed.set()

    def answer(self, path: str, flavor: str | None) -> tuple[int, str, str]:
        """Status, value, ETag."""
        assert flavor == "Google"
        self.asked.append(path)
        if len(self.asked) <= self.refuse:
            return 503, "", ""
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(path).query)
        if query.get("wait_for_change") == ["true"] and query.get("last_etag", [self._now()[1]]) == [self._now()[1]]:
            was = self._noticed.is_set()
            while self._noticed.is_set() == was:  # a notice that was there before is no change
                time.sleep(0.02)
        found = 200, *self._now()
        if len(self.asked) == self.notice_after_asking:
            self.notice()
        return found

    def _now(self) -> tuple[str, str]:
        return ("TRUE", "e2") if self._noticed.is_set() else ("FALSE", "e1")


@pytest.fixture
def metadata():
    """The server; ``host`` is where it listens."""
    made = Metadata()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            status, value, etag = made.answer(self.path, self.headers["Metadata-Flavor"])
            self.send_response(status)
            if etag:
                self.send_header("ETag", etag)
            self.end_headers()
            self.wfile.write(value.encode())

        def log_message(self, *_):
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        made.host = f"127.0.0.1:{server.server_address[1]}"
        yield made
        made.notice()  # nobody waits any more
        server.shutdown()


@pytest.fixture
def told(tmp_path) -> Path:
    """A Python that only notes what it was told to drain."""
    program = tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path / "told"}\n')
    program.chmod(0o755)
    return program


def start(metadata: Metadata, python: object, address: str, node: str) -> subprocess.Popen:
    env = os.environ | {"METADATA_HOST": metadata.host, "NODE_IP": node}
    command = ["bash", str(SCRIPT), address, str(python)]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen, seconds: float = 30) -> None:
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        process.kill()
    assert process.returncode == 0, errors


def test_a_notice_that_came_before_is_heard_at_once(metadata, told):
    metadata.notice()

    finish(start(metadata, told, "10.0.0.2:6379", "10.0.0.7"))

    assert metadata.asked == [WHERE]
    assert (told.parent / "told").read_text() == "- 10.0.0.2:6379 10.0.0.7\n"


def test_a_notice_that_comes_later_is_waited_for_by_one_question(metadata, told):
    process = start(metadata, told, "10.0.0.2:6379", "10.0.0.7")
    while len(metadata.asked) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(1.5)
    assert metadata.asked == [WHERE, f"{WHERE}?wait_for_change=true&timeout_sec=300&last_etag=e1"]

    metadata.notice()
    finish(process)

    assert len(metadata.asked) == 2
    assert (told.parent / "told").exists()


def test_a_notice_between_two_questions_is_not_missed(metadata, told):
    metadata.notice_after_asking = 1

    finish(start(metadata, told, "10.0.0.2:6379", "10.0.0.7"))

    assert len(metadata.asked) == 2
    assert (told.parent / "told").exists()


def test_a_server_that_goes_away_is_asked_again_without_waiting(metadata, told):
    metadata.refuse = 2
    metadata.notice()

    finish(start(metadata, told, "10.0.0.2:6379", "10.0.0.7"))

    assert metadata.asked == [WHERE] * 3


@pytest.mark.ray
@pytest.mark.chaos
def test_a_notice_drains_this_node_and_not_the_head(cluster, metadata, tmp_path):  # noqa: F811
    from ray._raylet import GcsClient

    leaves = add_node(cluster, tmp_path / "leaves", num_cpus=1)
    client = GcsClient(address=cluster.address)

    def alive() -> set[str]:
        return {node_id.hex() for node_id, node in client.get_all_node_info().items() if node.state == 0}

    assert alive() == {leaves.node_id, cluster.head_node.node_id}
    metadata.notice_after_asking = 1
    finish(start(metadata, sys.executable, cluster.address, leaves.node_ip_address), 60)
    deadline = time.monotonic() + 30
    while leaves.node_id in alive():  # a drained node on which nothing runs goes at once
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert alive() == {cluster.head_node.node_id}
