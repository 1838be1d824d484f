"""The whole recipe: a run, from its config to its report and its exported folder."""
