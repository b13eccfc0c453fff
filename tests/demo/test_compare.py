"""What the page shows, without the page: the same answers and numbers as everywhere else in
TPRL."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tprl
from tprl.bench.latency import Reading
from tprl.bench.parity import stock_inputs
from tprl.budget import budget
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.demo import compare as page_work
from tprl.demo.cards import cards, flops_text
from tprl.demo.compare import Comparison, check_question, compare_pruners, open_image
from tprl.errors import UserError
from tprl.evaluation.evaluator import Answered, Entry, evaluate
from tprl.lvlm.frozen import FrozenLVLM
from tprl.scoring.scorer import Scorer
from tprl.types import Sample

NAMES = ("tprl", "divprune", "fastv", "pooling", "random")
TOTAL = 144


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "tiny_llava")


@pytest.fixture(scope="module")
def pruners() -> dict[str, Any]:
    return {name: load_component("pruner", name) for name in NAMES}


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    dataset = Scenes("test")
    return [dataset[i] for i in range(10)]


@pytest.fixture(scope="module")
def evaluated(lvlm: FrozenLVLM, pruners: dict[str, Any]) -> dict[tuple[str, str], Answered]:
    """What an evaluation says of each pruner and question, as of all tokens."""
    dataset = Scenes("test")
    entries = [Entry("keep_all", load_component("pruner", "keep_all"), (1.0,))]
    entries += [
        Entry(name, pruners[name], (1 / 3,)) for name in ("tprl", "fastv", "pooling", "divprune")
    ]
    answers = evaluate(Scorer(lvlm, dataset, frozenset({"score"})), dataset, entries, 10, 10)
    return {(answered.row.pruner, answered.row.uid): answered for answered in answers}


@pytest.fixture(scope="module")
def comparison(lvlm: FrozenLVLM, pruners: dict[str, Any], samples: list[Sample]) -> Comparison:
    return compare_pruners(lvlm, pruners, samples[0].images[0], samples[0].question, 1 / 3)


class TestCompare:
    @pytest.mark.parametrize(
        "name", ["tprl", "fastv", pytest.param("divprune", marks=pytest.mark.slow)]
    )
    def test_answers_are_those_of_the_stock_model_and_of_prune(
        self, lvlm: FrozenLVLM, pruners: dict[str, Any], samples: list[Sample], name: str
    ) -> None:
        for sample in samples[:3]:
            local = compare_pruners(
                lvlm, {name: pruners[name]}, sample.images[0], sample.question, 0.25
            )
            inputs = stock_inputs(lvlm, [sample])

            def answer(inputs: Any = inputs) -> str:
                ids = lvlm.model.generate(**inputs, max_new_tokens=16)[
                    :, inputs["input_ids"].shape[1] :
                ]
                return lvlm.tokenizer.batch_decode(ids, skip_special_tokens=True)[0].strip()

            assert local.full.answer == answer()
            with tprl.prune(lvlm.model, name, keep_ratio=0.25, processor=lvlm.processor):
                assert local.pruned[0].answer == answer()

    @pytest.mark.parametrize(
        "name", ["tprl", "fastv", "pooling", pytest.param("divprune", marks=pytest.mark.slow)]
    )
    def test_tokens_and_flops_are_those_of_the_evaluation(
        self,
        lvlm: FrozenLVLM,
        pruners: dict[str, Any],
        samples: list[Sample],
        evaluated: dict[tuple[str, str], Answered],
        name: str,
    ) -> None:
        right = [s for s in samples if evaluated["keep_all", s.uid].row.score == 1.0]
        assert len(right) > 5
        for sample in right[:3]:  # the evaluation's FLOPs are of the reference answer
            local = compare_pruners(
                lvlm, {name: pruners[name]}, sample.images[0], sample.question, 1 / 3
            )
            reference = evaluated[name, sample.uid]
            assert (local.full.answer, local.full.kept) == (sample.answers[0], TOTAL)
            assert (local.full.flops, local.pruned[0].flops) == (
                reference.full_flops,
                reference.flops,
            )
            assert local.pruned[0].kept == reference.row.kept_tokens
            if name == "tprl":
                assert (local.pruned[0].answer == local.full.answer) == (reference.row.score == 1.0)

    @pytest.mark.slow
    def test_with_everything_kept_all_answers_are_the_same(
        self, lvlm: FrozenLVLM, pruners: dict[str, Any], samples: list[Sample]
    ) -> None:
        for sample in samples[:5]:
            local = compare_pruners(lvlm, pruners, sample.images[0], sample.question, 1.0)
            assert {answered.answer for answered in local.pruned} == {local.full.answer}
            assert {answered.kept for answered in local.pruned} == {TOTAL}
            assert all(answered.keep is None or answered.keep.all() for answered in local.pruned)

    @pytest.mark.parametrize("ratio", [0.02, 0.93])
    def test_the_slider_sets_the_budget(
        self, lvlm: FrozenLVLM, pruners: dict[str, Any], samples: list[Sample], ratio: float
    ) -> None:
        chosen = {name: pruners[name] for name in ("tprl", "divprune", "random")}
        for answered in compare_pruners(
            lvlm, chosen, samples[0].images[0], samples[0].question, ratio
        ).pruned:
            assert answered.keep is not None
            assert answered.keep.shape == (12, 12)
            assert answered.kept == answered.keep.sum() == budget(ratio, TOTAL)

    def test_only_patches_have_a_mask_and_only_policies_a_map(self, comparison: Comparison) -> None:
        by_name = {answered.pruner: answered for answered in comparison.pruned}
        assert list(by_name) == list(NAMES)
        assert {name for name, answered in by_name.items() if answered.keep is not None} == {
            "tprl",
            "divprune",
            "random",
        }
        assert {name for name, answered in by_name.items() if answered.probability is not None} == {
            "tprl"
        }
        tprl_ = by_name["tprl"]
        assert tprl_.probability is not None
        assert tprl_.keep is not None
        assert tprl_.probability.shape == (12, 12)
        assert tprl_.probability[tprl_.keep].mean() > tprl_.probability[~tprl_.keep].mean()

    def test_every_stage_is_timed(self, comparison: Comparison) -> None:
        for answered in (comparison.full, *comparison.pruned):
            assert (
                min(answered.reading.vision, answered.reading.prefill, answered.reading.decode) > 0
            )
            assert (answered.reading.selector == 0) == (
                answered is comparison.full or answered.pruner == "fastv"
            )

    def test_pruners_take_turns_and_a_slow_start_counts_for_none(
        self, lvlm: FrozenLVLM, samples: list[Sample], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A machine whose first pass takes 10 times as long, and whose fourth is disturbed."""
        order: list[str] = []
        real, times = page_work.ask, iter([50.0, 5.0, 6.0, 90.0, 5.5])

        def timed(lvlm: Any, encode: Any, pruner: Any, *remainder: Any) -> Any:
            order.append(pruner.name)
            return real(lvlm, encode, pruner, *remainder)._replace(
                reading=Reading(next(times), 0.0, 0.0, 0.0)
            )

        monkeypatch.setattr(page_work, "ask", timed)
        random = load_component("pruner", "random")
        local = compare_pruners(
            lvlm, {"random": random}, samples[0].images[0], samples[0].question, 0.5
        )
        assert order == ["keep_all", "keep_all", "random", "keep_all", "random"]
        assert (local.full.reading.total, local.pruned[0].reading.total) == (5.0, 5.5)

    def test_nothing_is_left_on_the_model(self, lvlm: FrozenLVLM, comparison: Comparison) -> None:
        assert "generate" not in vars(lvlm.model)
        assert not torch.is_grad_enabled() or not any(
            p.requires_grad for p in lvlm.model.parameters()
        )


