"""The whole recipe: a run from its configuration to its report and its exported folder."""
