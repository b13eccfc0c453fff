"""Reinforcement learning as pure functions: rollouts, advantages, the PPO loss."""
