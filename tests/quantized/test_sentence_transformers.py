"""A model of sentence-transformers, as that library builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from trilens import Lens, demo_path

pytestmark = pytest.mark.filterwarnings("default")


def test_the_model_inside_is_captured(tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = demo_path("transformer")
    inner = Transformer(str(folder))
    whole = SentenceTransformer(modules=[inner, Pooling(inner.get_embedding_dimension())])
    lens = Lens(whole)
    text = "def area(r):"
    cap = lens.capture(text, residual="all", attention=True)
    plain = AutoModel.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")
    with torch.no_grad():
        states = plain(**ids, output_hidden_states=True).hidden_states
    assert cap.token_ids.tolist() == ids["input_ids"][0].tolist()
    assert "".join(cap.tokens) == text
    for layer in range(lens.n_layers - 1):
        assert torch.equal(cap.residual[layer], states[layer + 1][0])
    assert whole.encode(text).shape == (lens.d_model,)
