from __future__ import annotations

import json
import logging
import pickle
import random
import shutil
import struct
import threading
import warnings
from pathlib import Path

import psutil
import pytest
import torch
import transformers
from huggingface_hub.utils import are_progress_bars_disabled
from huggingface_hub.utils import logging as hub_logging
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.utils import logging as transformers_logging

from loading_cases import refused
from tinymodels import build
from trilens.errors import (
    ConfigError,
    CorruptFileError,
    LoadError,
    MemoryShortError,
    ModelNotFoundError,
    TrilensError,
    UnsafeFormatError,
    UsageError,
)
from trilens.io.weight_files import read_headers
from trilens.io.weight_memory import memory_bytes
from trilens.models import loading
from trilens.models.loading import Loaded, load
from trilens.models.rwkv7.config import RWKV7Config
from trilens.models.rwkv7.model import RWKV7ForCausalLM

SIZES = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def llama(**options):
    return LlamaConfig(**SIZES, **ENDS, num_key_value_heads=1, **options)


def gpt2():
    ends = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=32, vocab_size=40, **ends)


def t5():
    return T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, dropout_rate=0.0
    )


@pytest.fixture(autouse=True)
def quiet_saving():
    before = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    yield
    transformers_logging.set_verbosity(before)
    if bars:
        transformers_logging.enable_progress_bar()


def make(folder, model_class=LlamaForCausalLM, config=None, **save_options) -> Path:
    torch.manual_seed(0)
    model_class(config or llama()).save_pretrained(folder, **save_options)
    return Path(folder)


@pytest.fixture
def checkpoint(tmp_path):
    return make(tmp_path / "model")


