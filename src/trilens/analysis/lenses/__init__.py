"""What layers would predict: residual streams read with the model's own unembedding."""

__all__: list[str] = []
