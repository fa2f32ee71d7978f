"""``mapping_<class>.npy``: label -> ROI name, as a pickled dict in a 0-d object array, read without trusting it.

The devkit's files can only be read with ``allow_pickle=True``, which runs whatever code a file brings. Here a pickle
may name NumPy's array and scalar constructors, ``ndarray``, ``dtype`` and bytes written as text, and nothing else.
"""

from __future__ import annotations

import io
import pickle
import tokenize
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from brainenc.errors import DataError


def _latin1(text: str, encoding: str) -> bytes:
    """What ``_codecs.encode`` does in pickles of protocol 2, where bytes are written as text; no other codec."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it asks for the codec {encoding}")
    return text.encode("latin1")


_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    # The functions are asked for by what NumPy itself pickles, as their home moved between versions 1 and 2.
    **{(f"numpy.{c}.multiarray", "_reconstruct"): np.zeros(()).__reduce__()[0] for c in ("core", "_core")},
    **{(f"numpy.{c}.multiarray", "scalar"): np.int64(0).__reduce__()[0] for c in ("core", "_core")},
}


_TORN_OR_FOREIGN = (
    ValueError, TypeError, AttributeError, EOFError, LookupError, ArithmeticError, MemoryError, RuntimeError,
    SyntaxError, tokenize.TokenError, pickle.PickleError,
)  # fmt: skip
"""What NumPy's header reader and an unpickler raise over bytes that are not theirs."""


class _Restricted(pickle.Unpickler):
    def find_class(self, module_name: str, global_name: str) -> Any:
        try:
            return _ALLOWED[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}") from None


def read_mapping(path: Path) -> dict[int, str]:
    """Label -> name, e.g. ``{0: 'Unknown', 1: 'OPA', 2: 'PPA', 3: 'RSC'}``.

    Raises:
        DataError: the file is no such mapping, or its pickle asks for anything but plain NumPy and Python values.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings(action="ignore"):  # NumPy's, about odd headers
            value = _read_object(file)
        return {int(label): str(name) for label, name in value.items()}
    except _TORN_OR_FOREIGN as error:
        raise DataError(
            f"{path} is not a label mapping: {error}. Wanted a 0-d object array with a dict such as "
            "{0: 'Unknown', 1: 'OPA'}, as the challenge distributes it; download it again."
        ) from error


def write_mapping(path: Path, mapping: Mapping[int, str]) -> None:
    """Write the form in which the challenge distributes mappings: ``np.load(path, allow_pickle=True).item()``."""
    np.save(path, np.array(dict(mapping), dtype=object), allow_pickle=True)


def _read_object(file: BinaryIO) -> dict[Any, Any]:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if shape != () or not dtype.hasobject:
        raise ValueError(f"it holds an array of shape {shape} and type {dtype}")
    value = _Restricted(io.BytesIO(file.read()), encoding="ASCII").load()
    inner = value.item() if isinstance(value, np.ndarray) and value.shape == () else value
    if not isinstance(inner, dict):
        raise ValueError(f"it holds a {type(inner).__name__}")
    return inner
