"""Evaluation across magnifications: what an encoder keeps where the um per pixel change."""
