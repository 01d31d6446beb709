"""The contract between export and serving: all of `serve` that `export` may import."""
