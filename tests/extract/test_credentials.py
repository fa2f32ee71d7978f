"""Keys and signatures are used, and then are nowhere: not in what is printed, not in any file or object."""

import json
import os
import sys

import fsspec
import pytest
import s3fs

from brainenc.cli.main import run as brainenc
from brainenc.extract.config import ExtractConfig, Source
from brainenc.extract.extractor import Extractor
from brainenc.extract.guard_record import guard_folder
from brainenc.extract.prepare import create, survey
from brainenc.extract.sources import list_sources
from brainenc.featurestore.store import open_store
from tests.extract.conftest import draw_image, save_images
from tests.featurestore.conftest import KEY, SECRET, keyed_bucket, moto_server, s3  # noqa: F401

SIGNATURE = "5ignatureFEED"


@pytest.fixture
def without_ray(monkeypatch):
    """Extraction with its worker in this process; the guard's answer is kept beside the store's other records."""

    def drive(run, found, *_):
        extractor = Extractor(found.job)
        for task in run.tasks:
            run.take(extractor.extract(task))
        extractor.close()

    monkeypatch.setattr("brainenc.extract.pipeline.drive", drive)


def client():
    return s3fs.S3FileSystem(key="test", secret="test", skip_instance_cache=True, use_listings_cache=False)


def path_of(url: str) -> str:
    return url.rpartition("@")[2]


def put_images(url: str, count: int, *, bad: int | None = None) -> list[str]:
    """Pictures below an address; their paths, in order."""
    fs, paths = client(), [f"{path_of(url)}/images/{n}.png" for n in range(count)]
    for n, path in enumerate(paths):
        with fsspec.filesystem("memory").open("/picture.png", "wb") as file:
            draw_image(n).save(file, "png")
        fs.pipe_file(path, b"no image" if n == bad else fsspec.filesystem("memory").cat_file("/picture.png"))
    return paths


def signed(path: str, day: int) -> str:
    endpoint = os.environ["AWS_ENDPOINT_URL"]
    return (
        f"{endpoint}/{path}?X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential={KEY}%2F2026010{day}%2Fus-east-1"
        f"&X-Amz-Date=2026010{day}T000000Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host&X-Amz-Signature={SIGNATURE}{day}"
    )


