"""The autoencoder stage: which tokens it sees, and that it learns."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from tests.helpers import toy_encoded
from tests.stages.plain import build_stage
from tests.stages.toy_runs import Metrics, fit, lvlm, policy, same, weights

from tprl.data.toy import KINDS, ToyDataset
from tprl.errors import UserError
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.tprl import TPRL
from tprl.stages.autoencoder import AutoencoderStage
from tprl.types import Encoded, Sample


def stage(pruner: TPRL | None = None, **options: Any) -> AutoencoderStage:
    pruner = pruner or policy(code_width=12, hidden=32)
    small: dict[str, Any] = {"images": 40, "epochs": 2, "batch_size": 64, "lr": 3e-3}
    live: dict[str, Any] = {"pruner": pruner, "lvlm": lvlm(), "dataset": ToyDataset()}
    return build_stage(AutoencoderStage, **(live | small | options))


class TestTokens:
    def test_every_picture_counts_once(self) -> None:
        module = stage(images=10)
        module.setup("fit")
        pictures = ToyDataset()
        samples = [pictures[i * len(KINDS)] for i in range(10)]
        expected = lvlm().encode(samples).visual.half()
        assert torch.equal(module.held_out, expected[:1].flatten(0, 1))
        assert torch.equal(module.tokens, expected[1:].flatten(0, 1))

    @pytest.mark.parametrize(("limit", "pictures"), [(12, 2), (400, 67)])
    def test_a_dataset_with_fewer_pictures_than_asked_for_is_used_up(
        self, limit: int, pictures: int
    ) -> None:
        module = stage(dataset=ToyDataset(limit=limit), images=1000)
        module.setup("fit")
        assert len(module.tokens) + len(module.held_out) == pictures * 24

    def test_a_single_picture_is_refused(self) -> None:
        with pytest.raises(
            UserError, match="needs at least 2 images, and dataset toy shows 1: use"
        ):
            stage(dataset=ToyDataset(limit=6)).setup("fit")

    def test_padded_tokens_are_left_out(self) -> None:
        class Ragged(ToyLVLM):
            def encode(
                self, samples: Sequence[Sample], extras: frozenset[str] = frozenset()
            ) -> Encoded:
                grids = [((2, 2 + i % 3),) for i in range(len(samples))]
                return toy_encoded(grids, width=24, uids=[sample.uid for sample in samples])

        module = stage(lvlm=Ragged(width=24), images=6)
        module.setup("fit")
        assert (len(module.held_out), len(module.tokens)) == (4, 6 + 8 + 4 + 6 + 8)
        assert not (torch.cat([module.held_out, module.tokens]) == 0).all(1).any()

    def test_statistics_come_from_the_training_tokens(self) -> None:
        module = stage()
        module.setup("fit")
        assert module.pruner.autoencoder is not None
        torch.testing.assert_close(
            module.pruner.autoencoder.mean, module.tokens.float().mean(0), atol=1e-5, rtol=1e-4
        )

    def test_a_pruner_without_autoencoder_is_refused(self) -> None:
        with pytest.raises(ValueError, match="code_width=0"):
            stage(policy()).setup("fit")


class TestTraining:
    def test_codes_of_half_the_width_learn_to_reconstruct_held_out_pictures(self) -> None:
        metrics = Metrics()
        module = stage(images=200, epochs=8)
        before = weights(module.pruner.net)
        trainer = fit(module, metrics)
        # about the fraction of variance lost: nothing is known yet
        assert metrics["autoencoder/mse"][0] > 0.9
        assert float(trainer.callback_metrics["autoencoder/val_mse"]) < 0.5
        assert same(weights(module.pruner.net), before)

    def test_the_same_seed_gives_the_same_bits(self) -> None:
        ends = []
        for seed in (0, 0, 1):
            module = stage(seed=seed)
            fit(module)
            ends.append(weights(module.pruner))
        assert same(ends[0], ends[1])
        assert not same(ends[0], ends[2])
