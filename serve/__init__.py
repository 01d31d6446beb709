"""Serve an exported bundle: labels, pictures and numbers from tissue images. Never imports torch."""
