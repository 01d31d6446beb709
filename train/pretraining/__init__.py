"""Magnification-Aware Distillation: encoders that mean the same at every magnification.

Our implementation of an idea of which only the abstract is known (arXiv 2512.14796).
"""
