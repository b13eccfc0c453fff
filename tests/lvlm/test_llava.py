"""The LLaVA backend against the stock Hugging Face model, on small random weights scaled up so that
errors show."""

import copy
import re
from pathlib import Path

import pytest
import torch
from tests.lvlm.small import SAMPLES, TOKENS, random_selection
from torch import Tensor

from tprl.bench.parity import masked
from tprl.errors import UserError
from tprl.lvlm.llava import Llava
from tprl.lvlm.regions import region_rank
from tprl.splice import keep_all, splice
from tprl.types import Encoded, Prompt, Sample, TokenSelection


def stock_inputs(lvlm: Llava, samples: list[Sample]) -> dict[str, Tensor]:
    return lvlm.processor(
        text=[lvlm.render(sample) for sample in samples],
        images=[sample.images[0] for sample in samples],
        padding=True,
        return_tensors="pt",
    )


def logits_of(lvlm: Llava, prompt: Prompt) -> Tensor:
    """Logits of the last column: what decides the first answer token."""
    with torch.no_grad():
        return lvlm.model(
            inputs_embeds=prompt.embeds,
            attention_mask=prompt.attention.long(),
            position_ids=prompt.positions[0],
        ).logits[:, -1]


def greedy_ids(lvlm: Llava, prompt: Prompt, count: int) -> list[list[int]]:
    """Greedy tokens up to and with the end token, by one uncached forward per token; the reference
    for `exact`."""
    ids: list[list[int]] = [[] for _ in prompt.uids]
    embeds, attention, positions = prompt.embeds, prompt.attention.long(), prompt.positions[0]
    for _ in range(count):
        with torch.no_grad():
            out = lvlm.model(
                inputs_embeds=embeds,
                attention_mask=attention,
                position_ids=positions,
                use_cache=False,
            )
        chosen = out.logits[:, -1].argmax(-1)
        for row, token in zip(ids, chosen.tolist(), strict=True):
            if lvlm.tokenizer.eos_token_id not in row:
                row.append(token)
        embeds = torch.cat([embeds, lvlm.model.get_input_embeddings()(chosen).unsqueeze(1)], 1)
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
        positions = torch.cat([positions, positions[:, -1:] + 1], 1)
    return ids


