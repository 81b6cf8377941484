"""Tokens per second beside SAELens' activation store and plain hooks; the loader beside its cache.

    python -m benchmarks.saelens [--rows 32] [--layers 4] [--rounds 3]

The first layers of an 88M-parameter Llama with random weights, rows of 256 random tokens, the
residual stream of the last of them in float32. All read the same rows in turn, round by round, on
processor time; that they give the same values is checked first. SAELens' cache is what `to_saelens`
writes of the same store. Needs `sae-lens`, which wants versions of its own: install it into an
environment apart.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from sae_lens.training.mixing_buffer import mixing_buffer

from benchmarks.common import llama_88m, ratios, save
from benchmarks.store import VOCAB, documents
from trilens import Lens, Store, StoreOptions, capture_corpus
from trilens.corpus import to_saelens

CONTEXT, ROWS, BATCH, BUFFER = 256, 8, 512, 4096


def rows(count: int) -> list[list[int]]:
    """Rows of one length."""
    tokens = [token for text in documents(count * CONTEXT) for token in text]
    return [tokens[at : at + CONTEXT] for at in range(0, count * CONTEXT, CONTEXT)]


def their_store(model: HookedProxyLM, hook: str, **given: Any) -> ActivationsStore:
    """SAELens' store of one layer's residual stream."""
    options: dict[str, Any] = {
        "model": model,
        "dataset": None,
        "streaming": False,
        "hook_name": hook,
        "hook_head_index": None,
        "context_size": CONTEXT,
        "d_in": model.model.config.hidden_size,
        "n_batches_in_buffer": BUFFER // CONTEXT,
        "total_training_tokens": CONTEXT,
        "store_batch_size_prompts": ROWS,
        "train_batch_size_tokens": BATCH,
        "prepend_bos": False,
        "normalize_activations": "none",
        "device": torch.device("cpu"),
        "dtype": "float32",
    }
    return ActivationsStore(**{**options, **given})


def epoch(store: ActivationsStore, n_rows: int) -> Iterator[torch.Tensor]:
    """As its own loader, and ending where the rows do."""
    batches = (store.get_filtered_llm_batch() for _ in range(n_rows // ROWS))
    return mixing_buffer(BUFFER, BATCH, batches)


def captures(folder: Path, n_rows: int, layers: int, rounds: int) -> dict[str, Any]:
    """Hooks, SAELens' store, and ours, which writes to disk what it captures."""
    lens, texts = Lens(llama_88m(vocab_size=VOCAB, layers=layers)), rows(n_rows)
    lens.batches_safely(CONTEXT)
    hook, threads = f"model.layers.{layers - 1}", torch.get_num_threads()
    # A model of its own, of the same weights: its hooks stay.
    proxy = HookedProxyLM(llama_88m(vocab_size=VOCAB, layers=layers), None, hook_names=[hook])
    dataset = Dataset.from_dict({"input_ids": texts})

    @torch.no_grad()
    def hooks() -> torch.Tensor:
        kept: list[torch.Tensor] = []
        block = lens.model.model.layers[layers - 1]
        handle = block.register_forward_hook(lambda _m, _i, out: kept.append(out))
        for at in range(0, n_rows, ROWS):
            lens.model(input_ids=torch.tensor(texts[at : at + ROWS]), use_cache=False)
        handle.remove()
        return torch.cat(kept).flatten(0, 1)

    def theirs() -> None:
        found = epoch(their_store(proxy, hook, dataset=dataset), n_rows)
        assert sum(map(len, found)) == n_rows * CONTEXT

    def ours() -> Store:
        options = StoreOptions(
            layers=(layers - 1,), dtype="float32", context=CONTEXT, shard_tokens=BUFFER,
            batch_tokens=ROWS * CONTEXT, threads=threads,
        )  # fmt: skip
        return capture_corpus(lens, texts, folder / "ours", options=options, overwrite=True)

    wanted = hooks()
    first = their_store(proxy, hook, dataset=dataset).get_filtered_llm_batch()
    torch.testing.assert_close(first, wanted[: len(first)])
    torch.testing.assert_close(ours()["resid_post", layers - 1].to_torch(), wanted)
    return _speeds({"hooks": hooks, "saelens": theirs, "trilens": ours}, n_rows, rounds)


def loaders(folder: Path, n_rows: int, rounds: int) -> dict[str, Any]:
    """Shuffled tokens from both, of the same values, all of them in the page cache."""
    lens = Lens(llama_88m(vocab_size=VOCAB, layers=1))
    options = StoreOptions(layers=(0,), dtype="float32", context=CONTEXT)
    store = capture_corpus(lens, rows(n_rows), folder / "store", options=options)
    cache = str(to_saelens(store, "resid_post", 0, folder / "cache", context_size=CONTEXT))
    proxy = HookedProxyLM(lens.model, None, hook_names=[])

    def loaded() -> ActivationsStore:
        return their_store(proxy, "blocks.0.hook_resid_post", cached_activations_path=cache)

    def theirs() -> None:
        assert sum(map(len, epoch(loaded(), n_rows))) == n_rows * CONTEXT

    def ours() -> None:
        batches = store["resid_post", 0].iter_batches(BATCH, shuffle=0, buffer_tokens=BUFFER)
        assert sum(map(len, batches)) == n_rows * CONTEXT

    first = loaded().get_filtered_llm_batch()
    torch.testing.assert_close(
        first, store["resid_post", 0].to_torch(0, len(first)), rtol=0, atol=0
    )
    return _speeds({"saelens": theirs, "trilens": ours}, n_rows, rounds)


def _speeds(runs: dict[str, Callable[[], Any]], n_rows: int, rounds: int) -> dict[str, Any]:
    found = ratios(runs, rounds, time.process_time)
    tokens = n_rows * CONTEXT
    speeds = {name: round(tokens / found[name]["seconds"]) for name in runs}
    return {**found, "tokens_per_second": speeds, "tokens": tokens}


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        folder = Path(name)
        figures = {
            "setting": {key: getattr(given, key) for key in ("rows", "layers", "rounds")},
            "captures": captures(folder, given.rows, given.layers, given.rounds),
            "loaders": loaders(folder, 4 * given.rows, given.rounds),
        }
    save("saelens", figures)


if __name__ == "__main__":
    main()
