"""Frozen vision-language models behind one protocol."""
