"""Which option an answer chooses."""

import pytest

from tprl.data.choices import means


class TestMeans:
    """The right option is B, "A dog."; the first column is what a model says."""

    @pytest.mark.parametrize(
        "prediction",
        [
            "B",
            "b",
            " B\n",
            "B.",
            "B)",
            "(B)",
            "(b)",
            "(b).",
            "B. A dog",
            "b: cat",  # the letter counts
            "(B) dog",
            "B\nBecause it barks.",
            "B.\n\nIt barks.",
            "Answer: B",
            "answer : (b)",
            "The answer is B",
            "The answer is B.",
            "The correct answer is: B",
            "It could be A, but the answer is B because it barks.",
            "The answer is A? No, the answer is B.",
            "a dog",
            "A DOG.",
            " A  dog\n",
            "The answer is a dog.",
            "Answer: A dog",
        ],
    )
    def test_right(self, prediction: str) -> None:
        assert means(prediction, "B", "A dog.")

    @pytest.mark.parametrize(
        "prediction",
        [
            "",
            " ",
            "A",
            "a.",
            "A. A dog.",  # the letter counts
            "C",
            "E",
            "AB",
            "B or C",
            "A and B",
            "Be",
            "B-52",
            "dog",
            "a dog or a cat",
            "A dog and a cat",
            "Answer: A cat",
            "It is a dog.",
            "Option B",
            "I think B",
            "The answer is unclear",
            "The answer is b because it barks",
            "No idea",
            "**B**",
            "B's",
        ],
    )
    def test_wrong(self, prediction: str) -> None:
        assert not means(prediction, "B", "A dog.")

    def test_an_article_is_no_letter(self) -> None:
        assert not means("A cat", "A", "a dog")
        assert means("A cat", "B", "a cat")
        assert means("a cat", "A", "a cat")

    def test_a_letter_is_a_letter_where_options_are_letters(self) -> None:
        assert means("B", "B", "C")
        assert not means("B", "A", "B")
