"""The model as an ONNX graph: the reference in torch, its exported form, and the graph itself."""
