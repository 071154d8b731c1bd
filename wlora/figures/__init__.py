"""The paper's Figures 2 and 3 and what else a study shows, drawn from its records."""
