"""Studies before a run: which layers matter, which variant recovers best, how languages should be mixed."""
