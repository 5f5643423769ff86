"""The README and the pages: their code runs, their links lead somewhere, nothing lacks.

A stand-in with one small layer takes the place of ResNet-18, and the preset `demo` uses
a few samples, so that pages can show real commands. Each page has a folder of its own
with a trained run in ``runs/demo``, unless the page trains one there.
"""

import contextlib
import functools
import importlib
import itertools
import re
import shlex
import shutil
import sys
import types
from pathlib import Path

import flax.linen as nn
import jax
import pytest
from page_blocks import parse, prose, read_blocks, read_commands
from test_layering import ORDER
from tiny import DenseLayer, LinearHead

import hsee_jax as hs
from hsee_jax import cli
from hsee_jax.algorithms import ALGORITHMS
from hsee_jax.cli.commands import COMMANDS
from hsee_jax.config import PRESETS, SECTIONS, options
from hsee_jax.inference import CRITERIA
from hsee_jax.nn import NETWORKS, resnet18
from hsee_jax.nn.model import cached_stage
from hsee_jax.runs.build import build_federation, build_strategy
from hsee_jax.runs.data import build_info

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs/hooks"))

import pages  # noqa: E402

DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for path in (README, *sorted(DOCS.rglob("*.md")))
}
WITH_CODE = [
    name
    for name, text in PAGES.items()
    if any(block.language in ("python", "bash") for block in read_blocks(text))
]
READING = ("eval", "gate", "export", "report")  # commands that only read a run
TRAINS = re.compile(r"""\btrain\(.*["']runs/demo["']""")
# What is wrong if the reader of a page has data or a plugin that the test has not.
LACKS = re.compile(r"data_dir: |plugin: \w+ cannot be imported \(ModuleNotFoundError")
REGISTRIES = [r for s in SECTIONS.values() for r in s.registries.values()] + [CRITERIA]


class Same(nn.Module):
    """A layer without weights."""

    def __call__(self, x, mask, *, train):
        return x


@functools.wraps(resnet18)
def stand_in(*, num_classes, input_shape, **options):
    """One dense layer, and eight that change nothing, named as in ResNet-18."""
    model = resnet18(num_classes=num_classes, input_shape=input_shape, **options)
    first, rest = cached_stage(DenseLayer(8)), cached_stage(Same())
    head, count = cached_stage(LinearHead(num_classes)), len(model.layer_names)
    return model._replace(
        stages=(first, *(rest,) * (count - 1)),
        exit_heads=(head,) * count,
        final_head=head,
    )


