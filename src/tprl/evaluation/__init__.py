"""Measuring pruners: answers, scores, intervals, result files. Numbers, no pictures."""
