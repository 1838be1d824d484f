"""Babel in JAX: grow a pretrained decoder by copying layers, recover it, and train it on in 25 languages."""

__version__ = "0.1.0"
