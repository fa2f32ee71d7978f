"""Checkpoints of the published code: read, refused, and written back."""

import argparse
import json
import pickle

import numpy as np
import pytest
import torch

from brainenc.cli.main import run as brainenc
from brainenc.datasets.algonauts import Subject
from brainenc.errors import CheckpointUnusable, NotASubject
from brainenc.train import EncoderConfig, build_encoder, load_published
from brainenc.train.evaluate import open_run, part_samples
from brainenc.train.published import import_published, published_state, read_published
from tests.train.parity_cases import CASES, Case, distance


def save(folder, case, *, state=None, **changes):
    """A checkpoint as the published code writes it."""
    args = {
        "encoder_arch": case.meta["encoder"], "readout_res": case.meta["readout"], "nheads": case.meta["nheads"],
        "hidden_dim": case.meta["hidden_dim"], "dim_feedforward": case.meta["dim_feedforward"], "dec_layers": 1,
        "enc_layers": 0, "pre_norm": 1, "dropout": 0.0, "subj": "01", "position_embedding": "sine",
        "num_queries": case.meta["num_queries"], "device": torch.device("cpu"), "val_perf": np.float64(0.25),
    } | changes  # fmt: skip
    path = folder / "checkpoint.pth"
    content = {
        "model": state or case.state,
        "args": argparse.Namespace(**args),
        "epoch": 7,
        "val_perf": np.float32(0.5),
    }
    torch.save(content, path)
    return path


@pytest.fixture
def case() -> Case:
    return Case("transformer-rois_all")


@pytest.fixture
def subject(case, tmp_path):
    return case.write_rois(tmp_path / "subj01")


@pytest.mark.parametrize("name", CASES)
def test_published_checkpoints_predict_what_they_predicted(name, tmp_path):
    """Through the public loader, predictions of both hemispheres are the published ones to 1e-5."""
    case = Case(name)

    model = load_published(save(tmp_path, case), case.write_rois(tmp_path / "subj01"))
    lh, rh = model(case.features)

    assert distance(lh, case.arrays["expected/lh_pred"]) < 1e-5
    assert distance(rh, case.arrays["expected/rh_pred"]) < 1e-5


@pytest.mark.parametrize("name", CASES)
def test_the_published_code_loads_what_we_write(name, tmp_path):
    """A state dict made for the published code has every name and shape of its own, and the same values where used."""
    case = Case(name)
    model = load_published(save(tmp_path, case), case.write_rois(tmp_path / "subj01"))

    written = published_state(model)

    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in case.state.items()}
    assert all(torch.equal(written[k], case.state[k]) for k in model.state_dict())


def test_arguments_and_numbers_are_read(case, tmp_path):
    """Epoch and performance come along, though NumPy pickled them; so do arguments of every plain kind."""
    found = read_published(save(tmp_path, case))

    assert (found.epoch, found.val_perf) == (7, 0.5)
    assert found.args["subj"] == "01"