class TestBadInput:
    @pytest.mark.parametrize(
        ("question", "sentence"),
        [
            (" \n", "There is no question"),
            ("what color is the dog and the Cat?", 'does not know "dog", "Cat": ask in words'),
            ("is there a <image>?", 'does not know "<image>"'),
            ("is " * 1000, "The question has 2999 characters: use at most 2000"),
        ],
    )
    def test_questions(self, lvlm: FrozenLVLM, question: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            check_question(lvlm, question)

    def test_a_question_is_stripped(self, lvlm: FrozenLVLM) -> None:
        assert check_question(lvlm, " what color is the circle?\n") == "what color is the circle?"

    def test_no_pruner_or_a_ratio_out_of_range(
        self, lvlm: FrozenLVLM, pruners: dict[str, Any], samples: list[Sample]
    ) -> None:
        image, question = samples[0].images[0], samples[0].question
        with pytest.raises(UserError, match="choose a pruner"):
            compare_pruners(lvlm, {}, image, question, 0.5)
        for ratio in (0.0, 1.5):
            with pytest.raises(UserError, match=f"keep_ratio must be .*got {ratio}"):
                compare_pruners(lvlm, {"tprl": pruners["tprl"]}, image, question, ratio)
        with pytest.raises(UserError, match="is infeasible"):
            compare_pruners(lvlm, {"fastv": pruners["fastv"]}, image, question, 0.1)

    def test_no_image_or_a_damaged_one(self, tmp_path: Path) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "whole.png")
        (tmp_path / "part.png").write_bytes((tmp_path / "whole.png").read_bytes()[:2000])
        (tmp_path / "text.png").write_text("hello")
        with pytest.raises(UserError, match="There is no image"):
            open_image(None)
        for name in ("part.png", "text.png", "missing.png"):
            with pytest.raises(UserError, match="cannot be read"):
                open_image(tmp_path / name)
        Image.new("1", (20000, 10000)).save(tmp_path / "bomb.png")
        with pytest.raises(
            UserError, match=r"too many pixels: 20000 x 10000 = 200000000 > 178956970; scale"
        ):
            open_image(tmp_path / "bomb.png")