@pytest.fixture(scope="module", autouse=True)
def small():
    """Replace ResNet-18 and the preset `demo`."""
    entry = NETWORKS["resnet18"]
    demo = hs.override(
        PRESETS["demo"],
        cuts=("2", "4"),
        max_train_samples=120,
        max_test_samples=40,
        rounds=2,
        eval_every=1,
        checkpoint_every=1,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(NETWORKS._entries, "resnet18", entry._replace(make=stand_in))
        patch.setattr(hs.nn, "resnet18", stand_in)
        patch.setitem(PRESETS, "demo", demo)
        yield


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """Train the demo."""
    folder = tmp_path_factory.mktemp("trained") / "runs"
    hs.train(hs.preset("demo"), folder / "demo")
    return folder


@contextlib.contextmanager
def new_process(clean):
    """Swap in other entries of all registries, and forget local modules on exit."""
    before = [registry._entries for registry in REGISTRIES]
    for registry, entries in zip(REGISTRIES, clean, strict=True):
        registry._entries = dict(entries)
    try:
        yield
    finally:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry._entries = entries
        for path in Path.cwd().glob("*.py"):
            sys.modules.pop(path.stem, None)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Enter an empty folder, and yield the module in which a page runs."""
    monkeypatch.chdir(tmp_path)
    module = types.ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield module


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_of_a_page_runs(name, trained, place, capsys):
    blocks = list(read_blocks(PAGES[name]))
    python = [block for block in blocks if block.language == "python"]
    if not any(TRAINS.search(block.code) for block in python):
        shutil.copytree(trained, "runs")
    for example in (ROOT / "examples").glob("*.py"):
        shutil.copy(example, ".")
    clean = [registry._entries for registry in REGISTRIES]
    with new_process(clean):
        for block, after in itertools.zip_longest(blocks, blocks[1:]):
            if block.file:
                Path(block.file).write_text(block.code + "\n")
            elif block.language == "bash":
                with new_process(clean):
                    run_shell(block, after)
            elif block in python and not block.is_skipped:
                code = "\n" * (block.line - 1) + block.code
                exec(compile(code, name, "exec"), vars(place))


def run_shell(block, after):
    """Check the command lines of a block; the next block may show why one fails."""
    for words in read_commands(block.code):
        try:
            check(words, run=not block.is_skipped, train="run" in block.notes)
        except hs.UserError as error:
            shown = "" if after is None else " ".join(after.code.split())
            assert LACKS.match(str(error)) or str(error) in shown, (words, error)


def check(words, *, run, train):
    """Parse a command line, and execute it if it is cheap."""
    command, given = parse(shlex.split(shlex.join(words).replace("--cuts auto", "")))
    if command in ("train", "info"):
        config = given["config"]
        federation = build_federation(config, build_info(config.data))
        build_strategy(config, federation)
    if command in READING:
        runs = given["runs"] if command == "report" else [given["run"]]
        run = run and all(path.exists() for path in runs)
        run = run and given.get("target_accuracy") is None  # too much for the stand-in
    cheap = command in READING or "--list" in words
    if run and (cheap or (train and command == "train")):
        assert cli.main(words) == 0, words


def test_the_readme_names_its_two_commands():
    blocks = {note: b for b in read_blocks(PAGES["README.md"]) for note in b.notes}
    (words,) = read_commands(blocks["demo"].code)
    assert words[:2] == ["train", "demo"]
    assert blocks["tests"].code.endswith("pytest")


def test_links_lead_to_pages():
    made = {DOCS / path for path in (*pages.generated(), *pages.SOURCES)}
    for name, text in PAGES.items():
        for target in re.findall(r"\]\(([^)\s#]+)(?:#[^)\s]*)?\)", prose(text)):
            if "://" not in target:
                path = (ROOT / name).parent.joinpath(target).resolve()
                assert path.exists() or path in made, f"{name}: {target}"
    for source in pages.SOURCES.values():
        assert (ROOT / source).is_file()


def test_flags_in_the_text_exist():
    flower = {
        "--database",
        "--disable-runtime-dependency-installation",
        "--enable-supernode-auth",
        "--node-config",
        "--run-config",
    }
    known = {*pages.anchors(), *flower, "--help", "--extra-index-url", "--strict"}
    for name, text in PAGES.items():
        found = re.findall(r"`(?:hsee \w+ )?(--[a-z][a-z-]*)", prose(text))
        assert set(found) <= known, name


@pytest.mark.parametrize("package", ORDER)
def test_every_public_name_is_on_an_api_page(package):
    text = PAGES[f"docs/reference/api/{package}.md"]
    shown = re.findall(rf"^::: hsee_jax\.{package}\.(?:\w+\.)?(\w+)$", text, re.M)
    names = importlib.import_module(f"hsee_jax.{package}").__all__
    assert sorted(shown) == sorted(names)


def test_every_name_of_the_front_is_on_the_first_api_page():
    shown = re.findall(r"`hs\.(\w+)`\]", PAGES["docs/reference/api/index.md"])
    assert sorted(shown) == sorted(set(hs.__all__) - set(ORDER))


def test_every_package_is_in_the_table_of_the_architecture():
    text = PAGES["docs/explanation/architecture.md"]
    assert re.findall(r"^\| \[`(\w+)`\]", text, re.M) == ORDER


def read_cards():
    """Yield each card of the page on algorithms: its heading, rows and commands."""
    text = PAGES["docs/reference/algorithms.md"]
    for card in re.split(r"^### ", text, flags=re.M)[1:]:
        card = re.split(r"^## ", card, flags=re.M)[0]
        rows = dict(re.findall(r"^\| (\w+) \| (.+) \|$", card, re.M))
        codes = [b.code for b in read_blocks(card) if b.language == "bash"]
        yield card.partition("\n")[0], rows, "\n".join(codes)


def test_every_card_says_what_to_expect():
    for heading, rows, commands in read_cards():
        missing = {"paper", "file", "computed", "bytes", "differs", "expect"} - {*rows}
        assert not missing, heading
        assert list(read_commands(commands)), heading
        for path in re.findall(r"`(hsee_jax/[\w/]+\.py)`", rows["file"]):
            assert (ROOT / path).is_file(), heading


def test_every_algorithm_of_the_house_has_a_card():
    cards = list(read_cards())
    for name, entry in ALGORITHMS.items():
        if entry.make.__module__.startswith("hsee_jax."):
            path = f"`{entry.make.__module__.replace('.', '/')}.py`"
            found = [commands for _, rows, commands in cards if path in rows["file"]]
            assert any(re.search(rf"--strategy {name}\b", code) for code in found), name


def test_the_reference_has_every_option_and_every_flag():
    text = pages.configuration()
    places = re.findall(r"\{ #option-(\w+) \}", text)
    assert sorted(places) == sorted(options())
    assert "[ours" not in text
    commands = pages.cli()
    assert all(f"## hsee {name}" in commands for name in COMMANDS)
    for flag in ("--resume", "--target-offload", "--data-dir TEXT", "--client ID"):
        assert f"`{flag}" in commands


def test_the_reference_follows_the_registries():
    """A codec that is registered now, with an option, is in the tables."""

    def rounded(*, digits: int = 3):
        """Features with few digits."""
        return hs.link.FULL

    with new_process([registry._entries for registry in REGISTRIES]):
        hs.link.register(rounded)
        text = pages.configuration()
    assert "| `rounded` | Features with few digits. | `digits` |" in text
    row = re.search(r"^\| `digits`\{ #option-digits \} \| (.*) \|$", text, re.M)
    assert row[1].split(" | ")[:2] == ["`rounded`", "`3`"]
    assert "*Values:* integer" in row[1]
    assert "rounded" not in pages.configuration()


@pytest.mark.parametrize(
    ("page", "name"), [("plan-cuts.md", "fleet.toml"), ("sweep.md", "study.toml")]
)
def test_the_example_is_the_file_of_its_page(page, name):
    (block,) = (
        block
        for block in read_blocks(PAGES[f"docs/how-to/{page}"])
        if block.file == name
    )
    text = (ROOT / "examples" / name).read_text(encoding="utf-8")
    assert block.code.rstrip("\n") + "\n" == text
