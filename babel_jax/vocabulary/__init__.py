"""The vocabulary of a model: what it costs each language, and a larger one."""
