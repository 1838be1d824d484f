"""The decoder: one module for all families, with its parameters as plain pytrees."""
