"""The record by which a method's room shows itself to the rest of the house."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np

__all__ = ["Check", "CheckResult", "Figure", "FigurePicture", "Method", "NamedFamily"]


class NamedFamily(Protocol):
    """A family of foreign checkpoints, see `instseg_ext.checkpoint.Family`."""

    @property
    def name(self) -> str:
        """The name under which the converter finds it."""


class FigurePicture(NamedTuple):
    """A picture to draw a figure of.

    Attributes:
        name: what its files are named after.
        picture: (H, W, 3) uint8 BGR; not to be modified.
        annotations: of the objects in it, in detectron2's form (``bbox``, ``bbox_mode``,
            ``segmentation``, ``category_id``, ``iscrowd``), in pixels of ``picture``. None where
            nobody annotated it, as with a file of the user's own; the empty list says that there
            is no object.
    """

    name: str
    picture: np.ndarray
    annotations: list[dict[str, Any]] | None


class Figure(Protocol):
    """Draws one kind of figure of ``instseg visualize``."""

    def __call__(
        self,
        cfg: Any,
        make_predictor: Callable[[], Any],
        pictures: Sequence[FigurePicture],
        folder: Path,
    ) -> Sequence[Path]:
        """Draw.

        Args:
            cfg: the config; not modified.
            make_predictor: gives the ``engine.predictor.Predictor`` of ``cfg``, and builds it at
                the first call: a figure that needs no model does not call it, and then needs no
                weights.
            pictures: read one by one as they are taken, so take each of them once.
            folder: where the files go; it exists.

        Returns:
            The files, the one to open first last.
        """


class CheckResult(NamedTuple):
    """What a check found out.

    Attributes:
        passed: nothing is wrong.
        text: what was measured, and what to change if something is wrong; sentences.
    """

    passed: bool
    text: str


class Check(Protocol):
    """Tells from pictures without annotations whether a model is used as it was trained."""

    def __call__(self, predictor: Any, pictures: Iterable[np.ndarray]) -> CheckResult:
        """Run the model.

        Args:
            predictor: an ``engine.predictor.Predictor``.
            pictures: (H, W, 3) uint8 BGR, read one by one as they are taken.

        Raises:
            ValueError: if these pictures cannot decide it; the message says which could.
        """


@dataclass(frozen=True)
class Method:
    """Everything that commands, trainer and evaluation need to know about one method.

    Attributes:
        name: display name and folder under ``projects/``.
        add_config: adds the method's config node to a config.
        meta_architectures: registered META_ARCHITECTURE names that this method owns.
        components: ROI_HEADS, ROI_MASK_HEAD or PROPOSAL_GENERATOR names by which the method claims
            a two-stage model that another method's meta-architecture carries.
        replaces: registered names of reference code whose config files work here, and what takes
            their place.
        class_count_keys: config keys that hold the number of foreground classes.
        score_threshold_keys: config keys that keep low-scoring candidates out of the results. A
            command that wants lower scores lowers them; it never raises them, since that would
            change the suppression.
        build_mapper: ``(cfg, is_train) -> mapper``; ``None`` means the shared mapper.
        build_source: ``(cfg, training set, seed) -> source``, see ``data.TrainLoader``, for a
            method that draws its training samples from the whole set; ``None`` means that the
            mapper makes one of each image.
        evaluator_hints: from a config to options for the evaluator, such as
            ``{"segm_score_field": "mask_scores"}``.
        converters: families of foreign checkpoints that hold this method's models; the zoo
            registers them.
        export_wrapper: what export traces; ``None`` means the method has no export.
        figures: extra figures of ``instseg visualize`` by name, see ``Figure``.
        checks: from a config to the checks of ``instseg check-model`` by name, see ``Check``.
        evaluate_patches: ``(cfg, model, data set, its name, batch=...) -> figures``, what
            ``instseg evaluate-patches`` reports; ``None`` for methods that are trained on images.
    """

    name: str
    add_config: Callable[[Any], None]
    meta_architectures: tuple[str, ...] = ()
    components: tuple[str, ...] = ()
    replaces: Mapping[str, str] = field(default_factory=dict)
    class_count_keys: tuple[str, ...] = ()
    score_threshold_keys: tuple[str, ...] = ()
    build_mapper: Callable[[Any, bool], Callable[[dict], dict | None]] | None = None
    build_source: (
        Callable[[Any, list[dict], int], Callable[[int, np.random.Generator], dict | None]] | None
    ) = None
    evaluator_hints: Callable[[Any], Mapping[str, object]] = lambda cfg: {}
    converters: tuple[NamedFamily, ...] = ()
    export_wrapper: Callable | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    checks: Callable[[Any], Mapping[str, Check]] = lambda cfg: {}
    evaluate_patches: Callable[..., dict[str, Any]] | None = None
