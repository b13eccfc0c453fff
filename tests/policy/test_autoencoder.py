import pytest
import torch

from tprl.errors import UserError
from tprl.policy.autoencoder import Autoencoder


def correlated(n: int, seed: int) -> torch.Tensor:
    """[n 48] tokens that live near 6 dimensions, with scales from 0.01 to 100 and an offset."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(6, 48, generator=torch.Generator().manual_seed(99))
    tokens = torch.randn(n, 6, generator=generator) @ mix + 0.1 * torch.randn(
        n, 48, generator=generator
    )
    return tokens * torch.logspace(-2, 2, 48) + 5


def test_it_learns_to_reconstruct_correlated_tokens() -> None:
    torch.manual_seed(0)
    model, train, held_out = (
        Autoencoder(48, code_width=8, hidden=64),
        correlated(2048, 0),
        correlated(512, 1),
    )
    model.fit_statistics(train)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    before = model.relative_mse(held_out).item()
    for step in range(300):
        optimizer.zero_grad()
        model.relative_mse(train[(step * 128) % 2048 :][:128]).backward()
        optimizer.step()
    after = model.relative_mse(held_out).item()
    assert before > 0.8
    assert after < 0.1
    assert model.encode(held_out).shape == (512, 8)
    error = (model(held_out) - held_out) / held_out.std(0)
    assert error.square().mean().item() == pytest.approx(after, rel=0.2)


def test_relative_mse_of_the_mean_is_one() -> None:
    model, tokens = Autoencoder(48, code_width=4, hidden=8), correlated(500, 0)
    model.fit_statistics(tokens)
    with torch.no_grad():
        for parameter in model.decoder[-1].parameters():
            parameter.zero_()
    assert model.relative_mse(tokens).item() == pytest.approx(1.0, abs=0.01)


def test_statistics_travel_in_the_state_dict() -> None:
    torch.manual_seed(0)
    model, tokens = (
        Autoencoder(3, code_width=2, hidden=4),
        torch.tensor([[1.0, 2.0, 7.0], [3.0, 6.0, 7.0]]),
    )
    model.fit_statistics(tokens)
    state = model.state_dict()
    assert state["mean"].tolist() == [2.0, 4.0, 7.0]
    # a constant feature is left alone
    torch.testing.assert_close(state["std"], torch.tensor([2**0.5, 8**0.5, 1.0]))
    other = Autoencoder(3, code_width=2, hidden=4)
    other.load_state_dict(state)
    assert torch.equal(other.encode(tokens), model.encode(tokens))


def test_codes_are_per_token_and_do_not_depend_on_the_batch() -> None:
    model, tokens = Autoencoder(48), correlated(12, 0)
    codes = model.encode(tokens.reshape(3, 4, 48))
    assert codes.shape == (3, 4, 64)
    torch.testing.assert_close(codes[1, 2], model.encode(tokens[6]))


def test_one_token_has_no_statistics() -> None:
    with pytest.raises(UserError, match="at least 2 tokens, not 1"):
        Autoencoder(3).fit_statistics(torch.zeros(1, 3))
