"""Sites of real, tiny models of different structure, each value against independent hooks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AlbertConfig, AlbertForMaskedLM

from rwkv7_cases import model_of
from tinymodels import build, prompt_ids
from tolerances import assert_near
from trilens.axes import SITES
from trilens.lens.lens import Lens

TOKENS = 19
Hooked = dict[str, tuple[list[Tensor], list[Tensor]]]

# Per type: its layer 1, and where plain hooks find its sites: "<" the module's input, ">" its
# output.
PRE_NORM = {
    "resid_mid": "<post_attention_layernorm",
    "attn.out": ">self_attn.o_proj",
    "attn.add": ">self_attn.o_proj",
    "mlp.in": "<mlp",
    "mlp.gate": ">mlp.gate_proj",
    "mlp.up": ">mlp.up_proj",
    "mlp.post": "<mlp.down_proj",
    "mlp.out": ">mlp",
    "mlp.add": ">mlp",
}
WHERE: dict[str, tuple[str, dict[str, str]]] = {
    "llama": ("model.layers.1", PRE_NORM),
    "gpt2": (
        "transformer.h.1",
        {
            "resid_mid": "<ln_2",
            "attn.out": ">attn.c_proj",
            "mlp.in": "<mlp",
            "mlp.post": "<mlp.c_proj",
            "mlp.out": ">mlp",
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers.1",
        {"attn.add": ">attention.dense", "mlp.post": "<mlp.dense_4h_to_h", "mlp.add": ">mlp"},
    ),
    "gptj": (
        "transformer.h.1",
        {"attn.add": ">attn.out_proj", "mlp.post": "<mlp.fc_out", "mlp.add": ">mlp"},
    ),
    "falcon": (
        "transformer.h.1",
        {"attn.add": ">self_attention.dense", "mlp.add": ">mlp.dense_4h_to_h"},
    ),
    "gemma2": (
        "model.layers.1",
        {
            "resid_mid": "<pre_feedforward_layernorm",
            "attn.out": ">self_attn.o_proj",
            "attn.add": ">post_attention_layernorm",
            "mlp.out": ">mlp.down_proj",
            "mlp.add": ">post_feedforward_layernorm",
        },
    ),
    "olmo2": (
        "model.layers.1",
        {
            "resid_mid": "<mlp",
            "attn.out": ">self_attn.o_proj",
            "attn.add": ">post_attention_layernorm",
            "mlp.in": "<mlp",
            "mlp.add": ">post_feedforward_layernorm",
        },
    ),
    "granite": (
        "model.layers.1",
        {name: where for name, where in PRE_NORM.items() if not name.endswith(".add")},
    ),
    "bert": (
        "bert.encoder.layer.1",
        {
            "resid_mid": ">attention.output.LayerNorm",
            "attn.out": ">attention.output.dense",
            "attn.add": ">attention.output.dense",
            "mlp.in": "<intermediate.dense",
            "mlp.post": "<output.dense",
            "mlp.out": ">output.dense",
        },
    ),
    "mixtral": (
        "model.layers.1",
        {"resid_mid": "<post_attention_layernorm", "mlp.in": "<mlp", "mlp.out": ">mlp"},
    ),
    "mamba": (
        "backbone.layers.1",
        {"mixer.in": "<mixer", "mixer.out": ">mixer", "mixer.add": ">mixer"},
    ),
    "rwkv7": (
        "model.layers.1",
        {"mixer.out": ">attn", "mixer.add": ">attn", "mlp.add": ">ffn"},
    ),
    "falcon_h1": (
        "model.layers.1",
        {
            "resid_mid": "<pre_ff_layernorm",
            "attn.out": ">self_attn.o_proj",
            "mixer.out": ">mamba",
            "mlp.in": "<feed_forward",
            "mlp.add": ">feed_forward",
        },
    ),
    "zaya": ("model.layers.1", {"resid_mid": "<post_attention_layernorm", "mlp.out": ">mlp"}),
    "albert": (
        "albert.encoder.albert_layer_groups.0.albert_layers.0",
        {"attn.out": ">attention.dense", "mlp.post": "<ffn_output", "mlp.out": ">ffn_output"},
    ),
}


@pytest.fixture(autouse=True)
def quiet():
    """The families' own warnings are not ours to answer for."""
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.disable(logging.NOTSET)


@cache
def lens_of(model_type: str) -> Lens:
    if model_type == "albert":
        torch.manual_seed(0)
        config = AlbertConfig(
            vocab_size=120,
            embedding_size=16,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=48,
        )
        return Lens(AlbertForMaskedLM(config).eval())
    if model_type == "rwkv7":
        return Lens(model_of("rwkv7", 0.05, 1.0))
    return Lens(build(model_type))


def ids_of(model_type: str) -> Tensor:
    return prompt_ids(model_type if model_type != "rwkv7" else "llama", TOKENS)


