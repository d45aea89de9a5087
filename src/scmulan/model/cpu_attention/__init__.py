"""Attention on a CPU in float32, for inference: compiled loops in place of torch's kernel (why: README.md here)."""
