"""Files and messages: headers of safetensors, tensors with JSON, hub folders."""

__all__: list[str] = []
