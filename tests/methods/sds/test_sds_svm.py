"""Support vector machines and logistic regression of SDS; numbers are the sheet's checks."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from instseg_ext.methods.sds.logistic import fit_logistic
from instseg_ext.methods.sds.svm import MinedSvm, SvmOptions, fit_svm

EXACT = SvmOptions(c=0.1, bias_value=1.0, tolerance=1e-5)


def samples(num=300, dim=8, seed=0):
    rng = np.random.default_rng(seed)
    positive = np.arange(num) % 5 == 0
    return rng.normal(size=(num, dim)) + 0.5 * positive[:, None], positive


def test_two_samples_at_their_bounds():
    """Check 12: the duals are at 2C and C, so that w is 0.3."""
    options = SvmOptions(c=0.1, bias_value=0.0)
    svm = fit_svm(np.array([[1.0], [-1.0]]), np.array([True, False]), options)
    assert svm.weight == pytest.approx([0.3])
    assert svm.duals == pytest.approx([0.2, 0.1])
    assert svm.bias == 0
    assert svm.objective == pytest.approx(0.045 + 0.2 * 0.7 + 0.1 * 0.7)


def test_against_a_general_solver():
    """Check 12: the same minimum as that of the dual by another method."""
    features, positive = samples()
    svm = fit_svm(features, positive, EXACT)
    sign = np.where(positive, 1, -1)
    part = np.concatenate([features, np.ones((300, 1))], axis=1) * sign[:, None]
    bounds = [(0, 0.2 if p else 0.1) for p in positive]
    found = minimize(
        lambda a: ((a @ part) @ (a @ part) / 2 - a.sum(), part @ (a @ part) - 1),
        np.zeros(300),
        jac=True,
        bounds=bounds,
        method="L-BFGS-B",
        options={"maxiter": 5000, "ftol": 1e-15, "gtol": 1e-9},
    )
    weight = found.x @ part
    assert svm.weight == pytest.approx(weight[:-1], abs=1e-3)
    assert svm.bias == pytest.approx(weight[-1], abs=1e-3)
    # No gap is left between the two problems.
    assert svm.objective == pytest.approx(-found.fun, abs=1e-5)


def test_fits_repeat_and_accept_any_precision():
    features, positive = samples()
    half = fit_svm(features.astype(np.float16), positive, EXACT)
    again = fit_svm(features.astype(np.float16), positive, EXACT)
    assert np.array_equal(half.weight, again.weight)
    assert half.weight == pytest.approx(fit_svm(features, positive, EXACT).weight, abs=1e-2)


def test_nothing_to_fit():
    svm = fit_svm(np.zeros((0, 3)), np.zeros(0, bool), EXACT)
    assert not svm.weight.any()
    assert svm.bias == 0
    zeros = fit_svm(np.zeros((2, 3)), np.array([True, False]), SvmOptions(bias_value=0.0))
    assert not zeros.weight.any()


def test_mining():
    """Check 15: keys are unique, easy negatives leave, the objective does not rise."""
    features, positive = samples(num=600)
    negatives, keys = features[~positive], np.flatnonzero(~positive)
    mined = MinedSvm(SvmOptions(c=0.1, bias_value=1.0, retrain=50), features[positive])
    assert mined.add(negatives[:100], keys[:100]) == 100  # the first fit takes all
    assert mined.model is not None
    for start in range(0, len(keys), 60):
        mined.add(negatives[start : start + 60], keys[start : start + 60])
        assert len(set(mined.keys.tolist())) == len(mined.keys)
    first = mined.fit()
    scores = mined.negatives @ first.weight + first.bias
    assert scores.min() > -1.2
    assert 0 < len(mined.keys) < len(keys)
    second = mined.fit()
    assert second.objective <= first.objective + 1e-9
    # What is left out has no part in the solution: mined and full training agree.
    full = fit_svm(features, positive, SvmOptions(c=0.1, bias_value=1.0))
    mined.add(negatives, keys)
    assert mined.fit().weight == pytest.approx(full.weight, abs=0.02)


def test_positives_may_be_replaced():
    features, positive = samples()
    mined = MinedSvm(EXACT, features[positive])
    mined.add(features[~positive], np.flatnonzero(~positive))
    mined.replace_positives(features[positive][:7])
    kept = len(mined.negatives)
    anew = fit_svm(
        np.concatenate([mined.positives, mined.negatives]), np.arange(7 + kept) < 7, EXACT
    )
    assert mined.fit().weight == pytest.approx(anew.weight, abs=1e-5)


def test_logistic_of_two_samples():
    """Check 13: w is the root of w = sigmoid(-w)."""
    features = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    weight, bias = fit_logistic(features, torch.tensor([[True], [False]]), 0.5, bias=False)
    assert weight.item() == pytest.approx(0.40106, abs=1e-5)
    assert bias.item() == 0


def test_logistic_labels_are_independent():
    features, positive = samples(num=60)
    features = torch.from_numpy(features)
    labels = torch.stack([torch.from_numpy(positive), torch.arange(60) % 2 == 0], dim=1)
    labels = torch.cat([labels, torch.ones(60, 1, dtype=torch.bool)], dim=1)
    weight, bias = fit_logistic(features, labels, 1.0)
    for i in range(3):
        alone, alone_bias = fit_logistic(features, labels[:, i : i + 1], 1.0)
        torch.testing.assert_close(weight[i], alone[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(bias[i], alone_bias[0], atol=1e-5, rtol=0)
        # the gradient vanishes
        residual = torch.sigmoid(features @ weight[i] + bias[i]) - labels[:, i].double()
        assert (weight[i] + residual @ features).abs().max() < 1e-4
    assert ((features @ weight[2] + bias[2]) > 0).all()  # a label that all samples have


def test_logistic_without_samples():
    weight, bias = fit_logistic(torch.zeros(0, 3), torch.zeros(0, 2, dtype=torch.bool), 1.0)
    assert weight.shape == (2, 3)
    assert not weight.any()
    assert not bias.any()
