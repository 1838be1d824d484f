"""What a model knows of each language: bits per byte on held-out text, tables and plots."""
