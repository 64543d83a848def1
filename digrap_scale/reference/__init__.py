"""θ₀, the pre-trained weights: read from safetensors, each rank its own slices."""

from digrap_scale.reference.store import SafetensorsReader, load_slices

__all__ = ["SafetensorsReader", "load_slices"]
