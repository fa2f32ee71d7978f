"""Emulated object stores, and a cache folder that is the test's own."""

import os

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BRAINENC_CACHE", str(tmp_path / "brainenc-cache"))


@pytest.fixture(scope="session")
def moto_server():
    """S3 on loopback, for the whole session."""
    import logging

    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3(moto_server, monkeypatch):
    """An empty bucket ``lab-bucket`` in an emulated S3, where ``s3://lab-bucket/...`` leads for the test."""
    import s3fs

    settings = {"AWS_ENDPOINT_URL": moto_server, "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"}
    for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)
    fs = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False)
    fs.mkdir("lab-bucket")
    yield "s3://lab-bucket"
    fs.rm("lab-bucket", recursive=True)


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