def written(tmp_path, url: str) -> dict[str, bytes]:
    """Every file below the test's folder and every object of the bucket's part, by name."""
    fs = client()
    files = {str(p): p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    return files | {path: fs.cat_file(path) for path in fs.find(path_of(url))}


def assert_nothing_leaks(*said: str, files: dict[str, bytes]) -> None:
    for secret in (KEY, SECRET, SIGNATURE):
        for text in said:
            assert secret not in text, text
        for name, data in files.items():
            assert secret not in name
            assert secret.encode() not in data, name


def options(store: str, images, backbone: str, *more: str) -> list[str]:
    given = ("--feature", "3.q", "--rows-per-shard", "4", "--batch-size", "2", "--threads", "1", "--device", "cpu")
    return ["extract", "--store", store, "--images", str(images), "--backbone", backbone, *given, *more]


@pytest.mark.usefixtures("without_ray")
def test_keys_and_signatures_are_used_and_reach_no_output_and_no_file(
    keyed_bucket, miniature, tmp_path, tmp_path_factory, capsys, caplog  # noqa: F811
):  # fmt: skip
    store, paths = f"{keyed_bucket}/features", put_images(keyed_bucket, 6, bad=5)
    lists = tmp_path_factory.mktemp("lists")  # what the user keeps there is the user's own
    for day in (1, 2):
        (lists / f"{day}").mkdir()
        (lists / f"{day}" / "web.txt").write_text("\n".join(signed(path, day) for path in paths))
    said = []

    def extract(*arguments: str) -> tuple[int, str]:
        code = brainenc(list(arguments))
        out, err = capsys.readouterr()
        said.extend((out, err))
        return code, out + err

    # Refused for an image that cannot be read, with everything else sealed.
    code, text = extract("--debug", *options(store, lists / "1" / "web.txt", miniature))
    assert code == 1
    assert "could not be read" in text
    assert "5.png?" in text or "5.png:" in text
    # The same images, signed anew on another day: they are the same, and what was sealed stays.
    code, text = extract(*options(store, lists / "2" / "web.txt", miniature, "--on-bad-image", "null"))
    assert code == 0, text
    assert f"missing row: {os.environ['AWS_ENDPOINT_URL']}/{paths[5]}" in text
    assert f"s3://{path_of(store)}  web/mini/3.q" in text
    code, text = extract(*options(store, lists / "1" / "web.txt", miniature, "--check-images", "--json"))
    assert code == 0, text
    assert json.loads(text.splitlines()[-1])["store"] == f"s3://{path_of(store)}"
    # A folder in the bucket, read with the keys of its address.
    code, text = extract(*options(store, f"{keyed_bucket}/images", miniature, "--on-bad-image", "null"))
    assert code == 0, text
    for arguments in (
        ["plan", *options(store, f"{keyed_bucket}/images", miniature)[1:], "--no-time", "--json"],
        ["plan", *options(store, lists / "1" / "web.txt", miniature)[1:], "--no-time"],
        ["extract", "--output_dir", store, "--data_dir", "/nowhere", "--backbone", miniature, "--feature", "3.q"],
        ["store", "ls", store, "--json"],
        ["--debug", "store", "ls", f"{keyed_bucket}/nothing"],
        ["--debug", "store", "info", store, "a/b/1.q"],
        ["store", "ls", store, f"{keyed_bucket}/unexpected"],
        ["--debug", *options(store, signed(paths[0], 1), miniature)],
        ["--debug", *options(store, f"{keyed_bucket}/empty", miniature)],
        ["extract", "--store", store, "--subject-dir", f"{keyed_bucket}/subj01", *options(store, "x", miniature)[5:]],
        ["train", "--resume", f"{keyed_bucket}/run"],
        ["train", "--resume", f"{keyed_bucket}/run", "--out", f"{keyed_bucket}/other"],
        ["--debug", "train", "--subject-dir", f"{keyed_bucket}/subj01", "--store", store, "--feature", "mini/3.q",
         "--out", f"{keyed_bucket}/run"],
        ["evaluate", f"{keyed_bucket}/run"],
        ["watch", f"{keyed_bucket}/run", "--once"],
    ):  # fmt: skip
        extract(*arguments)

    stimuli = open_store(store).stimuli("web")
    assert stimuli.ids == [stimulus.uri for stimulus in stimuli]
    assert stimuli.ids[0] == f"{os.environ['AWS_ENDPOINT_URL']}/{paths[0]}"
    assert open_store(store)["images/mini/3.q"].present.tolist() == [True] * 5 + [False]
    assert_nothing_leaks(*said, caplog.text, files=written(tmp_path, keyed_bucket))


def test_an_error_that_nobody_planned_shows_its_traceback_without_credentials(capsys, monkeypatch):
    def broken(*_, **__):
        raise RuntimeError(f"cannot sign https://u:{SECRET}@h.example/x?sig={SIGNATURE}")

    monkeypatch.setattr(sys.modules["brainenc.cli.main"].cli, "main", broken)

    assert brainenc(["doctor"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "cannot sign https://h.example/x?sig=***" in err
    assert_nothing_leaks(err, files={})


def test_the_system_refusing_names_no_credential(capsys, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(13, "denied", f"s3://{KEY}:{SECRET}@bucket/x")

    monkeypatch.setattr(sys.modules["brainenc.cli.main"].cli, "main", refused)

    assert brainenc(["--debug", "doctor"]) == 1
    assert_nothing_leaks(capsys.readouterr().err, files={})


def test_workers_are_given_what_was_listed_and_the_store_what_may_be_kept(tmp_path, miniature):
    """A file system that takes keys in its addresses: whatever lies there can be read by nobody without them."""
    memory = fsspec.filesystem("memory")
    root = f"memory://{KEY}:{SECRET}@lab/pictures"
    for path in sorted(save_images(tmp_path / "p", 2).iterdir()):
        memory.pipe_file(f"/{KEY}:{SECRET}@lab/pictures/{path.name}", path.read_bytes())
    config = ExtractConfig(
        store=str(tmp_path / "s"), backbone=miniature, features=("3.q",), sources=(Source(location=root),),
        rows_per_shard=2, micro_batch=2, threads=1, device="cpu",
    )  # fmt: skip

    found = survey(config)
    create(found)
    extractor = Extractor(found.job)
    outcome = extractor.extract(found.tasks[0])
    extractor.close()

    assert outcome.status == "sealed"
    assert SECRET in found.tasks[0].uris[0]
    stored = open_store(tmp_path / "s").stimuli("pictures")
    assert next(s.uri for s in stored) == "memory://lab/pictures/train-0001_nsd-00000.png"
    assert_nothing_leaks(files={str(p): p.read_bytes() for p in (tmp_path / "s").rglob("*") if p.is_file()})


def test_a_list_behind_a_signature_is_a_list_and_names_its_set(tmp_path):
    fsspec.filesystem("memory").pipe_file(f"/lab/list.csv?token={SIGNATURE}", b"id,path\na,memory://lab/x.png\n")
    fsspec.filesystem("memory").pipe_file("/lab/x.png", b"x")

    (found,) = list_sources([Source(location=f"memory://lab/list.csv?token={SIGNATURE}")])

    assert (found.name, [row.id for row in found.rows]) == ("list", ["a"])


def test_the_guards_record_of_a_store_is_named_by_its_address_without_keys():
    address = f"s3://{KEY}:{SECRET}@bucket"

    assert KEY not in str(guard_folder(address))
    assert guard_folder(address) == guard_folder("s3://bucket")
