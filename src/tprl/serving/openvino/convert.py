"""A folder that OpenVINO answers from: four graphs, a tokenizer, and a program of numpy."""

import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import torch
from openvino import opset13 as operators
from openvino._offline_transformations import apply_make_stateful_transformation
from torch import nn

from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.pruners.learned import LearnedPruner
from tprl.runtime.files import write_atomically
from tprl.serving.openvino import runtime
from tprl.serving.openvino.checks import check_convert, sides
from tprl.serving.openvino.parts import Eyes, Language, Policy, Words, on_cpu
from tprl.serving.settings import Settings
from tprl.types import Sample

log = logging.getLogger(__name__)
MARK = "QUESTION"  # of no template; replaced by what is asked
FACTS = "serving.json"
PROGRAM = "answer.py"


def convert(
    lvlm: FrozenLVLM, pruner: Any, settings: Settings, folder: Path, weights: str = "f32"
) -> None:
    """Write graphs, tokenizer, facts and program.

    Args:
        lvlm: converted in float32 on the CPU, whatever its dtype and device; it stays so.
        pruner: a policy.
        settings: the keep ratio is a default that callers may change; positions are fixed.
        folder: made if it does not exist.
        weights: "f32", or "int8" with a scale per row.

    Raises:
        UserError: see `check_convert` and `wording`.
    """
    # Everything is checked and read before a folder exists.
    check_convert(lvlm, pruner)
    about = facts(lvlm, pruner, settings)
    folder.mkdir(parents=True, exist_ok=True)
    on_cpu(lvlm, pruner)
    # SDPA becomes one operation of OpenVINO; flash attention cannot be traced.
    lvlm.model.set_attn_implementation("sdpa")
    for name, graph in graphs(lvlm, pruner).items():
        if weights == "int8":
            log.info("%s: %d matrices as int8", name, compress(graph))
        # OpenVINO would store weights as float16 by default, and f32 promises exact answers.
        ov.save_model(graph, folder / f"{name}.xml", compress_to_fp16=False)
    lvlm.processor.tokenizer.save_pretrained(folder)
    write_atomically(folder / FACTS, json.dumps(about, indent=1) + "\n")
    # The program lies beside its graphs: the folder needs no TPRL to answer.
    shutil.copy(runtime.__file__, folder / PROGRAM)


@torch.no_grad()
def graphs(lvlm: FrozenLVLM, pruner: LearnedPruner) -> dict[str, ov.Model]:
    """Counts of tokens and words, the keep ratio and lengths are inputs of the graphs, not parts of
    them."""
    config, width = lvlm.model.config, lvlm.width
    side = config.vision_config.image_size
    # Values of the examples do not matter, their ranks and types do.
    pixels = torch.zeros(1, 3, side, side)
    tokens = Eyes(lvlm)(pixels)
    words = torch.zeros(1, 5, width)
    places = torch.rand(1, tokens.shape[1], 2)
    # -1 leaves an axis open: numbers of tokens and words differ by question.
    parts = {
        "eyes": _traced(Eyes(lvlm), (pixels,), [[1, 3, side, side]]),
        "words": _traced(Words(lvlm), (torch.zeros(1, 5, dtype=torch.long),), [[1, -1]]),
        "policy": _traced(
            Policy(pruner),
            (tokens, places, words, torch.tensor([0.5])),
            [[1, -1, width], [1, -1, 2], [1, -1, width], [1]],
        ),
    }
    return parts | {"language": _language(lvlm)}


