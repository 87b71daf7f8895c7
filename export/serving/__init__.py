"""An OpenAI-compatible server of one decoder export: onnxruntime-genai, or onnxruntime for what it cannot run."""
