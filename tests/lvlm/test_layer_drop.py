"""Drops between decoder layers, against the same model with per-layer masks over the whole
sequence."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from jaxtyping import Float, Int
from tests.lvlm.small import each_family
from tests.lvlm.test_families import SAMPLES
from torch import Tensor

from tprl.budget import budget
from tprl.build import load_component
from tprl.cost import LMShape
from tprl.errors import UserError
from tprl.lvlm.batching import axes
from tprl.lvlm.frozen import FrozenLVLM
from tprl.lvlm.layer_drop import LayerPlan, LayerStage, Look, dropping
from tprl.splice import keep_all, splice
from tprl.types import Prompt

# Refused: the first layers add deepstack features, or not all layers attend to all tokens.
FAMILIES = each_family("qwen3_vl", "gemma3", "gemma4", "qwen3_5")
TWO = SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0]))
MIXED = [SAMPLES[0], TWO, SAMPLES[3]._replace(images=()), SAMPLES[4]]
STEPS = 5


class LastRow:
    """Attention of the last token, by a schedule that tests choose."""

    name = "last_row"
    extras: frozenset[str] = frozenset()

    def __init__(self, *stages: LayerStage) -> None:
        self.given = stages

    def stages(self, keep_ratio: float, layers: int) -> tuple[LayerStage, ...]:
        return self.given

    def rank(self, look: Look, k: Int[Tensor, "B S"]) -> Float[Tensor, "B S"]:
        return look.last_row()

    def flops(self, lm: LMShape, stage: LayerStage, text: int, alive: int) -> int:
        return 0


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return load_component(
        "model", request.param, pretrained=None, dtype="float32", max_new_tokens=STEPS
    )


def plan(lvlm: FrozenLVLM, *stages: LayerStage) -> LayerPlan:
    return LayerPlan.of(LastRow(*stages), 0.5, lvlm.layers)


def language(lvlm: FrozenLVLM) -> Any:
    parts = lvlm.model.model
    return parts.language_model if hasattr(parts, "language_model") else parts.text_model


def naive(
    lvlm: FrozenLVLM, prompt: Prompt, ids: Tensor, stages: Sequence[LayerStage]
) -> tuple[Tensor, list[list[int]]]:
    """Logits [A N] that predict each of `ids` after a single prompt: no token leaves, layers mask
    what is dropped.

    Attention is written out, head by head, from the layers' own projections; also the columns that
    live at the end.
    """
    model, text = lvlm.model, language(lvlm)
    embeds = torch.cat([prompt.embeds, model.get_input_embeddings()(ids[None, :-1])], 1)
    places = torch.cat(
        [prompt.positions, prompt.positions[..., -1:] + 1 + torch.arange(len(ids) - 1)], -1
    )
    cos, sin = text.rotary_emb(embeds, axes(places))
    length, width = embeds.shape[1], prompt.embeds.shape[1]
    alive = [True] * length
    hidden, rows = embeds, {}
    for number, layer in enumerate(text.layers):
        before = layer.input_layernorm(hidden)
        rows[number] = _row(layer, before, cos, sin, width - 1, alive)
        for stage in stages:
            if stage.before == number:
                for image in range(int(prompt.image.max()) + 1):
                    block = [
                        c
                        for c in range(width)
                        if prompt.visual[0, c] and int(prompt.image[0, c]) == image
                    ]
                    left = sorted(
                        (c for c in block if alive[c]), key=lambda c: -float(rows[stage.reads][c])
                    )
                    for column in left[budget(stage.keep, len(block)) :]:
                        alive[column] = False
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)
        mask[:, [not present for present in alive]] = torch.finfo(torch.float32).min
        mask.fill_diagonal_(0.0)
        hidden = layer(
            hidden,
            attention_mask=mask[None, None],
            position_embeddings=(cos, sin),
            position_ids=None,
        )
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    logits = model.lm_head(text.norm(hidden))[0, width - 1 :]
    return logits, [[c for c in range(width) if alive[c] and prompt.visual[0, c]]]


def _row(layer: Any, x: Tensor, cos: Tensor, sin: Tensor, last: int, alive: list[bool]) -> Tensor:
    """Mean over heads of the attention of column `last`."""
    attention = layer.self_attn
    size = attention.head_dim
    query, key = attention.q_proj(x)[0], attention.k_proj(x)[0]
    heads, groups = query.shape[1] // size, query.shape[1] // key.shape[1]

    def rotated(vector: Tensor, column: int) -> Tensor:
        turning = cos.shape[-1]
        head, still = vector[:turning], vector[turning:]
        if turning < size:  # GLM's: neighbors are a plane, and a part of a head stands still
            turned = torch.stack([-head[1::2], head[::2]], -1).flatten()
        else:
            turned = torch.cat([-head[turning // 2 :], head[: turning // 2]])
        return torch.cat([head * cos[0, column] + turned * sin[0, column], still])

    total = torch.zeros(len(alive))
    for head in range(heads):
        q = rotated(query[last, head * size : (head + 1) * size], last)
        start = head // groups * size
        scores = torch.full((len(alive),), -torch.inf)
        for column in range(last + 1):
            if alive[column]:
                scores[column] = q @ rotated(key[column, start : start + size], column) / size**0.5
        total += scores.softmax(0)
    return total / heads


# Two drops, of which the second reads the layer that it stands before, as PyramidDrop's do.
FROM_THE_START = (LayerStage(0, 0, 0.6), LayerStage(1, 1, 0.2))


@pytest.mark.parametrize(
    "stages",
    [
        (LayerStage(1, 0, 0.3),),
        FROM_THE_START,
        pytest.param((LayerStage(1, 1, 0.4),), marks=pytest.mark.slow),
    ],
    ids=["as FastV", "before the first layer", "as PyramidDrop"],
)
def test_dropping_is_masking_in_later_layers_at_every_step(
    lvlm: FrozenLVLM, stages: tuple[LayerStage, ...]
) -> None:
    sample = TWO
    encoded = lvlm.encode([sample])
    prompt = splice(encoded, keep_all(encoded))
    layer_plan = plan(lvlm, *stages)
    text = lvlm.answer(prompt, layer_plan)[0]
    ids = []
    for _ in range(STEPS):
        logits, _ = naive(lvlm, prompt, torch.tensor([*ids, 0]), stages)
        ids.append(int(logits[-1].argmax()))
    end = lvlm.tokenizer.eos_token_id
    ids = ids[: ids.index(end)] if end in ids else ids
    assert text == lvlm.tokenizer.decode(ids, skip_special_tokens=True)
    answer = lvlm.answer_ids(["yes it is"])
    logits, _ = naive(lvlm, prompt, answer[0], stages)
    expected = logits.log_softmax(-1).gather(1, answer.T).mean()
    assert float(lvlm.score(prompt, ["yes it is"], layer_plan)[0]) == pytest.approx(
        float(expected), abs=1e-5
    )
    assert abs(float(lvlm.score(prompt, ["yes it is"])[0]) - float(expected)) > 1e-4


@pytest.mark.parametrize(
    "stages",
    [
        FROM_THE_START,
        pytest.param((LayerStage(1, 0, 0.3),), marks=pytest.mark.slow),
        pytest.param((LayerStage(1, 1, 0.4),), marks=pytest.mark.slow),
    ],
    ids=["before the first layer", "as FastV", "as PyramidDrop"],
)
def test_a_ragged_batch_is_its_samples_alone(
    lvlm: FrozenLVLM, stages: tuple[LayerStage, ...]
) -> None:
    layer_plan, answers = plan(lvlm, *stages), ["yes it is", "no", "red", "two of them"]
    encoded = lvlm.encode(MIXED)
    prompt = splice(encoded, keep_all(encoded))
    texts, (log_prob, exact) = (
        lvlm.answer(prompt, layer_plan),
        lvlm.score(prompt, answers, layer_plan),
    )
    for row, sample in enumerate(MIXED):
        single = lvlm.encode([sample])
        alone = splice(single, keep_all(single))
        assert lvlm.answer(alone, layer_plan) == texts[row : row + 1]
        again = lvlm.score(alone, answers[row : row + 1], layer_plan)
        assert torch.allclose(again[0], log_prob[row : row + 1], atol=1e-5)
        assert torch.equal(again[1], exact[row : row + 1])


def test_the_cache_really_shrinks_from_the_first_drop_on(lvlm: FrozenLVLM) -> None:
    encoded = lvlm.encode([TWO])
    prompt, layer_plan = splice(encoded, keep_all(encoded)), plan(lvlm, LayerStage(1, 0, 0.3))
    with lvlm.deepstack(prompt.deep, prompt.visual), dropping(lvlm.model, prompt, layer_plan):
        out = lvlm.model.generate(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention.long(),
            position_ids=axes(prompt.positions),
            max_new_tokens=2,
            min_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
        )
    cache = out.past_key_values
    n, images = prompt.embeds.shape[1], encoded.image_of[0].bincount().tolist()
    kept = sum(budget(0.3, count) for count in images)
    assert cache.get_seq_length(0) == n + 1
    assert cache.get_seq_length(1) == n - sum(images) + kept + 1
    assert not any(layer._forward_pre_hooks for layer in language(lvlm).layers)


def test_eager_attention_gives_the_same() -> None:
    both = [
        load_component(
            "model",
            "llava",
            pretrained=None,
            dtype="float32",
            max_new_tokens=STEPS,
            attention=attention,
        )
        for attention in ("sdpa", "eager")
    ]
    layer_plan = []
    for lvlm in both:
        encoded = lvlm.encode(MIXED)
        prompt = splice(encoded, keep_all(encoded))
        layer_plan.append(
            lvlm.score(
                prompt, ["yes it is", "no", "red", "two"], plan(lvlm, LayerStage(1, 0, 0.3))
            )[0]
        )
    assert torch.allclose(*layer_plan, atol=1e-5)


def test_layers_that_add_deepstack_features_are_not_dropped_before() -> None:
    lvlm = load_component("model", "qwen3_vl", pretrained=None, dtype="float32", max_new_tokens=2)
    encoded = lvlm.encode(SAMPLES[:1])
    with pytest.raises(
        UserError,
        match="drops tokens before layer 1, where this LVLM still adds deepstack features",
    ):
        lvlm.answer(splice(encoded, keep_all(encoded)), plan(lvlm, LayerStage(1, 0, 0.3)))
    text = lvlm.answer(splice(encoded, keep_all(encoded)), plan(lvlm, LayerStage(2, 1, 0.3)))
    assert len(text) == 1


def test_what_layers_compute_is_counted() -> None:
    layer_plan = LayerPlan(LastRow(), (LayerStage(1, 0, 0.5), LayerStage(3, 3, 0.25)), 5)
    assert layer_plan.counts(36) == [36, 18, 18, 9, 9]
