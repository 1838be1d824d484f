"""Benchmarks: their data, their prompts, how an answer is read, and what lm-evaluation-harness is told."""
