"""Read weight files without running the code they may contain.

``.pth .pt .pyth .bin`` through torch's weights-only unpickler (plain numpy arrays are allowed),
``.safetensors``, ``.pkl`` (detectron2's model zoo) through an unpickler that knows numpy arrays and
builtin containers and nothing else, ``.caffemodel`` through protobuf, and ``.t7`` of Lua Torch by a
reader that passes over its functions. HDF5 of Caffe and the ``.params`` of MXNet are known by their
first bytes, whatever the file is called.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.utils.file_io import PathManager

from instseg_ext.checkpoint.caffe_files import HDF5_MAGIC, read_caffe_hdf5, read_caffemodel
from instseg_ext.checkpoint.mxnet_files import MXNET_MAGIC, read_mxnet
from instseg_ext.checkpoint.pickles import load_restricted, torch_safe_globals
from instseg_ext.checkpoint.torch7_files import CLASS, read_torch7, torch7_weights

__all__ = ["fetch_weights", "read_metadata", "read_weights"]

_TORCH_SUFFIXES = (".pth", ".pt", ".pyth", ".bin")
_READERS_BY_MAGIC = {HDF5_MAGIC: read_caffe_hdf5, MXNET_MAGIC: read_mxnet}
# What files of other frameworks are called, and what they then are.
_MARKED_SUFFIXES = {".h5": "HDF5", ".hdf5": "HDF5", ".params": "file of MXNet"}
_REMEDY = "if you trust its source, pass --unsafe, which lets it run code while it is read"
# What damaged or foreign content raises in pickle, zipfile and torch.
_READ_ERRORS = (
    pickle.UnpicklingError,
    zipfile.BadZipFile,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    RuntimeError,
    TypeError,
    UnicodeDecodeError,
    ValueError,
)


def fetch_weights(path: str) -> str:
    """Return the local file that ``path`` means, downloading it if it is a URL.

    Args:
        path: a local path, or anything detectron2's ``PathManager`` opens (``http(s)://``,
            ``detectron2://``), optionally with a ``?query``, which is dropped.

    Raises:
        FileNotFoundError: if there is no such file or it cannot be downloaded.
    """
    name = path.partition("?")[0]
    try:
        local = PathManager.get_local_path(name)
    except (OSError, ValueError) as error:  # urllib's URLError is an OSError
        raise FileNotFoundError(
            f"the weights {path} cannot be fetched ({_first_line(error)}): check the address and "
            "the network, or download the file and give its path as MODEL.WEIGHTS."
        ) from error
    if not Path(local).is_file():
        raise FileNotFoundError(
            f"the weights {path} do not exist: correct MODEL.WEIGHTS, or set it to '' to start "
            "from random weights."
        )
    return str(local)


def read_weights(path: str, unsafe: bool = False) -> dict[str, Any]:
    """Read a weight file or training checkpoint on the CPU.

    Args:
        path: local file, see the module's docstring for the formats.
        unsafe: allow arbitrary pickles, which can run any code.

    Returns:
        A dict whose ``"model"`` entry maps parameter names to tensors or arrays. Wrappers
        (``model``, ``state_dict``, pycls' ``model_state``, detectron1's ``blobs``) are taken off;
        what else the file held stays beside it. ``__author__`` and ``matching_heuristics`` are set
        where detectron2 sets them: for files whose names need matching.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the format is unknown, damaged, or needs ``unsafe``.
        ImportError: if the format needs a package that is not installed.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"the weights {path} do not exist.")
    with open(file, "rb") as stream:
        read = _READERS_BY_MAGIC.get(stream.read(8))
    if read is not None:
        return {"model": read(file)}
    if file.suffix in _MARKED_SUFFIXES:
        raise ValueError(
            f"{path} is no {_MARKED_SUFFIXES[file.suffix]}: it is damaged, not completely "
            "downloaded, or misnamed."
        )
    if file.suffix == ".caffemodel":
        return {"model": read_caffemodel(file)}
    if file.suffix == ".pkl":
        return _unwrap_pickle(_read_pickle(file, unsafe), file)
    if file.suffix == ".t7":
        return _unwrap_torch7(read_torch7(file), file)
    if file.suffix == ".safetensors":
        return {"model": _read_safetensors(file)}
    if file.suffix not in _TORCH_SUFFIXES:
        raise ValueError(
            f"{path} has an unknown suffix: weights are {', '.join(_TORCH_SUFFIXES)}, "
            ".safetensors, .pkl, .caffemodel, .h5, .params or .t7."
        )
    return _unwrap_torch(_read_torch(file, unsafe), file)