@pytest.mark.parametrize("module", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numbers_of_both_numpys_are_read(module, case, tmp_path, monkeypatch):
    """NumPy 1 and 2 pickle their scalars under different names; both are understood."""
    scalar = np.float64(0).__reduce__()[0]
    path = save(tmp_path, case)
    raw = path.read_bytes()
    other = ({"numpy.core.multiarray", "numpy._core.multiarray"} - {scalar.__module__}).pop()
    if module != scalar.__module__:
        path = rewrite_pickle(path, scalar.__module__.encode(), other.encode())
        assert path.read_bytes() != raw

    assert read_published(path).val_perf == 0.5


def rewrite_pickle(path, old, new):
    """Replace bytes in the pickle inside a torch file."""
    import zipfile

    out = path.with_name("other.pth")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(out, "w") as target:
        for item in source.infolist():
            data = source.read(item)
            target.writestr(item.filename, data.replace(old, new) if item.filename.endswith("data.pkl") else data)
    return out


def test_distributed_training_s_prefix_is_taken_off(case, tmp_path, subject):
    """Names that begin with ``module.`` are the same parameters."""
    state = {f"module.{k}": v for k, v in case.state.items()}

    lh, _ = load_published(save(tmp_path, case, state=state), subject)(case.features)

    assert distance(lh, case.arrays["expected/lh_pred"]) < 1e-5


def test_backbone_weights_in_the_file_are_passed_over(case, tmp_path, subject):
    """Runs without saved features keep their frozen backbone in the checkpoint."""
    state = case.state | {"backbone_model.0.backbone.cls_token": torch.zeros(1, 1, 8)}

    load_published(save(tmp_path, case, state=state), subject)


def test_code_in_a_checkpoint_is_not_run(case, tmp_path, subject):
    """A pickle that would call something is refused, and does not."""
    flag = tmp_path / "ran"

    class Bomb:
        def __reduce__(self):
            return flag.touch, ()

    path = tmp_path / "bomb.pth"
    torch.save({"model": case.state, "args": argparse.Namespace(x=Bomb())}, path)

    with pytest.raises(CheckpointUnusable, match="could run code"):
        load_published(path, subject)
    assert not flag.exists()


def test_keys_that_differ_are_named(case, tmp_path, subject):
    """A checkpoint of another model is refused with what is missing, unknown, or of another shape."""
    state = dict(case.state)
    state["lh_head.weight"] = state.pop("query_embed.weight")
    state["rh_embed.0.weight"] = torch.zeros(44, 32)

    with pytest.raises(CheckpointUnusable) as caught:
        load_published(save(tmp_path, case, state=state), subject)

    message = str(caught.value)
    assert "query_embed.weight: missing" in message
    assert "lh_head.weight: unknown" in message
    assert "rh_embed.0.weight: (44, 32) in the checkpoint, (43, 32) in the model" in message


def test_another_subject_is_refused(case, tmp_path):
    """Vertex counts of checkpoint and subject must agree."""
    other = Case("custom_transformer-rois_all").write_rois(tmp_path / "subj02")

    with pytest.raises(CheckpointUnusable, match=r"lh_embed\.0\.weight: \(57, 32\) in the checkpoint, \(37, 32\)"):
        load_published(save(tmp_path, case), other)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"encoder_arch": "perceiver"}, "no encoder 'perceiver'"),
        ({"enc_layers": 2}, "2 encoder layer"),
        ({"position_embedding": "learned"}, "'learned'"),
    ],
)
def test_what_we_do_not_have_is_refused(changes, words, case, tmp_path, subject):
    """Settings that would change the function are not ignored."""
    with pytest.raises(CheckpointUnusable, match=words):
        load_published(save(tmp_path, case, **changes), subject)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read|holds more"),
        (pickle.dumps({"model": {}}), "cannot be read|holds more|no published checkpoint"),
        (None, "There is no checkpoint"),
    ],
)
def test_files_that_are_no_checkpoint_are_refused(content, words, tmp_path, subject):
    """Absent, empty and foreign files end in one sentence."""
    path = tmp_path / "checkpoint.pth"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(CheckpointUnusable, match=words):
        load_published(path, subject)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.99])
def test_a_torn_checkpoint_is_refused(fraction, case, tmp_path, subject):
    """A download that broke off ends in one sentence."""
    path = save(tmp_path, case)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])

    with pytest.raises(CheckpointUnusable, match=r"cannot be read|holds more"):
        load_published(path, subject)


def test_a_state_dict_alone_is_refused(case, tmp_path, subject):
    """Without arguments nobody knows what the tensors mean."""
    path = tmp_path / "weights.pth"
    torch.save(case.state, path)

    with pytest.raises(CheckpointUnusable, match="wanted 'model' and 'args'"):
        load_published(path, subject)


def test_a_folder_without_rois_is_refused(case, tmp_path):
    """The subject's ROIs say what each query means."""
    with pytest.raises(NotASubject):
        load_published(save(tmp_path, case), tmp_path)


def test_imported_checkpoints_are_runs_of_ours(case, tmp_path, subject):
    """The run folder holds a whole checkpoint with the published weights, which loads into the same model."""
    from click.testing import CliRunner

    from brainenc.cli.main import cli
    from brainenc.train import checkpoint
    from brainenc.train.run_folder import RunFolder

    path = save(tmp_path, case)
    arguments = ["import-checkpoint", str(path), "--subject-dir", str(subject), "--out", str(tmp_path / "run")]
    shown = CliRunner().invoke(cli, [*arguments, "--store", str(tmp_path / "store"), "--feature", "d/11.q"])

    assert shown.exit_code == 0, shown.output
    assert "transformer with rois_all" in shown.output
    folder = RunFolder(tmp_path / "run")
    choice = checkpoint.newest([folder.checkpoints])
    assert choice.skipped == ()
    assert choice.folder.name == folder.pointed("best")["checkpoint"]
    assert folder.config().features == ("d/11.q",)
    model = load_published(path, subject)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    checkpoint.load_weights(choice.folder, model)
    assert distance(model(case.features)[0], case.arrays["expected/lh_pred"]) < 1e-5
    again = CliRunner().invoke(cli, arguments)
    assert "holds a run already" in str(again.exception)


