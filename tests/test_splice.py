from dataclasses import replace

import pytest
import torch
from tests.helpers import IMAGE_ID, RAGGED, toy_encoded

from tprl.splice import keep_all, splice
from tprl.types import Encoded, TokenSelection


def _random_keep(encoded: Encoded, share: float = 0.4) -> torch.Tensor:
    keep = torch.rand(encoded.visual_mask.shape, generator=torch.Generator().manual_seed(1)) < share
    keep[:, 0] = True
    return keep & encoded.visual_mask


def _expected_columns(encoded: Encoded, keep: torch.Tensor, b: int) -> list[int]:
    dropped = {
        int(c)
        for c, m, k in zip(encoded.visual_at[b], encoded.visual_mask[b], keep[b], strict=True)
        if m > k
    }
    return [
        c for c in range(encoded.attention.shape[1]) if encoded.attention[b, c] and c not in dropped
    ]


@pytest.mark.parametrize("axes", [1, 3])
def test_keeping_everything_changes_nothing(axes):
    encoded = toy_encoded(RAGGED, axes=axes)
    prompt = splice(encoded, keep_all(encoded))
    for name in ("input_ids", "embeds", "attention", "positions"):
        assert torch.equal(getattr(prompt, name), getattr(encoded, name)), name
    assert torch.equal(prompt.visual, encoded.input_ids == IMAGE_ID)
    assert prompt.uids == encoded.uids


def test_dropped_tokens_vanish_and_the_rest_keeps_order_and_position():
    encoded = toy_encoded(RAGGED, axes=3)
    keep = _random_keep(encoded)
    prompt = splice(encoded, TokenSelection(keep))
    lengths = []
    for b in range(3):
        columns, live = _expected_columns(encoded, keep, b), prompt.attention[b]
        lengths.append(len(columns))
        assert torch.equal(prompt.embeds[b, live], encoded.embeds[b, columns])
        assert torch.equal(prompt.input_ids[b, live], encoded.input_ids[b, columns])
        assert torch.equal(prompt.positions[:, b, live], encoded.positions[:, b, columns])
        assert torch.equal(prompt.visual[b, live], encoded.input_ids[b, columns] == IMAGE_ID)
    assert prompt.attention.sum(1).tolist() == lengths
    assert prompt.attention.shape[1] == max(lengths)  # no column that nobody needs
    assert torch.equal(prompt.visual.sum(1), keep.sum(1))


def test_left_padding():
    encoded = toy_encoded(RAGGED)
    prompt = splice(encoded, TokenSelection(_random_keep(encoded)))
    assert (prompt.attention.int().diff(dim=1) >= 0).all()
    assert prompt.attention[:, -1].all()
    assert not prompt.attention.all()
    assert (prompt.positions[:, ~prompt.attention] == 0).all()
    assert not prompt.visual[~prompt.attention].any()


def test_compact_positions_are_consecutive():
    encoded = toy_encoded(RAGGED, axes=3)
    keep = _random_keep(encoded)
    prompt = splice(encoded, TokenSelection(keep), positions="compact")
    for b in range(3):
        live = prompt.attention[b]
        assert prompt.positions[:, b, live].tolist() == [list(range(int(live.sum())))] * 3
    kept = splice(encoded, TokenSelection(keep))
    assert torch.equal(prompt.embeds, kept.embeds)
    assert not torch.equal(prompt.positions, kept.positions)


def test_compact_keep_all_is_the_identity_on_rope_positions():
    encoded = toy_encoded(RAGGED)
    assert torch.equal(
        splice(encoded, keep_all(encoded), positions="compact").positions, encoded.positions
    )


def test_merged_replaces_kept_tokens_only_and_leaves_the_batch_alone():
    encoded = toy_encoded(RAGGED)
    before, keep = encoded.embeds.clone(), _random_keep(encoded)
    merged = encoded.visual + 100
    prompt = splice(encoded, TokenSelection(keep, merged=merged))
    for b in range(3):
        assert torch.equal(prompt.embeds[b, prompt.visual[b]], merged[b, keep[b]])
        text = prompt.attention[b] & ~prompt.visual[b]
        assert torch.equal(
            prompt.embeds[b, text],
            before[b, encoded.attention[b] & (encoded.input_ids[b] != IMAGE_ID)],
        )
    assert torch.equal(encoded.embeds, before)


