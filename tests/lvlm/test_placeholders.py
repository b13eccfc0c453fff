"""A processor that writes another number of placeholders than the vision tower makes features."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.lvlm.small import save_folder
from tests.lvlm.test_families import FAMILIES, SAMPLES

import tprl
from tprl.bench.parity import stock_inputs
from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.batching import check_placeholders
from tprl.lvlm.frozen import FrozenLVLM

TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
WRONG: dict[str, list[tuple[str, Any]]] = {
    "llava": [
        ("patch_size", 16),
        ("num_additional_image_tokens", 0),
        ("vision_feature_select_strategy", "full"),
    ],
    "llava_next": [("patch_size", 4), ("num_additional_image_tokens", 2)],
    "internvl": [("image_seq_length", 10), ("image_seq_length", 18)],
    "smolvlm": [("image_seq_len", 8)],
    "llava_onevision": [("num_image_tokens", 16), ("vision_aspect_ratio", "anyres_max_2")],
    "gemma3": [("full_image_sequence", "<start_of_image>" + 8 * "<image_soft_token>")],
    "gemma4": [("image_processor.patch_size", 8), ("image_processor.pooling_kernel_size", 1)],
    "mistral3": [("patch_size", 7), ("spatial_merge_size", 3)],
}
SETTINGS = {"full_image_sequence": "image_seq_length"}  # what it is made from
QWEN = [("image_processor.merge_size", 1), ("image_processor.patch_size", 7)]


def changes(lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each wrong setting in turn."""
    for name, value in WRONG.get(lvlm.model_type, QWEN):
        part: Any = lvlm.processor
        *path, last = name.split(".")
        for step in path:
            part = getattr(part, step)
        with monkeypatch.context() as patch:
            patch.setattr(part, last, value)
            yield SETTINGS.get(last, last)


@pytest.mark.parametrize("family", FAMILIES)
def test_refused_with_both_numbers_and_the_setting(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lvlm = load_component("model", family, pretrained=None, dtype="float32")
    for setting in changes(lvlm, monkeypatch):
        for samples in ([SAMPLES[0]], [SAMPLES[0], TWO]):
            with pytest.raises(UserError, match=rf"\d+.* \d+.*{setting}=") as error:
                lvlm.encode(samples)
            assert str(error.value).count("\n") == 0
            inputs = stock_inputs(lvlm, samples)
            with (
                tprl.prune(lvlm.model, "random", keep_ratio=0.5),
                pytest.raises(UserError, match=f"{setting}="),
            ):
                lvlm.model.generate(**inputs, max_new_tokens=1)
    assert lvlm.encode([TWO]).visual_mask.any()


def test_image_by_image() -> None:
    image = torch.tensor([[False, True, True, True, False, True, False]])
    check_placeholders(image, [[0, 1]], [3, 1], ["a"], True, "mend it")
    with pytest.raises(
        UserError, match=r"ended an image of a after 3 placeholders, .* \[2, 2\] features.*mend it"
    ):
        check_placeholders(image, [[0, 1]], [2, 2], ["a"], True, "mend it")


def test_pixels_of_another_size() -> None:
    tiles = (("internvl3", "tiles"), ("smolvlm2", "tiles"))
    for family, what in (("llava", "images"), ("llava_next", "crops"), *tiles):
        lvlm = load_component("model", family, pretrained=None, dtype="float32")
        batch = stock_inputs(lvlm, SAMPLES[:1])
        batch["pixel_values"] = batch["pixel_values"][..., :-4]
        with (
            tprl.prune(lvlm.model, "random", keep_ratio=0.5),
            pytest.raises(UserError, match=f"makes {what} of"),
        ):
            lvlm.model.generate(**batch, max_new_tokens=1)


def test_crops_and_tiles_that_no_placeholder_stands_for() -> None:
    for family, message in (
        ("llava_next", "a number of crops of"),
        ("smolvlm2", r"announces \d+ tiles"),
    ):
        lvlm = load_component("model", family, pretrained=None, dtype="float32")
        batch = stock_inputs(lvlm, SAMPLES[:1])
        for name in {"pixel_values", "pixel_attention_mask"} & batch.keys():
            batch[name] = torch.cat([batch[name], torch.ones_like(batch[name][:, :1])], 1)
        with (
            tprl.prune(lvlm.model, "random", keep_ratio=0.5),
            pytest.raises(UserError, match=message),
        ):
            lvlm.model.generate(**batch, max_new_tokens=1)


@pytest.mark.parametrize("family", ["llava", "llava_next"])
def test_settings_that_are_not_there_come_from_the_config(family: str, tmp_path: Path) -> None:
    lvlm = load_component("model", family, pretrained=None, dtype="float32")
    save_folder(lvlm, tmp_path)
    path = tmp_path / "processor_config.json"
    settings = json.loads(path.read_text())
    for name in ("patch_size", "vision_feature_select_strategy", "num_additional_image_tokens"):
        del settings[name]
    path.write_text(json.dumps(settings))
    again = load_component("model", family, pretrained=str(tmp_path), dtype="float32")
    assert torch.equal(again.encode([TWO]).input_ids, lvlm.encode([TWO]).input_ids)
