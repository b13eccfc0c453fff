"""The learned pruner: token autoencoder, actor-critic, and the action distributions it samples
from."""
