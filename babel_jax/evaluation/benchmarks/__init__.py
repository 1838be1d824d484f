"""Benchmarks: their data, their prompts, the reading of answers, and the interface to
lm-evaluation-harness.
"""
