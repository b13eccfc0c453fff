"""MME: accuracy, accuracy+ and their sums on fifteen images, its rule for yes and no, its rows."""

import math
from pathlib import Path
from typing import Any

import pytest
from tests.data.rows import as_hub, encoded, official

from tprl.data.mme import MME, read
from tprl.data.taking import take
from tprl.errors import UserError

# subtask, what the model says where "Yes" is right, and where "No" is
IMAGES = [
    ("code_reasoning", "**Yes**", "(No)"),  # the first is "**ye"
    ("existence", "Yes", "No"),
    ("existence", "yes.", "Yes, it is."),
    ("count", "YES", " no"),
    ("position", "No idea", "No idea"),
    ("color", "  Yes, it is.", "not really"),
    ("posters", "y", "n"),
    ("celebrity", "Yes", ""),
    ("scene", "Certainly yes", "Snow."),
    ("landmark", "A yes", "Nope"),
    ("artwork", "yesno", "noyes"),
    ("OCR", "“Yes”", "I think no"),
    ("commonsense_reasoning", "Yes\n", "No."),
    ("numerical_calculation", "no", "no"),
    ("text_translation", "Answer: Yes", "The answer is no"),
]
SAID = [output for image in IMAGES for output in image[1:]]


def rows() -> list[dict[str, Any]]:
    return [
        {
            "question_id": f"{subtask}/{number:04}.png",
            "image": encoded(number),
            "question": f"Is it {word}? {' ' * (number % 2)}Please answer yes or no.",
            "answer": answer,
            "category": subtask,
        }
        for number, (subtask, _, _) in enumerate(IMAGES)
        for answer, word in (("Yes", "so"), ("No", "otherwise"))
    ]


def stored(folder: Path, table: list[dict[str, Any]]) -> str:
    as_hub(table).to_parquet(folder / "test-00000-of-00001.parquet")
    return str(folder / "test-00000-of-00001.parquet")


@pytest.fixture
def mme(tmp_path: Path) -> MME:
    return MME(source=stored(tmp_path, rows()))


class TestScore:
    def test_perception_cognition_and_total(self, mme: MME) -> None:
        numbers = official(mme, SAID)
        scores = {
            "existence": 125,  # 3 of 4 questions, 1 of 2 images
            "count": 200,
            "position": 50,
            "color": 200,
            "posters": 0,
            "celebrity": 50,
            "scene": 50,
            "landmark": 50,
            "artwork": 200,
            "OCR": 50,
            "commonsense_reasoning": 200,
            "numerical_calculation": 50,
            "text_translation": 0,
            "code_reasoning": 50,
        }
        assert {name: numbers[f"score/{name}"] for name in scores} == scores
        assert (numbers["perception"], numbers["cognition"], numbers["total"]) == (975, 300, 1275)
        assert (numbers["accuracy/existence"], numbers["accuracy_plus/existence"]) == (75, 50)
        assert (numbers["accuracy/scene"], numbers["accuracy_plus/scene"]) == (50, 0)
        assert len(numbers) == 3 + 3 * 14
        assert mme.headline in numbers

    def test_perfect_scores_are_2000_and_800(self, mme: MME) -> None:
        numbers = official(mme, ["yes", "no"] * 15)
        assert (numbers["perception"], numbers["cognition"], numbers["total"]) == (2000, 800, 2800)

    def test_always_yes_is_half_of_accuracy_and_no_accuracy_plus(self, mme: MME) -> None:
        assert official(mme, ["yes"] * 30)["total"] == 700

    def test_neither_order_nor_repetition_matters(self, mme: MME) -> None:
        mixed = [*range(0, 30, 2), *range(29, 0, -2), 0, 5, 5]
        assert official(mme, SAID, mixed) == official(mme, SAID)

    def test_half_an_image_counts_in_accuracy_alone(self, mme: MME) -> None:
        """Question 5, which is wrong, is lost."""
        numbers = official(mme, SAID, [n for n in range(30) if n != 5])
        assert (numbers["accuracy/existence"], numbers["accuracy_plus/existence"]) == (100, 100)

    def test_a_partial_sum_is_no_score(self, mme: MME) -> None:
        numbers = official(mme, SAID, range(2, 24))
        assert numbers["perception"] == 975
        assert math.isnan(numbers["cognition"])
        assert math.isnan(numbers["total"])
        assert math.isnan(numbers["score/code_reasoning"])

    @pytest.mark.parametrize(
        ("prediction", "meaning"),
        [
            ("Yes", "yes"),
            ("No", "no"),
            (" \nYES, it is.", "yes"),
            ("No idea", "no"),
            ("Not sure", "no"),
            ("Know", "no"),
            ("I know", "other"),
            ("y", "other"),
            ("unknown", "other"),
            ("It is not", "other"),
            ("", "other"),
        ],
    )
    def test_the_first_four_characters_decide(self, prediction: str, meaning: str) -> None:
        assert read(prediction) == meaning


class TestRows:
    def test_a_sample(self, mme: MME) -> None:
        sample = mme[3]
        assert sample.uid == "mme/test/existence/0001.png/3"
        assert (
            sample.question
            == "Is it otherwise?\nAnswer the question using a single word or phrase."
        )
        assert (sample.answers, sample.family, sample.images[0].size) == (
            ("no",),
            "existence",
            (24, 16),
        )
        assert sample.images[0] is mme[2].images[0]
        assert len(mme) == 30

    def test_damaged_rows_are_counted_by_reason(self, tmp_path: Path) -> None:
        bad = rows()
        bad[0]["image"] = {"bytes": b"no picture", "path": None}
        bad[1]["image"] = None
        bad[2]["answer"] = "perhaps"
        bad[3]["question"] = " Please answer yes or no."
        bad[4]["category"] = "taste"
        bad[5]["answer"] = None
        mme = MME(source=stored(tmp_path, bad), max_bad_rows=0.2)
        assert len(take(mme, range(30))) == 24
        assert mme.damage == {
            "broken image": 1,
            "no image": 1,
            "no answer": 2,
            "empty question": 1,
            "unknown subtask": 1,
        }
        with pytest.raises(
            UserError,
            match=r"mme: row 0 has a fault \(broken image: .*\), and with it 1 of 30 rows",
        ):
            take(MME(source=stored(tmp_path, bad)), range(30))

    def test_another_table_is_refused(self, tmp_path: Path) -> None:
        other = [{key: value for key, value in row.items() if key != "category"} for row in rows()]
        with pytest.raises(UserError, match=r"row 0 has a fault \(no column 'category'\)"):
            MME(source=stored(tmp_path, other))[0]

    def test_limit_and_splits(self, tmp_path: Path) -> None:
        path = stored(tmp_path, rows())
        assert len(MME(source=path, limit=5)) == 5
        with pytest.raises(UserError, match="mme has no labelled split 'val', only test"):
            MME("val", source=path)
