"""Pruned models outside this process: what an inference engine needs to keep the same tokens.

`choose`, `places`, `settings`, `names` and `template` know no engine; `vllm/` and `openvino/` do.
"""
