"""The toy model: it must measure selection, and nothing else."""

import pytest
import torch

from tprl import cost
from tprl.data.toy import ToyDataset
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM
from tprl.splice import keep_all, splice
from tprl.types import LVLM, Encoded, Sample, TokenSelection


def batch(lvlm: ToyLVLM, count: int = 12) -> tuple[list[Sample], Encoded]:
    samples = [ToyDataset()[i] for i in range(count)]
    return samples, lvlm.encode(samples, frozenset({"region"}))


def without_answer(encoded: Encoded) -> TokenSelection:
    return TokenSelection(encoded.visual_mask & (encoded.extras["region"] == 0))


class TestAnswers:
    def test_reads_the_prompt_and_not_the_mask(self) -> None:
        """Overwriting the answer's token with another's embedding takes the answer away, whatever
        was kept."""
        lvlm = ToyLVLM()
        samples, encoded = batch(lvlm, 60)
        answers = [sample.answers[0] for sample in samples]
        answer_at = (encoded.extras["region"] > 0).int().argmax(1)
        other = (answer_at + 1) % 24
        rows = torch.arange(60)
        merged = encoded.visual.clone()
        merged[rows, answer_at] = merged[rows, other]
        kept = lvlm.score(splice(encoded, keep_all(encoded)), answers)
        lost = lvlm.score(
            splice(encoded, TokenSelection(encoded.visual_mask, merged=merged)), answers
        )
        pruned = lvlm.score(splice(encoded, without_answer(encoded)), answers)
        assert bool(kept[1].all())
        assert not lost[1].any()
        assert not pruned[1].any()
        assert float(kept[0].min()) > -0.2
        assert float(pruned[0].max()) < -2

    def test_the_answers_token_alone_is_enough(self) -> None:
        lvlm = ToyLVLM()
        samples, encoded = batch(lvlm, 60)
        selection = TokenSelection(encoded.extras["region"] > 0)
        assert selection.count.tolist() == [1] * 60
        assert lvlm.answer(splice(encoded, selection)) == [sample.answers[0] for sample in samples]

    def test_merging_all_tokens_into_one_loses_the_answer(self) -> None:
        lvlm = ToyLVLM()
        _, encoded = batch(lvlm, 60)
        mean = encoded.visual.mean(1, keepdim=True).expand_as(encoded.visual)
        single = TokenSelection(torch.arange(24).expand(60, -1) == 0, merged=mean)
        assert lvlm.answer(splice(encoded, single)) == ["unknown"] * 60


class TestEncode:
    def test_is_an_lvlm_with_a_cost(self) -> None:
        lvlm = ToyLVLM()
        assert isinstance(lvlm, LVLM)
        parts = cost.total(
            lvlm.shape, text_tokens=6, visual_tokens=24, answer_tokens=lvlm.answer_length("one")
        )
        assert (
            parts["total"]
            > cost.total(lvlm.shape, text_tokens=6, visual_tokens=2, answer_tokens=1)["total"]
        )

    def test_a_sample_alone_is_encoded_as_in_a_batch(self) -> None:
        lvlm = ToyLVLM(width=20)
        samples, encoded = batch(lvlm, 12)
        # two wordings: padding happens
        assert encoded.attention.sum(1).tolist() == [30] * 6 + [34] * 6
        for i, sample in enumerate(samples):
            single = lvlm.encode([sample], frozenset({"cls_attention"}))
            assert torch.equal(single.visual[0], encoded.visual[i])
            width = single.embeds.shape[1]
            assert torch.equal(single.embeds[0], encoded.embeds[i, -width:])
            assert torch.equal(single.question[0], encoded.question[i, -width:])
            assert single.question.sum() == len(sample.question.split())
            assert single.extras["cls_attention"].sum() == pytest.approx(1)

    def test_unknown_extras_and_small_widths_are_refused(self) -> None:
        with pytest.raises(UserError, match=r"toy cannot provide \['depth'\]"):
            ToyLVLM().encode([ToyDataset()[0]], frozenset({"depth"}))
        with pytest.raises(
            UserError, match=r"model\.width=12 cannot hold 10 codes and noise: give at least 16\."
        ):
            ToyLVLM(width=12)