def edit_config(folder, remove=(), **changes):
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("saved", "config", "loaded", "unused"),
    [
        (LlamaForCausalLM, llama(), "LlamaForCausalLM", 0),
        (LlamaForCausalLM, llama(tie_word_embeddings=True), "LlamaForCausalLM", 0),
        (GPT2LMHeadModel, gpt2(), "GPT2LMHeadModel", 0),
        (BertForMaskedLM, BertConfig(**SIZES), "BertForMaskedLM", 0),
        (BertLMHeadModel, BertConfig(**SIZES, is_decoder=True), "BertLMHeadModel", 0),
        (BertModel, BertConfig(**SIZES), "BertModel", 0),
        (BertForSequenceClassification, BertConfig(**SIZES), "BertModel", 2),
        (BertForPreTraining, BertConfig(**SIZES), "BertForMaskedLM", 4),
        (RobertaForSequenceClassification, RobertaConfig(**SIZES, **ENDS), "RobertaModel", 4),
        (LlamaForSequenceClassification, llama(), "LlamaModel", 1),
        (T5ForConditionalGeneration, t5(), "T5ForConditionalGeneration", 0),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_class_follows_the_configuration(tmp_path, saved, config, loaded, unused):
    make(tmp_path, saved, config)
    found = load(tmp_path)
    assert type(found.model).__name__ == loaded
    assert len(found.unused) == unused
    assert not found.model.training
    assert found.source == str(tmp_path.resolve())
    assert found.tokenizer is None
    ours = found.model.state_dict()
    stored = load_file(tmp_path / "model.safetensors")
    prefix = f"{found.model.base_model_prefix}."
    for name in set(stored) - set(found.unused):
        mine = ours.get(name, ours.get(name.removeprefix(prefix)))
        assert torch.equal(mine, stored[name]), name


@pytest.mark.parametrize("saved", [LlamaForCausalLM, BertForMaskedLM, BertModel])
def test_without_architectures_the_files_decide(tmp_path, saved):
    make(tmp_path, saved, llama() if saved is LlamaForCausalLM else BertConfig(**SIZES))
    edit_config(tmp_path, remove=["architectures"])
    assert type(load(tmp_path).model) is saved


def test_the_result_is_the_model_that_was_saved(checkpoint):
    torch.manual_seed(0)
    reference = LlamaForCausalLM(llama()).eval()
    ids = torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        assert torch.equal(load(checkpoint).model(ids).logits, reference(ids).logits)


def test_a_relative_path_and_a_path_object(checkpoint, monkeypatch):
    monkeypatch.chdir(checkpoint.parent)
    for path in ("model", "./model", Path("model"), f"{checkpoint}/"):
        assert load(path).source == str(checkpoint.resolve())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64", torch.bfloat16])
def test_the_dtype_asked_for(checkpoint, dtype):
    wanted = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    found = load(checkpoint, dtype=dtype)
    assert {p.dtype for p in found.model.parameters()} == {wanted}
    own_bytes = sum(p.nbytes for p in found.model.parameters())
    assert (
        found.estimate_bytes
        == own_bytes
        == memory_bytes(read_headers(checkpoint), checkpoint, dtype)
    )


def test_the_dtype_auto_is_the_checkpoints_own(tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(llama()).to(torch.bfloat16).save_pretrained(tmp_path)
    assert load(tmp_path).model.dtype == torch.bfloat16
    edit_config(tmp_path, remove=["dtype", "torch_dtype"])
    found = load(tmp_path)
    assert found.model.dtype == torch.bfloat16
    assert found.estimate_bytes == sum(p.nbytes for p in found.model.parameters())


def test_loading_leaves_the_default_dtype(checkpoint):
    load(checkpoint, dtype="bfloat16")
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype", ["fp8", "int8", "", "Float32", torch.int64, None, 16])
def test_a_dtype_that_is_none(checkpoint, dtype):
    message = refused(UsageError, checkpoint, dtype=dtype)
    assert repr(dtype) in message
    assert "auto, bfloat16, float16, float32, float64" in message


def test_a_sharded_checkpoint(tmp_path):
    whole, parts = make(tmp_path / "whole"), make(tmp_path / "parts", max_shard_size="4KB")
    assert len(list(parts.glob("*.safetensors"))) > 2
    one, many = load(whole), load(parts)
    assert many.estimate_bytes == one.estimate_bytes
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        assert torch.equal(a, b)
    lost = sorted(parts.glob("*.safetensors"))[1]
    lost.unlink()
    assert lost.name in refused(CorruptFileError, parts)


def test_memory_is_checked_before_anything_is_loaded(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "build_model", lambda *_, **__: pytest.fail("loaded"))
    needed = memory_bytes(read_headers(checkpoint), checkpoint, "bfloat16")
    monkeypatch.setattr(loading, "_free_bytes", lambda: needed - 1)
    message = refused(MemoryShortError, checkpoint, dtype="bfloat16")
    assert f"needs {needed} bytes" in message
    assert f"{needed - 1} bytes are free" in message


def test_weights_in_their_own_dtype_are_mapped_and_may_be_larger_than_memory(
    checkpoint, monkeypatch
):
    monkeypatch.setattr(loading, "_free_bytes", lambda: 1)
    model = load(checkpoint).model
    files = {str(file.resolve()) for file in checkpoint.glob("*.safetensors")}
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, name = line.split(maxsplit=5)
        if name in files:
            spans.append(tuple(int(end, 16) for end in span.split("-")))
    for name, parameter in model.named_parameters():
        assert any(low <= parameter.data_ptr() < high for low, high in spans), name


def test_weights_that_are_merged_on_the_way_take_memory(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "_free_bytes", lambda: 1)
    build("mixtral").save_pretrained(tmp_path / "experts")
    refused(MemoryShortError, tmp_path / "experts")


def test_as_much_memory_as_needed_is_enough(checkpoint, monkeypatch):
    needed = memory_bytes(read_headers(checkpoint), checkpoint, "bfloat16")
    monkeypatch.setattr(loading, "_free_bytes", lambda: needed)
    assert load(checkpoint, dtype="bfloat16").estimate_bytes == needed


def test_more_memory_than_the_machine_has(checkpoint):
    """The real reading: a sparse file larger than all memory, whose weights are never read."""
    size = 4 * psutil.virtual_memory().total // 4 * 4
    header = {"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    text = json.dumps(header).encode()
    with (checkpoint / "model.safetensors").open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + size)
    message = refused(MemoryShortError, checkpoint, dtype="float16")
    assert f"{size / 2 / 2**30:.2f} GiB" in message


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")])
def test_the_cpu_as_a_device(checkpoint, device):
    assert load(checkpoint, device_map=device).model.device.type == "cpu"


@pytest.mark.parametrize("device", ["gpu:0", "meta", True, 3.5, "cuda:99"])
def test_a_device_that_is_not_there(checkpoint, device):
    assert repr(device) in refused(UsageError, checkpoint, device_map=device)


@pytest.mark.parametrize(
    ("cause", "error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory."), MemoryShortError, "does not fit on cpu"),
        (RuntimeError("CUDA error: invalid device"), LoadError, "cannot be moved to cpu"),
        (NotImplementedError("no float64 here"), LoadError, "cannot be moved to cpu"),
    ],
    ids=["full", "broken", "unable"],
)
def test_a_device_that_does_not_take_the_model(checkpoint, monkeypatch, cause, error, words):
    def to(model, device):
        raise cause

    monkeypatch.setattr(LlamaForCausalLM, "to", to)
    monkeypatch.setattr(loading, "_read_device_map", lambda _: (None, torch.device("cpu")))
    message = refused(error, checkpoint, device_map="cpu")
    assert words in message and str(cause) in message


