"""Synthetic haematoxylin-and-eosin tissue with its label maps."""
