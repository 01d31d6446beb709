"""A training run, from a data set to a checkpoint."""
