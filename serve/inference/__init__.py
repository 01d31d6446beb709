"""An image through the model: backends, batches, tiles."""
