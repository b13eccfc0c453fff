"""Digests change with what they are of, and with nothing else."""

import os
from pathlib import Path

import pytest
import torch
from tests.stages.toy_runs import policy

from tprl.build import load_component
from tprl.data.toy import ToyDataset
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.toy import ToyLVLM
from tprl.pruners.uniform import UniformPruner
from tprl.scoring.identity import of_dataset, of_lvlm, of_path, of_processor, of_pruner, of_weights


@pytest.fixture(scope="module")
def lvlm() -> FrozenLVLM:
    return load_component("model", "llava", pretrained=None, dtype="float32")


class TestWeights:
    def test_follow_the_numbers(self) -> None:
        assert of_weights(policy(0)) == of_weights(policy(0)) != of_weights(policy(1))

    def test_of_a_model_inside_an_object(self, lvlm: FrozenLVLM) -> None:
        before = of_lvlm(lvlm, {})
        weight = next(iter(lvlm.model.parameters()))
        weight.add_(1)
        after = of_lvlm(lvlm, {})
        weight.sub_(1)
        assert before["weights"] != after["weights"]
        assert {**before, "weights": 0} == {**after, "weights": 0}

    def test_of_an_image_processor_of_the_same_settings_and_another_class(
        self, lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """With and without torchvision a processor has the same settings and makes other pixels."""
        before, images = of_lvlm(lvlm, {}), lvlm.processor.image_processor
        other = type("Other", (type(images),), {})
        monkeypatch.setattr(images, "__class__", other)
        assert of_lvlm(lvlm, {}) != before

    def test_of_torchvision(self, lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch) -> None:
        before = of_lvlm(lvlm, {})
        monkeypatch.setattr(
            "tprl.scoring.identity.version", lambda package: f"{package} of tomorrow"
        )
        after = of_lvlm(lvlm, {})
        assert after["torchvision"] == "torchvision of tomorrow" != before["torchvision"]

    def test_of_half_precision_and_of_scalars(self) -> None:
        module = torch.nn.BatchNorm1d(3)
        assert of_weights(module) != of_weights(module.to(torch.bfloat16))

    def test_of_large_tensors_a_sample(self) -> None:
        module = torch.nn.Linear(300, 300)
        before = of_weights(module)
        module.weight.data.mul_(1.001)
        assert of_weights(module) != before

    def test_of_what_has_none(self) -> None:
        assert of_weights(None) is of_weights(ToyLVLM()) is of_weights(UniformPruner()) is None


class TestProcessor:
    def test_follows_settings_template_and_vocabulary(self, lvlm: FrozenLVLM) -> None:
        def loaded() -> FrozenLVLM:
            return load_component("model", "llava", pretrained=None, dtype="float32")

        same, size, template, words = loaded(), loaded(), loaded(), loaded()
        size.processor.image_processor.do_rescale = not size.processor.image_processor.do_rescale
        template.processor.chat_template += " "
        words.tokenizer.add_tokens(["another"])
        digests = [of_processor(item.processor) for item in (lvlm, same, size, template, words)]
        assert digests[0] == digests[1]
        assert len(set(digests)) == 4


class TestData:
    def test_follows_the_files_that_the_settings_name(self, tmp_path: Path) -> None:
        rows, images = tmp_path / "rows.jsonl", tmp_path / "images"
        (images / "deep").mkdir(parents=True)
        (images / "deep" / "a.png").write_bytes(b"a")
        rows.write_text("1")
        config = {
            "source": str(rows),
            "images": str(images),
            "max_bad_rows": 0.1,
            "name": "no path",
        }

        def digests() -> dict[str, object]:
            return of_dataset(ToyDataset(limit=5), config, "train")

        before = digests()
        assert digests() == before
        assert before["questions"] == 5
        assert isinstance(before["files"], dict)
        assert before["files"].keys() == {"source", "images"}
        rows.write_text("12")
        edited = digests()
        os.utime(images / "deep" / "a.png", (0, 0))
        assert len({str(item) for item in (before, edited, digests())}) == 3

    def test_a_folder_without_opening_it(self, tmp_path: Path) -> None:
        (tmp_path / "broken").symlink_to("nowhere")
        assert of_path(str(tmp_path)) == of_path(str(tmp_path))


def test_a_learned_pruner_is_told_by_weights_and_serving() -> None:
    digests = [
        of_pruner(item, {"a": 1})
        for item in (policy(0), policy(0, quality=9.0), policy(1), UniformPruner())
    ]
    assert len({str(item) for item in digests}) == 4
