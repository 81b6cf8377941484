"""The inputs of trilens, each with a whole example, ways to damage it, and its reader."""

from __future__ import annotations

import json
import pickletools
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from hostile.fuzz import Target
from hostile.mutations import mutate_bytes, mutate_json
from hostile.resealed import (
    reseal_gguf,
    resealed_folder,
    resealed_tensors,
    tensors_file,
)
from rwkv7_published import published_tensors
from trilens.analysis.comparison.result import Comparison
from trilens.analysis.comparison.run import compare
from trilens.checkpoint.format.names import MANIFEST_NAME
from trilens.checkpoint.format.plan import TernaryPlan
from trilens.checkpoint.gguf.validation import validate_gguf
from trilens.checkpoint.pipeline import ternarize
from trilens.checkpoint.validation import validate
from trilens.errors import TrilensError
from trilens.io.json import parse_json
from trilens.io.safetensors_header import read_header
from trilens.io.torch_archive import read_torch_archive
from trilens.io.weight_files import read_headers
from trilens.lens.capture import Capture
from trilens.lens.lens import Lens
from trilens.models.loading import load, load_tokenizer
from trilens.models.rwkv7.convert import convert_rwkv7
from trilens.text.documents import read_documents

__all__ = ["TARGETS", "tiny_checkpoint", "tiny_gguf"]

_WORDS = ["the", "cat", "sat", "on", "a", "mat", "[UNK]", "</s>"]


