"""Rewards of one question, dealt out anew."""

import pytest
import torch

from tprl.build import load_component
from tprl.errors import UserError
from tprl.rewards import WeightedReward
from tprl.rewards.permuted import Permuted
from tprl.rewards.score_change import ScoreChange
from tprl.rewards.tokens_saved import TokensSaved
from tprl.rl.gae import leave_one_out
from tprl.types import Outcome

TERMS = [ScoreChange(), TokensSaved(weight=0.5)]


def _outcome(seed: int, questions: int = 4, group: int = 6) -> Outcome:
    draw, n = torch.Generator().manual_seed(seed), questions * group
    score, kept = (
        torch.rand(3, n, generator=draw),
        torch.randint(1, 100, (3, n), generator=draw).sort(0, True).values,
    )
    return Outcome(tuple(f"q/{i // group}" for i in range(n)), kept, score=score)


def test_each_question_keeps_its_rewards_and_an_episode_its_terms_together() -> None:
    moved = 0
    for seed in range(5):
        outcome = _outcome(seed)
        right, dealt = (
            torch.cat(list(kind(TERMS)(outcome).values())) for kind in (WeightedReward, Permuted)
        )
        assert list(Permuted(TERMS)(outcome)) == ["score_change", "tokens_saved"]
        for question in range(4):
            rows = slice(6 * question, 6 * question + 6)
            before, after = (
                {tuple(column) for column in x[:, rows].T.tolist()} for x in (right, dealt)
            )
            assert before == after
        moved += int((right != dealt).any(0).sum())
    assert moved > 60  # of 120; a sixth of them stay by chance


def test_the_same_draw_for_the_same_rewards_in_any_order_of_the_questions() -> None:
    outcome = _outcome(0)
    order = torch.tensor([*range(12, 24), *range(12)])
    turned = Outcome(
        tuple(outcome.uids[i] for i in order), outcome.kept[:, order], score=outcome.score[:, order]
    )
    first, other = Permuted(TERMS)(outcome), Permuted(TERMS)(turned)
    assert all(torch.equal(first[name][:, order], other[name]) for name in first)
    assert not torch.equal(Permuted(TERMS, seed=1)(outcome)["score_change"], first["score_change"])


def test_advantages_say_nothing_about_actions() -> None:
    """The first of 8 episodes is the only right one, in 2,000 questions: its mean advantage is 0
    where it was 1."""
    score = torch.zeros(2, 8 * 2000)
    score[1, ::8] = 1.0
    # so that questions differ
    score[1] += 1e-3 * torch.rand(16_000, generator=torch.Generator().manual_seed(0))
    outcome = Outcome(
        tuple(f"q/{i // 8}" for i in range(16_000)), torch.ones(2, 16_000).long(), score=score
    )
    for kind, mean in ((WeightedReward, 1.0), (Permuted, 0.0)):
        reward = kind([ScoreChange()])(outcome)["score_change"].sum(0)
        assert leave_one_out(reward, 8)[::8].mean() == pytest.approx(mean, abs=0.03)


def test_a_question_with_one_episode_is_refused() -> None:
    with pytest.raises(UserError, match=r"and q/0 has one: set stage\.group=8"):
        Permuted(TERMS)(_outcome(0, group=1))


def test_the_packaged_reward_needs_what_log_likelihood_needs() -> None:
    assert load_component("reward", "permuted").needs == {"log_prob"}
