"""Components from their settings: what may be built, and what is refused."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tprl.build import MOVED, build, load_component
from tprl.errors import UserError


class TestBuild:
    def test_builds_an_allowed_target_with_plain_containers(self) -> None:
        node = OmegaConf.create(
            {"_target_": "tprl.types.Sample", "uid": "a", "images": [], "question": "?"}
        )
        sample = build(node, answers=("yes",))
        assert (sample.uid, sample.answers) == ("a", ("yes",))
        assert type(sample.images) is list

    def test_a_partial_waits_for_its_live_objects(self) -> None:
        node = {"_target_": "tprl.budget.budget", "_partial_": True, "keep_ratio": 0.5}
        assert build(node)(n=10) == 5
        assert build(node, n=10) == 5

    @pytest.mark.parametrize(
        "target",
        [
            "os.system",
            "builtins.eval",
            "tprl.build.inspect.sys.exit",
            "tprlx.a",
            "tprl",
            "tprl.types.Tensor",
            "tprl.build.OmegaConf.load",
        ],
    )
    def test_other_targets_are_rejected(self, target: str) -> None:
        with pytest.raises(UserError, match=r"_target_ .* is not allowed"):
            build({"_target_": target})

    @pytest.mark.parametrize(
        ("target", "typo", "known"),
        [
            ("tprl.lvlm.llava.Llava", "micro_bach", "micro_batch"),
            ("tprl.pruners.tprl.TPRL", "qualty", "quality"),
        ],
    )
    def test_options_that_go_to_a_base_class_are_checked_against_it(
        self, target: str, typo: str, known: str
    ) -> None:
        with pytest.raises(UserError, match=rf"has no argument {typo}; it takes: .*\b{known}\b"):
            build({"_target_": target, "_partial_": True, typo: 1})
        assert build({"_target_": target, "_partial_": True, known: 1}).keywords == {known: 1}

    def test_nested_targets_are_checked_too(self) -> None:
        with pytest.raises(UserError, match=r"os\.getcwd is not allowed"):
            build({"_target_": "tprl.types.Sample", "uid": [{"_target_": "os.getcwd"}]})

    def test_an_unknown_argument_lists_the_known_ones(self) -> None:
        with pytest.raises(UserError, match="no argument rate; it takes: keep_ratio, n"):
            build({"_target_": "tprl.budget.budget", "rate": 1})

    def test_a_missing_module_and_a_missing_target_say_so(self) -> None:
        with pytest.raises(UserError, match="cannot be imported"):
            build({"_target_": "tprl.nowhere.Thing"})
        with pytest.raises(UserError, match="must name a class or function, got"):
            build({"a": 1})

    def test_a_user_error_inside_a_nested_component_stays_one(self) -> None:
        inner = {"_target_": "tprl.budget.check_keep_ratio", "keep_ratio": 1.7}
        with pytest.raises(UserError, match=r"keep_ratio must be .*, got 1\.7"):
            build({"_target_": "tprl.types.Sample", "uid": inner})

    @pytest.mark.parametrize(("old", "new"), MOVED.items())
    def test_settings_of_before_a_module_moved_name_what_is_there_now(
        self, old: str, new: str
    ) -> None:
        assert find_spec(new)
        with pytest.raises(ModuleNotFoundError):
            import_module(old)

    def test_a_moved_target_is_built_wherever_it_stands(self, tmp_path: Path) -> None:
        old = {
            "_target_": "tprl.metrics_csv.MetricsCSV",
            "save_dir": str(tmp_path),
            "name": "",
            "version": "",
        }
        assert type(build(old)).__module__ == "tprl.runtime.metrics_csv"
        sample = build(
            {
                "_target_": "tprl.types.Sample",
                "uid": "a",
                "images": [old],
                "question": "?",
                "answers": [],
            }
        )
        assert type(sample.images[0]).__module__ == "tprl.runtime.metrics_csv"

    def test_a_component_is_built_without_hydra(self) -> None:
        assert load_component("pruner", "random").name == "random"
        with pytest.raises(
            UserError, match="pruner=rnd does not exist; choose one of: attention_color, "
        ):
            load_component("pruner", "rnd")