def first_tensor(value: Any) -> Tensor | None:
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    items = value.values() if isinstance(value, dict) else value
    if not isinstance(value, tuple | list | dict):
        return None
    return next((t for item in items if (t := first_tensor(item)) is not None), None)


@cache
def hooked(model_type: str) -> Hooked:
    """Copies of the first tensor that each module of layer 1 was given, and gave."""
    lens = lens_of(model_type)
    home = WHERE[model_type][0]
    seen: Hooked = {}
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        seen[path] = ([], [])

        def before(_module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = first_tensor((*args, kwargs))
            seen[path][0].append(torch.empty(0) if tensor is None else tensor.clone())

        def after(_module: nn.Module, _args: Any, output: Any) -> None:
            tensor = first_tensor(output)
            seen[path][1].append(torch.empty(0) if tensor is None else tensor.clone())

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))

    for path, module in lens.model.get_submodule(home).named_modules():
        watch(path, module)
    try:
        with torch.no_grad():
            lens.model(ids_of(model_type), use_cache=False)
    except TypeError:
        with torch.no_grad():
            lens.model(ids_of(model_type))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def hooked_value(model_type: str, where: str) -> Tensor:
    given, gave = hooked(model_type)[where[1:]]
    values = given if where[0] == "<" else gave
    # ALBERT's layers are calls of one module: layer 1 is its second call.
    value = values[1] if model_type == "albert" else values[0]
    return value.reshape(TOKENS, -1)


@cache
def captured(model_type: str) -> dict[str, Tensor]:
    lens = lens_of(model_type)
    names = [name for name, layers in lens.site_layers.items() if 1 in layers]
    capture = lens.capture(ids_of(model_type), residual=None, sites=names, layers=[1])
    return {name: capture.sites[name, 1] for name in names}


@pytest.mark.parametrize(
    ("model_type", "name"), [(kind, name) for kind, (_, sites) in WHERE.items() for name in sites]
)
def test_a_site_is_what_a_plain_hook_sees(model_type: str, name: str) -> None:
    where = WHERE[model_type][1][name]
    ours = captured(model_type)[name].reshape(TOKENS, -1)
    assert torch.equal(ours, hooked_value(model_type, where))


@pytest.mark.parametrize("model_type", WHERE)
def test_the_streams_around_a_block_are_its_input_and_output(model_type: str) -> None:
    sites = captured(model_type)
    assert torch.equal(sites["resid_pre"], hooked_value(model_type, "<"))
    assert torch.equal(sites["resid_post"], hooked_value(model_type, ">"))


SUMS_UP = ("llama", "gpt2", "gpt_neox", "gptj", "falcon", "gemma2", "olmo2", "granite", "mixtral",
           "mamba", "rwkv7", "falcon_h1")  # fmt: skip


@pytest.mark.parametrize("model_type", SUMS_UP)
def test_the_parts_sum_to_the_stream_after_the_block(model_type: str) -> None:
    sites = captured(model_type)
    parts = [sites[name] for name in ("attn.add", "mixer.add", "mlp.add") if name in sites]
    assert parts
    every = torch.stack([sites["resid_pre"], *parts]).double()
    assert_sums(sites["resid_post"], every)
    if "resid_mid" in sites:
        first = [sites[name] for name in ("attn.add", "mixer.add") if name in sites]
        assert_sums(sites["resid_mid"], torch.stack([sites["resid_pre"], *first]).double())


def assert_sums(whole: Tensor, terms: Tensor) -> None:
    """Equal to the sum of terms within their rounding in the model's dtype."""
    bound = 4 * len(terms) * torch.finfo(whole.dtype).eps * terms.abs().sum(0).max()
    assert float((whole.double() - terms.sum(0)).abs().max()) <= float(bound)


def assert_within(actual: Tensor, expected: Tensor, terms: float) -> None:
    """Equal within some roundings of float32, relative to the largest sum of absolute terms."""
    gap = float((actual.double() - expected.double()).abs().max())
    assert gap <= 64 * torch.finfo(torch.float32).eps * terms


ATTENDING = tuple(t for t in WHERE if t not in ("mamba", "rwkv7", "gptj", "falcon"))


@pytest.mark.parametrize("model_type", ATTENDING)
def test_heads_come_from_the_pattern_and_sum_to_the_output(model_type: str) -> None:
    sites = captured(model_type)
    pattern, values, z = (sites[f"attn.{n}"].double() for n in ("pattern", "v", "z"))
    groups = z.shape[1] // values.shape[1]
    values = values.repeat_interleave(groups, dim=1).transpose(0, 1)
    ours = (pattern @ values).transpose(0, 1)
    terms = float((pattern @ values.abs()).max())
    assert_within(ours, z, terms)
    heads, out = sites["attn.head_out"].double(), sites["attn.out"].double()
    assert heads.shape == (TOKENS, z.shape[1], lens_of(model_type).d_model)
    rest = out - heads.sum(1)
    # What is left is the bias: the same for every token.
    terms = float(heads.abs().sum(1).max())
    assert_within(rest, rest[:1].expand_as(rest), terms)
    scores = sites["attn.scores"].double()
    assert_near(scores.softmax(-1), pattern, 1e-5)


