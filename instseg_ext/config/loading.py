"""Find config files by name, load them without running code, and merge typed overrides."""

from __future__ import annotations

import difflib
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path

import yaml
from detectron2.config import CfgNode

from instseg_ext import resources

__all__ = ["config_names", "display_name", "find_config", "merge_file", "merge_overrides"]


def config_names() -> list[str]:
    """Return the names of all configs a user can ask for, such as ``"SOLO/solov2_R_50_FPN_1x"``."""
    files = resources.root().glob("projects/*/configs/*.yaml")
    return sorted(
        f"{f.parent.parent.name}/{f.stem}" for f in files if not f.stem.startswith("Base")
    )


def find_config(name_or_path: str) -> Path:
    """Return the file that ``name_or_path`` means.

    Args:
        name_or_path: an existing file, or ``<Project>/<config>`` with or without ``.yaml``.

    Raises:
        FileNotFoundError: if there is neither; the message lists the nearest names.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    # The relative path of the checkout works from anywhere, also after `pip install`.
    candidates = [resources.root() / path]
    project, _, stem = name_or_path.removesuffix(".yaml").partition("/")
    if stem:
        candidates.append(resources.root() / "projects" / project / "configs" / f"{stem}.yaml")
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    names = config_names()
    near = difflib.get_close_matches(name_or_path, names, n=3, cutoff=0.4) or names[:3]
    raise FileNotFoundError(
        f"Config {name_or_path!r} is neither a file nor a known name; nearest: {', '.join(near)}. "
        "`instseg models` lists all of them."
    )


def display_name(path: Path) -> str:
    """Return ``<Project>/<config>`` for a file of ``projects``, else the file's name."""
    path = path.resolve()
    if path.parent.parent.parent == (resources.root() / "projects").resolve():
        return f"{path.parent.parent.name}/{path.stem}"
    return path.name


def merge_file(cfg: CfgNode, path: Path) -> None:
    """Merge a YAML file and its ``_BASE_`` files, refusing tags that construct Python objects.

    Args:
        cfg: changed in place.
        path: the file.

    Raises:
        ValueError: if the file is no valid YAML, asks for Python objects, or holds a value of the
            wrong type.
        KeyError: if it holds an unknown key; the message lists the nearest keys.
    """
    try:
        cfg.merge_from_file(str(path), allow_unsafe=False)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Config {path} cannot be read as plain YAML: {reason}") from error
    except KeyError as error:
        key = str(error.args[0]).rpartition(": ")[2]
        raise KeyError(f"Config {path}: {_unknown_key(cfg, key)}") from error
    except (ValueError, AssertionError) as error:
        raise ValueError(f"Config {path}: {error}") from error


def merge_overrides(cfg: CfgNode, opts: Sequence[object]) -> frozenset[str]:
    """Merge alternating keys and values, as typed on a command line.

    An int is accepted where the config holds a float, anything is accepted where it holds a string.

    Args:
        cfg: changed in place.
        opts: ``[key, value, key, value, ...]``; values that are strings are read as Python literals
            if they are.

    Returns:
        The keys that were set.

    Raises:
        KeyError: if a key is unknown; the message lists the nearest keys.
        ValueError: if a key has no value or a value has the wrong type.
    """
    opts = list(opts)
    if opts and opts[0] == "--":
        opts = opts[1:]
    if len(opts) % 2:
        raise ValueError(f"Overrides come in pairs KEY VALUE, but {opts[-1]!r} has no partner.")
    for key, text in zip(opts[::2], opts[1::2], strict=True):
        _set(cfg, str(key), text)
    return frozenset(str(key) for key in opts[::2])


def _set(cfg: CfgNode, key: str, text: object) -> None:
    *parents, leaf = key.split(".")
    node = cfg
    for name in parents:
        node = node.get(name) if isinstance(node, CfgNode) else None
    if not isinstance(node, CfgNode) or leaf not in node:
        raise KeyError(_unknown_key(cfg, key))
    old = node[leaf]
    if isinstance(old, CfgNode):
        raise ValueError(
            f"{key} is a group of keys, not a value; set one of "
            f"{', '.join(f'{key}.{k}' for k in old)}."
        )
    node[leaf] = _coerce(key, old, text)


def _coerce(key: str, old: object, text: object) -> object:
    if isinstance(old, str):
        return str(text)
    value = text
    if isinstance(text, str):
        try:
            value = literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
    if isinstance(old, bool) or isinstance(value, bool):
        matches = isinstance(old, bool) and isinstance(value, bool)
    elif isinstance(old, float) and isinstance(value, int):
        return float(value)
    elif isinstance(old, (list, tuple)) and isinstance(value, (list, tuple)):
        return type(old)(value)
    else:
        matches = old is None or isinstance(value, type(old))
    if not matches:
        raise ValueError(f"{key} wants a {type(old).__name__} such as {old!r}, not {text!r}.")
    return value


def _unknown_key(cfg: CfgNode, key: str) -> str:
    near = difflib.get_close_matches(key, list(_keys(cfg)), n=3, cutoff=0.5)
    return f"there is no config key {key}" + (f"; nearest: {', '.join(near)}." if near else ".")


def _keys(node: CfgNode, prefix: str = "") -> list[str]:
    keys = []
    for name, value in node.items():
        keys += (
            _keys(value, f"{prefix}{name}.") if isinstance(value, CfgNode) else [f"{prefix}{name}"]
        )
    return keys
