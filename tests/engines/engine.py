"""llama.cpp as the tests call it, and the models that its outputs are compared with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import llama_cpp
import llama_cpp.llama_cpp as bindings
import numpy as np
import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.nn.functional import gelu
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.activations import (
    GELUActivation,
    GELUTanh,
    NewGELUActivation,
    PytorchGELUTanh,
)
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.utils import logging

import trilens
from trilens.ternary.packed.experts import TernaryExperts
from trilens.ternary.packed.linear import TernaryLinear

__all__ = [
    "Comparison",
    "Engine",
    "byte_level",
    "compare",
    "engine_rounding",
    "reference",
    "reference_logits",
    "save_model",
    "sentencepiece_like",
]

F32 = 0
_GELU_BY_TANH = (PytorchGELUTanh, GELUTanh, NewGELUActivation, BloomGelu)


_default_params = bindings.llama_model_default_params


def _weights_as_stored() -> Any:
    """Weights in the file's order, for kernels that every processor has.

    Those for matrix units (AMX), whose order Q8_0 and Q4_0 are brought into elsewhere, end the
    process where GCC leaves out the shapes of their tiles (llama.cpp, pull request 26954).
    """
    params = _default_params()
    params.use_extra_bufts = False
    return params


class Engine:
    """One GGUF file, loaded by llama.cpp, on one thread."""

    def __init__(self, path: Path, n_ctx: int = 128) -> None:
        # Keys and values in float32, so that weights' activations are all that is rounded.
        with patch.object(bindings, "llama_model_default_params", _weights_as_stored):
            self.model = llama_cpp.Llama(
                str(path),
                n_ctx=n_ctx,
                n_batch=n_ctx,
                n_threads=1,
                n_threads_batch=1,
                logits_all=True,
                type_k=F32,
                type_v=F32,
                verbose=False,
            )

    def logits(self, ids: list[int]) -> np.ndarray:
        """Shapes: → [seq, vocab]."""
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)], dtype=np.float64)

    def next_logits(self, token: int) -> np.ndarray:
        """The logits after one more token: another kernel than a whole text's.

        Shapes: → [vocab]
        """
        self.model.eval([token])
        return np.array(self.model.scores[self.model.n_tokens - 1], dtype=np.float64)

    def tokenize(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=special, special=False))

    def close(self) -> None:
        self.model.close()


def byte_level(
    texts: list[str], *, steps: Sequence[Any] = (), ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    """A trained byte-level BPE tokenizer.

    Args:
        texts: to train on.
        steps: how text is cut before the merges; None given, by GPT-2's own expression.
        ignore_merges: words that are tokens are taken whole.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps]) if steps else last
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def save_model(config: Any, tokenizer: Any, folder: Path, seed: int = 0) -> Path:
    """A random model of a configuration, with outputs far from uniform."""
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if values.ndim == 1:  # norms and biases too must differ from 1 and 0
                values.add_(torch.randn_like(values) * 0.2)
            elif "embed" in name or "wte" in name or "lm_head" in name:
                values.copy_(torch.randn_like(values) * 0.2)
            else:
                values.copy_(torch.randn_like(values) * values.shape[-1] ** -0.5)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def reference(source: Path, folder: Path, plan: trilens.TernaryPlan) -> Any:
    """The same ternary model in transformers, in float32, through another file than the engine's.

    Eager attention, because the fused kernels of transformers leave out soft caps.
    """
    trilens.ternarize(source, folder, plan=plan)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if getattr(model.config, "_experts_implementation", None) is not None:
        model.set_experts_implementation("eager")  # whose products `engine_rounding` sees
    return model.eval()


@torch.no_grad()
def reference_logits(model: Any, ids: list[int]) -> np.ndarray:
    """Shapes: → [seq, vocab]."""
    return model(torch.tensor([ids]), use_cache=False).logits[0].double().numpy()


@dataclass(frozen=True)
class Comparison:
    """The engine's logits against the same ternary model in float32.

    Attributes:
        difference: The largest difference.
        rounding: The largest difference that the engine's way to round makes in the reference.
        beyond_rounding: The largest difference that is left when both round alike.
        spread: Standard deviation of the logits.
        clear: Positions whose first token is ahead of the second by more than twice `rounding`.
        wrong: Those of them where the engine has another first token.
    """

    difference: float
    rounding: float
    beyond_rounding: float
    spread: float
    clear: int
    wrong: int


def compare(
    engine: Engine, model: Any, format: str, ids: list[int], *, rounded_head: bool = False
) -> Comparison:
    """Run a text through both; where the head is in blocks of 32, its input is rounded too."""
    found, exact = engine.logits(ids), reference_logits(model, ids)
    with engine_rounding(model, format, rounded_head=rounded_head):
        rounded = reference_logits(model, ids)
    rounding = float(np.abs(rounded - exact).max())
    second, first = np.sort(exact, axis=-1)[:, -2:].T
    clear = first - second > 2 * rounding
    return Comparison(
        float(np.abs(found - exact).max()),
        rounding,
        float(np.abs(found - rounded).max()),
        float(exact.std()),
        int(clear.sum()),
        int((clear & (found.argmax(-1) != exact.argmax(-1))).sum()),
    )