@pytest.fixture
def generated(lvlm: Llava, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Token ids of everything that `answer` generates, in the order it likes, padding removed."""
    seen: list[list[int]] = []
    generate = lvlm.model.generate

    def spy(*arguments: object, **options: object) -> Tensor:
        out = generate(*arguments, **options)
        seen.extend([i for i in row if i != lvlm.tokenizer.pad_token_id] for row in out.tolist())
        return out

    monkeypatch.setattr(lvlm.model, "generate", spy)
    return seen


class TestEncode:
    def test_every_visual_token_stands_in_its_image_columns_in_order(
        self, lvlm: Llava, encoded: Encoded
    ) -> None:
        x = stock_inputs(lvlm, SAMPLES)
        assert torch.equal(encoded.input_ids, x["input_ids"])
        assert torch.equal(encoded.attention, x["attention_mask"].bool())
        assert encoded.visual_at.shape == (15, TOKENS)
        assert encoded.visual_mask.all()
        for row, at in zip(encoded.input_ids, encoded.visual_at, strict=True):
            assert (row == lvlm.model.config.image_token_index).nonzero().squeeze(
                1
            ).tolist() == at.tolist()
        with torch.no_grad():
            features = lvlm.model.get_image_features(
                x["pixel_values"], return_dict=True
            ).pooler_output
        assert torch.allclose(encoded.visual, torch.stack(list(features)), atol=1e-5)

    def test_text_columns_hold_word_embeddings_and_grids_are_square(
        self, lvlm: Llava, encoded: Encoded
    ) -> None:
        text = encoded.attention & (encoded.input_ids != lvlm.model.config.image_token_index)
        expected = lvlm.model.get_input_embeddings()(encoded.input_ids)
        assert torch.equal(encoded.embeds[text], expected[text])
        assert encoded.grids == ((((6, 6),),),) * 15
        assert not encoded.image_of.any()
        assert encoded.uids == tuple(sample.uid for sample in SAMPLES)

    def test_positions_count_from_the_first_real_column(self, encoded: Encoded) -> None:
        for attention, positions in zip(encoded.attention, encoded.positions[0], strict=True):
            assert positions[attention].tolist() == list(range(int(attention.sum())))
        assert not encoded.attention.all()  # the batch is ragged

    def test_the_question_mask_covers_exactly_the_questions_words(
        self, lvlm: Llava, encoded: Encoded
    ) -> None:
        for sample, ids, mask in zip(SAMPLES, encoded.input_ids, encoded.question, strict=True):
            assert lvlm.tokenizer.decode(ids[mask]).split() == re.findall(
                r"\w+|[^\w\s]", sample.question
            )

    def test_the_question_mask_is_not_fooled_by_template_words(self, lvlm: Llava) -> None:
        question = "USER: ASSISTANT: is there a USER?"
        encoded = lvlm.encode([SAMPLES[0]._replace(question=question), SAMPLES[3]])
        assert lvlm.tokenizer.decode(encoded.input_ids[0][encoded.question[0]]).split() == [
            *("USER", ":", "ASSISTANT", ":", "is", "there", "a", "USER", "?")
        ]

    def test_a_shared_image_goes_through_the_tower_once(self, lvlm: Llava) -> None:
        seen: list[int] = []
        hook = lvlm.model.model.vision_tower.register_forward_pre_hook(
            lambda _, args: seen.append(len(args[0]))
        )
        try:
            mixed = [SAMPLES[i] for i in (0, 5, 1, 6, 2, 10)]
            encoded = lvlm.encode(mixed, frozenset({"vision_features"}))
        finally:
            hook.remove()
        assert seen == [3]
        apart = [lvlm.encode([sample], frozenset({"vision_features"})) for sample in mixed]
        assert torch.allclose(encoded.visual, torch.cat([item.visual for item in apart]), atol=1e-5)
        expected = torch.cat([item.extras["vision_features"] for item in apart])
        assert torch.allclose(encoded.extras["vision_features"], expected, atol=1e-5)

    def test_nothing_needs_a_gradient(self, lvlm: Llava, encoded: Encoded) -> None:
        assert not encoded.embeds.requires_grad
        assert not any(p.requires_grad for p in lvlm.model.parameters())
        assert not isinstance(lvlm, torch.nn.Module)

    def test_width_and_shape(self, lvlm: Llava) -> None:
        assert lvlm.width == 48
        assert lvlm.shape.vision.patches == TOKENS


class TestExtras:
    def test_extras_hold_only_what_was_requested(self, lvlm: Llava, encoded: Encoded) -> None:
        assert encoded.extras == {}
        names = frozenset({"cls_attention", "vision_features", "region"})
        extras = lvlm.encode(SAMPLES[:2], names).extras
        assert extras.keys() == names
        assert [extras[name].shape[:2] for name in sorted(names)] == [(2, TOKENS)] * 3

    @pytest.mark.parametrize("layer", [-2, 2, -3, 1])
    def test_cls_attention_is_that_of_the_layer_that_makes_the_features(
        self, lvlm: Llava, monkeypatch: pytest.MonkeyPatch, layer: int
    ) -> None:
        """hidden_states[-2] of three layers is hidden_states[2]: the output of the second of
        them."""
        monkeypatch.setattr(lvlm.model.config, "vision_feature_layer", layer)
        tower = copy.deepcopy(lvlm.model.model.vision_tower)
        tower.set_attn_implementation("eager")
        pixels = lvlm.processor.image_processor(
            [SAMPLES[i].images[0] for i in (0, 5)], return_tensors="pt"
        )["pixel_values"]
        with torch.no_grad():
            out = tower(pixels, output_attentions=True, output_hidden_states=True)
        made_by = {-2: 1, 2: 1, -3: 0, 1: 0}[layer]
        expected = out.attentions[made_by].mean(1)[:, 0, 1:]
        extras = lvlm.encode(
            [SAMPLES[0], SAMPLES[5]], frozenset({"cls_attention", "vision_features"})
        ).extras
        assert torch.allclose(extras["cls_attention"], expected, atol=1e-5)
        assert torch.allclose(
            extras["vision_features"], out.hidden_states[made_by + 1][:, 1:], atol=1e-4
        )
        assert expected.std() > 1e-3
        others = [a.mean(1)[:, 0, 1:] for i, a in enumerate(out.attentions) if i != made_by]
        assert all((extras["cls_attention"] - other).abs().max() > 1e-3 for other in others)

    def test_region_is_the_rank_on_the_samples_boxes(self, lvlm: Llava) -> None:
        samples = SAMPLES[:3]
        expected = region_rank(samples, [[[(6, 6)]]] * 3, TOKENS)
        assert torch.equal(lvlm.encode(samples, frozenset({"region"})).extras["region"], expected)
        assert (expected > 0).any(1).all()

    def test_project_is_the_projector(self, lvlm: Llava) -> None:
        encoded = lvlm.encode(SAMPLES[:6], frozenset({"vision_features"}))
        assert torch.allclose(
            lvlm.project(encoded.extras["vision_features"]), encoded.visual, atol=1e-5
        )

    def test_an_unknown_extra_is_refused(self, lvlm: Llava) -> None:
        with pytest.raises(
            UserError, match=r"toy cannot provide \['keys'\]: it knows .*cls_attention"
        ):
            lvlm.encode(SAMPLES[:1], frozenset({"keys", "region"}))


class TestStock:
    """Keeping everything is the stock model; dropping a token is masking it out."""

    def test_all_tokens_give_the_stock_models_answers(
        self, lvlm: Llava, encoded: Encoded, generated: list[list[int]]
    ) -> None:
        x = stock_inputs(lvlm, SAMPLES)
        texts = lvlm.answer(splice(encoded, keep_all(encoded)))
        ours = generated.copy()
        out = lvlm.model.generate(**x, max_new_tokens=6, do_sample=False)[
            :, x["input_ids"].shape[1] :
        ]
        stock_ids = [[i for i in row if i != lvlm.tokenizer.pad_token_id] for row in out.tolist()]
        assert sorted(ours) == sorted(stock_ids)
        assert texts == lvlm.tokenizer.batch_decode(out, skip_special_tokens=True)
        assert len({tuple(row) for row in ours}) > 5  # not one answer for everything
        assert len({len(row) for row in ours}) > 1

    def test_all_tokens_give_the_stock_models_logits(self, lvlm: Llava, encoded: Encoded) -> None:
        with torch.no_grad():
            expected = lvlm.model(**stock_inputs(lvlm, SAMPLES)).logits[:, -1]
        got = logits_of(lvlm, splice(encoded, keep_all(encoded)))
        assert torch.allclose(got, expected, atol=1e-4)
        assert expected.std() > 0.3

    def test_a_pruned_token_is_a_masked_token(
        self, lvlm: Llava, encoded: Encoded, generated: list[list[int]]
    ) -> None:
        selection = random_selection(encoded)
        prompt = splice(encoded, selection)
        dropped = masked(encoded, selection)
        assert prompt.embeds.shape[1] < encoded.embeds.shape[1] - 15  # they are really gone
        assert torch.allclose(logits_of(lvlm, prompt), logits_of(lvlm, dropped), atol=1e-4)
        full = logits_of(lvlm, splice(encoded, keep_all(encoded)))
        assert (logits_of(lvlm, prompt) - full).abs().max() > 0.1
        texts, expected = lvlm.answer(prompt), greedy_ids(lvlm, dropped, lvlm.max_new_tokens)
        assert sorted(generated) == sorted(expected)
        assert texts == [lvlm.tokenizer.decode(ids, skip_special_tokens=True) for ids in expected]

    def test_a_ragged_batch_is_its_samples_alone(self, lvlm: Llava, encoded: Encoded) -> None:
        selection = random_selection(encoded, seed=1)
        prompt = splice(encoded, selection)
        answers = [sample.answers[0] for sample in SAMPLES]
        together = (lvlm.answer(prompt), *lvlm.score(prompt, answers), logits_of(lvlm, prompt))
        for i, sample in enumerate(SAMPLES[:8]):
            item = lvlm.encode([sample])
            alone = splice(item, TokenSelection(keep=selection.keep[i : i + 1]))
            assert lvlm.answer(alone) == together[0][i : i + 1]
            log_prob, exact = lvlm.score(alone, answers[i : i + 1])
            assert torch.allclose(log_prob, together[1][i : i + 1], atol=1e-4)
            assert torch.equal(exact, together[2][i : i + 1])
            assert torch.allclose(logits_of(lvlm, alone), together[3][i : i + 1], atol=1e-4)

    def test_the_micro_batch_changes_nothing(
        self, lvlm: Llava, encoded: Encoded, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        prompt, answers = (
            splice(encoded, random_selection(encoded, seed=2)),
            [s.answers[0] for s in SAMPLES],
        )
        texts, (log_prob, exact) = lvlm.answer(prompt), lvlm.score(prompt, answers)
        for size in (1, 4):
            monkeypatch.setattr(lvlm, "micro_batch", size)
            assert lvlm.answer(prompt) == texts
            again = lvlm.score(prompt, answers)
            assert torch.allclose(again[0], log_prob, atol=1e-5)
            assert torch.equal(again[1], exact)


class TestScore:
    def test_the_log_probability_is_that_of_the_stock_model(
        self, lvlm: Llava, encoded: Encoded
    ) -> None:
        log_prob, _ = lvlm.score(
            splice(encoded, keep_all(encoded)), [sample.answers[0] for sample in SAMPLES]
        )
        for i, sample in enumerate(SAMPLES):
            x = stock_inputs(lvlm, [sample])
            answer = lvlm.tokenizer(
                sample.answers[0] + " </s>", add_special_tokens=False, return_tensors="pt"
            )["input_ids"]
            ids, start = torch.cat([x["input_ids"], answer], 1), x["input_ids"].shape[1]
            with torch.no_grad():
                logits = lvlm.model(
                    input_ids=ids,
                    pixel_values=x["pixel_values"],
                    attention_mask=torch.ones_like(ids),
                ).logits[0]
            terms = [
                logits[start - 1 + j].log_softmax(-1)[token] for j, token in enumerate(answer[0])
            ]
            assert terms[1:]
            assert float(log_prob[i]) == pytest.approx(float(torch.stack(terms).mean()), abs=1e-4)

    def test_exact_says_what_greedy_decoding_does(self, lvlm: Llava, encoded: Encoded) -> None:
        """Right for the decoded answer itself, and for others, shortened and prolonged ones: 240
        pairs."""
        right = wrong = 0
        for seed in range(4):
            prompt = splice(encoded, random_selection(encoded, share=0.2 + 0.2 * seed, seed=seed))
            greedy = greedy_ids(lvlm, prompt, 8)
            written = [lvlm.tokenizer.decode(ids[:6], skip_special_tokens=True) for ids in greedy]
            others = [
                written[1:] + written[:1],
                [" ".join(text.split()[:-1]) for text in written],
                [f"{text} red" for text in written],
            ]
            for answers in (written, *others):
                _, exact = lvlm.score(prompt, answers)
                for text, ids, flag in zip(answers, greedy, exact.tolist(), strict=True):
                    wanted = [
                        *lvlm.tokenizer(text, add_special_tokens=False)["input_ids"],
                        lvlm.tokenizer.eos_token_id,
                    ]
                    assert flag == (ids == wanted), (text, lvlm.tokenizer.decode(ids))
                    right, wrong = right + flag, wrong + (not flag)
        assert right >= 10
        assert wrong >= 100

    def test_an_empty_answer_is_the_end_token(self, lvlm: Llava, encoded: Encoded) -> None:
        prompt = splice(encoded, keep_all(encoded))
        log_prob, exact = lvlm.score(prompt, [""] * len(SAMPLES))
        logits, end = logits_of(lvlm, prompt), lvlm.tokenizer.eos_token_id
        assert torch.allclose(log_prob, logits.log_softmax(-1)[:, end], atol=1e-4)
        assert torch.equal(exact, logits.argmax(-1) == end)


class TestGates:
    def test_gates_of_0_and_1_are_pruning(self, lvlm: Llava, encoded: Encoded) -> None:
        selection = random_selection(encoded)
        answers = [sample.answers[0] for sample in SAMPLES]
        expected = lvlm.score(splice(encoded, selection), answers)[0]
        result = lvlm.gated_log_prob(encoded, selection.keep.float(), answers)
        assert torch.allclose(result, expected, atol=1e-3, rtol=1e-3)
        assert not torch.allclose(
            result, lvlm.score(splice(encoded, keep_all(encoded)), answers)[0], atol=1e-2
        )

    def test_the_gradient_reaches_every_gate(self, lvlm: Llava, encoded: Encoded) -> None:
        gate = (encoded.visual_mask * 0.5).requires_grad_()
        lvlm.gated_log_prob(
            encoded, gate, [sample.answers[0] for sample in SAMPLES]
        ).sum().backward()
        assert gate.grad is not None
        assert (gate.grad[encoded.visual_mask] != 0).float().mean() > 0.99

    def test_half_precision_with_gates_of_the_policy(self, folder: Path) -> None:
        half = Llava(str(folder), dtype="bfloat16")
        encoded = half.encode(SAMPLES[:3])
        result = half.gated_log_prob(
            encoded, encoded.visual_mask.float() * 0.7, [s.answers[0] for s in SAMPLES[:3]]
        )
        assert torch.isfinite(result).all()
