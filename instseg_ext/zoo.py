"""The composition root: the only module that knows every method."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from instseg_ext import compat

# A missing or unusable detectron2 must end in one sentence, before the first module that imports
# it.
compat.require_detectron2()

from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.modeling import (  # noqa: E402
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    SEM_SEG_HEADS_REGISTRY,
)

from instseg_ext import checkpoint  # noqa: E402
from instseg_ext import config as config_nodes  # noqa: E402
from instseg_ext.data import add_data_config, register_bundled, register_from_config  # noqa: E402
from instseg_ext.method import Method  # noqa: E402
from instseg_ext.methods import (  # noqa: E402
    deepmask,
    fcis,
    mask_rcnn,
    metric_learning,
    mnc,
    multipathnet,
    panet,
    pointrend,
    polarmask,
    sds,
    solo,
    yolact,
)

__all__ = [
    "METHODS",
    "add_instseg_config",
    "class_count",
    "get_config",
    "load_config",
    "method_of",
    "set_class_count",
]

METHODS: tuple[Method, ...] = (
    solo.METHOD,
    yolact.METHOD,
    polarmask.METHOD,
    pointrend.METHOD,
    pointrend.SEMANTIC_METHOD,
    panet.METHOD,
    mnc.METHOD,
    fcis.METHOD,
    deepmask.METHOD,
    multipathnet.METHOD,
    metric_learning.METHOD,
    sds.METHOD,
    mask_rcnn.METHOD,
)

for _method in METHODS:
    for _family in _method.converters:
        checkpoint.register_family(_family)


def add_instseg_config(cfg: CfgNode) -> None:
    """See ``instseg_ext.add_instseg_config``."""
    if cfg.is_frozen():
        raise ValueError(
            "add_instseg_config needs a config that is not frozen; call it before cfg.freeze()."
        )
    defaults = get_cfg()
    config_nodes.add_shared_config(defaults)
    add_data_config(defaults)
    for method in METHODS:
        method.add_config(defaults)
    config_nodes.add_missing(cfg, defaults)
    register_bundled()


def load_config(name_or_path: str, opts: Sequence[object] = ()) -> tuple[CfgNode, frozenset[str]]:
    """Return the config of ``get_config`` and the keys that ``opts`` typed."""
    cfg = get_cfg()
    add_instseg_config(cfg)
    file = config_nodes.find_config(name_or_path)
    config_nodes.merge_file(cfg, file)
    # A dumped config keeps the name of the one it came from.
    cfg.INSTSEG.CONFIG = cfg.INSTSEG.CONFIG or config_nodes.display_name(file)
    typed = config_nodes.merge_overrides(cfg, opts)
    config_nodes.resolve_device(cfg, typed)
    # These raise early on a value that no model could be built with.
    _check_names(cfg)
    method_of(cfg)
    config_nodes.resolve_precision(cfg)
    register_from_config(cfg)
    return cfg, typed


def get_config(name_or_path: str, opts: Sequence[object] = ()) -> CfgNode:
    """See ``instseg_ext.get_config``."""
    return load_config(name_or_path, opts)[0]


def method_of(cfg: CfgNode) -> Method:
    """Return the record of the method that ``cfg`` describes.

    Raises:
        ValueError: if no method here owns the configured architecture.
    """
    name = cfg.MODEL.META_ARCHITECTURE
    owners = [method for method in METHODS if name in method.meta_architectures]
    if not owners:
        known = sorted(n for method in METHODS for n in method.meta_architectures)
        raise ValueError(
            f"MODEL.META_ARCHITECTURE {name!r} belongs to no method here; "
            f"known: {', '.join(known)}."
        )
    if owners[0] is not mask_rcnn.METHOD:
        return owners[0]
    # Two-stage methods share Mask R-CNN's architecture and are told apart by the parts they bring.
    parts = {
        cfg.MODEL.ROI_HEADS.NAME,
        cfg.MODEL.ROI_MASK_HEAD.NAME,
        cfg.MODEL.PROPOSAL_GENERATOR.NAME,
    }
    claims = [method for method in METHODS if parts & set(method.components)]
    return (claims or owners)[0]


def _check_names(cfg: CfgNode) -> None:
    """Say what replaces the parts of reference code that a config file may name.

    Raises:
        ValueError: if such a part is named and nobody has registered it.
    """
    replaces = {old: new for method in METHODS for old, new in method.replaces.items()}
    for node, registry in (
        ("ROI_HEADS", ROI_HEADS_REGISTRY),
        ("ROI_MASK_HEAD", ROI_MASK_HEAD_REGISTRY),
        ("SEM_SEG_HEAD", SEM_SEG_HEADS_REGISTRY),
    ):
        name = cfg.MODEL[node].NAME
        if name in replaces and name not in registry:
            raise ValueError(
                f"MODEL.{node}.NAME {name} is not registered here: set it to {replaces[name]}, "
                "which has the same keys and parameter names."
            )


def class_count(cfg: CfgNode) -> int:
    """Return the number of foreground classes the configured model predicts.

    It is 1 where the method does not tell classes apart.
    """
    keys = method_of(cfg).class_count_keys
    return _get(cfg, keys[0]) if keys else 1


def set_class_count(cfg: CfgNode, count: int, typed: Collection[str] = ()) -> list[str]:
    """Set every class-count key of the configured method to the data set's count.

    Args:
        cfg: changed in place.
        count: classes of the training set.
        typed: keys the user typed; they are not overwritten but must agree.

    Returns:
        The keys whose value changed.

    Raises:
        ValueError: if a typed key holds another number.
    """
    changed = []
    for key in method_of(cfg).class_count_keys:
        old = _get(cfg, key)
        if old == count:
            continue
        if key in typed:
            raise ValueError(
                f"{key} {old} was typed, but the training set has {count} classes; "
                "leave the key out."
            )
        config_nodes.merge_overrides(cfg, [key, count])
        changed.append(key)
    return changed


def _get(cfg: CfgNode, key: str) -> int:
    node = cfg
    for name in key.split("."):
        node = node[name]
    return node
