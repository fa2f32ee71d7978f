"""The code on the store's page runs, and does what its comments say."""

import re
from pathlib import Path

import numpy as np


def test_the_guides_code_runs_as_it_stands(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "store.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for _ in range(2):  # the second time everything is there already
        exec(compile(code, "docs/store.md", "exec"), names)
    half = names["features"].astype(np.float16)
    assert names["view"].shape == (100, 49, 64)
    np.testing.assert_array_equal(names["batch"], half[names["order"][:32]])
    np.testing.assert_array_equal(names["everything"][:], half[::-1])
