"""The examples run as they stand, and print what their tutorials show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from doc_blocks import compare_output
from website.tutorials import EXAMPLES, read_script, run_script, shown_of

# Which feature learns what hangs on roundings: how much is printed is compared, not what.
TRAINED = {"Tokens on which the most used features are largest"}


def run(name: str) -> dict[str, Any]:
    script = read_script(name)
    names, printed = run_script(script)
    for cell, shown, found in zip(script.cells, shown_of(script), printed, strict=True):
        if cell.title in TRAINED:
            assert len(shown.splitlines()) == len(found.splitlines())
        else:
            compare_output(shown, found)
    return names


def test_every_example_is_run_here() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {
        "class_means",
        "induction_heads",
        "logit_lens",
        "patching",
        "probe",
        "sparse_autoencoder",
        "state_knockout",
        "steering",
        "ternary_circuit",
    }


def test_induction_heads_carry_the_repeat() -> None:
    shown = run("induction_heads")
    assert min(shown["scores"][place] for place in shown["found"]) > 0.5
    others = max(sum(shown["rises"]) / len(shown["rises"]), 0.1)
    assert shown["rise"] >= 2 * others


def test_patching_and_its_twin() -> None:
    shown = run("patching")
    assert shown["exact"].complete
    assert shown["right"] != shown["wrong"]
    assert shown["rank"] > 0.5


def test_steering_changes_the_text() -> None:
    shown = run("steering")
    plain = shown["lens"].generate(shown["PROMPT"], max_new_tokens=24).text
    assert shown["text"] != plain


def test_a_probe_reads_an_open_bracket() -> None:
    assert run("probe")["accuracy"] > 0.9


def test_edges_before_and_after() -> None:
    shown = run("ternary_circuit")
    layer, head = divmod(int(shown["strongest"][0]), shown["before"].shape[1])
    assert shown["before"][layer, head] > shown["after"][layer, head] > 0
    assert not Path(shown["ternary"]).exists()


def test_a_token_that_wrote_nothing_is_missed() -> None:
    assert min(run("state_knockout")["largest"].values()) > 0.05


def test_layers_settle_and_a_translation_helps() -> None:
    shown = run("logit_lens")
    assert shown["rank"] == 0
    assert max(shown["tuned"].held_out_errors) < min(shown["tuned"].untranslated_errors)
    assert len(repr(shown["tuned"])) < 200


def test_a_sparse_autoencoder_from_a_store() -> None:
    shown = run("sparse_autoencoder")
    assert shown["explained"] > 0.7
    assert int((shown["active"] > 0).sum()) > shown["WIDTH"] // 4


def test_means_tell_classes_apart() -> None:
    assert max(run("class_means")["accuracies"]) > 0.9
