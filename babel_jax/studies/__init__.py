"""Studies before a run: the layers that matter, the variant that recovers best, the mixture of languages."""
