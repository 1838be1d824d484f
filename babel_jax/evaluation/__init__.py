"""The quality of a model by language: bits per byte on held-out text, the offline suite, tables and plots."""
