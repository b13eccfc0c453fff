"""The normalization and the soft accuracy of VQA."""

import pytest

from tprl.data.vqa_accuracy import (
    CONTRACTIONS,
    by_frequency,
    normalized,
    normalized_text,
    soft_accuracy,
)


class TestNormalization:
    @pytest.mark.parametrize(
        ("answer", "plain"),
        [
            ("Yes", "yes"),
            ("  Yes.\n", "yes"),
            ("the Dog", "dog"),
            ("an apple a day", "apple day"),
            ("The", ""),
            ("Two", "2"),
            ("ten dogs", "10 dogs"),
            ("none", "0"),
            ("eleven", "eleven"),
            ("twenty one", "twenty 1"),
            ("1,000", "1000"),
            ("1,000-2,000", "10002000"),  # a comma in a number takes all punctuation along
            ("1-2", "1 2"),
            ("red, white", "red white"),
            ("red,white", "red white"),
            ("black/white", "black white"),
            ("black / white", "black white"),
            ("t-shirt", "t shirt"),
            ("t -shirt", "t shirt"),
            ("u-turn t -shirt", "uturn t shirt"),  # next to a space once is enough for every one
            ("yes!", "yes"),
            ('"stop"', "stop"),
            ("3.5", "3.5"),
            ("3.", "3"),
            ("a.m.", "am"),
            (".5", ".5"),
            ("8:30", "8:30"),
            ("men's", "men's"),
            ("dont", "don't"),
            ("Cant", "can't"),
            ("couldnt've", "couldn't've"),
            ("couldn'tve", "couldn't've"),
            ("its", "its"),
            ("a\tb\nc", "b c"),
            ("", ""),
        ],
    )
    def test_of_vqa(self, answer: str, plain: str) -> None:
        assert normalized(answer) == plain

    @pytest.mark.parametrize(
        ("answer", "plain"),
        [
            ("Men's", "men 's"),
            ("x,y", "xy"),
            ("why?not", "whynot"),
            ("1,000-2,000", "1000 2000"),
            ("The Coca-Cola.", "coca cola"),
            ("Two", "2"),
            ("that's", "that 's"),
        ],
    )
    def test_of_textvqa(self, answer: str, plain: str) -> None:
        assert normalized_text(answer) == plain

    def test_the_table_of_contractions(self) -> None:
        """Without the entries of the released table that have capitals, or change nothing: they
        never apply."""
        assert len(CONTRACTIONS) == 114
        literal = {
            "hes": "he's",
            "ow's'at": "'ow's'at",
            "'ows'at": "'ow's'at",
            "'ow'sat": "'ow's'at",
            "somebody'd": "somebodyd",
            "shed've": "she'd've",
            "yall": "y'all",
            "y'allll": "y'all'll",
            "y'all'dve": "y'all'd've",
            "twas": "'twas",
            "oclock": "o'clock",
        }
        assert {key: CONTRACTIONS[key] for key in literal} == literal
        assert (
            not {"shes", "im", "ive", "lets", "its", "well", "id", "ill", "were", "shell"}
            & CONTRACTIONS.keys()
        )


class TestAccuracy:
    @pytest.mark.parametrize(
        ("matches", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
    )
    def test_of_ten_answers(self, matches: int, accuracy: float) -> None:
        answers = ["yes"] * matches + ["no"] * (10 - matches)
        assert soft_accuracy("yes", answers) == pytest.approx(accuracy)

    def test_of_fewer_answers(self) -> None:
        """One of two matches: 0 of the other one if it is left out, and 1 of 1 if not: (0 + 1) / 2.
        Of three, two can be left, so two matches are enough: (2 * 1/2 + 1) / 3."""
        assert soft_accuracy("yes", ["yes", "no"]) == pytest.approx(1 / 2)
        assert soft_accuracy("yes", ["yes", "yes", "no"]) == pytest.approx(2 / 3)
        assert soft_accuracy("yes", ["yes"] * 3) == 1

    def test_of_a_single_answer(self) -> None:
        assert [soft_accuracy(prediction, ["yes"]) for prediction in ("yes", "no")] == [1, 0]

    def test_the_most_common_answer_comes_first(self) -> None:
        assert by_frequency(["b", "a", "c", "a", "", "", ""]) == ("a", "a", "b", "c", "", "", "")
        assert by_frequency(["b", "a", "B"]) == ("b", "a", "B")
        assert by_frequency([]) == ()
