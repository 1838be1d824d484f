"""Depth expansion: which layers the deeper model has (plan), and the model made from it (apply)."""