def tiny_checkpoint(folder: Path) -> Path:
    """A Llama of 2 blocks with a tokenizer of 8 words."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    words = {word: number for number, word in enumerate(_WORDS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "[UNK]",
                "eos_token": "</s>", "model_max_length": 64}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def _one_file(name: str, make: Callable[[Path], None]) -> Callable[[Path], bytes]:
    def made(folder: Path) -> bytes:
        make(folder / name)
        return (folder / name).read_bytes()

    return made


def _flipped(name: str) -> Callable[[random.Random, bytes, Path], Path]:
    def damage(rng: random.Random, whole: bytes, place: Path) -> Path:
        place.mkdir(exist_ok=True)
        (place / name).write_bytes(mutate_bytes(rng, whole))
        return place / name

    return damage


# ---- safetensors -------------------------------------------------------------------------------


def _small_tensors(path: Path) -> None:
    save_file({"a": torch.ones(3, 4), "b": torch.arange(5), "c": torch.ones(2).bfloat16()}, path)


def _damaged_header(rng: random.Random, whole: bytes, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    file = place / "x.safetensors"
    if rng.random() < 0.5:
        file.write_bytes(mutate_bytes(rng, whole))
    else:
        length = struct.unpack("<Q", whole[:8])[0]
        header = mutate_json(rng, json.loads(whole[8 : 8 + length]))
        file.write_bytes(struct.pack("<Q", len(header)) + header + whole[8 + length :])
    return file


def _read_header(file: Path) -> None:
    headers = read_header(file)
    with safe_open(file, framework="pt") as opened:
        assert set(opened.keys()) == set(headers)
        for name, header in headers.items():
            assert tuple(opened.get_tensor(name).shape) == header.shape


def _sharded(folder: Path) -> dict[str, Any]:
    for number in (1, 2):
        save_file({f"t{number}": torch.ones(2)}, folder / f"model-{number}.safetensors")
    return {
        "metadata": {"total_size": 16},
        "weight_map": {"t1": "model-1.safetensors", "t2": "model-2.safetensors"},
    }


def _damaged_index(rng: random.Random, whole: dict[str, Any], place: Path) -> Path:
    if not place.exists():
        shutil.copytree(place.with_name("base"), place)
    (place / "model.safetensors.index.json").write_bytes(mutate_json(rng, whole))
    return place


# ---- JSON, plans ---------------------------------------------------------------------------------

_PLAN = {
    "rule": "absmean", "per": "group", "group_size": 32, "keep": ["head", r"\.0\."],
    "only": ["mlp"], "scale_dtype": "float16", "storage": "compact", "rotate": True,
    "matrices": {"a.weight": {"rule": "exact", "per": "row"}, "b.weight": {"rule": "keep"}},
}  # fmt: skip


def _damaged_plan(rng: random.Random, whole: Any, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    document = {"format": "trilens.plan", "plan": whole} if rng.random() < 0.3 else whole
    (place / "plan.json").write_bytes(mutate_json(rng, document))
    return place / "plan.json"


def _read_plan(file: Path) -> None:
    plan = TernaryPlan.load(file)
    assert TernaryPlan.from_json(plan.to_json()) == plan
    plan.of("a.weight")


def _read_json(file: Path) -> None:
    json.dumps(parse_json(file.read_bytes(), str(file)), allow_nan=False)


# ---- corpora -------------------------------------------------------------------------------------


def _texts(folder: Path) -> dict[str, bytes]:
    lines = [json.dumps({"text": f"line {n}\u2028é", "id": n}) for n in range(4)]
    table = pa.table({"text": ["one", "two two", None, "three"] * 20, "n": list(range(80))})
    buffers = {}
    for name, options in (
        ("d.parquet", {}),
        ("p.parquet", {"use_dictionary": False, "compression": "zstd"}),
        ("g.parquet", {"compression": "gzip", "data_page_version": "2.0", "row_group_size": 7}),
    ):
        buffer = BytesIO()
        pq.write_table(table, buffer, **options)
        buffers[name] = buffer.getvalue()
    return {
        "a.jsonl": "\n".join(lines).encode(),
        "a.txt": "Some text.\nMore text, é.".encode(),
        "a.csv": b"text,n\nfirst,1\n",
        **buffers,
    }


def _damaged_text(
    names: tuple[str, ...],
) -> Callable[[random.Random, dict[str, bytes], Path], Path]:
    def damage(rng: random.Random, whole: dict[str, bytes], place: Path) -> Path:
        place.mkdir(exist_ok=True)
        name = rng.choice(names)
        (place / name).write_bytes(mutate_bytes(rng, whole[name]))
        return place / name

    return damage


def _read_text(file: Path) -> None:
    for document in read_documents(file):
        document.encode()


# ---- .pth ----------------------------------------------------------------------------------------


def _small_pth(path: Path) -> None:
    torch.save({"a": torch.ones(3, 4), "b": torch.arange(6).reshape(2, 3).t()}, path)


def _damaged_archive(rng: random.Random, whole: bytes, place: Path) -> Path:
    """Bytes of the archive; or of one record, in an archive whose checksums are right."""
    place.mkdir(exist_ok=True)
    file = place / "x.pth"
    if rng.random() < 0.4:
        file.write_bytes(mutate_bytes(rng, whole))
        return file
    with zipfile.ZipFile(BytesIO(whole)) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    name = rng.choice([n for n in records if n.endswith("data.pkl")] * 8 + list(records))
    edit = _edited_pickle if name.endswith("data.pkl") and rng.random() < 0.5 else mutate_bytes
    records[name] = edit(rng, records[name])
    kind = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(file, "w", kind) as archive:
        for other, content in records.items():
            archive.writestr(other, content)
    return file


def _edited_pickle(rng: random.Random, data: bytes) -> bytes:
    """One opcode in place of another, or its argument."""
    places = [at for *_, at in pickletools.genops(data) if at is not None]
    at = rng.choice(places)
    piece = rng.choice(
        (b"K\xff", b"J\xff\xff\xff\x7f", b"J\0\0\0\x80", b"\x8a\x08" + b"\xff" * 7 + b"\x7f", b"N",
         b"}", b"]", b")", b"(", b"t", b"R", b"\x96\xff\xff\xff\xff\0\0\0\0", b"cos\nsystem\n",
         b"0", b"h\0", b"q\0", b"b", b"Q", b"\x88", b"X\x01\0\0\0x", b"G\x7f\xf0\0\0\0\0\0\0")
    )  # fmt: skip
    end = min((other for other in places if other > at), default=len(data))
    return data[:at] + piece + data[rng.choice((at, end)) :]


def _read_archive(file: Path) -> None:
    for tensor in read_torch_archive(file).values():
        tensor.clone()


def _published(path: Path) -> None:
    torch.save(published_tensors(layers=1, width=16, vocab=11, head_size=8), path)


def _convert(file: Path) -> None:
    out = file.parent / "out"
    shutil.rmtree(out, ignore_errors=True)
    convert_rwkv7(file, out)
    load(out)


# ---- captures, comparisons -----------------------------------------------------------------------


def _capture(path: Path) -> None:
    lens = Lens.from_pretrained(tiny_checkpoint(path.parent / "model"))
    lens.capture([1, 2, 3, 4], residual="all", attention=True, gates=True).save(path)


def _damaged_tensors(rng: random.Random, whole: bytes) -> bytes:
    """The header and its manifest are changed as JSON, under a hash that fits; bytes now and then,
    with a hash that fits or one that does not."""
    kind = rng.random()
    if kind < 0.3:
        found = mutate_bytes(rng, whole)
        return found if kind < 0.1 else resealed_tensors(found)
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    if kind < 0.4:
        return tensors_file(header, mutate_bytes(rng, data))
    if kind < 0.5:
        text = mutate_json(rng, header)
        return resealed_tensors(struct.pack("<Q", len(text)) + text + data)
    manifest = json.loads(header["__metadata__"]["trilens"])
    header["__metadata__"]["trilens"] = mutate_json(rng, manifest).decode("utf-8", "replace")
    return tensors_file(header, data)


def _damaged_capture(rng: random.Random, whole: bytes, place: Path) -> Path:
    place.mkdir(exist_ok=True)
    (place / "x.tlc").write_bytes(_damaged_tensors(rng, whole))
    return place / "x.tlc"


def _read_capture(file: Path) -> None:
    capture = Capture.load(file)
    capture.top_tokens(2)
    capture.save(file.with_suffix(".again"))
    Capture.load(file.with_suffix(".again"))


def _comparison(folder: Path) -> dict[str, Any]:
    model = tiny_checkpoint(folder / "model")
    lens = Lens.from_pretrained(model)
    compare(lens, lens, prompts=[[1, 2, 3, 4, 5, 6]]).save(folder / "saved")
    return dict(json.loads((folder / "saved" / "comparison.json").read_text()))


def _damaged_comparison(rng: random.Random, whole: dict[str, Any], place: Path) -> Path:
    """The manifest, a part or both; three of four carry hashes that fit the damage."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(place.with_name("base") / "saved", place)
    manifest, text = place / "comparison.json", json.dumps(whole).encode()
    kind = rng.choice(("manifest", "manifest", "table", "arrays", "bytes"))
    if kind == "manifest":
        text = mutate_json(rng, whole)
    elif kind == "bytes":
        text = mutate_bytes(rng, manifest.read_bytes())
    else:
        file = next(place.glob(f"{kind}.*"))
        damage = _damaged_tensors if kind == "arrays" else mutate_bytes
        file.write_bytes(damage(rng, file.read_bytes()))
    if rng.random() < 0.75:
        resealed_folder(place, manifest, text, "parts")
    else:
        manifest.write_bytes(text)
    return place


