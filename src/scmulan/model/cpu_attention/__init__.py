"""Attention on a CPU in float32."""
