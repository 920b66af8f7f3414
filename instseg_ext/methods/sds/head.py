"""What SDS reads from the features of regions: classes, scores and finer masks."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from instseg_ext.methods.sds.refine import Refiner

__all__ = ["SDSHead"]


class SDSHead(nn.Module):
    """The classifier of fine-tuning, and the linear models that are fitted after it.

    Attributes:
        classifier: (K + 1) logits, the background last; serves fine-tuning only.
        svm_weight: (K, D) of features times ``feature_scale``.
        svm_bias: (K,).
        feature_scale: ().
        svm_fitted: (K,) bool. As long as no class is fitted, the classifier gives the scores.
        refiner: of the masks.
    """

    def __init__(self, num_features: int, num_classes: int, refiner: Refiner) -> None:
        """Make a head that is not fitted.

        Args:
            num_features: D.
            num_classes: K.
            refiner: for D features and K classes.
        """
        super().__init__()
        self.classifier = nn.Linear(num_features, num_classes + 1)
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)
        self.register_buffer("svm_weight", torch.zeros(num_classes, num_features))
        self.register_buffer("svm_bias", torch.zeros(num_classes))
        self.register_buffer("feature_scale", torch.ones(()))
        self.register_buffer("svm_fitted", torch.zeros(num_classes, dtype=torch.bool))
        self.refiner = refiner

    def forward(self, features: Tensor) -> Tensor:
        """Return (R, K + 1) logits of (R, D) features."""
        return self.classifier(features)

    def scores(self, features: Tensor) -> Tensor:
        """Return (R, K) scores between 0 and 1.

        Fitted, they are the logistic function of the margins, which has their order; before, the
        probabilities of the classifier.
        """
        if not bool(self.svm_fitted.any()):
            return self.classifier(features).softmax(dim=1)[:, :-1]
        margins = features * self.feature_scale @ self.svm_weight.T + self.svm_bias
        return torch.where(self.svm_fitted, margins.sigmoid(), 0.0)
