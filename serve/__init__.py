"""Serve an exported bundle: labels, pictures and numbers of tissue images. Never imports torch."""
