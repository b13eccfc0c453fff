"""Settings of a served folder, and which pruners can be served."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from tprl.build import choices, load_component
from tprl.errors import UserError
from tprl.pruners.mlp import MLPPruner
from tprl.serving.settings import FOLDER, Settings, check_servable, sees_other_images
from tprl.serving.versions import VLLM, check_vllm

SERVED = {"divprune", "keep_all", "mlp", "pooling", "question_dpp", "random", "tprl", "uniform"}
DIVPRUNE = {"_target_": "tprl.pruners.divprune.DivPrunePruner"}


class TestSettings:
    def test_they_come_back_from_a_config(self) -> None:
        settings = Settings(0.25, "compact", DIVPRUNE)
        assert Settings.of(SimpleNamespace(**settings.keys)) == settings

    def test_a_config_without_them(self) -> None:
        with pytest.raises(UserError, match="no tprl_positions, tprl_pruner: serve a folder that"):
            Settings.of(SimpleNamespace(tprl_keep_ratio=0.5))

    @pytest.mark.parametrize(
        ("ratio", "positions", "sentence"),
        [
            (1.7, "keep", "keep_ratio must be a number in"),
            (0.5, "some", "positions=some is unknown: use keep"),
        ],
    )
    def test_values_that_cannot_be(self, ratio: float, positions: str, sentence: str) -> None:
        with pytest.raises(UserError, match=sentence):
            Settings(ratio, positions)

    @pytest.mark.parametrize(("unpruned", "kept"), [(576, 64), (144, 16), (1, 1), (0, 0)])
    def test_tokens_are_the_budget(self, unpruned: int, kept: int) -> None:
        assert Settings(1 / 9).tokens(unpruned) == kept

    def test_a_pruner_is_built_or_loaded(self, tmp_path: Path) -> None:
        assert Settings(0.5, pruner=DIVPRUNE).load(tmp_path).name == "divprune"
        with pytest.raises(UserError, match="has no folder pruner/"):
            Settings(0.5).load(tmp_path)
        MLPPruner(16, code_width=8, hidden=16).save_pretrained(tmp_path / FOLDER)
        assert Settings(0.5).load(tmp_path).name == "mlp"


class TestServable:
    def test_every_pruner_is_served_or_refused_in_a_sentence(self) -> None:
        refusals = {}
        for name in choices("pruner"):
            pruner = load_component("pruner", name)
            try:
                check_servable(pruner)
            except UserError as error:
                refusals[name] = str(error)
        assert set(choices("pruner")) - refusals.keys() == SERVED
        assert "its own budget" in refusals["tprl_adaptive"]
        assert "its own budget" in refusals["keyword_budget"]
        assert "keeps a core for a conversation" in refusals["core_focus"]
        assert "between layers" in refusals["fastv"]
        assert "reads cls_attention of the vision tower" in refusals["cls_attention"]
        assert all(
            text.startswith("pruner ") and text.count(". ") == 0 for text in refusals.values()
        )

    def test_a_threshold_decides_too_late(self) -> None:
        with pytest.raises(UserError, match="selects by a threshold"):
            check_servable(MLPPruner(16, code_width=8, hidden=16, select="threshold", tau=0.5))

    def test_who_sees_other_images(self) -> None:
        seeing = {name for name in SERVED if sees_other_images(load_component("pruner", name))}
        assert seeing == {"tprl"}


class TestVersions:
    def test_tried_ones_pass_however_they_were_built(self) -> None:
        check_vllm(VLLM[0])
        check_vllm(f"{VLLM[0]}+cpu")
        with pytest.raises(UserError, match="was not tried"):
            check_vllm(f"{VLLM[0]}1")  # a tried one is no beginning of others

    def test_others_are_refused_with_those_tried(self) -> None:
        with pytest.raises(
            UserError, match=r"vLLM 0\.9\.1 was not tried with this plugin: use 0\.32\.0, or"
        ):
            check_vllm("0.9.1")

    def test_none_at_all(self) -> None:
        with pytest.raises(UserError, match="vLLM is not installed here: `make test-vllm`"):
            check_vllm()
