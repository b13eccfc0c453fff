"""Pruning inside vLLM: an out-of-tree plugin (entry point group `vllm.general_plugins`).

vLLM keeps no contract for model classes, so only versions that were tried are served.
"""

from tprl.serving.versions import check_vllm

check_vllm()