def _read_comparison(folder: Path) -> None:
    found = Comparison.load(folder)
    json.dumps(found.to_dict(), allow_nan=False)
    found.save(folder.with_name("again"))


# ---- GGUF ----------------------------------------------------------------------------------------


def tiny_gguf(path: Path) -> None:
    """A Llama of one block as a GGUF file."""
    # Blocks of the format have 256 weights a row.
    folder = path.parent / "source"
    folder.mkdir()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=256, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {
        word: number for number, word in enumerate(["a", "b", "c", "ab", "abc", "d", "e", "f"])
    }
    tokenizer = Tokenizer(models.BPE(words, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')
    ternarize(folder, path, format="gguf-tq2_0")


def _damaged_gguf(rng: random.Random, whole: bytes, place: Path) -> Path:
    """Bytes anywhere; the hashes of three of four fit them."""
    file = _flipped("x.gguf")(rng, whole, place)
    if rng.random() < 0.75:
        reseal_gguf(file)
    return file


def _read_gguf(file: Path) -> None:
    validate_gguf(file)


# ---- checkpoints ---------------------------------------------------------------------------------


def _checkpoint(folder: Path) -> dict[str, Any]:
    tiny_checkpoint(folder)
    return {
        name: json.loads((folder / name).read_text())
        for name in ("config.json", "tokenizer.json", "tokenizer_config.json")
    }


def _damaged_json(*names: str) -> Callable[[random.Random, dict[str, Any], Path], Path]:
    def damage(rng: random.Random, whole: dict[str, Any], place: Path) -> Path:
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(place.with_name("base"), place)
        name = rng.choice(names)
        (place / name).write_bytes(mutate_json(rng, whole[name]))
        return place

    return damage


def _read_checkpoint(folder: Path) -> None:
    lens = Lens(load(folder).model)
    lens.capture([1, 2, 3])


def _read_tokenizer(folder: Path) -> None:
    tokenizer = load_tokenizer(folder, trusted=False)
    if tokenizer is None:
        return
    lens = _LENS.get(folder.parent)
    if lens is None:
        lens = _LENS[folder.parent] = Lens(load(folder.with_name("base")).model)
    Lens(lens.model, tokenizer).capture("the cat sat")


_LENS: dict[Path, Lens] = {}


def _ternarize(folder: Path) -> None:
    out = folder.with_name("out")
    shutil.rmtree(out, ignore_errors=True)
    ternarize(folder, out)
    try:
        Lens(load(out).model).capture([1, 2, 3])
        validate(out)
    except TrilensError as error:
        raise AssertionError(f"what ternarize wrote is refused: {error}") from error


def _ternary(folder: Path) -> dict[str, Any]:
    ternarize(tiny_checkpoint(folder.with_name("source")), folder, plan=TernaryPlan(per="row"))
    names = ("config.json", MANIFEST_NAME)
    return {name: json.loads((folder / name).read_text()) for name in names}


def _damaged_ternary(rng: random.Random, whole: dict[str, Any], place: Path) -> Path:
    """Configuration or manifest; three of four manifests list the files as they are."""
    folder = _damaged_json("config.json", MANIFEST_NAME)(rng, whole, place)
    if rng.random() < 0.75:
        manifest = folder / MANIFEST_NAME
        resealed_folder(folder, manifest, manifest.read_bytes(), "files")
    return folder


def _validate(folder: Path) -> None:
    validate(folder)
    load(folder)


TARGETS: dict[str, Target] = {
    "safetensors": Target(
        _one_file("x.safetensors", _small_tensors), _damaged_header, _read_header, 200, 20_000
    ),
    "index": Target(_sharded, _damaged_index, lambda f: void(read_headers(f)), 100, 12_000),
    "json": Target(lambda _: _PLAN, _damaged_plan, _read_json, 120, 20_000),
    "plan": Target(lambda _: _PLAN, _damaged_plan, _read_plan, 150, 14_000),
    "text": Target(
        _texts, _damaged_text(("a.jsonl", "a.jsonl", "a.txt", "a.csv")), _read_text, 150, 12_000
    ),
    "parquet": Target(
        _texts, _damaged_text(("d.parquet", "p.parquet", "g.parquet")), _read_text, 120, 9_000
    ),
    "archive": Target(_one_file("x.pth", _small_pth), _damaged_archive, _read_archive, 150, 10_000),
    "gguf": Target(_one_file("x.gguf", tiny_gguf), _damaged_gguf, _read_gguf, 80, 6_000),
    "capture": Target(_one_file("x.tlc", _capture), _damaged_capture, _read_capture, 120, 5_000),
    "comparison": Target(_comparison, _damaged_comparison, _read_comparison, 60, 1_500),
    "convert": Target(_one_file("x.pth", _published), _flipped("x.pth"), _convert, 15, 600),
    "config": Target(_checkpoint, _damaged_json("config.json"), _read_checkpoint, 20, 1_000),
    "tokenizer": Target(
        _checkpoint,
        _damaged_json("tokenizer.json", "tokenizer_config.json"),
        _read_tokenizer,
        20,
        1_000,
    ),
    "ternarize": Target(_checkpoint, _damaged_json("config.json"), _ternarize, 5, 250),
    "validate": Target(_ternary, _damaged_ternary, _validate, 15, 600),
}
"""Name of the input → how it is fuzzed."""


def void(_: Any) -> None:
    """Nothing of a result."""
