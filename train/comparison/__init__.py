"""The paper's comparison (arXiv 2604.13479): every method, every seed, one report."""
