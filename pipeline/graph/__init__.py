"""Graph rewriting over onnx-graphsurgeon."""