def _language(lvlm: FrozenLVLM) -> ov.Model:
    """The language model, which keeps keys and values itself between calls."""
    text = lvlm.model.config.text_config
    heads = text.num_key_value_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    # Two tokens after three: lengths of 1 would be traced as axes to broadcast.
    past = [torch.zeros(1, heads, 3, head) for _ in range(2 * text.num_hidden_layers)]
    inputs = (
        torch.zeros(1, 2, lvlm.width),
        torch.arange(3, 5).unsqueeze(0),
        torch.zeros(1, 1, 2, 5),
        *past,
    )
    shapes = [[1, -1, lvlm.width], [1, -1], [1, 1, -1, -1], *([1, heads, -1, head] for _ in past)]
    graph = _traced(Language(lvlm), inputs, shapes)
    # Inputs 0 to 2 are embeddings, positions and mask; output 0 is the logits.
    pairs = {}
    for number in range(len(past)):
        graph.inputs[3 + number].get_tensor().set_names({f"past.{number}"})
        graph.outputs[1 + number].get_tensor().set_names({f"present.{number}"})
        pairs[f"past.{number}"] = f"present.{number}"
    # OpenVINO then keeps keys and values between calls, so that they are never copied out.
    apply_make_stateful_transformation(graph, pairs)
    return graph


def _traced(
    module: nn.Module, inputs: tuple[Any, ...], shapes: Sequence[Sequence[int]]
) -> ov.Model:
    module.eval().requires_grad_(False)
    return ov.convert_model(
        module, example_input=inputs, input=[ov.PartialShape(list(shape)) for shape in shapes]
    )


def compress(graph: ov.Model) -> int:
    """Hold the matrices of a graph as int8 with a float scale per row, symmetrically; returns how
    many.

    Only what is multiplied or looked up is touched; numbers are computed in float as before.
    """
    changed = 0
    for node in graph.get_ops():
        if node.get_type_name() not in ("MatMul", "Gather"):
            continue
        for place in range(min(2, node.get_input_size())):
            source = node.input_value(place).get_node()
            if source.get_type_name() != "Constant" or not _is_matrix(source):
                continue
            # The graph keeps computing in float: int8 is how a weight is stored, not how it is
            # used.
            node.input(place).replace_source_output(_int8(source.data).output(0))
            changed += 1
    graph.validate_nodes_and_infer_types()
    return changed


def _is_matrix(constant: Any) -> bool:
    return (
        len(constant.shape) == 2
        and min(constant.shape) > 1
        and constant.get_element_type() == ov.Type.f32
    )


def _int8(matrix: np.ndarray) -> Any:
    # 127 on both sides keeps zero exact; a row of zeros would divide by zero.
    scale = np.abs(matrix).max(1, keepdims=True).astype(np.float32) / 127
    scale[scale == 0] = 1
    rounded = np.clip(np.round(matrix / scale), -127, 127).astype(np.int8)
    return operators.multiply(
        operators.convert(operators.constant(rounded), "f32"), operators.constant(scale)
    )


def facts(lvlm: FrozenLVLM, pruner: LearnedPruner, settings: Settings) -> dict[str, Any]:
    """What the program must know beside the graphs."""
    config, images = lvlm.model.config, lvlm.processor.image_processor
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    return {
        "keep_ratio": settings.keep_ratio,
        "positions": settings.positions,
        "select": pruner.serving.select,
        "quality": pruner.serving.quality,
        "trained_to": pruner.serving.trained_to,
        "fade": pruner.serving.fade,
        "grid": [side, side],
        "image_token": lvlm.image_token,
        "prompt": wording(lvlm),
        "ends": lvlm.ends,
        "size": sides(images.size),
        "crop": sides(images.crop_size),
        "mean": list(images.image_mean),
        "std": list(images.image_std),
    }


def wording(lvlm: FrozenLVLM) -> list[str]:
    """A prompt about one image, before and after the question.

    Raises:
        UserError: the template does not write the question once as it is.
    """
    picture: Any = object()  # prompts count images, they do not look at them
    # The template is asked once with a marked question, and its text is cut at the mark.
    text = lvlm.render(Sample("wording", (picture,), MARK, ()))
    before, mark, after = text.partition(MARK)
    if not mark or MARK in after or before.count(lvlm.placeholder) != 1:
        raise UserError(
            f"{lvlm.name} words a prompt as {text!r}, which does not "
            "hold one image before one question: set model.prompt."
        )
    return [before, after]
