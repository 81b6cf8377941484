"""The trainable scan: transformers' own values, and the derivatives of a float64 loop."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import MambaConfig, MambaForCausalLM
from transformers.models.mamba import modeling_mamba

from tolerances import largest, sum_error
from training.scan import selective_scan, trainable_scan


def _inputs(dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 6, 40), (2, 6, 40), (6, 16), (2, 16, 40), (2, 16, 40), (6,), (2, 6, 40), (6,)]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes]
    tensors[2] = -tensors[2].exp()
    return [tensor.to(dtype).requires_grad_() for tensor in tensors]


def _definition(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, *rest: Tensor) -> Tensor:
    d, z, bias = rest
    dt = functional.softplus(dt + bias[:, None])
    h = torch.zeros(2, 6, 16, dtype=u.dtype)
    rows = []
    for t in range(u.shape[-1]):
        h = (dt[:, :, t, None] * a).exp() * h + (dt * u)[:, :, t, None] * b[:, None, :, t]
        rows.append((h * c[:, None, :, t]).sum(-1))
    return (torch.stack(rows, -1) + u * d[:, None]) * functional.silu(z)


def test_values_and_gradients_are_those_of_the_definition() -> None:
    ours, exact = _inputs(torch.float32), _inputs(torch.float64)
    y = selective_scan(*ours, delta_softplus=True)
    expected = _definition(*exact)
    # float32 sums over 40 tokens of 16 states; gradients are sums of the same terms.
    close = sum_error(40 * 16, 1, torch.float32)
    assert largest(y - expected) <= close * largest(expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, reference in zip(ours, exact, strict=True):
        assert mine.grad is not None and reference.grad is not None
        assert largest(mine.grad - reference.grad) <= close * largest(reference.grad)


def test_a_mamba_gives_the_same_logits_with_it_and_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2)).eval()
    ids = torch.randint(50, (2, 30))
    original = modeling_mamba.mamba_selective_scan
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
        with trainable_scan():
            assert modeling_mamba.mamba_selective_scan is selective_scan
            fast = model(ids, use_cache=False).logits
    assert modeling_mamba.mamba_selective_scan is original
    assert (plain - fast).abs().max() <= 1e-5 * plain.abs().max()


def test_it_is_put_back_after_an_exception() -> None:
    original = modeling_mamba.mamba_selective_scan
    try:
        with trainable_scan():
            raise RuntimeError
    except RuntimeError:
        pass
    assert modeling_mamba.mamba_selective_scan is original
