"""The toy pictures: the same every time, one answer each."""

import pytest

from tprl.data.toy import KINDS, ToyDataset, read_cells
from tprl.errors import UserError


class TestSamples:
    def test_the_dataset_is_the_same_every_time_and_splits_are_disjoint(self) -> None:
        pixels = {
            split: {ToyDataset(split)[i].images[0].tobytes() for i in range(0, 120, 6)}
            for split in ("train", "val")
        }
        assert not pixels["train"] & pixels["val"]
        assert ToyDataset("test", seed=3)[5].uid == ToyDataset("test")[5].uid == "toy/test/0/flute"
        assert ToyDataset(seed=3)[5].uid == "toy/train-3/0/flute"
        first, again = ToyDataset()[100], ToyDataset(limit=200)[100]
        assert first.images[0].tobytes() == again.images[0].tobytes()
        assert (first.question, first.answers, first.region) == (
            again.question,
            again.answers,
            again.region,
        )

    def test_exactly_one_cell_answers_each_question(self) -> None:
        for i in range(12):
            sample = ToyDataset()[i]
            cells = read_cells(sample.images[0])
            places = [
                at for at, cell in enumerate(cells) if cell.kind == KINDS.index(sample.family)
            ]
            assert len(cells) == 24
            assert len(places) == 1
            assert sample.region is not None
            x, y = places[0] % 6 * 8.0, places[0] // 6 * 8.0
            assert sample.region == ((x, y, x + 8, y + 8),)
            assert sample.family in sample.question

    def test_scores_the_exact_word(self) -> None:
        data, sample = ToyDataset(), ToyDataset()[0]
        assert data.score(sample, f" {sample.answers[0]}\n") == 1.0
        assert data.score(sample, "unknown") == 0.0
        assert data.teacher_forced(sample)

    def test_a_limit_an_end_and_a_bad_split(self) -> None:
        assert (len(ToyDataset("val")), len(ToyDataset(limit=7))) == (600, 7)
        with pytest.raises(IndexError, match="question 7 of 7"):
            ToyDataset(limit=7)[7]
        with pytest.raises(
            UserError, match="split 'dev' does not exist in toy: choose one of train, val, test"
        ):
            ToyDataset("dev")
