"""ONNX: a model with its adapters merged, switchable at run time, or mixed in one batch."""
