"""Depth expansion: the layers of the deeper model (plan), its parameters (apply) and its folder (folders)."""