@pytest.mark.parametrize("model_type", ("llama", "gpt_neox", "gemma2", "qwen3", "gpt2", "phi3"))
def test_queries_before_the_rotary_step_become_those_after_it(model_type: str) -> None:
    lens = lens_of(model_type)
    names = ["attn.q", "attn.k", "attn.q_rot", "attn.k_rot"]
    sites = lens.capture(ids_of(model_type), residual=None, sites=names, layers=[1]).sites
    for name in ("attn.q", "attn.k"):
        before, after = sites[name, 1], sites[f"{name}_rot", 1]
        assert torch.equal(before[0], after[0])
        lengths = before.norm(dim=-1)
        assert_within(lengths, after.norm(dim=-1), float(lengths.max()))
        assert torch.equal(before, after) == (model_type == "gpt2")


GATED: dict[str, Callable[[Tensor], Tensor]] = {
    "llama": nn.functional.silu,
    "gemma2": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "phi3": nn.functional.silu,
}


@pytest.mark.parametrize("model_type", GATED)
def test_a_glu_multiplies_its_gate_and_its_projection_reads_it(model_type: str) -> None:
    lens = lens_of(model_type)
    names = ["mlp.gate", "mlp.up", "mlp.post", "mlp.out"]
    sites = lens.capture(ids_of(model_type), residual=None, sites=names, layers=[1]).sites
    gate, up, post, out = (sites[name, 1] for name in names)
    assert torch.equal(GATED[model_type](gate) * up, post)
    down = lens.model.get_submodule("model.layers.1.mlp.down_proj")
    with torch.no_grad():
        terms = float((post.abs().double() @ down.weight.double().abs().T).max())
        assert_within(down(post), out, terms)


@pytest.mark.parametrize("model_type", ("llama", "granite", "opt", "gpt2"))
def test_the_embedding_and_the_final_norm_are_where_a_model_begins_and_ends(
    model_type: str,
) -> None:
    lens, ids = lens_of(model_type), ids_of(model_type)
    capture = lens.capture(ids, sites=["embed", "final_norm"])
    embedding = lens.model.get_input_embeddings()
    assert torch.equal(capture.sites["embed", None], embedding(ids)[0])
    last = capture.sites["final_norm", None]
    logits = lens.model.get_output_embeddings()(last) / getattr(
        lens.model.config, "logits_scaling", 1.0
    )
    assert_near(logits, capture.logits, 1e-5)


@pytest.mark.parametrize(
    ("model_type", "name", "absent", "why"),
    [
        ("gpt_neox", "resid_mid", True, "parallel"),
        ("gptj", "resid_mid", True, "parallel"),
        ("falcon", "resid_mid", True, "parallel"),
        ("mamba", "resid_mid", True, "no MLP"),
        ("mamba", "attn.z", True, "no softmax attention"),
        ("xlnet", "attn.out", False, "no output projection reads"),
        ("diffllama", "attn.out", False, "2 times"),
        ("mixtral", "mlp.post", False, "routed experts"),
        ("gpt2", "mlp.gate", False, "no activation module whose output times"),
        ("llama", "router", True, "no router"),
        ("llama", "mixer.out", True, "no recurrent mixer"),
        ("albert", "embed", False, "width 16"),
    ],
)
def test_what_is_not_there_says_why(model_type: str, name: str, absent: bool, why: str) -> None:
    lens = lens_of(model_type)
    layer = None if name == "embed" else 1
    assert why in lens.why_no_site(name, layer)
    assert ((name, layer) in lens._runner.proof.sites.absent) == absent


@pytest.mark.parametrize("model_type", [*WHERE, "diffllama", "gemma4_text", "longcat_flash"])
def test_every_name_of_every_layer_is_proven_or_refused_in_a_sentence(model_type: str) -> None:
    lens = lens_of(model_type)
    claims = lens._runner.proof.sites
    for name, spec in SITES.items():
        for layer in range(lens.n_layers) if spec.per_layer else [None]:
            key = name, layer
            assert (key in claims.sites) != (key in claims.reasons), key
            assert "no rule" not in claims.reasons.get(key, "")


def test_a_stream_that_the_model_writes_into_is_marked_and_read_before() -> None:
    claims = lens_of("falcon")._runner.proof.sites
    assert claims.sites["mlp.add", 1].overwritten
    assert not claims.sites["attn.add", 1].overwritten
