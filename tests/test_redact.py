"""What is secret never shows, wherever it stands in a text; what is not secret stays as it is."""

import pickle
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from brainenc import errors
from brainenc.metrics import Gauges
from brainenc.redact import bare_address, redact, redacted

SIGNED = (
    "https://h.example/a/img.png?v=2&X-Amz-Algorithm=AWS4-HMAC-SHA256&X-Amz-Credential=AKIA%2F20260101&X-Amz-Date={day}"
    "&X-Amz-Expires=3600&X-Amz-SignedHeaders=host&X-Amz-Signature={secret}"
)
FORMS = (
    "s3://AKIAEXAMPLE:{secret}@bucket/path",
    "s3://AKIAEXAMPLE:{secret}@bucket",
    "s3:/AKIAEXAMPLE:{secret}@bucket/path",
    "/data/s3:/AKIAEXAMPLE:{secret}@bucket/path",
    "simplecache::s3://AKIAEXAMPLE:{secret}@bucket/x.hdf5::imgBrick[3]",
    "https://:{secret}@h.example",
    "https://user:{secret}@h.example:8443/x@y.png",
    "https://h.example/x?sig={secret}&se=2026",
    "https://h.example/x?part=3;sig={secret}",
    "https://h.example/x.hdf5?sig={secret}::imgBrick[3]",
    "https://h.example/x?access_token={secret}#top",
    "https://h.example/x#access_token={secret}",
    "https://h.example/x?TOKEN={secret}",
    "https://h.example/x?key={secret}",
    "https://h.example/x?Expires=1&Signature={secret}&Key-Pair-Id=1",
    "https://h.example/x?X-Goog-Signature={secret}",
    "https://h.example/x?X-Amz-Security-Token={secret}&X-Amz-Signature=1",
    SIGNED.replace("{day}", "1"),
    "sig={secret}",
    "token={secret}",
    "access_token={secret}",
    "Authorization: Bearer {secret}",
    "Authorization: Basic {secret}",
    "'Authorization': 'token {secret}'",
    "{{'aws_secret_access_key': '{secret}', 'region': 'x'}}",
    '{{"private_key": "{secret} and more", "type": "service"}}',
    "AWS_SECRET_ACCESS_KEY={secret}",
    "client_secret: {secret}",
)
AROUND = st.sampled_from(["{}", "cannot open {}", "'{}'", '"{}"', "({}) was refused", "[Errno 2] {}: gone", "{}, {}"])
SECRETS = st.builds(
    "{}{}".format, st.sampled_from(string.ascii_letters), st.text(string.ascii_letters + "0189/+%~-._=", min_size=9)
)


@pytest.mark.parametrize("form", FORMS)
@given(secret=SECRETS, around=AROUND)
def test_no_secret_survives_in_any_form_and_redacting_again_changes_nothing(form, secret, around):
    text = around.replace("{}", form.format(secret=secret))

    once = redact(text)

    assert secret not in once
    assert secret.rpartition("/")[2] not in once or len(secret.rpartition("/")[2]) < 6
    assert redact(once) == once


@example(["s3://AKIAEXAMPLE:s3cr3t@bucket", "https://user:s3cr3t@h.example:8443/x@y.png"])  # the port, then a user
@given(st.lists(st.sampled_from([f.format(secret="s3cr3t") for f in FORMS] + list(" /@:?&=;,'\"#x")), max_size=8))
def test_redacting_twice_is_redacting_once_for_any_text(pieces):
    once = redact("".join(pieces))

    assert redact(once) == once


@pytest.mark.parametrize(
    "text",
    [
        "gs://lab/features/subj01-train", "/home/user@lab/store", "gs://lab/user@lab/store", "s3://bucket/a=b/c",
        "https://h.example:8443/user@lab/x.png", "reading x at 10:30", "dinov2-base/11.token: 5 of 8 shards",
        "C:\\Users\\a", "https://h.example/x?v=2&size=3#top", "{'weights': 'a', 'layer': '11'}",
        "Did you mean 'token'? There is: q, k, token.", "basic features", "http://127.0.0.1:8265/#/jobs",
    ],
)  # fmt: skip
def test_harmless_text_stays_as_it_is(text):
    assert redact(text) == text


def test_what_is_beside_a_secret_stays():
    assert redact("s3://A:b/c@bucket/x@y and https://h/x?sig=1&part=3::imgBrick[7]") == (
        "s3://bucket/x@y and https://h/x?sig=***&part=3::imgBrick[7]"
    )
    assert redact("https://user:p@ss@h/x@y") == "https://h/x@y"


def test_values_are_redacted_all_the_way_down():
    found = redacted({"store": "s3://A:topsecret@b", "s3://A:topsecret@c": [1, ("token=topsecret", None)]})

    assert found == {"store": "s3://b", "s3://c": [1, ("token=***", None)]}


def test_an_address_is_kept_without_its_signature_and_so_is_the_same_tomorrow():
    today, tomorrow = (SIGNED.format(day=day, secret=f"feed{day}") for day in (1, 2))

    assert bare_address(today) == bare_address(tomorrow) == "https://h.example/a/img.png?v=2"
    assert bare_address(f"{today}::imgBrick[3]") == "https://h.example/a/img.png?v=2::imgBrick[3]"


@pytest.mark.parametrize(
    ("address", "bare"),
    [
        ("s3://AKIA:topsecret@bucket/a.png", "s3://bucket/a.png"),
        ("https://acc.example/c/a.png?sv=2020&se=2026&sr=b&sp=r&sig=a%2F", "https://acc.example/c/a.png"),
        ("https://h/a?Expires=1&Signature=2&AWSAccessKeyId=3", "https://h/a"),
        ("https://h/a?id=5&token=abc#top", "https://h/a?id=5#top"),
        ("https://h/a?sp=3&se=4", "https://h/a?sp=3&se=4"),
        ("/data/a?token=1.png", "/data/a?token=1.png"),
        ("gs://lab/user@lab/a=b.png", "gs://lab/user@lab/a=b.png"),
    ],
)
def test_bare_addresses(address, bare):
    assert bare_address(address) == bare
    assert bare_address(bare) == bare


@given(secret=SECRETS, form=st.sampled_from([form for form in FORMS if "://" in form]))
def test_a_bare_address_holds_no_secret(secret, form):
    assert secret not in bare_address(form.format(secret=secret))


@pytest.mark.parametrize(
    "error",
    [
        errors.DataError("s3://A:topsecret@b is gone"),
        errors.TransferFailed("https://h/x?sig=topsecret"),
        errors.UnknownName("stimulus set", "x", ("a",), "s3://A:topsecret@b"),
        errors.KeyNotFound("a/b/1.q", "s3://A:topsecret@b", ("a/b/0.q",)),
        errors.BadImages({"https://h/x?token=topsecret": "https://u:topsecret@h: 404"}),
        errors.NotAStore("s3://A:topsecret@b is none"),
    ],
)
def test_no_error_of_ours_holds_a_secret_in_text_repr_or_pickle(error):
    for copy in (error, pickle.loads(pickle.dumps(error))):
        assert "topsecret" not in f"{copy} {copy!r} {copy.args} {copy.__dict__}"
    assert b"topsecret" not in pickle.dumps(error)


def test_no_metric_is_labelled_with_a_secret():
    labels = []

    class Gauge:
        def set(self, value, tags):
            labels.append(tags)

    Gauges(lambda *_: Gauge(), run="s3://A:topsecret@bucket/features").set({"images_done": 3})

    assert labels == [{"run": "s3://bucket/features"}]
