"""SAM-Path with Dynamic Focal Attention, one file per box of the paper's figure."""