class TestImages:
    def test_a_file_is_read_without_loss(self, tmp_path: Path, samples: list[Sample]) -> None:
        samples[0].images[0].save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").tobytes() == samples[0].images[0].tobytes()

    def test_photographs_stand_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        Image.new("L", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
        opened = open_image(tmp_path / "a.jpg")
        assert (opened.size, opened.mode) == ((20, 40), "RGB")

    def test_large_ones_are_scaled_down_and_the_original_stays(self) -> None:
        image = Image.new("1", (8192, 4096))
        assert open_image(image).size == (5792, 2896)
        assert image.size == (8192, 4096)


class TestCards:
    def test_one_card_per_answer_with_its_numbers(self, comparison: Comparison) -> None:
        page = cards(comparison)
        assert page.count('<section class="card"') == 1 + len(NAMES)
        assert page.count("<details>") == 1
        assert (
            "With 48 of 144 visual tokens and "
            f"{100 * comparison.pruned[0].flops / comparison.full.flops:.0f} %"
        ) in page
        assert flops_text(comparison.full.flops) in page
        assert "://" not in page

    def test_they_say_whether_the_answers_agree(self, comparison: Comparison) -> None:
        other = replace(comparison.pruned[1], answer="green <b>cheese</b>")
        same = replace(comparison.pruned[0], answer=comparison.full.answer)
        page = cards(replace(comparison, question="<i>?", pruned=(same, other)))
        assert page.count("✓ the same answer") == page.count("≠ another answer") == 1
        assert "“green &lt;b&gt;cheese&lt;/b&gt;”" in page
        assert "&lt;i&gt;?" in page

    @pytest.mark.parametrize(
        ("flops", "text"),
        [(5e3, "5 KFLOPs"), (1.21e9, "1.21 GFLOPs"), (8.4e12, "8.4 TFLOPs"), (2e15, "2 PFLOPs")],
    )
    def test_flops_get_a_prefix(self, flops: float, text: str) -> None:
        assert flops_text(flops) == text
