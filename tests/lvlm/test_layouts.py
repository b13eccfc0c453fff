"""Folders that are laid out in another way: one right sentence each, before any weight is
loaded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tests.lvlm.real import CHECKPOINTS, real, shrunk
from tests.lvlm.small import save_folder

import tprl
from tprl.build import load_component
from tprl.errors import UserError
from tprl.lvlm.loading import explained
from tprl.types import Sample

SAMPLE = Sample("a", (Image.new("RGB", (64, 48), (200, 30, 30)),), "what is it?", ("red",))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llava") / "weights"
    folder.mkdir()
    save_folder(load_component("model", "llava", pretrained=None, dtype="float32"), folder)
    return folder


@pytest.fixture
def copy(llava: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(llava, tmp_path / "copy"))


def load(folder: Path, name: str = "llava", **options: Any) -> Any:
    return load_component("model", name, pretrained=str(folder), dtype="float32", **options)


def configured(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_llavas_own_layout(copy: Path) -> None:
    layout = {
        "model_type": "llava",
        "architectures": ["LlavaLlamaForCausalLM"],
        "mm_vision_tower": "openai/clip",
    }
    (copy / "config.json").write_text(json.dumps(layout))
    with pytest.raises(
        UserError, match=r"LLaVA's own layout.*model\.pretrained=llava-hf/llava-1\.5-7b-hf"
    ):
        load(copy)


def test_internvls_own_code_is_never_run(copy: Path) -> None:
    code = {"AutoConfig": "configuration_internvl_chat.InternVLChatConfig"}
    (copy / "config.json").write_text(json.dumps({"model_type": "internvl_chat", "auto_map": code}))
    (copy / "configuration_internvl_chat.py").write_text(
        "raise SystemExit('code of a checkpoint was run')"
    )
    with pytest.raises(
        UserError, match=r"InternVL's own layout.*model\.pretrained=OpenGVLab/InternVL3-2B-hf"
    ):
        load(copy, "internvl3")


def test_any_other_code_is_not_run_either(copy: Path) -> None:
    configured(
        copy, model_type="minicpmv", auto_map={"AutoConfig": "configuration_minicpm.MiniCPMVConfig"}
    )
    with pytest.raises(
        UserError, match=r"minicpmv\) need code from their folder, which TPRL never runs.*-hf"
    ):
        load(copy)


def test_what_a_folder_lacks_is_named(copy: Path) -> None:
    (copy / "processor_config.json").rename(copy / "elsewhere")
    with pytest.raises(UserError, match=r"': there is no preprocessor_config\.json, which says"):
        load(copy)
    (copy / "elsewhere").rename(copy / "processor_config.json")
    # weights are never unpickled
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"there is a config\.json, and no weights .*: download"):
        load(copy)
    (copy / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json\): download"):
        load(copy)
    (copy / "config.json").rename(copy / "params.json")
    with pytest.raises(UserError, match=r"there is Mistral's own layout, and transformers reads a"):
        load(copy)
    (copy / "params.json").unlink()
    with pytest.raises(UserError, match=r"cannot load the folder '.*': there is no config\.json"):
        load(copy)


def test_pickled_weights_of_the_hub_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tprl.lvlm.loading.within_reach", lambda source: True)
    reason = "me/old does not appear to have a file named model.safetensors\nPlease ..."
    with (
        pytest.raises(UserError, match=r"^the weights 'me/old' are not in safetensors, and"),
        explained("me/old", "llava"),
    ):
        raise OSError(reason)


def test_another_family_is_named(copy: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"are of type llava, and model=smolvlm2 reads smolvlm: .*, model=llava\.",
    ):
        load(copy, "smolvlm2")


def test_a_sentencepiece_file_alone_names_the_package(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (copy / "tokenizer.json").rename(copy / "tokenizer.model")
    monkeypatch.setattr("tprl.lvlm.layouts.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tokenizer\.model alone.*pip install sentencepiece"):
        load(copy)


def test_what_an_old_processor_leaves_out_is_the_configs(copy: Path) -> None:
    settings = json.loads((copy / "processor_config.json").read_text())
    (copy / "preprocessor_config.json").write_text(json.dumps(settings["image_processor"]))
    # as LLaVA-1.5 was before 2024: no patch_size anywhere
    (copy / "processor_config.json").unlink()
    lvlm = load(copy)
    assert lvlm.processor.patch_size == lvlm.model.config.vision_config.patch_size
    assert lvlm.encode([SAMPLE]).visual_mask.sum() == 36


def test_a_template_that_shows_no_image(copy: Path) -> None:
    (copy / "chat_template.jinja").write_text(
        "{% for t in messages %}{{ t.content[-1].text }}{% endfor %} A:"
    )
    with pytest.raises(
        UserError, match=r"writes 0 image placeholders <image> for sample a.*set model\.prompt"
    ):
        load(copy).encode([SAMPLE])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for turn in messages %}{{ turn.role }", "unexpected '}'"),
        ("{{ messages[0].role + ': ' + messages[0].content }}", "can only concatenate str"),
        ("{{ raise_exception('text only') }}", "text only"),
    ],
)
def test_a_template_that_cannot_write_the_question(copy: Path, template: str, reason: str) -> None:
    (copy / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError) as error:
        load(copy).encode([SAMPLE])
    assert f"cannot write sample a ({reason}" in str(error.value)
    assert "set model.prompt, e.g. 'USER: <image>" in str(error.value)
    assert "\n" not in str(error.value)
    assert load(copy, prompt="Q: <image> {question} A:").encode([SAMPLE]).question.any()


@pytest.mark.parametrize("layer", [-9, [-2, 4]])
def test_a_layer_that_the_tower_does_not_have(copy: Path, layer: Any) -> None:
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32")
    lvlm.model.config.vision_feature_layer = layer
    with pytest.raises(UserError, match=r"vision_feature_layer=.* its vision tower of 3 does not"):
        type(lvlm).around(lvlm.model, lvlm.processor)


def test_several_layers_of_the_tower_are_the_stock_models(copy: Path) -> None:
    lvlm = load_component("model", "llava", pretrained=None, dtype="float32")
    config = lvlm.model.config
    config.vision_feature_layer = [-3, -2]
    model = type(lvlm.model)(config).eval()
    model.generation_config = lvlm.model.generation_config
    torch.manual_seed(0)
    model.save_pretrained(copy)
    several = load(copy)
    encoded = several.encode([SAMPLE], frozenset({"vision_features", "cls_attention"}))
    prompt = several.render(SAMPLE)
    inputs = several.processor(text=prompt, images=SAMPLE.images[0], return_tensors="pt")
    with torch.no_grad():
        stock = several.model.get_image_features(
            inputs["pixel_values"], vision_feature_layer=[-3, -2], return_dict=True
        )
    assert torch.allclose(encoded.visual[0], stock.pooler_output[0], atol=1e-6)
    assert encoded.extras["vision_features"].shape[-1] == several.shape.features == 64
    with pytest.raises(UserError, match=r"features of layers \[-3, -2\] side by side"):
        several.encode([SAMPLE], frozenset({"patch_embeds"}))


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl3", "smolvlm2", "llava_next"])
def test_a_prompt_of_ones_own_shows_images_as_the_family_does(name: str) -> None:
    options = {"pretrained": None, "dtype": "float32"}
    lvlm = load_component("model", name, prompt="Q: <image> {question} A:", **options)
    encoded = lvlm.encode([SAMPLE])
    assert (
        encoded.visual_mask.sum()
        == load_component("model", name, **options).encode([SAMPLE]).visual_mask.sum()
    )
    assert (
        lvlm.tokenizer.decode(encoded.input_ids[0][encoded.question[0]]).strip() == SAMPLE.question
    )


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl3", "smolvlm2"])
def test_processors_without_a_video_half_render_chats(name: str) -> None:
    lvlm = load_component("model", name, pretrained=None, dtype="float32")
    turn = {
        "role": "user",
        "content": [{"type": "image"}, {"type": "text", "text": SAMPLE.question}],
    }
    text = lvlm.processor.apply_chat_template([turn], add_generation_prompt=True)
    assert text == lvlm.render(SAMPLE)


def test_the_processor_is_public(llava: Path, tmp_path: Path) -> None:
    assert type(tprl.load_processor(str(llava))).__name__ == "LlavaProcessor"
    folder = tmp_path / "qwen"
    folder.mkdir()
    lvlm = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
    save_folder(lvlm, folder)
    inputs = tprl.load_processor(str(folder))(
        text=lvlm.render(SAMPLE), images=[SAMPLE.images[0]], return_tensors="pt"
    )
    assert (inputs["input_ids"] == lvlm.image_token).sum() == lvlm.encode(
        [SAMPLE]
    ).visual_mask.sum()
    with pytest.raises(UserError, match="neither a folder"):
        tprl.load_processor("/nowhere/at/all")


@real
@pytest.mark.slow
@pytest.mark.parametrize(("folder", "name"), CHECKPOINTS.items())
def test_every_family_loads_as_the_hub_lays_it_out(folder: str, name: str, tmp_path: Path) -> None:
    lvlm = load(shrunk(folder, tmp_path / folder), name, max_new_tokens=2)
    encoded = lvlm.encode([SAMPLE])
    assert (
        lvlm.tokenizer.decode(encoded.input_ids[0][encoded.question[0]]).strip() == SAMPLE.question
    )
    assert encoded.visual_mask.sum() > 1
