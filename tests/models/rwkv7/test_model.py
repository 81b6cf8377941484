"""RWKV-7 against the package of its authors, and as a citizen of transformers."""

from __future__ import annotations

import contextlib
import copy
import importlib
import io
import math
import sys
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from rwkv7_published import published_tensors
from tolerances import assert_near
from trilens.errors import ConfigError, CorruptFileError, ShapeError, UsageError
from trilens.models.rwkv7 import layers as rwkv7_layers
from trilens.models.rwkv7.config import RWKV7Config, low_rank_dim
from trilens.models.rwkv7.convert import convert_rwkv7
from trilens.models.rwkv7.kernels import rwkv7_attention
from trilens.models.rwkv7.model import RWKV7ForCausalLM, RWKV7Model, register
from trilens.models.rwkv7.state import RWKV7State

# Reordered fp32 sums (other chunk borders, other batch shapes) through three blocks, of the largest
# value.
REORDERED = 2e-5


def tiny_config(**changes):
    sizes = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 3, "head_size": 8}
    return RWKV7Config(**{**sizes, **changes})


def stirred(model, seed=0, scale=0.1):
    """A published initialisation has zero output projections, which would hide every mistake."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=scale)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return stirred(RWKV7ForCausalLM(tiny_config())).requires_grad_(False)


@pytest.fixture
def ids():
    return torch.randint(1, 61, (2, 41), generator=torch.Generator().manual_seed(3))


# --- the authors' package as oracle ---------------------------------------------------------------


@contextlib.contextmanager
def quiet_oracle():
    """Import the package, which prints, uses a deprecated compiler and sets global switches."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, value in {"V7_ON": "1", "JIT_ON": "0", "CUDA_ON": "0"}.items():
            patch.setenv(f"RWKV_{name}", value)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                yield importlib.import_module("rwkv.model")
        finally:
            matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
            torch._C._jit_set_autocast_mode(True)
            for name in ("rwkv", "rwkv.model"):
                sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The same weights as the oracle reads them and as our converted model."""
    folder = tmp_path_factory.mktemp("published")
    torch.save(published_tensors(layers=3, width=768, vocab=512), folder / "model.pth")
    convert_rwkv7(folder / "model.pth", folder / "converted")
    return folder, AutoModelForCausalLM.from_pretrained(folder / "converted").eval()


def off(ours, theirs):
    return float((ours - theirs).abs().max() / theirs.abs().max())


def test_agrees_with_the_authors_package(published):
    folder, ours = published
    prompt = torch.randint(0, 512, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    with quiet_oracle() as package, torch.no_grad():
        oracle = package.RWKV(model=str(folder / "model"), strategy="cpu fp32")
        expected, their_state = oracle.forward(prompt, None, full_output=True)
        expected_next, _ = oracle.forward([7], copy.deepcopy(their_state))
        out = ours(torch.tensor([prompt]), use_cache=True)
        our_state = copy.deepcopy(out.past_key_values)
        step = ours(torch.tensor([[7]]), past_key_values=out.past_key_values)
    # Two fp32 paths, and the package writes e^-1/2 with six digits; measured 1e-6 to 3e-6.
    assert off(out.logits[0], expected) <= 1e-4
    assert off(step.logits[0, 0], expected_next) <= 1e-4
    for i, layer in enumerate(our_state.layers):
        assert off(layer.attn_shift[0], their_state[3 * i]) <= 1e-4
        # The package stores the transposed state: value channels first.
        assert off(layer.recurrent[0].transpose(-1, -2), their_state[3 * i + 1]) <= 1e-4
        assert off(layer.ffn_shift[0], their_state[3 * i + 2]) <= 1e-4


# --- a citizen of transformers --------------------------------------------------------------------


def test_auto_classes_know_it_and_registering_again_is_harmless():
    register()
    assert type(AutoConfig.for_model("rwkv7")) is RWKV7Config
    config = tiny_config()
    assert type(AutoModel.from_config(config)) is RWKV7Model
    assert type(AutoModelForCausalLM.from_config(config)) is RWKV7ForCausalLM


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_saving_and_loading_changes_no_bit(tmp_path, ids, tied, dtype):
    model = stirred(RWKV7ForCausalLM(tiny_config(tie_word_embeddings=tied)).to(dtype))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (loaded.lm_head.weight is loaded.model.embeddings.weight) == tied
    mine, theirs = model.state_dict(), loaded.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "_name_or_path": ""
    }
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_checkpoint_that_lacks_tensors_is_refused_and_not_made_up(tmp_path, model):
    tensors = model.state_dict()
    del tensors["model.layers.1.attn.k_proj.weight"]
    model.save_pretrained(tmp_path, state_dict=tensors)
    with pytest.raises(CorruptFileError, match=r"lacks 1 tensors.*layers\.1\.attn\.k_proj"):
        RWKV7ForCausalLM.from_pretrained(tmp_path)


def test_the_body_alone_loads_from_a_whole_checkpoint(tmp_path, model, ids):
    model.save_pretrained(tmp_path)
    body, info = RWKV7Model.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    expected = model.model(ids).last_hidden_state
    assert torch.equal(body.eval()(ids).last_hidden_state, expected)


def test_hidden_states_are_embedding_blocks_and_the_final_norm(model, ids):
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out[0])))
        for block in model.model.layers
    ]
    out = model(ids, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    states = out.hidden_states
    assert len(states) == 4
    assert torch.equal(states[0], model.model.embeddings(ids))
    for i, (came, went) in enumerate(seen):
        assert torch.equal(came, states[i])
        assert i == 2 or torch.equal(went, states[i + 1])
    assert torch.equal(states[-1], model.model.norm(seen[-1][1]))
    assert torch.equal(model.lm_head(states[-1]), out.logits)
    assert torch.equal(model(ids).logits, out.logits)


def test_outputs_as_transformers_has_them(model, ids):
    full = model(ids, labels=ids)
    loss, logits, state = model(ids, labels=ids, return_dict=False)
    assert torch.equal(loss, full.loss)
    assert torch.equal(logits, full.logits)
    assert isinstance(state, RWKV7State)
    expected = torch.nn.functional.cross_entropy(
        full.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    )
    torch.testing.assert_close(loss, expected)
    assert_near(model(ids, logits_to_keep=2).logits, full.logits[:, -2:], REORDERED)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(model(inputs_embeds=embeds).logits, full.logits)
    assert model(ids, use_cache=False).past_key_values is None


def test_half_precision_stays_near(model, ids, monkeypatch):
    half = copy.deepcopy(model).bfloat16()
    calls = []

    def watch(*args):
        calls.append(args)
        return rwkv7_attention(*args)

    monkeypatch.setattr(rwkv7_layers, "rwkv7_attention", watch)
    out = half(ids)
    _, log_w, _, _, removal, _, _, _ = calls[0]
    assert log_w.dtype == torch.float32
    torch.testing.assert_close(removal.norm(dim=-1), torch.ones_like(removal[..., 0]))
    assert out.logits.dtype == torch.bfloat16
    assert all(layer.recurrent.dtype == torch.float32 for layer in out.past_key_values.layers)
    # bf16 rounds at 4e-3 in every one of some 60 operations on the way.
    assert off(out.logits.float(), model(ids).logits) < 0.1


# --- the state ------------------------------------------------------------------------------------


@pytest.mark.parametrize("cuts", [[1] * 41, [40, 1], [3, 17, 21], [16, 16, 9]])
def test_pieces_with_a_state_give_what_the_whole_gives(model, ids, cuts):
    whole = model(ids)
    state, logits = None, []
    for piece in ids.split(cuts, dim=1):
        out = model(piece, past_key_values=state, use_cache=True)
        state = out.past_key_values
        logits.append(out.logits)
    assert_near(torch.cat(logits, 1), whole.logits, REORDERED)
    for ours, theirs in zip(state.layers, whole.past_key_values.layers, strict=True):
        assert_near(ours.recurrent, theirs.recurrent, REORDERED)
        assert_near(ours.ffn_shift, theirs.ffn_shift, REORDERED)
    assert state.get_seq_length() == 41


@pytest.mark.parametrize("options", [{"do_sample": False}, {"num_beams": 3, "do_sample": False}])
def test_generation_with_a_cache_is_generation_without(model, ids, options):
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids), **options}
    cached = model.generate(ids, use_cache=True, **options)
    assert torch.equal(cached, model.generate(ids, use_cache=False, **options))
    assert cached.shape[1] > ids.shape[1]


def test_generation_continues_from_a_state_that_is_given(model, ids):
    options = {"max_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    state = model(ids[:, :-1]).past_key_values
    logits = model(ids[:, -1:], past_key_values=state).logits
    assert torch.equal(logits[:, -1].argmax(-1), expected[:, 41])


def test_a_state_can_be_reordered_repeated_and_reset(model, ids):
    state = model(ids).past_key_values
    step = model(ids[:, :1], past_key_values=copy.deepcopy(state)).logits
    turned, doubled = copy.deepcopy(state), copy.deepcopy(state)
    turned.reorder_cache(torch.tensor([1, 0]))
    doubled.batch_repeat_interleave(2)
    assert doubled.batch_size == 4
    flipped = model(ids.flip(0)[:, :1], past_key_values=turned).logits
    assert_near(flipped, step.flip(0), REORDERED)
    rows = model(ids.repeat_interleave(2, 0)[:, :1], past_key_values=doubled).logits
    assert_near(rows, step.repeat_interleave(2, 0), REORDERED)
    with pytest.raises(UsageError, match="cannot drop 2 tokens"):
        state.crop(-2)
    state.reset()
    assert (state.get_seq_length(), state.batch_size) == (0, -1)
    assert torch.equal(model(ids, past_key_values=state).logits, model(ids).logits)


def test_a_state_holds_no_sequence_alive(model):
    long = torch.ones(1, 300, dtype=torch.long)
    for layer in model(long).past_key_values.layers:
        assert layer.attn_shift.untyped_storage().nbytes() == layer.attn_shift.nbytes
        assert layer.ffn_shift.untyped_storage().nbytes() == layer.ffn_shift.nbytes


# --- padding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left", "both", "between"])
def test_masked_tokens_are_as_if_they_were_not_there(model, ids, side):
    real = ids[:1, :21]
    before, after = {"right": (0, 6), "left": (6, 0), "both": (2, 4), "between": (0, 0)}[side]
    junk = torch.full((1, 3), 9)
    if side == "between":
        padded = torch.cat([real[:, :8], junk, real[:, 8:]], 1)
        mask = torch.ones_like(padded)
        mask[:, 8:11] = 0
    else:
        padded = torch.nn.functional.pad(real, (before, after), value=9)
        mask = torch.nn.functional.pad(torch.ones_like(real), (before, after))
    rows = torch.cat([padded, torch.full_like(padded, 5)])
    out = model(rows, attention_mask=torch.cat([mask, torch.ones_like(mask)]))
    alone = model(real)
    kept = out.logits[0][mask[0].bool()]
    assert_near(kept, alone.logits[0], REORDERED)
    for ours, theirs in zip(out.past_key_values.layers, alone.past_key_values.layers, strict=True):
        assert_near(ours.recurrent[:1], theirs.recurrent, REORDERED)
        assert_near(ours.attn_shift[:1], theirs.attn_shift, REORDERED)
        assert_near(ours.ffn_shift[:1], theirs.ffn_shift, REORDERED)
    full = model(torch.full_like(padded, 5))
    assert_near(out.logits[1:], full.logits, REORDERED)


def test_right_padding_without_a_mask_leaves_real_tokens_alone(model, ids):
    short = model(ids[:, :20]).logits
    assert_near(model(ids).logits[:, :20], short, REORDERED)


def test_a_row_that_is_all_padding_keeps_its_state(model, ids):
    state = model(ids).past_key_values
    before = copy.deepcopy(state)
    mask = torch.tensor([[0, 0], [1, 1]])
    model(ids[:, :2], attention_mask=mask, past_key_values=state)
    for ours, theirs in zip(state.layers, before.layers, strict=True):
        assert torch.equal(ours.recurrent[0], theirs.recurrent[0])
        assert torch.equal(ours.attn_shift[0], theirs.attn_shift[0])
        assert torch.equal(ours.ffn_shift[0], theirs.ffn_shift[0])
        assert not torch.equal(ours.recurrent[1], theirs.recurrent[1])


def test_a_left_padded_batch_generates_what_each_prompt_generates(model, ids):
    prompts = [ids[0, :9], ids[1, :15]]
    rows = torch.stack([torch.nn.functional.pad(p, (15 - len(p), 0)) for p in prompts])
    mask = torch.stack(
        [torch.nn.functional.pad(torch.ones_like(p), (15 - len(p), 0)) for p in prompts]
    )
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    together = model.generate(rows, attention_mask=mask, **options)[:, 15:]
    for row, prompt in zip(together, prompts, strict=True):
        one = prompt.unsqueeze(0)
        alone = model.generate(one, attention_mask=torch.ones_like(one), **options)
        assert torch.equal(row, alone[0, len(prompt) :])


# --- what can be captured -------------------------------------------------------------------------


def test_gates_and_the_kernel_see_the_same_values(model, ids, monkeypatch):
    seen, calls = {}, []

    def watch(*args):
        calls.append(args)
        return rwkv7_attention(*args)

    monkeypatch.setattr(rwkv7_layers, "rwkv7_attention", watch)
    attn = model.model.layers[1].attn
    hooks = [
        module.register_forward_hook(lambda _, args, out, n=name: seen.update({n: (args[0], out)}))
        for name, module in attn.named_modules()
        if name
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    assert len(calls) == 3
    r, log_w, _, _, a, b, state, chunk_size = calls[1]
    flat = {name: x.flatten(-2) for name, x in {"r": r, "log_w": log_w, "a": a, "b": b}.items()}
    assert (state, chunk_size) == (None, 16)

    assert torch.equal(seen["w_act"][0], seen["w_lora"][1])
    expected = -math.exp(-0.5) * torch.sigmoid(seen["w_act"][0])
    torch.testing.assert_close(seen["w_act"][1], expected)
    assert torch.equal(seen["w_act"][1], flat["log_w"])
    assert -math.exp(-0.5) < float(log_w.min()) < float(log_w.max()) < 0

    assert torch.equal(seen["a_act"][1], torch.sigmoid(seen["a_lora"][1]))
    torch.testing.assert_close(flat["b"], -flat["a"] * seen["a_act"][1])
    torch.testing.assert_close(a.norm(dim=-1), torch.ones_like(a[..., 0]))
    assert torch.equal(seen["v_act"][1], torch.sigmoid(seen["v_lora"][1]))
    assert torch.equal(flat["r"], seen["r_proj"][1])
    assert float(seen["g_lora"][1].min()) < 0
    assert not hasattr(model.model.layers[0].attn.v_lora, "lora")


# --- training -------------------------------------------------------------------------------------


def test_the_published_start_is_a_stream_that_blocks_do_not_touch(ids):
    torch.manual_seed(0)
    fresh = RWKV7ForCausalLM(tiny_config()).eval()
    out = fresh(ids, labels=ids, output_hidden_states=True)
    start = fresh.model.layers[0].pre_norm(fresh.model.embeddings(ids))
    assert torch.equal(out.hidden_states[1], start)
    assert torch.equal(out.hidden_states[2], start)
    # Logits of a fresh model are small, so its loss is that of guessing.
    assert abs(float(out.loss.detach()) - math.log(61)) < 0.5
    weights = fresh.state_dict()
    assert float(weights["model.embeddings.weight"].abs().max()) <= 1e-4
    ramp = weights["model.layers.0.attn.w_lora.lora.2.bias"]
    assert -8.1 < float(ramp.min()) < float(ramp.max()) < 3.1
    norm = weights["model.layers.1.attn.g_norm.weight"]
    torch.testing.assert_close(norm, torch.full_like(norm, (2 / 3) ** 0.7))


def test_a_single_block_can_be_initialised():
    fresh = RWKV7ForCausalLM(tiny_config(num_hidden_layers=1))
    assert all(torch.isfinite(p).all() for p in fresh.parameters())


def test_training_from_scratch_learns_a_text_by_heart():
    torch.manual_seed(0)
    fresh = RWKV7ForCausalLM(tiny_config(num_hidden_layers=2)).train()
    text = torch.randint(1, 61, (2, 40))
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        loss = fresh(text, labels=text).loss
        optimizer.zero_grad()
        loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in fresh.parameters() if p.grad is not None)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert fresh(text).past_key_values is None
    assert losses[-1] < 0.5 < 3.5 < losses[0]
    untouched = [name for name, p in fresh.named_parameters() if p.grad is None]
    assert untouched == []


def test_gradients_match_the_sequential_model(ids):
    """Chunks of 16 in fp32 against one token at a time in fp64, through the whole model."""
    torch.manual_seed(0)
    chunked = stirred(RWKV7ForCausalLM(tiny_config()))
    stepwise = RWKV7ForCausalLM(tiny_config(chunk_size=1))
    stepwise.load_state_dict(chunked.state_dict())
    stepwise.double()
    for one in (chunked, stepwise):
        one(ids, labels=ids).loss.backward()
    pairs = zip(chunked.named_parameters(), stepwise.parameters(), strict=True)
    for (name, ours), theirs in pairs:
        # fp32 through three blocks and back; measured at most 5e-6 of a tensor's largest gradient.
        assert off(ours.grad.double(), theirs.grad) < 1e-4, name


def test_gradient_checkpointing_changes_no_gradient(ids):
    torch.manual_seed(0)
    plain = stirred(RWKV7ForCausalLM(tiny_config())).train()
    saving = copy.deepcopy(plain)
    # The name changed within transformers 5.
    enable = getattr(saving, "activation_checkpointing_enable", None)
    (enable or saving.gradient_checkpointing_enable)()
    for one in (plain, saving):
        one(ids, labels=ids).loss.backward()
    for ours, theirs in zip(saving.parameters(), plain.parameters(), strict=True):
        assert_near(ours.grad, theirs.grad, REORDERED)
    assert saving(ids, use_cache=True).past_key_values is None
    with pytest.raises(UsageError, match="cannot continue from past_key_values"):
        saving(ids, past_key_values=RWKV7State(3))


# --- refusals -------------------------------------------------------------------------------------


def test_what_cannot_be_run_is_refused(model, ids):
    with pytest.raises(UsageError, match="exactly one of input_ids and inputs_embeds"):
        model()
    with pytest.raises(UsageError, match="no attention weights"):
        model(ids, output_attentions=True)
    with pytest.raises(ShapeError, match="at least one token"):
        model(ids[:, :0])
    with pytest.raises(ShapeError, match=r"attention_mask has shape \(2, 3\)"):
        model(ids, attention_mask=torch.ones(2, 3))
    with pytest.raises(UsageError, match="RWKV7State of 2 layers: RWKV-7 continues from"):
        model(ids, past_key_values=RWKV7State(2))
    with pytest.raises(ShapeError, match="holds 2 rows: the input has 1"):
        model(ids[:1], past_key_values=model(ids).past_key_values)
    with pytest.raises(UsageError, match="v_first is missing: block 2"):
        model.model.layers[2](torch.zeros(1, 4, 32))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 30}, "hidden_size 30 is not a multiple of head_size 8"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"chunk_size": 0}, "chunk_size is 0"),
        ({"head_dim": 16, "num_heads": 4}, "num_heads is 4: .* has 2 heads"),
        ({"value_dim": [32, 64, 32]}, "value_dim is"),
        ({"attn": {"layers": [1]}}, "attn=.* is not RWKV-7"),
        ({"norm_first": False}, "norm_first=False is not RWKV-7"),
        ({"hidden_act": "silu"}, "hidden_act='silu' is not RWKV-7"),
    ],
)
def test_configurations_of_something_else_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(**changes)


def test_published_ranks_and_other_names_of_fields():
    config = RWKV7Config(head_dim=32, value_dim=[768] * 12, attn=None, fuse_norm=True)
    assert (config.head_size, config.head_dim, config.num_attention_heads) == (32, 32, 24)
    ranks = (config.decay_low_rank_dim, config.a_low_rank_dim, config.v_low_rank_dim)
    assert (*ranks, config.gate_low_rank_dim, config.intermediate_size) == (64, 64, 32, 128, 3072)
    # The published 1.5B and 2.9B models.
    names = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
    assert [low_rank_dim(name, 2048) for name in names] == [96, 96, 64, 256]
    assert [low_rank_dim(name, 2560) for name in names] == [96, 96, 64, 320]