@contextmanager
def engine_rounding(model: Any, format: str, *, rounded_head: bool = False) -> Iterator[None]:
    """Inputs of ternary layers rounded as llama.cpp rounds them, for the length of the context.

    TQ1_0 and TQ2_0 are multiplied with 8-bit integers and a scale for every 256 of them (Q8_K),
    Q2_0 with 8-bit integers and a float16 scale for every 32 (Q8_0); a head in bfloat16 with
    bfloat16 numbers. GELU is looked up in a table of float16.

    Source: llama.cpp, `ggml-quants.c` and `ggml-cpu.c` (`vec_dot_type`, `ggml_table_gelu_f16`).
    """

    def eight_bits(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(inputs[0]),)

    def by_blocks_of_32(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (rounded(inputs[0], 32),)

    def rounded(x: torch.Tensor, size: int = 32 if format == "gguf-q2_0" else 256) -> torch.Tensor:
        blocks = x.reshape(-1, size)
        scale = blocks.abs().amax(1, keepdim=True) / 127
        stored = scale.half().float() if size == 32 else scale
        codes = torch.where(scale > 0, blocks / scale, blocks).round()
        return (codes * stored).reshape(x.shape)

    def half(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].half().float(),)

    def half_out(_: Any, __: Any, output: torch.Tensor) -> torch.Tensor:
        return output.half().float()

    def brain_float(_: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (inputs[0].bfloat16().float(),)

    def by_tanh(_: Any, inputs: tuple[torch.Tensor, ...], __: Any) -> torch.Tensor:
        return gelu(inputs[0].half().float(), approximate="tanh").half().float()

    # Products of experts are seen where they are taken: packed ones, and dense ones of a block
    # that indexes their tensor.
    experts = {
        p.untyped_storage().data_ptr()
        for name, p in model.named_parameters()
        if p.ndim == 3 and p.is_floating_point() and "expert" in name
    }
    packed: list[Any] = [m for m in model.modules() if isinstance(m, TernaryExperts)]
    read: list[torch.Tensor] = []  # as long as one is there, no other has its address
    multiply, item = TernaryExperts.multiply, TernaryExperts.__getitem__

    def of_packed(self: Any, x: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return multiply(self, rounded(x), ends)

    def of_index(self: Any, index: Any) -> torch.Tensor:
        read.append(item(self, index))
        experts.add(read[-1].untyped_storage().data_ptr())
        return read[-1]

    linear = torch.nn.functional.linear

    def of_experts(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        coded = weight.untyped_storage().data_ptr() in experts
        return linear(rounded(x) if coded else x, weight, bias)

    head = model.get_output_embeddings()
    handles = [
        module.register_forward_pre_hook(eight_bits)
        for module in model.modules()
        if isinstance(module, TernaryLinear)
    ]
    for module in model.modules():
        if isinstance(module, _GELU_BY_TANH):
            handles.append(module.register_forward_pre_hook(half))
            handles.append(module.register_forward_hook(half_out))
        elif isinstance(module, GELUActivation | torch.nn.GELU):
            handles.append(module.register_forward_hook(by_tanh))
    if experts or packed:
        torch.nn.functional.linear = of_experts
        TernaryExperts.multiply, TernaryExperts.__getitem__ = of_packed, of_index
    if rounded_head:
        handles.append(head.register_forward_pre_hook(by_blocks_of_32))
    elif bool((head.weight == head.weight.bfloat16()).all()):
        handles.append(head.register_forward_pre_hook(brain_float))
    try:
        yield
    finally:
        torch.nn.functional.linear = linear
        TernaryExperts.multiply, TernaryExperts.__getitem__ = multiply, item
        for handle in handles:
            handle.remove()


def sentencepiece_like(
    texts: list[str], vocab_size: int = 500, *, prefix: str = ""
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer as transformers makes it of a SentencePiece model: ▁, bytes, all merges.

    Args:
        texts: to train on.
        vocab_size: at most this many tokens.
        prefix: how a text is begun with a space, by the "normalizer" or by "metaspace"; or "".
    """
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Replace(" ", "▁")
    special = ["<s>", "</s>", "<pad>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    vocab = trained.get_vocab()
    made = sorted((i, t) for t, i in vocab.items() if len(t) > 1 and t not in special)
    merges = [
        (token[:cut], token[cut:])
        for _, token in made
        for cut in range(1, len(token))
        if token[:cut] in vocab and token[cut:] in vocab
    ]
    model = models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    if prefix == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    elif prefix == "normalizer":
        steps = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        tokenizer.normalizer = normalizers.Sequence(steps)
    else:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<s>", "</s>", "<pad>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
    )
