"""What the README shows is what the commands print."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

import trilens
from trilens.cli.main import app
from trilens.demo import demo_path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```\n(.*?)\n```", README, re.DOTALL)


# Four digits may or may not show a point, a sign or an exponent.
NUMBER = re.compile(r"(?<![\w.,])[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?")


def words(text: str) -> list[str]:
    """The text without its numbers: bf16 rounds differently from processor to processor."""
    return NUMBER.sub("#", text).split()


def measured(shown: str, printed: str) -> tuple[list[float], list[float]]:
    """Numbers in the same places; those that count, in both texts, are left out."""
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    kept = [pair for pair in pairs if "." in pair[0] + pair[1]]
    ours, theirs = ([float(n.replace(",", "")) for n in side] for side in zip(*kept, strict=True))
    return ours, theirs


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d+\.\d+", text)]


def check(shown: str, printed: str) -> None:
    head, table = shown.split("\n\n")[:2]
    assert head in printed
    assert words(table.splitlines()[0]) == words(printed.split("\n\n")[1].splitlines()[0])
    ours, theirs = numbers(shown), numbers(printed)
    assert len(ours) == len(theirs)
    # Two decimals of bf16 arithmetic (8 bits): a few units in the third digit.
    assert ours == pytest.approx(theirs, rel=0.05, abs=0.05)


def test_demo_output() -> None:
    shown = next(block for block in BLOCKS if block.startswith("demo transformer"))
    result = CliRunner().invoke(app, ["demo"])
    assert result.exit_code == 0
    check(shown, result.stdout.split("\ndemo mamba")[0].rstrip())
    shown = next(block for block in BLOCKS if block.startswith("side by side"))
    printed = result.stdout[result.stdout.index("side by side") :]
    assert words(shown) == words(printed)
    ours, theirs = measured(shown, printed)
    # Signed weights of a recurrence are sums of bf16 numbers that cancel in part.
    assert ours == pytest.approx(theirs, rel=0.1, abs=0.05)


def test_compare_output(tmp_path: Path) -> None:
    block = next(block for block in BLOCKS if block.startswith("$ trilens ternarize"))
    first, second, shown = block.split("\n", 2)
    source, out = str(demo_path()), str(tmp_path / "ternary")
    for line in (first, second):
        words_of = line.removeprefix("$ trilens ").split()
        places = {"src/trilens/demo/transformer": source, "ternary": out}
        arguments = [places.get(word, word.replace("src/", f"{ROOT}/src/")) for word in words_of]
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
    assert words(shown) == words(result.stdout)
    # bf16 arithmetic; of differences near 0 the absolute error counts.
    ours, theirs = measured(shown, result.stdout)
    assert ours == pytest.approx(theirs, rel=0.05, abs=0.02)


def test_python_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    code = re.findall(r"```python\n(.*?)\n```", README, re.DOTALL)[0]
    exec(code.replace("path/or/hub-id", str(demo_path())), {})
    assert capsys.readouterr().out.count("\n") == 2


def test_make_targets_and_version() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile
    assert f'version = "{trilens.__version__}"' in (ROOT / "pyproject.toml").read_text()


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
