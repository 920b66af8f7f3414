"""How good a seed each cell is, and which are chosen."""

import pytest
import torch

from instseg_ext.methods.metric_learning import seeds as seeds_module
from instseg_ext.methods.metric_learning.seeds import SeedRule, seediness, select_seeds


def by_definition(points, scores, rule):
    """Compare with all chosen seeds anew in each step, in double precision."""
    points, scores = points.double(), scores.double()
    chosen = [int(scores.argmax())]
    while len(chosen) < min(rule.num_seeds, len(scores)):
        distances = (points[:, None] - points[chosen]).square().sum(dim=2)
        if rule.kind == "log":
            nearest = distances.amin(dim=1).clamp(min=1e-6)
            gain = scores.log() + rule.alpha * nearest.log()
        else:
            gain = scores - rule.sim_weight * (2 / (1 + distances.exp())).amax(dim=1)
        gain[chosen] = -torch.inf
        chosen.append(int(gain.argmax()))
    return chosen


@pytest.mark.parametrize("kind", ["log", "sim"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 2.0])
def test_acceptance_check_8_the_running_minimum_is_the_definition(kind, weight):
    torch.manual_seed(0)
    points, scores = torch.randn(200, 6), torch.rand(200)
    rule = SeedRule(kind, alpha=weight, sim_weight=weight, num_seeds=60)
    assert select_seeds(points, scores, rule).tolist() == by_definition(points, scores, rule)


def test_acceptance_check_7_without_diversity_the_best_come_first():
    torch.manual_seed(0)
    scores = torch.rand(50)
    found = select_seeds(torch.randn(50, 4), scores, SeedRule(alpha=0.0, num_seeds=50))
    assert found.tolist() == scores.sort(descending=True).indices.tolist()


def test_acceptance_check_7_with_much_diversity_the_farthest_comes_next():
    torch.manual_seed(0)
    points, scores = torch.randn(50, 4), torch.rand(50)
    first, second = select_seeds(points, scores, SeedRule(alpha=100.0, num_seeds=2)).tolist()
    assert first == scores.argmax()
    assert second == (points - points[first]).square().sum(dim=1).argmax()


@pytest.mark.parametrize("rule", [SeedRule(), SeedRule(alpha=0.0), SeedRule("sim")])
def test_cells_of_equal_embeddings_are_chosen_once_each(rule):
    found = select_seeds(torch.ones(20, 3), torch.zeros(20), rule)
    assert sorted(found.tolist()) == list(range(20))


def test_no_candidates():
    assert select_seeds(torch.zeros(0, 3), torch.zeros(0), SeedRule()).tolist() == []


def test_neither_input_is_changed():
    points, scores = torch.randn(9, 3), torch.rand(9)
    copies = points.clone(), scores.clone()
    for kind in ("log", "sim"):
        select_seeds(points, scores, SeedRule(kind))
    assert torch.equal(points, copies[0])
    assert torch.equal(scores, copies[1])


def test_seediness_is_the_best_probability_of_a_class(monkeypatch):
    monkeypatch.setattr(seeds_module, "_CELLS", 7)
    torch.manual_seed(0)
    logits = torch.randn(3, 5, 20) * 3
    found = seediness(logits)
    probs = logits.softmax(dim=1)[:, :-1]
    for cell in range(20):
        best = probs[..., cell].max()
        assert found.scores[cell] == pytest.approx(best.item(), rel=1e-5)
        tau, kind = found.taus[cell], found.classes[cell]
        assert probs[tau, kind, cell] == best


def test_logits_that_are_not_finite_give_no_finite_score():
    logits = torch.zeros(2, 3, 2)
    logits[0, 1, 0], logits[1, 0, 1] = torch.nan, torch.inf
    assert not seediness(logits).scores.isfinite().any()
