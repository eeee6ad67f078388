"""Which drafted tokens stay: the greedy rule, and rejection sampling with rules that are wrong."""

import pytest
import torch

from tess.kernels import reference
from tess.kernels.speculative import accept_drafts, draw_tokens, match_drafts


def test_greedy_drafts_stay_up_to_the_first_that_differs():
    drafts = torch.tensor([[5, 6, 7], [5, 9, 7], [1, 6, 7], [5, 6, 1]])
    targets = torch.tensor([5, 6, 7, 8]).expand(4, 4)
    counts, following = match_drafts(drafts, targets)
    assert counts.tolist() == [3, 1, 0, 2]
    assert following.tolist() == [8, 6, 5, 7]


def distributions(rows, drafts, vocabulary):
    q = torch.randn(rows, drafts, vocabulary).mul(1.5).softmax(-1)
    p = torch.randn(rows, drafts + 1, vocabulary)
    p[:, :-1] += q.log()
    p = p.softmax(-1)
    tokens = torch.multinomial(q.flatten(0, 1), 1).view(rows, drafts)
    return tokens, q, p, torch.rand(rows, drafts), torch.rand(rows)


@pytest.mark.parametrize("drafts", [1, 2, 6])
def test_rejection_sampling_equals_its_plain_form(drafts):
    arguments = distributions(200, drafts, 7)
    got, want = accept_drafts(*arguments), reference.accept_drafts(*arguments)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
    assert len(set(got[0].tolist())) == drafts + 1


def test_equal_distributions_accept_everything_and_zero_weights_are_never_drawn():
    tokens, q, p, accept, choose = distributions(50, 3, 5)
    p[:, :-1] = q
    counts, _ = accept_drafts(tokens, q, p, accept, choose)
    assert counts.tolist() == [3] * 50
    weights = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0]).expand(4, 5)
    drawn = draw_tokens(weights, torch.tensor([0.0, 0.29, 0.31, 1 - 2**-24]))
    assert drawn.tolist() == [1, 1, 3, 3]


def two_tokens(decide, rows=40_000):
    """Pairs of tokens that one draft and `decide` give for a two-step chain with known law."""
    torch.manual_seed(0)
    first = torch.tensor([0.5, 0.3, 0.2])
    second = torch.tensor([[0.1, 0.2, 0.7], [0.6, 0.3, 0.1], [0.3, 0.3, 0.4]])
    q = torch.tensor([0.2, 0.2, 0.6]).expand(rows, 1, 3)
    drafts = torch.multinomial(q[:, 0], 1)
    p = torch.stack([first.expand(rows, 3), second[drafts[:, 0]]], dim=1)
    counts, following = decide(drafts, q, p, torch.rand(rows, 1), torch.rand(rows))
    # a rejected draft: the token that follows is the first, and the chain goes on from it
    rejected = counts == 0
    one = torch.where(rejected, following, drafts[:, 0])
    two = torch.where(rejected, torch.multinomial(second[one], 1)[:, 0], following)
    observed = torch.zeros(9).scatter_add_(0, one * 3 + two, torch.ones(rows))
    expected = (first[:, None] * second).flatten() * rows
    return ((observed - expected) ** 2 / expected).sum().item()


def test_sampled_tokens_have_the_target_distribution_and_wrong_rules_do_not():
    limit = 26.1  # chi-squared with 8 degrees of freedom, 99.9th percentile
    assert two_tokens(accept_drafts) < limit

    def keeps_the_target_after_a_rejection(drafts, q, p, accept, choose):
        return accept_drafts(drafts, q * 0 + q.gather(-1, drafts[..., None]), p, accept, choose)

    def redraws_from_the_whole_target(drafts, q, p, accept, choose):
        counts, following = accept_drafts(drafts, q, p, accept, choose)
        whole = draw_tokens(p[torch.arange(len(p)), counts], choose)
        return counts, torch.where(counts == 0, whole, following)

    def always_accepts(drafts, q, p, accept, choose):
        return accept_drafts(drafts, q, p, accept * 0, choose)

    for wrong in (
        keeps_the_target_after_a_rejection, redraws_from_the_whole_target, always_accepts,
    ):
        assert two_tokens(wrong) > 10 * limit, wrong.__name__