def test_families_of_sixteen_queries_use_the_first_of_each_half(case, tmp_path, subject):
    """The published code gives every family 16 queries; a hemisphere reads its own half from the front."""
    g = torch.Generator().manual_seed(0)
    embed = torch.randn(16, 32, generator=g)
    path = save(tmp_path, case, state=case.state | {"query_embed.weight": embed}, readout_res="places", num_queries=16)

    model = load_published(path, subject)

    assert model.queries.labels == ("OPA", "PPA", "RSC", "remainder")
    assert torch.equal(model.query_embed.weight, torch.cat([embed[:4], embed[8:12]]))


@pytest.fixture
def imported(small, tmp_path):
    """The command that imports a checkpoint of the small subject, which has images, responses and features."""
    config = EncoderConfig(hidden=16, n_heads=2, feedforward=32, dropout=0.0)
    queries = Subject.open(small.subject_dir).rois.queries("rois_all")
    state = published_state(build_encoder(config, queries, channels=16, grid=(4, 4)))
    args = argparse.Namespace(encoder_arch="transformer", readout_res="rois_all", nheads=2, dim_feedforward=32)
    torch.save({"model": state, "args": args, "epoch": 3, "val_perf": 0.1}, tmp_path / "checkpoint.pth")
    what = [tmp_path / "checkpoint.pth", "--subject-dir", small.subject_dir]
    where = ["--store", small.store, "--feature", "tiny/1.q", "--out", tmp_path / "run"]
    return [str(word) for word in ["import-checkpoint", *what, *where]]


def test_an_imported_run_is_scored_on_the_images_that_its_checkpoint_left_out(imported, small, tmp_path, capsys):
    """`--split` is the published run's own: validation is on its last tenth, also after the file is gone."""
    indices = np.random.default_rng(5).permutation(45)
    np.save(tmp_path / "idxs.npy", indices)

    assert brainenc([*imported, "--split", str(tmp_path / "idxs.npy")]) == 0
    (tmp_path / "idxs.npy").unlink()
    assert brainenc(["evaluate", str(tmp_path / "run"), "--json"]) == 0

    said = capsys.readouterr()
    assert "WARNING" not in said.err
    assert json.loads(said.out.splitlines()[-1])["n_images"] == 5
    np.testing.assert_array_equal(np.load(tmp_path / "run/idxs.npy"), indices)
    ids = Subject.open(small.subject_dir).ids("train")
    samples = part_samples(open_run(tmp_path / "run"), "val")
    assert samples.ids == [ids[i] for i in indices[40:]]


def test_without_a_split_the_scores_are_warned_of(imported, tmp_path, capsys):
    """At the import, whenever it is scored, and when it is trained on, until somebody brings the split."""
    run = str(tmp_path / "run")
    resume = ["train", "--resume", run, "--workers", "0", "--no-guard", "--epochs", "1"]

    for command in (imported, ["evaluate", run], resume, ["evaluate", run]):
        assert brainenc(command) == 0, command
        said = capsys.readouterr().err
        assert said.count("was imported without --split") == 1, command
        assert "come out too high" in said
    assert brainenc(["evaluate", run, "--split", "test"]) == 1
    assert "without --split" not in capsys.readouterr().err, "test images are nobody's training images"
    np.save(tmp_path / "run/idxs.npy", np.arange(45))
    assert brainenc(["evaluate", run]) == 0
    assert "without --split" not in capsys.readouterr().err


@pytest.mark.parametrize("indices", [np.arange(44), np.zeros(45, int)])
def test_a_split_of_other_images_imports_nothing(imported, tmp_path, capsys, indices):
    np.save(tmp_path / "idxs.npy", indices)

    assert brainenc([*imported, "--split", str(tmp_path / "idxs.npy")]) == 1

    assert "wanted each of the numbers 0 to 44 once" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_split_wants_the_images_that_it_numbers(case, tmp_path, subject):
    """ROI masks are enough to import a checkpoint, not to check its split."""
    np.save(tmp_path / "idxs.npy", np.arange(45))

    with pytest.raises(NotASubject, match="training_images"):
        import_published(save(tmp_path, case), subject, tmp_path / "run", split=tmp_path / "idxs.npy")
    assert not (tmp_path / "run").exists()
