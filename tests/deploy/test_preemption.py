"""deploy/preemption.sh hears of a notice from Google's metadata server (here: one of ours) and tells Ray."""

import http.server
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.cluster.conftest import add_node, cluster  # noqa: F401 - a fixture

SCRIPT = Path(__file__).parents[2] / "deploy" / "preemption.sh"

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


@pytest.fixture
def metadata():
    """Answers FALSE once, as after a long wait without a notice, then TRUE; keeps what was asked."""
    asked = []

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Metadata-Flavor"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"FALSE" if len(asked) == 1 else b"TRUE")

        def log_message(self, *_):
            """Silent."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()


def test_a_notice_drains_this_node_and_not_the_head(cluster, metadata, tmp_path):  # noqa: F811
    from ray._raylet import GcsClient

    host, asked = metadata
    leaves = add_node(cluster, tmp_path / "leaves", num_cpus=1)
    client = GcsClient(address=cluster.address)

    def alive() -> set[str]:
        return {node_id.hex() for node_id, node in client.get_all_node_info().items() if node.state == 0}

    assert alive() == {leaves.node_id, cluster.head_node.node_id}
    env = os.environ | {"METADATA_HOST": host, "NODE_IP": leaves.node_ip_address}
    done = subprocess.run(
        ["bash", SCRIPT, cluster.address, sys.executable], env=env, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 30
    while leaves.node_id in alive():  # a drained node on which nothing runs goes at once
        assert time.monotonic() < deadline, done.stdout
        time.sleep(0.1)
    assert alive() == {cluster.head_node.node_id}
    assert asked[0] == ("/computeMetadata/v1/instance/preempted?wait_for_change=true&timeout_sec=300", "Google")
    assert len(asked) == 2
