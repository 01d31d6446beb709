"""Train SAM-Path with Dynamic Focal Attention: from images and masks to a checkpoint."""
