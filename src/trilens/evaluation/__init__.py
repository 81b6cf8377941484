"""What a model predicts about text: negative log-likelihood, perplexity, reference logits."""

__all__: list[str] = []