def test_placements_need_accelerate(checkpoint, monkeypatch):
    monkeypatch.setattr(loading, "find_spec", lambda _: None)
    for device_map in ("auto", {"": "cpu"}):
        assert "accelerate" in refused(UsageError, checkpoint, device_map=device_map)


@pytest.mark.parametrize("path", ["./absent", "/no/such/dir", "../absent", "a/b/c", "~/absent-x"])
def test_a_path_that_does_not_exist(path):
    assert repr(path) in refused(ModelNotFoundError, path)


def test_a_path_object_is_never_a_hub_id(tmp_path):
    assert "absent" in refused(ModelNotFoundError, Path("absent"))


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, "line\nbreak", "~no-such-user/x", ".."])
def test_odd_paths(path):
    refused(LoadError, path)


@pytest.mark.parametrize("path", ["", " ", None, 3, b"model", ["model"]])
def test_what_is_no_path(path):
    refused(UsageError, path)


def test_a_revision_of_a_directory(checkpoint):
    assert "'v1'" in refused(UsageError, checkpoint, revision="v1")
    refused(UsageError, checkpoint, revision=3)


def test_trust_is_true_or_false(checkpoint):
    assert "'yes'" in refused(UsageError, checkpoint, trust_remote_code="yes")


def test_files_instead_of_directories(checkpoint):
    assert "directory" in refused(LoadError, checkpoint / "model.safetensors")
    (checkpoint / "pytorch_model.bin").write_bytes(b"")
    assert "pytorch_model.bin" in refused(UnsafeFormatError, checkpoint / "pytorch_model.bin")


def test_a_directory_without_a_configuration(checkpoint):
    (checkpoint / "config.json").unlink()
    assert "has no config.json" in refused(ConfigError, checkpoint)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[]", "an object is needed"),
        ("{}", "names no model_type"),
        ('{"model_type": 3}', "names no model_type"),
        ('{"model_type": "llama", "auto_map": 3}', "auto_map"),
        ('{"model_type": ["llama"], "auto_map": {"AutoModel": "x.Y"}}', "trust_remote_code"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "not a valid llama configuration"),
        ('{"model_type": "llama", "dtype": "float33"}', "float33"),
    ],
)
def test_a_broken_configuration(checkpoint, content, problem):
    (checkpoint / "config.json").write_text(content)
    message = refused(ConfigError, checkpoint)
    assert problem in message
    assert "config.json" in message


def test_an_unknown_type(checkpoint):
    edit_config(checkpoint, model_type="colossus9")
    message = refused(ConfigError, checkpoint)
    assert "'colossus9'" in message
    assert transformers.__version__ in message
    assert "upgrade" in message


def test_a_type_that_has_no_language_model(checkpoint):
    """A configuration of images: there is no class for it that reads tokens, or its files do not
    fit."""
    edit_config(checkpoint, model_type="vit", architectures=["ViTForImageClassification"])
    refused(LoadError, checkpoint)


def test_a_configuration_that_no_model_can_have(checkpoint):
    edit_config(checkpoint, hidden_size=-16)
    refused(LoadError, checkpoint)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"hidden_size": 32}, "have another size"),
        ({"num_hidden_layers": 3}, "would be random"),
        ({"num_hidden_layers": 1}, "no place in the model: model.layers.1."),
        ({"vocab_size": 41}, "[40, 16] in the file, [41, 16] in the model"),
        ({"attention_bias": True}, "would be random"),
    ],
)
def test_a_configuration_that_contradicts_the_weights(checkpoint, changes, problem):
    edit_config(checkpoint, **changes)
    message = refused(CorruptFileError, checkpoint)
    assert problem in message
    assert "LlamaForCausalLM" in message


def test_biases_without_a_place_are_not_dropped(tmp_path):
    make(tmp_path, config=llama(attention_bias=True))
    edit_config(tmp_path, attention_bias=False)
    message = refused(CorruptFileError, tmp_path)
    assert "no place in the model: model.layers.0.self_attn." in message


def test_missing_weights_are_named(checkpoint):
    edit_weights(checkpoint, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))
    message = refused(CorruptFileError, checkpoint)
    assert "1 weights are missing" in message
    assert "model.layers.1.mlp.up_proj.weight" in message


