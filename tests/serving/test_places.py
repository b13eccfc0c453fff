"""Places of kept tokens: written beside embeddings, read back, and put into positions."""

import pytest
import torch

from tprl.errors import UserError
from tprl.serving.places import (
    LARGEST,
    Span,
    delta,
    rewritten,
    spans,
    text_positions,
    with_places,
    without_places,
)

IMAGE = 9


class TestChannels:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_every_place_survives_in_half_precision(self, dtype: torch.dtype) -> None:
        places = torch.tensor([[0, 1, 255, 256, 257, 4097, LARGEST], [7, 6, 5, 4, 3, 2, 1]])
        tokens = torch.randn(7, 5).to(dtype)
        packed = with_places(tokens, places)
        assert packed.dtype == dtype
        back, read = without_places(packed, axes=2)
        assert torch.equal(back, tokens)
        assert read.tolist() == places.tolist()

    def test_what_cannot_be_written_is_refused(self) -> None:
        with pytest.raises(UserError, match=f"place {LARGEST + 1}, and {LARGEST} is the largest"):
            with_places(torch.zeros(1, 3), torch.tensor([[LARGEST + 1]]))


class TestSpans:
    def test_a_run_is_an_image(self) -> None:
        assert spans([1, 9, 9, 2, 9, 3], IMAGE) == [Span(1, 2), Span(4, 1)]

    def test_images_of_one_size_may_follow_each_other(self) -> None:
        assert spans([9, 9, 9, 9, 1, 9, 9], IMAGE, 2) == [Span(0, 2), Span(2, 2), Span(5, 2)]

    def test_no_image(self) -> None:
        assert spans([1, 2], IMAGE) == []


class TestPositions:
    # Two words, an image of 6 tokens with 2 kept, a word, an image of 6 with 2 kept, two words.
    ids = (1, 2, 9, 9, 3, 9, 9, 4, 5)
    images = (Span(2, 2), Span(5, 2))
    kept = (torch.tensor([[1, 4]]), torch.tensor([[0, 5]]))

    def start(self) -> torch.Tensor:
        return text_positions(9, self.images, [6, 6]).unsqueeze(0)

    def test_text_stands_where_it_stood_before_pruning(self) -> None:
        line = self.start()[0]
        assert line[[0, 1, 4, 7, 8]].tolist() == [0, 1, 8, 15, 16]
        assert delta(line.unsqueeze(0)) == 17 - 9

    def test_survivors_go_to_their_places(self) -> None:
        new = rewritten(self.start(), self.images, [6, 6], self.kept, 0)
        assert new[0].tolist() == [0, 1, 3, 6, 8, 9, 14, 15, 16]

    @pytest.mark.parametrize("cut", range(1, 9))
    def test_a_chunk_may_end_anywhere_and_come_twice(self, cut: int) -> None:
        """What an engine hands over for a chunk are the embeddings in it; preemption starts
        anew."""
        whole = rewritten(self.start(), self.images, [6, 6], self.kept, 0)
        positions = self.start()
        for _ in range(2):
            for begin, end in ((0, cut), (cut, 9)):
                parts = [
                    places[:, max(begin - span.start, 0) : max(end - span.start, 0)]
                    for span, places in zip(self.images, self.kept, strict=True)
                ]
                inside = [part for part in parts if part.shape[1]]
                positions = rewritten(positions, self.images, [6, 6], inside, begin)
        assert torch.equal(positions, whole)

    def test_neighbors_without_a_word_between_them(self) -> None:
        images = (Span(0, 2), Span(2, 2))
        start = text_positions(5, images, [6, 6]).unsqueeze(0)
        new = rewritten(start, images, [6, 6], self.kept, 0)
        assert new[0].tolist() == [1, 4, 6, 11, 12]

    def test_three_axes(self) -> None:
        images = (Span(1, 2),)
        start = text_positions(4, images, [3]).expand(3, -1)
        places = torch.tensor([[0, 0], [0, 2], [1, 2]])
        new = rewritten(start, images, [3], [places], 0)
        assert new.tolist() == [[0, 1, 1, 4], [0, 1, 3, 4], [0, 2, 3, 4]]
        assert start.tolist() == [[0, 1, 1, 4]] * 3

    def test_nothing_to_write(self) -> None:
        start = self.start()
        assert torch.equal(rewritten(start, self.images, [6, 6], [], 7), start)
