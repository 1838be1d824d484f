"""Depth expansion: the layers of the deeper model (plan), and the model made from the plan (apply)."""
