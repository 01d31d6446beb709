"""Export a checkpoint: ONNX with the learned bias folded in, parity, and Triton's repository."""
