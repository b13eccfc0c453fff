"""Every family against its stock Hugging Face class, on small random weights scaled up so that
errors show."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tests.lvlm.small import each_family, half_on_disk, save_folder
from torch import Tensor
from torch.nn import functional as F

from tprl.bench.parity import defined, forward, parity, parity_table, stock_inputs, varied
from tprl.build import load_component
from tprl.data.scenes import Scenes
from tprl.errors import UserError
from tprl.lvlm.frozen import FrozenLVLM
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Sample, TokenSelection

FAMILIES = each_family()
SAMPLES = varied([Scenes("val")[i] for i in range(6)])


@pytest.fixture(scope="module", params=FAMILIES)
def lvlm(request: pytest.FixtureRequest) -> FrozenLVLM:
    return load_component(
        "model", request.param, pretrained=None, dtype="float32", max_new_tokens=6
    )


@pytest.fixture(scope="module")
def encoded(lvlm: FrozenLVLM) -> Encoded:
    return lvlm.encode(SAMPLES)


def some(encoded: Encoded) -> TokenSelection:
    draws = torch.rand(encoded.visual_mask.shape, generator=torch.Generator().manual_seed(0))
    return TokenSelection(encoded.visual_mask & (draws < 0.4))


def logits(lvlm: FrozenLVLM, prompt: Prompt) -> Tensor:
    return forward(lvlm, prompt)[:, -1]


@torch.no_grad()
def written(lvlm: FrozenLVLM, selection: TokenSelection, count: int) -> list[str]:
    """Greedy answers to SAMPLES pruned as the definition says, by one uncached forward per
    token."""
    ids = torch.zeros(len(SAMPLES), 0, dtype=torch.long)
    for _ in range(count):
        unread = torch.cat([ids, ids.new_zeros(len(ids), 1)], 1)
        new = defined(lvlm, SAMPLES, selection, unread)[:, -1].argmax(-1)
        ids = torch.cat([ids, new.unsqueeze(1)], 1)
    return texts_of(lvlm, ids)


def texts_of(lvlm: FrozenLVLM, ids: Tensor) -> list[str]:
    end = lvlm.tokenizer.eos_token_id
    rows = [row[: row.index(end)] if end in row else row for row in ids.tolist()]
    return [lvlm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]


@torch.no_grad()
def greedy(lvlm: FrozenLVLM, prompt: Prompt, count: int) -> list[str]:
    """Greedy answers by one uncached forward per token."""
    chosen: list[Tensor] = []
    for _ in range(count):
        new = logits(lvlm, prompt).argmax(-1).unsqueeze(1)
        chosen.append(new.squeeze(1))
        single = torch.ones_like(new, dtype=torch.bool)
        prompt = Prompt(
            prompt.uids,
            torch.cat([prompt.input_ids, new], 1),
            torch.cat([prompt.embeds, lvlm.words(new)], 1),
            torch.cat([prompt.attention, single], 1),
            torch.cat([prompt.positions, prompt.positions[..., -1:] + 1], -1),
            torch.cat([prompt.visual, ~single], 1),
            F.pad(prompt.image, (0, 1)),
            None if prompt.deep is None else F.pad(prompt.deep, (0, 0, 0, 1)),
        )
    return texts_of(lvlm, torch.stack(chosen, 1))


def test_keeping_everything_is_the_stock_model(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    prompt, stock = splice(encoded, keep_all(encoded)), stock_inputs(lvlm, SAMPLES)
    with torch.no_grad():
        expected = lvlm.model(**stock).logits[:, -1]
        ids = lvlm.model.generate(**stock, max_new_tokens=6, do_sample=False)[
            :, stock["input_ids"].shape[1] :
        ]
    assert torch.allclose(logits(lvlm, prompt), expected, atol=2e-5)
    assert expected.std() > 0.3
    assert lvlm.answer(prompt) == lvlm.tokenizer.batch_decode(ids, skip_special_tokens=True)


def test_pruned_is_what_the_definition_says_at_every_step(
    lvlm: FrozenLVLM, encoded: Encoded
) -> None:
    selection = some(encoded)
    prompt = splice(encoded, selection)
    expected = defined(lvlm, SAMPLES, selection)[:, -1]
    assert torch.allclose(logits(lvlm, prompt), expected, atol=1e-5)
    assert (
        logits(lvlm, prompt) - logits(lvlm, splice(encoded, keep_all(encoded)))
    ).abs().max() > 0.1
    assert lvlm.answer(prompt) == written(lvlm, selection, 6)


def test_a_ragged_batch_is_its_samples_alone(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    selection = some(encoded)
    prompt = splice(encoded, selection)
    answers = [sample.answers[0] for sample in SAMPLES]
    texts, (log_prob, exact) = lvlm.answer(prompt), lvlm.score(prompt, answers)
    for i, sample in enumerate(SAMPLES):
        single = lvlm.encode([sample])
        alone = splice(
            single,
            TokenSelection(selection.keep[i : i + 1, : single.visual_mask.shape[1]]),
        )
        assert torch.allclose(logits(lvlm, alone), logits(lvlm, prompt)[i : i + 1], atol=1e-5)
        assert lvlm.answer(alone) == texts[i : i + 1]
        result = lvlm.score(alone, answers[i : i + 1])
        assert torch.allclose(result[0], log_prob[i : i + 1], atol=1e-5)
        assert torch.equal(result[1], exact[i : i + 1])


def test_distributions_are_those_that_score_reads(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    prompt, answers = splice(encoded, some(encoded)), [sample.answers[0] for sample in SAMPLES]
    log_prob, exact = lvlm.score(prompt, answers)
    result = lvlm.distributions(prompt, answers)
    assert torch.allclose(
        result.exp().sum(-1).nan_to_num(nan=1.0), torch.ones(result.shape[:2]), atol=1e-5
    )
    for i, answer in enumerate(answers):
        ids = lvlm.answer_ids([answer])[0].tolist()
        assert lvlm.tokenizer.decode(ids[:-1]).strip() == answer
        assert ids[-1] == lvlm.tokenizer.eos_token_id
        assert result[i, len(ids) :].isnan().all()
        assert result[i, range(len(ids)), ids].mean() == pytest.approx(float(log_prob[i]), abs=1e-5)
        assert (result[i, : len(ids)].argmax(-1).tolist() == ids) == bool(exact[i])


def test_compact_positions_close_the_gaps(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    prompt = splice(encoded, some(encoded), positions="compact")
    count = prompt.attention.sum(1)
    assert torch.equal(prompt.positions.amax((0, 2)), count - 1)
    assert lvlm.answer(prompt) == greedy(lvlm, prompt, 6)


def test_visual_tokens_fill_their_grids_and_the_question_is_found(
    lvlm: FrozenLVLM, encoded: Encoded
) -> None:
    for i, sample in enumerate(SAMPLES):
        assert int(encoded.visual_mask[i].sum()) == sum(
            rows * columns for views in encoded.grids[i] for rows, columns in views
        )
        assert lvlm.tokenizer.decode(encoded.input_ids[i][encoded.question[i]]) == sample.question


def test_gates_of_0_and_1_are_pruning(lvlm: FrozenLVLM, encoded: Encoded) -> None:
    selection, answers = some(encoded), [sample.answers[0] for sample in SAMPLES]
    if lvlm.definition != "masked":
        with pytest.raises(UserError, match="a gate of 0 is not pruning: train with stage=lfd and"):
            lvlm.gated_log_prob(encoded, selection.keep.float(), answers)
        return
    expected = lvlm.score(splice(encoded, selection), answers)[0]
    assert torch.allclose(
        lvlm.gated_log_prob(encoded, selection.keep.float(), answers), expected, atol=1e-3
    )


MIXED = (
    SAMPLES[0],
    SAMPLES[1]._replace(images=(SAMPLES[0].images[0], SAMPLES[2].images[0])),
    SAMPLES[3]._replace(images=()),
)


@pytest.mark.parametrize("chosen", [MIXED, MIXED[2:]], ids=["one, two and no image", "text only"])
def test_any_number_of_images(lvlm: FrozenLVLM, chosen: tuple[Sample, ...]) -> None:
    chat = load_component(
        "model", lvlm.name, pretrained=None, dtype="float32", max_new_tokens=6, prompt=None
    )
    encoded = chat.encode(chosen)
    stock = stock_inputs(chat, chosen)
    ids = chat.model.generate(**stock, max_new_tokens=6, do_sample=False)[
        :, stock["input_ids"].shape[1] :
    ]
    prompt = splice(encoded, keep_all(encoded))
    assert chat.answer(prompt) == chat.tokenizer.batch_decode(ids, skip_special_tokens=True)
    counts = [
        len(set(images.tolist()))
        for images in (encoded.image_of[i][m] for i, m in enumerate(encoded.visual_mask))
    ]
    assert counts == [len(sample.images) for sample in chosen]
    log_prob, _ = chat.score(prompt, ["yes"] * len(chosen))
    alone = chat.encode(chosen[-1:])
    assert torch.allclose(
        chat.score(splice(alone, keep_all(alone)), ["yes"])[0], log_prob[-1:], atol=1e-5
    )


def test_a_local_folder_is_the_same_model(
    lvlm: FrozenLVLM, encoded: Encoded, tmp_path: Path
) -> None:
    save_folder(lvlm, tmp_path)
    result = load_component(
        "model", lvlm.name, pretrained=str(tmp_path), dtype="float32", max_new_tokens=6
    )
    again = result.encode(SAMPLES)
    assert torch.equal(again.input_ids, encoded.input_ids)
    prompt = splice(again, some(again))
    assert torch.allclose(
        logits(result, prompt), logits(lvlm, splice(encoded, some(encoded))), atol=1e-6
    )
    assert result.answer(prompt) == lvlm.answer(splice(encoded, some(encoded)))


@pytest.mark.filterwarnings("ignore:The following device_map keys")
def test_a_model_spread_over_memory_and_disk_is_the_same_model(
    lvlm: FrozenLVLM, encoded: Encoded, tmp_path: Path
) -> None:
    if lvlm.name == "gemma4":
        with pytest.raises(UserError, match="compares every prompt with its word embeddings, whic"):
            half_on_disk(lvlm, tmp_path)
        return
    spread = half_on_disk(lvlm, tmp_path)
    assert spread.device == torch.device("cpu")
    prompt, again = (splice(single, some(single)) for single in (encoded, spread.encode(SAMPLES)))
    answers = [sample.answers[0] for sample in SAMPLES]
    assert spread.answer(again) == lvlm.answer(prompt)
    assert torch.equal(spread.score(again, answers)[0], lvlm.score(prompt, answers)[0])


def test_random_weights_leave_the_runs_own_seed_alone(lvlm: FrozenLVLM) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load_component("model", lvlm.name, pretrained=None, dtype="float32")
    assert torch.equal(torch.rand(3), expected)


def test_a_question_that_the_template_trims_is_found_and_one_that_it_changes_is_refused() -> None:
    chat = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
    chat.processor.chat_template = chat.processor.chat_template.replace(
        "part.text", "part.text | trim"
    )
    encoded = chat.encode([SAMPLES[0]._replace(question="  is it red? ")])
    assert chat.tokenizer.decode(encoded.input_ids[0][encoded.question[0]]) == "is it red?"
    chat.processor.chat_template = chat.processor.chat_template.replace("trim", "upper")
    with pytest.raises(UserError, match=r"changes the question of sample scenes/val/0/attribute"):
        chat.encode([SAMPLES[0]])


def test_weights_of_another_family_are_refused(tmp_path: Path) -> None:
    save_folder(load_component("model", "qwen3_vl", pretrained=None, dtype="float32"), tmp_path)
    with pytest.raises(
        UserError,
        match=r"are of type qwen3_vl, and model=qwen2_5_vl reads qwen2_5_vl: choose the model",
    ):
        load_component("model", "qwen2_5_vl", pretrained=str(tmp_path), dtype="float32")


def test_a_chat_template_in_a_file_of_its_own_is_found(tmp_path: Path) -> None:
    lvlm = load_component("model", "qwen2_5_vl", pretrained=None, dtype="float32")
    lvlm.model.save_pretrained(tmp_path)
    lvlm.tokenizer.save_pretrained(tmp_path)
    lvlm.processor.image_processor.save_pretrained(tmp_path)
    (tmp_path / "chat_template.json").write_text(
        json.dumps({"chat_template": lvlm.processor.chat_template})
    )
    result = load_component("model", "qwen2_5_vl", pretrained=str(tmp_path), dtype="float32")
    assert result.render(SAMPLES[0]) == lvlm.render(SAMPLES[0])


def test_a_checkpoints_own_repetition_penalty_does_not_change_greedy_answers(
    lvlm: FrozenLVLM,
) -> None:
    encoded = lvlm.encode(SAMPLES)
    prompt = splice(encoded, keep_all(encoded))
    expected = lvlm.answer(prompt)
    lvlm.model.generation_config.update(repetition_penalty=1.3, num_beams=2)
    try:
        assert lvlm.answer(prompt) == expected
        assert parity(lvlm, SAMPLES).same_ids
    finally:
        lvlm.model.generation_config.update(repetition_penalty=None, num_beams=None)


def test_smolvlm_without_num2words_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tprl.lvlm.smolvlm2.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'tprl\[smolvlm\]'"):
        load_component("model", "smolvlm2", pretrained=None)


class TestParity:
    def test_every_family_is_exact(self, lvlm: FrozenLVLM) -> None:
        result = parity(lvlm, SAMPLES)
        assert result.keep_all == 0
        assert max(result.pruned, result.decode, result.batch) <= 1e-5
        assert result.std > 0.3
        assert result.same_ids
        assert (
            parity_table({lvlm.name: result})
            .splitlines()[2]
            .startswith(f"| `{lvlm.name}` | {lvlm.definition} | 0 | ")
        )

    def test_positions_that_close_the_gaps_would_be_seen(
        self, lvlm: FrozenLVLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            "tprl.bench.parity.splice", lambda e, s: splice(e, s, positions="compact")
        )
        result = parity(lvlm, SAMPLES)
        assert result.pruned > 0.05
        assert result.decode > 0.05

    def test_lost_deepstack_features_would_be_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        lvlm = load_component("model", "qwen3_vl", pretrained=None, dtype="float32")
        monkeypatch.setattr(lvlm, "deepstack", lambda deep, visual: nullcontext())
        result = parity(lvlm, SAMPLES)
        assert result.keep_all > 0.05
        assert not result.same_ids