def test_an_untied_head_that_is_missing(checkpoint):
    edit_weights(checkpoint, lambda t: t.pop("lm_head.weight"))
    assert "lm_head.weight" in refused(CorruptFileError, checkpoint)


def test_a_tied_head_is_not_missing(tmp_path):
    make(tmp_path, config=llama(tie_word_embeddings=True))
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    model = load(tmp_path).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_stored_buffers_that_are_computed_anyway_do_no_harm(tmp_path):
    make(tmp_path, BertModel, BertConfig(**SIZES))
    edit_weights(tmp_path, lambda t: t.update({"embeddings.position_ids": torch.arange(32)}))
    assert load(tmp_path).unused == ()


def test_an_empty_file_of_weights(checkpoint):
    save_file({}, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert "would be random" in refused(CorruptFileError, checkpoint)


def test_integers_in_place_of_weights(checkpoint):
    name = "model.norm.weight"
    edit_weights(checkpoint, lambda t: t.update({name: t[name].to(torch.int32)}))
    assert name in refused(CorruptFileError, checkpoint)


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path(self.target),))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_pickles_are_never_opened(checkpoint, tmp_path, name):
    bomb = Bomb()
    bomb.target = str(tmp_path / "exploded")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(pickle.dumps(bomb))
    message = refused(UnsafeFormatError, checkpoint)
    assert name in message
    assert "convert it with safetensors" in message
    assert not (tmp_path / "exploded").exists()
    pickle.loads((checkpoint / name).read_bytes())
    assert (tmp_path / "exploded").exists(), "the bomb is real"


def test_a_pickle_renamed_to_safetensors(checkpoint):
    (checkpoint / "model.safetensors").write_bytes(pickle.dumps({"a": list(range(100))}))
    refused(CorruptFileError, checkpoint)


def test_an_adapter_is_refused(checkpoint):
    (checkpoint / "adapter_config.json").write_text("{}")
    assert "merge it" in refused(ConfigError, checkpoint)


REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM
import pathlib
pathlib.Path(__file__).resolve()
open({flag!r}, "w").close()

class OddConfig(LlamaConfig):
    model_type = "odd-one"

