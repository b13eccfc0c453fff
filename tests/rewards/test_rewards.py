"""Reward terms against literal tables."""

import pytest
import torch

from tprl.errors import UserError
from tprl.rewards import WeightedReward
from tprl.rewards.fidelity import Fidelity
from tprl.rewards.flops_saved import FlopsSaved
from tprl.rewards.log_likelihood import LogLikelihood
from tprl.rewards.score_change import ScoreChange
from tprl.rewards.tokens_saved import TokensSaved
from tprl.types import Outcome


def outcome(**fields: list[list[float]]) -> Outcome:
    tensors = {name: torch.tensor(rows) for name, rows in fields.items()}
    kept = tensors.pop("kept", torch.tensor([[24.0] * 2, [12.0] * 2, [6.0] * 2, [2.0] * 2])).long()
    return Outcome(("a", "b"), kept[: len(next(iter(tensors.values()), kept))], **tensors)


class TestScoreChange:
    def test_the_first_step_starts_from_the_full_token_score(self) -> None:
        reading = ScoreChange()(outcome(score=[[1.0, 0.25], [0.5, 0.25], [1.0, 1.0]]))
        assert reading.tolist() == [[-0.5, 0.0], [0.5, 0.75]]

    def test_telescopes_to_final_minus_full(self) -> None:
        score = torch.rand(6, 50, generator=torch.Generator().manual_seed(0))
        result = ScoreChange()(
            Outcome(("",) * 50, torch.ones(6, 50, dtype=torch.long), score=score)
        )
        torch.testing.assert_close(result.sum(0), score[-1] - score[0])

    def test_without_a_score_it_raises(self) -> None:
        with pytest.raises(ValueError, match=r"outcome\.score, which was not measured"):
            ScoreChange()(outcome(log_prob=[[0.0, 0.0], [0.0, 0.0]]))


class TestLogLikelihood:
    def test_hopeless_states_are_floored_on_both_sides_of_a_step(self) -> None:
        measured = outcome(log_prob=[[-0.5, -9.0], [-7.0, -5.0], [-1.0, -3.0]])
        assert LogLikelihood(floor=-4.0)(measured).tolist() == [[-3.5, 0.0], [3.0, 1.0]]
        assert LogLikelihood(floor=-8.0)(measured).tolist() == [[-6.5, 3.0], [6.0, 2.0]]

    def test_without_a_measurement_it_raises(self) -> None:
        with pytest.raises(ValueError, match=r"outcome\.log_prob, which was not measured"):
            LogLikelihood()(outcome(score=[[0.0, 0.0], [0.0, 0.0]]))


class TestTokensSaved:
    def test_is_the_share_of_the_living_tokens_that_a_step_removes(self) -> None:
        reading = TokensSaved()(outcome(kept=[[24, 10], [12, 10], [3, 1]]))
        assert reading.tolist() == [[0.5, 0.0], [0.75, pytest.approx(0.9)]]

    def test_a_sample_without_images_divides_by_no_zero(self) -> None:
        assert torch.isfinite(TokensSaved()(outcome(kept=[[0, 4], [0, 2]]))).all()


class TestFidelity:
    def test_is_minus_the_rise_of_the_divergence(self) -> None:
        measured = outcome(
            answer_kl=[[0.0, 0.0], [1.5, 9.0], [0.5, 5.0]],
            agreement=[[1.0, 1.0], [0.0, 1.0], [1.0, 0.0]],
        )
        assert Fidelity(ceiling=4.0)(measured).tolist() == [[-1.5, -4.0], [1.0, 0.0]]
        assert Fidelity(agreement=2.0)(measured).tolist() == [[-3.5, -4.0], [3.0, -2.0]]

    @pytest.mark.parametrize("missing", ["answer_kl", "agreement"])
    def test_without_a_measurement_it_raises(self, missing: str) -> None:
        (there,) = {"answer_kl", "agreement"} - {missing}
        with pytest.raises(ValueError, match=rf"outcome\.{missing}, which was not measured"):
            Fidelity()(outcome(**{there: [[0.0, 0.0], [0.0, 0.0]]}))


class TestFlopsSaved:
    def test_is_a_share_of_all_flops(self) -> None:
        reading = FlopsSaved()(outcome(flops=[[200.0, 100.0], [150.0, 110.0], [50.0, 60.0]]))
        assert reading.tolist() == [[0.25, pytest.approx(-0.1)], [0.5, 0.5]]

    def test_without_a_measurement_it_raises(self) -> None:
        with pytest.raises(ValueError, match=r"outcome\.flops, which was not measured"):
            FlopsSaved()(outcome(score=[[0.0, 0.0], [0.0, 0.0]]))


class TestWeightedReward:
    def test_weights_each_term_by_its_name(self) -> None:
        reward = WeightedReward([ScoreChange(2.0), TokensSaved(0.1)])
        reading = reward(outcome(score=[[1.0, 0.0], [0.0, 1.0]], kept=[[10, 10], [5, 8]]))
        assert {name: value.tolist() for name, value in reading.items()} == {
            "score_change": [[-2.0, 2.0]],
            "tokens_saved": [[pytest.approx(0.05), pytest.approx(0.02)]],
        }

    def test_terms_by_name_are_those_of_a_list(self) -> None:
        terms = [ScoreChange(), TokensSaved(0.5)]
        measured = outcome(score=[[1.0], [0.0]], kept=[[8], [2]])
        named = WeightedReward({term.name: term for term in terms})(measured)
        listed = WeightedReward(terms)(measured)
        assert named.keys() == listed.keys()
        assert all(torch.equal(named[name], listed[name]) for name in named)

    def test_needs_what_its_terms_need(self) -> None:
        assert WeightedReward([TokensSaved()]).needs == frozenset()
        assert WeightedReward([TokensSaved(), LogLikelihood()]).needs == {"log_prob"}
        assert WeightedReward([ScoreChange(), LogLikelihood()]).needs == {"score", "log_prob"}

    @pytest.mark.parametrize(
        "terms", [[], [ScoreChange(), TokensSaved(), ScoreChange(0.5)]], ids=["none", "twice"]
    )
    def test_no_term_and_a_term_twice_are_refused(
        self, terms: list[ScoreChange | TokensSaved]
    ) -> None:
        with pytest.raises(UserError, match="at least one term, each named once"):
            WeightedReward(terms)
