import torch

from tprl.rl import credit


def test_the_first_of_the_best_episodes_of_each_question() -> None:
    returns = torch.tensor([0.0, 2.0, 2.0, -1.0, -3.0, -1.0])
    assert credit.best_episodes(returns, 3).tolist() == [1, 3]


def test_blocks_deal_out_places_in_turn() -> None:
    order = torch.tensor([[0, 3, 1, 5, 2, 4, 0]])
    block = credit.blocks_of(order, 2)
    assert block.tolist() == [[-1, 0, 0, 0, 1, 1, -1]]
    assert credit.without_blocks(block, 2, torch.zeros_like(block)).tolist() == [
        [False, False, False, False, True, True, False],
        [False, True, True, True, False, False, False],
    ]


def test_an_advantage_goes_to_the_block_whose_absence_costs() -> None:
    block = torch.tensor([[0, 0, 1, 1, -1], [0, 0, 1, 1, -1], [0, 0, 1, 1, -1]])
    loss = torch.tensor([[3.0, 1.0], [0.0, 0.0], [-2.0, 4.0]])
    got = credit.shared_out(torch.tensor([2.0, 2.0, 1.0]), loss, block)
    expected = [[3.0, 3.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 2.0, 2.0, 0.0]]
    torch.testing.assert_close(got, torch.tensor(expected))


def test_the_sum_over_the_tokens_stays_with_blocks_of_unequal_size() -> None:
    block = torch.tensor([[0, 1, 2, 0, 1]])
    got = credit.shared_out(torch.tensor([1.5]), torch.tensor([[0.2, 0.7, 0.0]]), block)
    torch.testing.assert_close(got.sum(1), torch.tensor([5 * 1.5]))


def test_fewer_tokens_than_blocks() -> None:
    block = credit.blocks_of(torch.tensor([[1, 0, 2]]), 4)
    assert credit.without_blocks(block, 4, torch.zeros_like(block)).sum(1).tolist() == [1, 1, 2, 2]
    got = credit.shared_out(torch.tensor([1.0]), torch.tensor([[0.0, 2.0, 0.0, 0.0]]), block)
    torch.testing.assert_close(got, torch.tensor([[0.0, 0.0, 2.0]]))


def test_no_image_loses_its_last_token() -> None:
    block, image = torch.tensor([[0, -1, 0, 1]]), torch.tensor([[0, 0, 1, 1]])
    assert credit.without_blocks(block, 2, image).tolist() == [
        [True, False, False, True],
        [True, False, True, False],
    ]