class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
"""


@pytest.fixture
def remote(checkpoint, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    flag = tmp_path / "it ran"
    (checkpoint / "odd.py").write_text(REMOTE.format(flag=str(flag)))
    auto_map = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.OddForCausalLM"}
    edit_config(
        checkpoint, model_type="odd-one", architectures=["OddForCausalLM"], auto_map=auto_map
    )
    return checkpoint, flag


def test_code_of_a_checkpoint_does_not_run_untrusted(remote):
    folder, flag = remote
    message = refused(ConfigError, folder)
    assert "'odd-one'" in message
    assert "trust_remote_code=True" in message
    assert not flag.exists()


def test_code_of_a_checkpoint_runs_when_trusted(remote):
    folder, flag = remote
    found = load(folder, trust_remote_code=True)
    assert type(found.model).__name__ == "OddForCausalLM"
    assert flag.exists()


def test_trusted_code_gives_no_random_weights_either(remote):
    folder, _ = remote
    edit_weights(folder, lambda t: t.pop("model.norm.weight"))
    assert "model.norm.weight" in refused(CorruptFileError, folder, trust_remote_code=True)


def test_a_known_type_with_a_foreign_class_needs_trust(remote):
    folder, flag = remote
    edit_config(folder, model_type="llama")
    assert "'OddForCausalLM'" in refused(ConfigError, folder)
    assert not flag.exists()


def test_code_beside_a_native_class_is_left_alone(remote):
    folder, flag = remote
    edit_config(folder, model_type="llama", architectures=["LlamaForCausalLM"])
    assert type(load(folder).model) is LlamaForCausalLM
    assert not flag.exists()


def save_tokenizer(folder):
    vocab = {"[UNK]": 0, "the": 1, "cat": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def test_the_tokenizer_comes_along(checkpoint):
    save_tokenizer(checkpoint)
    assert load(checkpoint).tokenizer("the cat")["input_ids"] == [1, 2]


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model": 3}', "\0" * 10])
def test_a_corrupt_tokenizer(checkpoint, content):
    save_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").write_text(content)
    assert "tokenizer.json" in refused(CorruptFileError, checkpoint)


def test_a_corrupt_tokenizer_configuration(checkpoint):
    save_tokenizer(checkpoint)
    (checkpoint / "tokenizer_config.json").write_text("{")
    assert "tokenizer_config.json" in refused(CorruptFileError, checkpoint)


def test_a_tokenizer_of_settings_alone_is_not_made_up(checkpoint):
    save_tokenizer(checkpoint)
    (checkpoint / "tokenizer.json").unlink()
    for name in ("PreTrainedTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "BertTokenizer"):
        (checkpoint / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        message = refused(CorruptFileError, checkpoint)
        assert "tokenizer_config.json" in message


def test_a_tokenizer_with_code_needs_trust(checkpoint):
    config = {"auto_map": {"AutoTokenizer": ["tok.OddTokenizer", None]}}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config))
    assert "trust_remote_code=True" in refused(ConfigError, checkpoint)


def state():
    return (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
        hub_logging.get_verbosity(),
        are_progress_bars_disabled(),
        list(warnings.filters),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
    )


@pytest.mark.parametrize("bars", [True, False])
def test_silence_undoes_itself(checkpoint, bars):
    switch = "enable" if bars else "disable"
    getattr(transformers_logging, f"{switch}_progress_bar")()
    transformers_logging.set_verbosity(logging.INFO)
    hub_logging.set_verbosity(logging.DEBUG)
    try:
        before = state()
        with loading._quiet():
            assert state() != before
        assert state() == before
        with pytest.raises(ZeroDivisionError), loading._quiet():
            raise ZeroDivisionError
        assert state() == before
    finally:
        hub_logging.set_verbosity(logging.WARNING)


def test_loading_is_silent_and_leaves_no_setting(checkpoint, capfd):
    transformers_logging.set_verbosity(logging.WARNING)
    transformers_logging.enable_progress_bar()
    before = state()
    load(checkpoint)
    edit_config(checkpoint, num_hidden_layers=3)
    refused(CorruptFileError, checkpoint)
    assert state() == before
    assert capfd.readouterr() == ("", "")


def test_loads_in_threads_do_not_disturb_each_other(tmp_path):
    folders = [make(tmp_path / str(n), max_shard_size="4KB") for n in range(4)]
    before = state()
    found: dict[int, Loaded] = {}

    def work(n):
        found[n] = load(folders[n], dtype=("float32", "bfloat16")[n % 2])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[n].model.dtype for n in range(4)] == [torch.float32, torch.bfloat16] * 2
    assert state() == before


def mutations(whole: bytes, count: int):
    """Seeded damage: bytes of the length and header, cut ends, other offsets, other shapes."""
    rng = random.Random(20)
    header_end = 8 + struct.unpack("<Q", whole[:8])[0]
    for n in range(count):
        kind = n % 4
        if kind == 0:
            changed = bytearray(whole)
            for _ in range(rng.randrange(1, 4)):
                changed[rng.randrange(header_end)] = rng.randrange(256)
            yield bytes(changed)
        elif kind == 1:
            yield whole[: rng.randrange(len(whole))]
        else:
            header = json.loads(whole[8:header_end])
            name = rng.choice([key for key in header if key != "__metadata__"])
            if kind == 2:
                header[name]["data_offsets"][rng.randrange(2)] += rng.choice([-8, -4, 4, 8, 2**40])
            else:
                header[name]["shape"] = rng.choice([[], [1], [2**31, 2**31], [16, 40], [-1, 4]])
            text = json.dumps(header).encode()
            yield struct.pack("<Q", len(text)) + text + whole[header_end:]


def test_damaged_files_are_refused_or_load_as_they_were(tmp_path):
    """100 mutations: each gives an error of trilens, or exactly the weights that were saved."""
    good = make(tmp_path / "good", GPT2LMHeadModel, gpt2())
    whole = (good / "model.safetensors").read_bytes()
    reference = load(good).model.state_dict()
    bad = tmp_path / "bad"
    shutil.copytree(good, bad)
    outcomes = {"refused": 0, "loaded": 0}
    for content in [whole, *mutations(whole, 100)]:
        (bad / "model.safetensors").write_bytes(content)
        try:
            found = load(bad).model.state_dict()
        except TrilensError as error:
            outcomes["refused"] += 1
            assert len(str(error).splitlines()) == 1
        else:
            outcomes["loaded"] += 1
            assert found.keys() == reference.keys()
            for name, tensor in found.items():
                assert torch.equal(tensor, reference[name]), name
    assert outcomes["refused"] >= 80
    assert outcomes["loaded"] >= 1


def test_a_type_that_this_package_adds_to_transformers(tmp_path):
    config = RWKV7Config(vocab_size=40, hidden_size=16, head_dim=8, num_hidden_layers=2)
    make(tmp_path, RWKV7ForCausalLM, config)
    found = load(tmp_path)
    assert type(found.model) is RWKV7ForCausalLM
    stored = load_file(tmp_path / "model.safetensors")
    ours = found.model.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stored.items())
