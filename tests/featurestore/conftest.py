"""Emulated object stores, and a cache folder that is the test's own."""

import os
import secrets

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "brainenc-cache"))


@pytest.fixture(scope="session")
def moto_server():
    """S3 on loopback with a bucket ``lab-bucket``, for the whole session; settings under which clients find it."""
    import logging

    import requests
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    requests.put(f"{url}/lab-bucket", timeout=30).raise_for_status()
    yield {
        "AWS_ENDPOINT_URL": url, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    server.stop()


@pytest.fixture
def s3(moto_server, monkeypatch):
    """An address in an emulated S3 that no other test uses."""
    for name, value in moto_server.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    return f"s3://lab-bucket/{secrets.token_hex(6)}"


KEY, SECRET = "AKIAEXAMPLE", "topsecretWJALR"


@pytest.fixture
def keyed_bucket(s3, monkeypatch, tmp_path):
    """An address with keys in it, where the environment has none; caches and records of this machine apart."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "cache"))
    return s3.replace("s3://", f"s3://{KEY}:{SECRET}@")


@pytest.fixture
def memory_url():
    """An address in fsspec's memory file system, empty before and after."""
    import fsspec

    fs = fsspec.filesystem("memory")
    url = f"memory://store-{os.getpid()}"
    yield url
    for path in list(fs.store):
        if path.startswith(f"/store-{os.getpid()}"):
            del fs.store[path]
