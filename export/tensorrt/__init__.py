"""TensorRT: plan, build, run and report an engine."""