def read_metadata(path: str) -> dict[str, Any]:
    """Read what one of our checkpoints says about itself, without reading its tensors.

    Args:
        path: local file.

    Returns:
        The ``"instseg_ext"`` entry: ``class_names`` (list of str), ``config`` (YAML text),
        ``version``; an empty dict for the files of others.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file cannot be read safely.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"the checkpoint {path} does not exist.")
    # Our checkpoints are zip files, which can be mapped; older formats are not ours.
    if file.suffix not in _TORCH_SUFFIXES or not zipfile.is_zipfile(file):
        return {}
    content = _read_torch(file, unsafe=False, mmap=True)
    metadata = content.get("instseg_ext", {}) if isinstance(content, dict) else {}
    return dict(metadata)


# --- formats -------------------------------------------------------------------------------------


def _read_torch(file: Path, unsafe: bool, mmap: bool = False) -> Any:
    """Load with torch: tensors and numpy arrays, or anything if ``unsafe``."""
    try:
        with torch.serialization.safe_globals(torch_safe_globals()):
            return torch.load(file, map_location="cpu", weights_only=not unsafe, mmap=mmap)
    except _READ_ERRORS as error:
        raise _unreadable(file, error, unsafe) from error


def _read_pickle(file: Path, unsafe: bool) -> Any:
    with open(file, "rb") as stream:
        try:
            if unsafe:
                return pickle.load(stream, encoding="latin1")
            return load_restricted(stream)
        except _READ_ERRORS as error:
            raise _unreadable(file, error, unsafe) from error


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise ImportError(
            f"reading {file} needs safetensors: pip install 'instseg_ext[safetensors]'."
        ) from error
    try:
        return load_file(file, device="cpu")
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is not a safetensors file ({_first_line(error)}).") from error


def _unreadable(file: Path, error: Exception, unsafe: bool) -> ValueError:
    """Word the failure: refused content has a remedy, damaged content has none."""
    text = str(error)
    # Torch words it in several ways, ours is "it refers to".
    refused = re.search(r"(?:global:? |it refers to )([\w.]+)", text, re.IGNORECASE)
    if refused and isinstance(error, pickle.UnpicklingError) and not unsafe:
        return ValueError(
            f"{file} is more than weights (it refers to {refused[1].rstrip('.')}): {_REMEDY}."
        )
    return ValueError(f"{file} cannot be read ({_first_line(error)}): it is damaged or no weights.")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


# --- wrappers ------------------------------------------------------------------------------------


def _unwrap_pickle(content: Any, file: Path) -> dict[str, Any]:
    """Take off the wrappers of detectron2's and detectron1's pickles."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dict of weights.")
    if "model" in content and "__author__" in content:
        return content
    blobs = content.get("blobs", content)
    weights = {key: value for key, value in blobs.items() if not key.endswith("_momentum")}
    return {
        "model": _checked(weights, file),
        "__author__": "Caffe2",
        "matching_heuristics": True,
    }


def _unwrap_torch(content: Any, file: Path) -> dict[str, Any]:
    """Take off the wrappers under which training frameworks store a state dict."""
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not a dict of weights.")
    if isinstance(content.get("model"), dict):
        return {**content, "model": _checked(content["model"], file)}
    if isinstance(content.get("state_dict"), dict):
        rest = {key: value for key, value in content.items() if key != "state_dict"}
        return {**rest, "model": _checked(content["state_dict"], file)}
    if isinstance(content.get("model_state"), dict):
        state = content["model_state"]
        weights = {k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}
        return {
            "model": _checked(weights, file),
            "__author__": "pycls",
            "matching_heuristics": True,
        }
    return {"model": _checked(content, file)}


def _unwrap_torch7(content: Any, file: Path) -> dict[str, Any]:
    """Name the tensors of a Torch file; of a table with a model, those of the model."""
    rest: dict[str, Any] = {}
    is_table = isinstance(content, dict) and CLASS not in content
    if is_table and isinstance(content.get("model"), dict):
        rest = {str(key): value for key, value in content.items() if key != "model"}
        content = content["model"]
    weights = torch7_weights(content)
    if not weights:
        raise ValueError(f"{file} holds no weights: there is no tensor of floats in it.")
    return {**rest, "model": weights}


def _checked(weights: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return ``weights`` if it maps names to tensors.

    Raises:
        ValueError: naming the first entry that is none.
    """
    for key, value in weights.items():
        if not isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
            raise ValueError(
                f"{file} is no state dict: its entry {key!r} is a {type(value).__name__}; expected "
                "tensors by name, or a dict with 'model' or 'state_dict'."
            )
    return weights
