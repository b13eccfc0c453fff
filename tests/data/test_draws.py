"""Draws: the same ones for ever, uniform, and others for every key."""

from collections import Counter

from tprl.data.draws import Stream


class TestStream:
    def test_draws_never_change(self) -> None:
        stream = Stream("golden", 1)
        assert [stream.integer(0, 9) for _ in range(12)] == [1, 9, 5, 2, 2, 4, 0, 2, 5, 5, 3, 1]
        assert stream.integers(-2, 2, (2, 3)).tolist() == [[2, -1, 0], [2, 1, 1]]
        assert stream.choice("abc") == "c"
        assert stream.shuffled([1, 2, 3, 4, 5]) == [5, 1, 2, 4, 3]

    def test_integers_are_uniform_between_both_ends(self) -> None:
        values = Stream("uniform").integers(-3, 4, (8000,))
        counts = Counter(values.tolist())
        assert sorted(counts) == list(range(-3, 5))
        assert max(abs(n - 1000) for n in counts.values()) < 5 * 1000**0.5

    def test_one_draw_is_the_array_of_one(self) -> None:
        single, many = Stream("k"), Stream("k")
        assert [single.integer(5, 60) for _ in range(50)] == many.integers(5, 60, (50,)).tolist()

    def test_a_permutation_reaches_every_order(self) -> None:
        stream = Stream("orders")
        orders = Counter(tuple(stream.shuffled("abc")) for _ in range(1200))
        assert len(orders) == 6
        assert min(orders.values()) > 130

    def test_keys_do_not_run_into_each_other(self) -> None:
        draws = {
            tuple(Stream(*key).integers(0, 10**9, (2,)).tolist())
            for key in [("a", 1, 23), ("a", 12, 3), ("a", 123)]
        }
        assert len(draws) == 3
