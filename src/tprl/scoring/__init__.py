"""What the frozen LVLM makes of a prompt: the one measurement behind training, rewards and
evaluation."""
