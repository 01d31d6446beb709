"""The HTTP service: BentoML runs the workers, FastAPI the endpoints."""
