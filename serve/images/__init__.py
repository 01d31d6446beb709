"""An image file as pixels and um per pixel. Knows nothing of HTTP or of the model."""
