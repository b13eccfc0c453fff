"""One measurement behind rewards and evaluation."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.scoring.shouting import Shouting
from torch import Tensor

from tprl.data.toy import ToyDataset
from tprl.lvlm.batching import divergence
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.keep_all import KeepAll
from tprl.pruners.oracle import OraclePruner
from tprl.pruners.random import RandomPruner
from tprl.scoring.scorer import Scorer, prompt_bytes, selected
from tprl.scoring.validation import ServedScore, after_these
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Sample, TokenSelection


class Generated(ToyDataset):
    """Every second question is scored by its generated text, with half a point for any answer."""

    def teacher_forced(self, sample: Sample) -> bool:
        return sample.family in ("apple", "chair", "eagle")

    def score(self, sample: Sample, prediction: str) -> float:
        return 0.5 + 0.5 * super().score(sample, prediction)


class Counting(ToyLVLM):
    """Counts the prompts it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.scored, self.answered = 0, 0

    def score(self, prompt: Prompt, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        self.scored += len(answers)
        return super().score(prompt, answers)

    def answer(self, prompt: Prompt) -> list[str]:
        self.answered += len(prompt.uids)
        return super().answer(prompt)


def batch(
    lvlm: ToyLVLM, count: int = 12, dataset: ToyDataset | None = None
) -> tuple[list[Sample], Encoded]:
    samples = [(dataset or ToyDataset())[i] for i in range(count)]
    return samples, lvlm.encode(samples, frozenset({"region"}))


def test_a_reader_reads_everything_and_the_model_nothing() -> None:
    lvlm, reader, data = Counting(), Counting(), Generated()
    samples, encoded = batch(lvlm, dataset=data)
    prompt = splice(encoded, keep_all(encoded))
    read, stock = Scorer(lvlm, data, reader=reader), Scorer(Counting(), data)
    assert read(samples, prompt).log_prob.equal(stock(samples, prompt).log_prob)
    assert read.full(samples, encoded).score.equal(stock.full(samples, encoded).score)
    served = ServedScore(lvlm, data, [0.5], limit=4, labels=False, reader=reader)
    served.log_prob(KeepAll(), 1.0)
    assert lvlm.scored == lvlm.answered == 0
    assert reader.scored > 12
    assert reader.answered > 4


def without_answer(encoded: Encoded) -> TokenSelection:
    return TokenSelection(encoded.visual_mask & (encoded.extras["region"] == 0))


class TestScorer:
    def test_exact_match_needs_one_forward_and_no_generation(self) -> None:
        lvlm = Counting()
        samples, encoded = batch(lvlm)
        found = Scorer(lvlm, ToyDataset())(samples, splice(encoded, keep_all(encoded)))
        assert found.score.tolist() == [1.0] * 12
        assert found.predictions == [None] * 12
        assert (lvlm.scored, lvlm.answered) == (12, 0)

    def test_the_other_answers_are_generated_for_their_own_rows(self) -> None:
        lvlm, dataset = Counting(), Generated()
        samples, encoded = batch(lvlm, dataset=dataset)
        scorer = Scorer(lvlm, dataset)
        right = scorer(samples, splice(encoded, keep_all(encoded)))
        wrong = scorer(samples, splice(encoded, without_answer(encoded)))
        assert right.score.tolist() == [1.0] * 12
        assert wrong.score.tolist() == [0.0, 0.5] * 6
        assert right.predictions == [
            None if i % 2 == 0 else s.answers[0] for i, s in enumerate(samples)
        ]
        assert wrong.predictions == [None, "unknown"] * 6
        assert lvlm.answered == 12

    def test_generation_agrees_with_teacher_forcing(self) -> None:
        class Written(ToyDataset):
            def teacher_forced(self, sample: Sample) -> bool:
                return False

        lvlm = ToyLVLM()
        samples, encoded = batch(lvlm, 60)
        prompt = splice(encoded, RandomPruner().select(encoded, 0.5))
        forced, written = (
            Scorer(lvlm, ToyDataset())(samples, prompt),
            Scorer(lvlm, Written())(samples, prompt),
        )
        assert torch.equal(forced.score, written.score)
        assert 0 < float(forced.score.mean()) < 1

    def test_a_score_that_no_reward_reads_is_not_generated(self) -> None:
        lvlm, dataset = Counting(), Generated()
        samples, encoded = batch(lvlm, dataset=dataset)
        found = Scorer(lvlm, dataset, frozenset({"log_prob"}))(
            samples, splice(encoded, keep_all(encoded))
        )
        assert bool(found.score.isnan().all())
        assert bool((found.log_prob > -0.1).all())
        assert lvlm.answered == 0

    def test_full_scores_are_measured_once_per_sample(self) -> None:
        lvlm, dataset = Counting(), Generated()
        scorer = Scorer(lvlm, dataset)
        samples, encoded = batch(lvlm, dataset=dataset)
        first = scorer.full(samples[:8], encoded.rows(range(8)))
        again = scorer.full(samples[4:][::-1], encoded.rows(range(11, 3, -1)))
        direct = Scorer(lvlm, dataset)(samples, splice(encoded, keep_all(encoded)))
        assert lvlm.scored - 12 == 12
        # and the six open questions were asked for the model's own words
        assert scorer.evaluations == 12 + 6
        assert torch.equal(first.log_prob, direct.log_prob[:8])
        assert torch.equal(again.log_prob, direct.log_prob.flip(0)[:8])
        assert torch.equal(again.score, direct.score.flip(0)[:8])

    def test_a_failing_score_raises(self) -> None:
        class Failing(Generated):
            def score(self, sample: Sample, prediction: str) -> float:
                raise ZeroDivisionError(sample.uid)

        lvlm = ToyLVLM()
        samples, encoded = batch(lvlm, dataset=Failing())
        with pytest.raises(ZeroDivisionError, match="toy/train/0/book"):
            Scorer(lvlm, Failing())(samples, splice(encoded, keep_all(encoded)))

    def test_padding_of_a_batch_changes_no_score(self) -> None:
        lvlm = ToyLVLM()
        samples, encoded = batch(lvlm, 24)
        prompt = splice(encoded, RandomPruner().select(encoded, 0.25))
        together = Scorer(lvlm, ToyDataset())(samples, prompt)
        for i, sample in enumerate(samples):
            one = lvlm.encode([sample])
            alone = Scorer(lvlm, ToyDataset())(
                [sample], splice(one, RandomPruner().select(one, 0.25))
            )
            assert float(alone.log_prob) == pytest.approx(float(together.log_prob[i]), abs=1e-5)
            assert float(alone.score) == float(together.score[i])


class TestSelections:
    """All states of all episodes in one pass, and no number depends on it."""

    def states(
        self, lvlm: ToyLVLM, dataset: ToyDataset
    ) -> tuple[list[Sample], Encoded, list[int], list[Tensor]]:
        """Three nested states of two episodes of every question, some of them equal."""
        samples, encoded = batch(lvlm, 20, dataset)
        rows = [i for i in range(20) for _ in range(2)]
        kept = [RandomPruner().select(encoded.rows(rows), ratio).keep for ratio in (0.75, 0.4, 0.1)]
        return samples, encoded, rows, kept

    @pytest.mark.parametrize("dataset", [ToyDataset(), Generated()], ids=["forced", "generated"])
    @pytest.mark.parametrize("at_once", [7, 256])
    def test_one_pass_equals_a_pass_per_step(
        self, dataset: ToyDataset, at_once: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tprl.scoring.scorer.AT_ONCE", at_once)
        lvlm = ToyLVLM()
        samples, encoded, rows, kept = self.states(lvlm, dataset)
        together = Scorer(lvlm, dataset)
        found = together.selections(samples, encoded, rows * 3, torch.cat(kept))
        own = sum(not dataset.teacher_forced(sample) for sample in samples)
        assert together.evaluations == 120 + own
        assert 0 < float(found.score.mean()) < 1
        for t, keep in enumerate(kept):
            prompt = splice(encoded.rows(rows), TokenSelection(keep))
            step, part = (
                Scorer(lvlm, dataset)([samples[i] for i in rows], prompt),
                slice(40 * t, 40 * t + 40),
            )
            torch.testing.assert_close(found.log_prob[part], step.log_prob, atol=1e-6, rtol=1e-6)
            assert torch.equal(found.score[part], step.score)
            assert found.predictions[part] == step.predictions

    def test_fidelity_in_one_pass_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tprl.scoring.scorer.AT_ONCE", 7)
        lvlm = ToyLVLM()
        _, encoded, rows, kept = self.states(lvlm, ToyDataset())
        scorer = Scorer(lvlm, ToyDataset(), frozenset({"answer_kl", "agreement"}))
        kl, same = scorer.fidelities(encoded, rows * 3, torch.cat(kept))
        assert 0 < float(same.mean()) < 1
        for t, keep in enumerate(kept):
            step = scorer.fidelity(
                splice(encoded.rows(rows), TokenSelection(keep)), scorer.reference(encoded), rows
            )
            torch.testing.assert_close(kl[40 * t : 40 * t + 40], step[0], atol=1e-6, rtol=1e-6)
            assert torch.equal(same[40 * t : 40 * t + 40], step[1])

    def test_prompts_go_from_short_to_long_each_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("tprl.scoring.scorer.AT_ONCE", 16)
        _, encoded, rows, kept = self.states(ToyLVLM(), ToyDataset())
        parts = [
            (at, prompt.attention.sum(1))
            for at, prompt in selected(encoded, rows * 3, torch.cat(kept), 1 << 30)
        ]
        assert sorted(i for at, _ in parts for i in at) == list(range(120))
        lengths = torch.cat([length for _, length in parts])
        assert torch.equal(lengths, lengths.sort().values)
        assert max(len(at) for at, _ in parts) == 16
        few = selected(encoded, rows * 3, torch.cat(kept), 3 * prompt_bytes(encoded))
        assert max(len(at) for at, _ in few) == 3


class TestFidelity:
    def measured(self, keep_ratio: float) -> tuple[list[float], list[float], list[bool]]:
        lvlm = ToyLVLM()
        _, encoded = batch(lvlm, 24)
        scorer = Scorer(lvlm, ToyDataset(), frozenset({"answer_kl", "agreement"}))
        own = scorer.reference(encoded)
        prompt = splice(encoded, RandomPruner().select(encoded, keep_ratio))
        kl, same = scorer.fidelity(prompt, own)
        answers = zip(lvlm.answer(prompt), own.answers, strict=True)
        return kl.tolist(), same.tolist(), [a == b for a, b in answers]

    def test_with_all_tokens_it_is_perfect(self) -> None:
        kl, same, _ = self.measured(1.0)
        assert kl == [0.0] * 24
        assert same == [1.0] * 24

    def test_agreement_is_the_same_answer(self) -> None:
        kl, same, equal = self.measured(0.25)
        assert [bool(one) for one in same] == equal
        assert 0 < sum(equal) < 24
        assert min(x for x, one in zip(kl, equal, strict=True) if not one) > max(
            x for x, one in zip(kl, equal, strict=True) if one
        )

    def test_kl_of_several_tokens_by_hand(self) -> None:
        """Two answer tokens over a vocabulary of 2, and an answer of one token whose second entry
        is padding."""
        nan = torch.nan
        full = torch.tensor([[[0.5, 0.5], [1.0, 0.0]], [[0.25, 0.75], [nan, nan]]]).log()
        pruned = torch.tensor([[[0.25, 0.75], [0.5, 0.5]], [[0.75, 0.25], [nan, nan]]]).log()

        kl, same = divergence(full, pruned)
        # (0.5 ln 2 + 0.5 ln(2/3) + ln 2) / 2, and 0.25 ln(1/3) + 0.75 ln 3
        assert kl.tolist() == pytest.approx([0.418494, 0.549306], abs=1e-5)
        assert same.tolist() == [0.0, 0.0]

    def test_reads_no_reference_answer(self) -> None:
        lvlm = Counting()
        samples, encoded = batch(lvlm)
        unlabelled = [sample._replace(answers=()) for sample in samples]
        scorer = Scorer(lvlm, ToyDataset(), frozenset({"answer_kl", "agreement"}))
        found = scorer(unlabelled, splice(encoded, keep_all(encoded)))
        assert found.score.isnan().all()
        assert found.log_prob.isnan().all()
        assert (lvlm.scored, lvlm.answered) == (0, 0)
        scorer.reference(encoded)
        scorer.reference(encoded)
        assert (lvlm.scored, lvlm.answered) == (0, 12)  # texts are remembered


class TestServedScore:
    def test_without_labels_it_is_agreement_with_the_models_own_answers(self) -> None:
        class Unlabelled(ToyDataset):
            def __getitem__(self, index: int) -> Sample:
                return super().__getitem__(index)._replace(answers=())

        served = ServedScore(ToyLVLM(), Unlabelled("val"), [1.0, 0.25], limit=30, labels=False)
        found = served(RandomPruner())
        assert found["accuracy@1.000"] == 1.0
        # The toy model is right with all tokens, so agreeing with it and being right are one here.
        right = ServedScore(ToyLVLM(), ToyDataset("val"), [1.0, 0.25], limit=30)(RandomPruner())
        assert found == pytest.approx(right)
        assert found["accuracy@0.250"] < 1

    def served(self, **options: Any) -> ServedScore:
        return ServedScore(ToyLVLM(), ToyDataset("val"), [1 / 12, 0.5], **options)

    def test_averages_over_questions_and_ratios(self) -> None:
        class Region(OraclePruner):
            """Encodings of the served score carry no region: look the answer's token up."""

            def select(self, encoded: Encoded, keep_ratio: float | None) -> TokenSelection:
                pairs = {s.uid: s for s in (ToyDataset("val")[i] for i in range(30))}
                again = ToyLVLM().encode(
                    [pairs[uid] for uid in encoded.uids], frozenset({"region"})
                )
                chosen = super().select(again, keep_ratio)
                lost = torch.tensor([uid.endswith("/apple") for uid in encoded.uids]) & (
                    keep_ratio == 0.5
                )
                return TokenSelection(
                    chosen.keep & ~(lost.unsqueeze(1) & (again.extras["region"] > 0))
                )

        found = self.served(limit=30, batch_size=7)(Region())
        assert found["accuracy@0.083"] == 1.0
        assert found["accuracy@0.500"] == pytest.approx(5 / 6)
        assert found["accuracy"] == pytest.approx(11 / 12)
        assert -0.5 < found["log_prob"] < -0.2  # one answer in twelve at about -4 nats

    def test_batches_change_nothing(self) -> None:
        one, other = (self.served(limit=40, batch_size=size)(RandomPruner()) for size in (40, 9))
        assert one.keys() == other.keys()
        assert list(one.values()) == pytest.approx(list(other.values()), abs=1e-6)

    def test_what_comes_after_its_questions(self) -> None:
        data = ToyDataset("val")
        settings = {"keep_ratios": [0.5], "limit": 30, "first": 5}
        assert after_these(data, **settings) == 35
        assert [after_these(data, limit=limit, first=0) for limit in (None, 10_000)] == [600, 600]

    def test_uses_what_there_is(self) -> None:
        assert sum(len(samples) for samples, _ in self.served(limit=10_000).batches) == 600


class Shouted(Shouting, ToyDataset):
    """Toy questions whose labels are spelled as the model never writes."""


class Spelling(ToyLVLM):
    """Gives a spelling that it does not write next to no probability, as a language model does."""

    def score(self, prompt: Prompt, answers: Sequence[str]) -> tuple[Tensor, Tensor]:
        log_prob, exact = super().score(prompt, [answer.lower() for answer in answers])
        foreign = torch.tensor([answer != answer.lower() for answer in answers])
        return torch.where(foreign, torch.full_like(log_prob, -20.0), log_prob), exact & ~foreign


class TestTargets:
    def test_a_right_answer_is_scored_in_the_words_of_the_model(self) -> None:
        dataset, lvlm = Shouted("test"), Spelling(width=24)
        samples = [dataset[i] for i in range(6)]
        encoded = lvlm.encode(samples)
        scorer = Scorer(lvlm, dataset)
        assert scorer.targets(samples, encoded) == [sample.answers[0].lower() for sample in samples]
        kept = torch.zeros(12, 24, dtype=torch.bool)
        for i, sample in enumerate(samples):
            x, y, *_ = sample.region[0]  # type: ignore[index]
            kept[i, int(y // 8) * 6 + int(x // 8)] = True
            kept[6 + i, (int(y // 8) * 6 + int(x // 8) + 1) % 24] = True
        scored = scorer.selections(samples, encoded, [*range(6)] * 2, kept)
        right, wrong = scored.log_prob[:6], scored.log_prob[6:]
        assert bool((right > -0.1).all())
        assert bool((wrong < right - 1).all())  # by the label's spelling both would be -20
        assert scored.score.tolist() == [1.0] * 6 + [0.0] * 6

    def test_a_wrong_answer_leaves_the_reference(self) -> None:
        class Otherwise(Shouted):
            def score(self, sample: Sample, prediction: str) -> float:
                return 0.0

        dataset, lvlm = Otherwise("test"), Spelling(width=24)
        samples = [dataset[i] for i in range(3)]
        scorer = Scorer(lvlm, dataset)
        assert scorer.targets(samples, lvlm.encode(samples)) == [
            sample.answers[0] for sample in samples
        ]

    def test_where_an_exact_match_decides_nothing_is_generated(self) -> None:
        class Silent(ToyLVLM):
            def answer(self, prompt: Prompt) -> list[str]:
                raise AssertionError("an answer was generated")

        dataset, lvlm = ToyDataset("test"), Silent(width=24)
        samples = [dataset[i] for i in range(3)]
        scorer = Scorer(lvlm, dataset)
        assert scorer.targets(samples, lvlm.encode(samples)) == [
            sample.answers[0] for sample in samples
        ]

    def test_served_scores_read_the_words_of_the_model(self) -> None:
        served = ServedScore(Spelling(width=24), Shouted("val"), [1.0], limit=12)
        assert served(KeepAll())["log_prob"] > -0.1
        assert served.log_prob(KeepAll(), 1.0) > -0.1
