"""The example learns: it beats the policy it began with, and the rule that never reads the
question."""

from examples.ppo_minimal import main


def test_ppo_beats_the_untrained_policy_and_the_rule_without_learning() -> None:
    accuracy = main(demonstrations=5, iterations=25)
    assert accuracy["all tokens"] == 1.0
    assert accuracy["attention_dpp, no learning"] < 0.5
    assert accuracy["policy, untrained"] < 0.5
    assert accuracy["policy, PPO"] > 0.9
