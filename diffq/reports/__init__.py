"""Files for people to look at: numbers, figures and pages of a model. Never imports torch."""
