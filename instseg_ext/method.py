"""The record by which a method's room shows itself to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

__all__ = ["Method", "NamedFamily"]


class NamedFamily(Protocol):
    """A family of foreign checkpoints, see `instseg_ext.checkpoint.Family`."""

    @property
    def name(self) -> str:
        """The name under which the converter finds it."""


@dataclass(frozen=True)
class Method:
    """Everything that commands, trainer and evaluation need to know about one method.

    Attributes:
        name: display name and folder under ``projects/``.
        add_config: adds the method's config node to a config.
        meta_architectures: registered META_ARCHITECTURE names that this method owns.
        components: ROI_HEADS, ROI_MASK_HEAD or PROPOSAL_GENERATOR names by which the method claims
            a two-stage model that another method's meta-architecture carries.
        class_count_keys: config keys that hold the number of foreground classes.
        score_threshold_keys: config keys that keep low-scoring candidates out of the results. A
            command that wants lower scores lowers them; it never raises them, since that would
            change the suppression.
        build_mapper: ``(cfg, is_train) -> mapper``; ``None`` means the shared mapper.
        evaluator_hints: from a config to options for the evaluator, such as
            ``{"segm_score_field": "mask_scores"}``.
        converters: families of foreign checkpoints that hold this method's models; the zoo
            registers them.
        export_wrapper: what export traces; ``None`` means the method has no export.
        figures: extra figures of ``instseg visualize`` by name.
        commands: extra command stages by name.
    """

    name: str
    add_config: Callable[[Any], None]
    meta_architectures: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    class_count_keys: tuple[str, ...] = ()
    score_threshold_keys: tuple[str, ...] = ()
    build_mapper: Callable[[Any, bool], Callable[[dict], dict | None]] | None = None
    evaluator_hints: Callable[[Any], Mapping[str, object]] = lambda cfg: {}
    converters: tuple[NamedFamily, ...] = ()
    export_wrapper: Callable | None = None
    figures: Mapping[str, Callable] = field(default_factory=dict)
    commands: Mapping[str, Callable] = field(default_factory=dict)
