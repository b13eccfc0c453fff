"""Seeds that follow from a name: the same on every machine, whatever the order and the batch
size."""

import hashlib


def stable_seed(uid: str, seed: int) -> int:
    """63 bits that depend on (uid, seed) only; Python's `hash` would differ from process to
    process."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{uid}".encode(), digest_size=8).digest()) >> 1
