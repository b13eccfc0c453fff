"""The splits of the embedded dataset: sizes, names, and nothing in two of them."""

import pytest

from tprl.data.crowd import Crowd
from tprl.data.scenes import (
    FAMILIES,
    SCENES,
    Scenes,
    draw_scene,
)
from tprl.errors import UserError


class TestSplits:
    def test_sizes_and_uids(self) -> None:
        assert {split: len(Scenes(split)) for split in SCENES.splits} == {
            "train": 1_000_000,
            "val": 2_000,
            "test": 6_000,
            "final": 6_000,
        }
        assert Scenes("test")[5999].uid == "scenes/test/1199/grounding"
        assert Scenes("train", seed=3)[2].uid == "scenes/train-3/0/count"

    def test_disjoint(self) -> None:
        sets = [Scenes("train"), Scenes("train", seed=1), Scenes("val"), Scenes("test")]
        samples = [data[i] for data in sets for i in range(0, 300, 5)]
        assert len({sample.uid for sample in samples}) == len(samples) == 240
        assert len({sample.images[0].tobytes() for sample in samples}) == len(samples)

    def test_pretraining_never_sees_a_scene_of_a_split(self) -> None:
        pretrain = {
            draw_scene("pretrain", 0, step, i).things for step in range(30) for i in range(4)
        }
        assert not pretrain & {
            draw_scene("scenes", split, 0, i).things for split in SCENES.splits for i in range(120)
        }

    def test_the_seed_moves_the_training_images_only(self) -> None:
        for split in ("val", "test"):
            assert (
                Scenes(split, seed=5)[17].images[0].tobytes()
                == Scenes(split)[17].images[0].tobytes()
            )
            assert Scenes(split, seed=5)[17].uid == Scenes(split)[17].uid
        assert (
            Scenes("train", seed=5)[17].images[0].tobytes()
            != Scenes("train")[17].images[0].tobytes()
        )

    def test_families_take_turns(self) -> None:
        data = Scenes("val", limit=20)
        assert [data[i].family for i in range(20)] == list(FAMILIES) * 4
        assert len(data) == 20

    def test_a_family_asks_the_same_beside_any_other_family(self) -> None:
        alone = Scenes("test", families=["count"])
        assert [alone[i].question for i in range(8)] == [
            Scenes("test")[5 * i + 2].question for i in range(8)
        ]
        assert [alone[i].uid for i in range(8)] == [Scenes("test")[5 * i + 2].uid for i in range(8)]

    @pytest.mark.parametrize("index", [-1, 20, 10**6])
    def test_an_index_outside_raises(self, index: int) -> None:
        with pytest.raises(IndexError):
            Scenes("val", limit=20)[index]

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"split": "tset"}, ["tset", "train", "val", "test"]),
            ({"families": ["count", "color"]}, ["color", *FAMILIES]),
            ({"families": []}, ["[]", *FAMILIES]),
            ({"families": ["count", "count"]}, ["count", "once"]),
            ({"limit": 0}, ["limit", "at least 1", "got 0"]),
            ({"limit": -4}, ["limit", "at least 1", "got -4"]),
            ({"rounds": 0}, ["rounds", "1 to 3", "got 0"]),
            ({"rounds": 4}, ["rounds", "1 to 3", "got 4"]),
        ],
    )
    def test_bad_input_is_one_sentence(
        self, arguments: dict[str, object], words: list[str]
    ) -> None:
        with pytest.raises(UserError) as caught:
            Scenes(**arguments)  # pyright: ignore[reportArgumentType]
        message = str(caught.value)
        assert all(word in message for word in words)
        assert message.endswith(".")
        assert len(message.splitlines()) == 1

    def test_a_limit_beyond_the_split_is_the_split(self) -> None:
        assert len(Scenes("val", limit=10**9)) == 2_000


class TestRounds:
    @pytest.mark.parametrize("world", [Scenes, Crowd])
    def test_more_questions_about_the_same_images(self, world: type[Scenes]) -> None:
        plain, more = world("val"), world("val", rounds=3)
        families = len(plain.families)
        assert len(more) == 3 * len(plain)
        assert (plain.questions_per_image, more.questions_per_image) == (families, 3 * families)
        for image in (0, 7):
            questions = [more[image * 3 * families + slot] for slot in range(3 * families)]
            # The first round is what one round asks; all are different, about one image.
            for slot in range(families):
                before = plain[image * families + slot]
                assert questions[slot]._replace(images=()) == before._replace(images=())
            assert len({sample.question for sample in questions}) == 3 * families
            assert len({sample.uid for sample in questions}) == 3 * families
            assert len({sample.uid.rpartition("/")[0] for sample in questions}) == 1
            assert len({sample.images[0].tobytes() for sample in questions}) == 1
        assert questions[-1].uid.endswith(f"/{plain.families[-1]}-3")
