"""FLOPs of choosing the tokens: inner products, greedy MAP, codes, the policy."""

from tprl.cost.flops import encoder_layer_flops, mlp_flops
from tprl.cost.shapes import PolicyShape


def similarity_flops(tokens: int, width: int) -> int:
    """All inner products between `tokens` vectors: the matrix that diversity-based selectors start
    from."""
    return 2 * tokens**2 * width


def dpp_flops(tokens: int, width: int, kept: int) -> int:
    """Kernel and greedy MAP of `policy.dpp`, which `policy.select=dpp` pays on top of the policy.

    Each of the `kept` steps multiplies a vector with the [kept, tokens] Cholesky factors, of which
    the code leaves out the rows that are still zero: half of them on average, all counted here. It
    writes that product elementwise, so torch's counter does not see it; it is one all the same.
    """
    return similarity_flops(tokens, width) + 2 * kept**2 * tokens


def greedy_flops(tokens: int, width: int, kept: int) -> int:
    """Greedy MAP of `policy.sequential`, which `policy.select=dpp` pays on top of the policy.

    Each step projects one feature vector out of those drawn before (two products with up to `kept`
    rows) and multiplies two vectors with the [tokens, width] features.
    """
    return 4 * tokens * width * kept + 2 * width * kept * (kept - 1)


def autoencoder_flops(
    in_width: int, hidden: int, code_width: int, tokens: int, decode: bool = False
) -> int:
    """Encoding `tokens` tokens, all that serving needs; with `decode` their reconstruction too."""
    one_way = mlp_flops((in_width, hidden, code_width), tokens)
    return 2 * one_way if decode else one_way


def policy_flops(policy: PolicyShape, tokens: int, words: int) -> int:
    """One forward pass of the policy (logits and value) on one sample, as `PolicyNet` computes it.

    Args:
        policy: its shape.
        tokens: visual tokens in the tensor. Dead ones are masked, not removed: they cost as much as
            alive ones.
        words: question tokens; they add nothing where the query is "none".
    """
    # "pooled" is one token for all words, "none" no token at all.
    w = policy.width
    words = 0 if policy.query == "none" else words
    sequence = tokens + (min(words, 1) if policy.query == "pooled" else words)
    # One linear layer per input, a two-layer MLP for the two numbers of the budget.
    inputs = mlp_flops((policy.code_width, w), tokens) + mlp_flops((policy.query_width, w), words)
    inputs += mlp_flops((policy.place_features, w), tokens) + mlp_flops((2, w, w), 1)
    inputs += mlp_flops((policy.scores, w), tokens)
    # A logit per token, one value per sample.
    heads = mlp_flops((w, w, w, 1), tokens) + mlp_flops((w, w, w, 1), 1)
    return inputs + policy.layers * encoder_layer_flops(w, 4 * w, sequence) + heads
