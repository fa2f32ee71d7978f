"""The store's scripts of ``examples/``: on a store that they make, and on one that they are given."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from tests.featurestore.making import KEY, ids, make_view

EXAMPLES = Path(__file__).parents[2] / "examples"


def main(name, *argv):
    """Run a script's ``main`` here: Ray's session is that of the tests."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([*map(str, argv)])


def test_rows_in_torch(tmp_path, capsys):
    losses = main("store_to_torch")
    said = capsys.readouterr().out
    assert "200 rows of (9, 16) torch.float16" in said
    assert "a single row is copied: False" in said
    assert losses[-1] < losses[0]
    make_view(tmp_path, 23)
    main("store_to_torch", "--store", tmp_path, "--key", KEY)
    assert "23 rows of (4, 6)" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_rows_in_ray(tmp_path, capsys):
    assert len(main("store_to_ray")) == 200
    _, rows = make_view(tmp_path, 23)
    found = main("store_to_ray", "--store", tmp_path, "--key", KEY)
    assert [*sorted(found)] == ids(23)
    np.testing.assert_allclose([found[one] for one in ids(23)], np.linalg.norm(rows.mean(1), axis=1), rtol=1e-5)
    assert "23 images; the longest mean token" in capsys.readouterr().out
