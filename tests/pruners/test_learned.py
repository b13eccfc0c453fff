"""Trained pruners: what they keep, what they store, and what they refuse."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.helpers import RAGGED, toy_encoded

from tprl.budget import budget, image_rows
from tprl.errors import UserError
from tprl.policy.dpp import cosine_kernel, greedy_map
from tprl.policy.networks import places
from tprl.pruners.folder import load_weights
from tprl.pruners.learned import LearnedPruner, load_pruner
from tprl.pruners.mlp import MLPPruner
from tprl.pruners.serving import Serving, uniforms
from tprl.pruners.tprl import TPRL
from tprl.runtime import files
from tprl.types import Encoded

WIDTH = 16  # of `toy_encoded`


def pruner(
    kind: str = "tprl", select: str = "topk", sharp: float = 200.0, code_width: int = 8
) -> LearnedPruner:
    """`sharp` scales the last layer, so that logits really differ."""
    torch.manual_seed(0)
    if kind == "mlp":
        return MLPPruner(WIDTH, code_width, hidden=12, width=16, select=select)
    made = TPRL(WIDTH, code_width, hidden=12, width=16, layers=1, heads=2, select=select)
    with torch.no_grad():
        made.net.policy_head.out.weight.mul_(sharp)  # type: ignore[union-attr,operator]
    return made


def calibrated(ratio: float = 0.3) -> LearnedPruner:
    made = pruner()
    made.calibrate([toy_encoded()], ratio)
    return made


every_kind = pytest.mark.parametrize("kind", ["tprl", "mlp"])
every_select = pytest.mark.parametrize("select", ["topk", "gumbel", "dpp"])


class TestSelect:
    @every_kind
    @every_select
    @pytest.mark.parametrize("ratio", [1.0, 1 / 3, 1 / 9, 1e-9])
    def test_keeps_exactly_the_budget(self, kind: str, select: str, ratio: float) -> None:
        encoded = toy_encoded()
        keep = pruner(kind, select).select(encoded, ratio).keep
        images = image_rows(encoded.visual_mask, encoded.image_of)
        assert images.split(keep)[images.mask].sum() == keep.sum()
        kept = (images.split(keep) & images.mask).sum(1)
        assert kept.tolist() == [budget(ratio, n) for n in (144, 54, 16, 35)]
        assert not (keep & ~encoded.visual_mask).any()

    @every_select
    def test_a_sample_alone_decides_as_in_any_batch_and_order(self, select: str) -> None:
        made, batch = pruner(select=select), toy_encoded()
        keep = made.select(batch, 0.2).keep
        order = [2, 0, 1]
        assert torch.equal(made.select(batch.rows(order), 0.2).keep, keep[order])
        for b, grids in enumerate(RAGGED):
            one = toy_encoded([grids], uids=[f"toy-{b}"])
            alone = made.select(one, 0.2).keep[0]
            assert torch.equal(alone, keep[b, : len(alone)])

    def test_topk_keeps_the_largest_logits(self) -> None:
        made, encoded = pruner(), toy_encoded()
        logits = made.logits(made.observe(encoded), 0.25)
        keep = made.select(encoded, 0.25).keep
        for b in range(3):
            for image in range(len(RAGGED[b])):
                valid = encoded.visual_mask[b] & (encoded.image_of[b] == image)
                assert float(logits[b, valid & keep[b]].min()) >= float(
                    logits[b, valid & ~keep[b]].max()
                )

    def test_dpp_is_the_greedy_mode_of_relevance_times_diversity(self) -> None:
        made, encoded = pruner(select="dpp", sharp=20.0), toy_encoded(RAGGED[:2])
        x = made.observe(encoded)
        logits = made.logits(x, 0.1)
        similarity = cosine_kernel(x.codes, x.mask)
        k = torch.tensor([budget(0.1, n) for n in (144, 54)])
        kept_logits = torch.stack(
            [
                row.masked_fill(~m, -torch.inf).sort(descending=True).values[n - 1]
                for row, m, n in zip(logits, x.mask, k.tolist(), strict=True)
            ]
        )
        q = (logits - kept_logits.unsqueeze(1)).exp() * x.mask  # quality 2: q = exp(logit)
        wanted = greedy_map(q.unsqueeze(1) * similarity.double() * q.unsqueeze(2), x.mask, k)
        assert torch.equal(made.select(encoded, 0.1).keep, wanted)
        assert not torch.equal(pruner(select="topk", sharp=20.0).select(encoded, 0.1).keep, wanted)

    def test_the_question_matters_to_tprl_and_not_to_mlp(self) -> None:
        encoded = toy_encoded()
        embeds = encoded.embeds.clone()
        embeds[encoded.question] = torch.randn(
            int(encoded.question.sum()), WIDTH, generator=torch.Generator().manual_seed(5)
        )
        asked = replace(encoded, embeds=embeds)
        for kind, differs in (("tprl", True), ("mlp", False)):
            made = pruner(kind)
            one, other = (made.logits(made.observe(batch), 0.2)[0] for batch in (encoded, asked))
            assert torch.equal(one, other) != differs
            # Not only a common offset, which would change no choice.
            assert torch.allclose(one - one.mean(), other - other.mean(), atol=1e-3) != differs

    def test_stays_in_training_mode_and_out_of_the_graph(self) -> None:
        made = pruner()
        made.train()
        x = made.observe(toy_encoded())
        assert not made.logits(x, 0.5).requires_grad
        assert not x.codes.requires_grad
        assert made.training
        assert made.net.training

    def test_tokens_of_another_width_are_refused_in_a_sentence(self) -> None:
        with pytest.raises(
            UserError,
            match=(
                r"^pruner tprl reads tokens of width 16, "
                r"and those of this LVLM have 24: train one .*\.$"
            ),
        ):
            pruner().select(toy_encoded(width=24), 0.5)

    @pytest.mark.parametrize("ratio", [0.0, 1.7])
    def test_a_ratio_outside_its_range_is_refused(self, ratio: float) -> None:
        with pytest.raises(UserError, match=r"keep_ratio must be .*got"):
            pruner().select(toy_encoded(), ratio)


class TestThreshold:
    def test_keeps_the_calibrated_fraction_on_the_calibration_data(self) -> None:
        encoded = toy_encoded()
        keep = calibrated(0.3).select(encoded, None).keep
        assert float(keep.sum()) / float(encoded.visual_mask.sum()) == pytest.approx(0.3, abs=0.01)
        assert not (keep & ~encoded.visual_mask).any()

    @pytest.mark.parametrize(("tau", "counts"), [(1.0, [1, 1, 2]), (-1.0, [144, 54, 51])])
    def test_keeps_at_least_one_token_whatever_the_threshold(
        self, tau: float, counts: list[int]
    ) -> None:
        made = calibrated()
        made.serving = replace(made.serving, tau=tau)
        assert made.select(toy_encoded(), None).count.tolist() == counts

    def test_adapts_to_the_sample(self) -> None:
        encoded = toy_encoded([((6, 6),)] * 12)
        made = pruner()
        made.calibrate([encoded], 0.25)
        assert len(set(made.select(encoded, None).count.tolist())) > 3

    def test_without_calibration_it_is_refused(self) -> None:
        with pytest.raises(UserError, match="has no threshold: give a keep_ratio"):
            pruner().select(toy_encoded(), None)
        with pytest.raises(UserError, match="selects by a threshold it does not have"):
            pruner(select="threshold").select(toy_encoded(), 0.5)

    def test_an_unknown_selection_is_refused(self) -> None:
        with pytest.raises(
            UserError,
            match=r"policy\.select must be one of topk, gumbel, dpp, threshold, got best\.",
        ):
            Serving("best")


class TestPlaces:
    def test_of_a_grid_of_two_rows_and_three_columns(self) -> None:
        found = places(toy_encoded([((2, 3),)]))
        sixth = 1 / 6
        x, y = [sixth, 0.5, 5 * sixth] * 2, [0.25] * 3 + [0.75] * 3
        torch.testing.assert_close(found, torch.tensor([list(zip(x, y, strict=True))]))

    def test_every_image_starts_anew_and_padding_is_zero(self) -> None:
        found = places(toy_encoded([((1, 2), (2, 1)), ((1, 1),)]))
        assert found[0].tolist() == [[0.25, 0.5], [0.75, 0.5], [0.5, 0.25], [0.5, 0.75]]
        assert found[1].tolist() == [[0.5, 0.5], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]]


class TestUniforms:
    def test_depend_on_uid_and_seed_alone(self) -> None:
        rows = uniforms(["a", "b", "a"], 0, 50)
        assert torch.equal(rows[0], rows[2])
        assert not torch.equal(rows[0], rows[1])
        assert torch.equal(uniforms(["b"], 0, 50)[0], rows[1])
        assert not torch.equal(uniforms(["b"], 1, 50)[0], rows[1])
        assert uniforms([], 0, 50).shape == (0, 50)
        assert float(rows.min()) >= 0
        assert float(rows.max()) < 1


class TestFolder:
    @every_kind
    @pytest.mark.parametrize("code_width", [0, 8])
    def test_a_round_trip_is_exact(self, kind: str, code_width: int, tmp_path: Path) -> None:
        made = pruner(kind, code_width=code_width)
        made.trained_on["model"] = "toy"
        made.save_pretrained(tmp_path)
        found = load_pruner(tmp_path)
        assert type(found) is type(made)
        assert (found.serving, found.trained_on, found.config) == (
            made.serving,
            made.trained_on,
            made.config,
        )
        assert not found.training
        state = found.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in made.state_dict().items())
        assert torch.equal(
            found.select(toy_encoded(), 0.2).keep, made.select(toy_encoded(), 0.2).keep
        )

    def test_half_precision_is_close_and_half_the_size(self, tmp_path: Path) -> None:
        made = pruner(sharp=1.0)
        made.save_pretrained(tmp_path / "full")
        made.save_pretrained(tmp_path / "half", half=True)
        found = load_pruner(tmp_path / "half")
        for name, value in found.state_dict().items():
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, made.state_dict()[name], atol=1e-3, rtol=1e-3)
        full, half = (
            (tmp_path / kind / "model.safetensors").stat().st_size for kind in ("full", "half")
        )
        assert half < 0.65 * full

    def test_a_calibrated_threshold_travels(self, tmp_path: Path) -> None:
        made = calibrated(0.3)
        made.save_pretrained(tmp_path)
        encoded: Encoded = toy_encoded()
        assert torch.equal(
            load_pruner(tmp_path).select(encoded, None).keep, made.select(encoded, None).keep
        )

    def test_saving_again_replaces_and_leaves_nothing_behind(self, tmp_path: Path) -> None:
        pruner(sharp=1.0).save_pretrained(tmp_path)
        pruner(sharp=3.0).save_pretrained(tmp_path)
        names = sorted(path.name for path in tmp_path.iterdir())
        assert names == [".sums", "README.md", "config.json", "model.safetensors"]
        found = load_pruner(tmp_path).state_dict()["net.policy_head.out.weight"]
        assert torch.equal(found, pruner(sharp=3.0).state_dict()["net.policy_head.out.weight"])

    def test_calibrations_travel_with_the_weights_that_they_are_of(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        pruner().save_pretrained(tmp_path / "home")
        files.write_sealed(tmp_path / "home" / "retention.json", '{"about": 1}')
        # An older version wrote fewer settings; the others had their defaults.
        config = tmp_path / "home" / "config.json"
        settings = json.loads(config.read_text())
        del settings["prior"]
        files.write_sealed(config, json.dumps(settings))
        again = load_pruner(tmp_path / "home")
        again.save_pretrained(tmp_path / "copy")
        copy = tmp_path / "copy" / "retention.json"
        assert files.read_sealed(copy) == b'{"about": 1}'
        assert not (tmp_path / "copy" / "retention_adaptive.json").exists()
        again.save_pretrained(tmp_path / "home")  # onto itself: nothing to copy
        # Another state of the pruner has no calibration, and that is said.
        with torch.no_grad():
            again.net.policy_head.out.weight.add_(1)
        again.save_pretrained(tmp_path / "changed")
        assert not (tmp_path / "changed" / "retention.json").exists()
        assert "retention.json of" in caplog.text
        assert "the pruner has changed since it was calibrated" in caplog.text

    def test_a_run_directory_stands_for_its_pruner(self, tmp_path: Path) -> None:
        pruner().save_pretrained(tmp_path / "pruner")
        assert load_pruner(tmp_path).name == "tprl"

    def test_another_width_is_refused_in_a_sentence(self, tmp_path: Path) -> None:
        pruner().save_pretrained(tmp_path)
        other = TPRL(24, 8, hidden=12, width=16, layers=1, heads=2)
        with pytest.raises(
            UserError,
            match=r"does not fit this policy: .* is \(.*\), \(.*\) is needed; use the policy .*\.$",
        ):
            load_weights(other, tmp_path)

    @pytest.mark.parametrize("keep", [0, 7, 200])
    def test_damaged_weights_are_refused_in_a_sentence(self, keep: int, tmp_path: Path) -> None:
        pruner().save_pretrained(tmp_path)
        weights = tmp_path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:keep])
        with pytest.raises(
            UserError, match=r"model\.safetensors is damaged .*: copy it again or train anew\.$"
        ):
            load_pruner(tmp_path)

    def test_a_damaged_config_is_refused_in_a_sentence(self, tmp_path: Path) -> None:
        pruner().save_pretrained(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match=r"config\.json is damaged"):
            load_pruner(tmp_path)

    def test_a_missing_folder_and_one_without_weights_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="nowhere does not exist: give the directory"):
            load_pruner(tmp_path / "nowhere")
        with pytest.raises(UserError, match="holds no trained pruner"):
            load_pruner(tmp_path)
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match="holds no trained pruner"):
            load_pruner(tmp_path)

    def test_a_folder_of_0_1_that_names_no_class_still_loads(self, tmp_path: Path) -> None:
        self.rewrite(tmp_path, lambda about: about.pop("_target_"))
        assert type(load_pruner(tmp_path)) is TPRL
        self.rewrite(tmp_path, lambda about: about.update(_target_=None, pruner="other"))
        with pytest.raises(
            UserError, match="names the pruner 'other', which is not one of tprl, mlp"
        ):
            load_pruner(tmp_path)

    @pytest.mark.parametrize(
        ("target", "sentence"),
        [
            ("os.getcwd", r"config\.json: _target_ os\.getcwd is not allowed"),
            (
                "tprl.pruners.mine.Mine",
                r"cannot be imported.*Install the code that the pruner was trained with",
            ),
            (
                "tprl.runtime.files.write_atomically",
                "is not a learned pruner, so nothing is loaded from it",
            ),
            ("tprl.pruners.random.RandomPruner", "is not a learned pruner"),
        ],
    )
    def test_a_class_that_is_no_learned_pruner_is_refused(
        self, target: str, sentence: str, tmp_path: Path
    ) -> None:
        self.rewrite(tmp_path, lambda about: about.update(_target_=target))
        with pytest.raises(UserError, match=sentence):
            load_pruner(tmp_path)

    def test_nothing_inside_a_config_is_built_or_interpolated(self, tmp_path: Path) -> None:
        inside = {
            "_target_": "tprl.budget.budget",
            "keep_ratio": 0.5,
            "n": 4,
            "home": "${oc.env:HOME}",
        }
        self.rewrite(tmp_path, lambda about: about.update(trained_on=inside))
        assert load_pruner(tmp_path).trained_on == inside

    @staticmethod
    def rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """A saved pruner whose config.json `change` edits."""
        pruner().save_pretrained(folder)
        about = json.loads((folder / "config.json").read_text())
        change(about)
        files.write_sealed(folder / "config.json", json.dumps(about))

    @every_kind
    def test_flops_name_their_parts(self, kind: str) -> None:
        parts = pruner(kind, "dpp").flops_by_part(144, 6, 16)  # type: ignore[operator]
        assert set(parts) == {"policy" if kind == "tprl" else "mlp", "autoencoder", "dpp"}
        assert all(value > 0 for value in parts.values())


class TestTrainOnly:
    def test_gradients_reach_the_named_part_alone(self) -> None:
        made = pruner()
        made.train_only("net.", without="net.value_head")
        names = {name for name, p in made.named_parameters() if p.requires_grad}
        assert names == {
            n for n, _ in made.named_parameters() if n.startswith("net.") and "value_head" not in n
        }
        made.train_only("autoencoder.")
        names = {name for name, p in made.named_parameters() if p.requires_grad}
        assert names == {
            name for name, _ in made.named_parameters() if name.startswith("autoencoder.")
        }