def test_extra_tokens_stand_right_after_their_anchor():
    encoded = toy_encoded([((2, 2),), ((1, 3),)], width=2)
    keep = torch.tensor([[1, 0, 0, 1], [0, 0, 0, 0]]).bool()
    extra = torch.tensor([[[1.0, 1], [2, 2], [3, 3]], [[4, 4], [9, 9], [9, 9]]])
    extra_at = torch.tensor([[0, 1, 1], [2, 0, 0]])
    extra_mask = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool()
    selection = TokenSelection(keep, extra=extra, extra_at=extra_at, extra_mask=extra_mask)
    prompt = splice(encoded, selection)
    visual = encoded.visual
    first = torch.stack([visual[0, 0], extra[0, 0], extra[0, 1], extra[0, 2], visual[0, 3]])
    assert torch.equal(prompt.embeds[0, prompt.visual[0]], first)
    assert torch.equal(prompt.embeds[1, prompt.visual[1]], extra[1, :1])
    at = [encoded.positions[0, b].gather(0, encoded.visual_at[b]) for b in range(2)]
    assert prompt.positions[0, 0, prompt.visual[0]].tolist() == at[0][[0, 0, 1, 1, 3]].tolist()
    assert prompt.positions[0, 1, prompt.visual[1]].tolist() == at[1][[2]].tolist()
    assert (prompt.input_ids[prompt.visual] == IMAGE_ID).all()
    assert selection.count.tolist() == [5, 1]
    for b in range(2):  # all text is still there, in order
        text = prompt.input_ids[b, prompt.attention[b] & ~prompt.visual[b]]
        assert torch.equal(
            text, encoded.input_ids[b, encoded.attention[b] & (encoded.input_ids[b] != IMAGE_ID)]
        )


def test_a_core_stands_at_the_front_of_its_image_at_its_own_positions():
    encoded = toy_encoded()
    keep = encoded.visual_mask.clone()
    keep[:, ::3] = False
    core = keep.clone()
    core[:, ::2] = False
    raster = splice(encoded, TokenSelection(keep))
    prompt = splice(encoded, TokenSelection(keep, core=core))
    for row in range(len(encoded)):
        mask, at = encoded.visual_mask[row], encoded.visual_at[row]
        text = encoded.attention[row] & ~encoded.is_visual[row]
        # What is written by hand: the text, and each image as core, then focus.
        columns = text.nonzero().squeeze(1).tolist()
        for image in encoded.image_of[row][mask].unique().tolist():
            tokens = mask & (encoded.image_of[row] == image)
            place = sum(column < int(at[tokens].min()) for column in columns)
            front, behind = tokens & core[row], tokens & keep[row] & ~core[row]
            columns[place:place] = [*at[front].tolist(), *at[behind].tolist()]
        count = len(columns)
        assert prompt.attention[row].sum() == count
        assert torch.equal(prompt.embeds[row, -count:], encoded.embeds[row, columns])
        assert torch.equal(prompt.positions[:, row, -count:], encoded.positions[:, row, columns])
        assert sorted(columns) == sorted(set(columns))
    assert torch.equal(prompt.attention, raster.attention)


def test_a_sample_alone_and_in_a_batch_gives_the_same_prompt():
    encoded = toy_encoded(RAGGED)
    keep = _random_keep(encoded)
    batch = splice(encoded, TokenSelection(keep))
    for b in range(3):
        alone = toy_encoded([RAGGED[b]], uids=[encoded.uids[b]])
        prompt = splice(alone, TokenSelection(keep[b : b + 1, : alone.visual_mask.shape[1]]))
        live = batch.attention[b]
        assert prompt.attention.all()
        assert torch.equal(prompt.embeds[0], batch.embeds[b, live])
        assert torch.equal(prompt.positions[:, 0], batch.positions[:, b, live])


def test_padded_keep_raises():
    encoded = toy_encoded(RAGGED)
    keep = encoded.visual_mask.clone()
    keep[1, -1] = True
    with pytest.raises(ValueError, match="padded visual token"):
        splice(encoded, TokenSelection(keep))


def test_extra_on_a_padded_token_raises():
    encoded = toy_encoded(RAGGED)
    selection = TokenSelection(
        encoded.visual_mask,
        extra=torch.zeros(3, 1, 16),
        extra_at=torch.full((3, 1), 60),
        extra_mask=torch.ones(3, 1, dtype=torch.bool),
    )
    with pytest.raises(ValueError, match="padded visual token"):
        splice(encoded, selection)


def test_keeping_nothing_raises_and_names_the_sample():
    encoded = toy_encoded(RAGGED)
    keep = encoded.visual_mask.clone()
    keep[1] = False
    with pytest.raises(ValueError, match="toy-1"):
        splice(encoded, TokenSelection(keep))


def test_a_prompt_without_images_passes():
    encoded = toy_encoded([(), ((2, 2),)])
    prompt = splice(encoded, keep_all(encoded))
    assert prompt.visual.sum(1).tolist() == [0, 4]
    assert torch.equal(prompt.embeds, encoded.embeds)


def test_rows_selects_and_repeats():
    encoded = toy_encoded(RAGGED, extras=["region"], axes=3)
    again = encoded.rows([2, 0, 2])
    assert again.uids == ("toy-2", "toy-0", "toy-2")
    assert torch.equal(again.extras["region"], encoded.extras["region"][[2, 0, 2]])
    assert torch.equal(again.positions, encoded.positions[:, [2, 0, 2]])
    assert torch.equal(replace(again).visual, encoded.visual[[2, 0, 2]])
