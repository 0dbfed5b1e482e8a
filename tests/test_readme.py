"""The README's commands parse, its files exist, and its quick start runs, shortened; the layout is what it says."""

import ast
import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

import random_search
import supernet
from conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "img" / "README.md"]
README, DETAILS = (page.read_text(encoding="utf-8") for page in PAGES)
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.DOTALL))
PARSERS = {"supernet.py": supernet.build_parser(), "random_search.py": random_search.build_parser()}


def commands() -> list[list[str]]:
    """Every python command of both pages, split as a shell would; torchrun's without its own flags."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README + DETAILS, re.DOTALL))
    inline = [text.replace("\n", " ") for text in re.findall(r"`(python [^`]*)`", README + DETAILS)]
    lines = re.split(r"\n|&&", blocks.replace("\\\n", " ")) + inline
    words = [
        shlex.split(re.sub(r"^torchrun --\S+", "python", line), comments=True) for line in lines
    ]
    return [w[1:] for w in words if w and Path(w[0]).name == "python"]


@pytest.mark.parametrize(
    "command", [c for c in commands() if c[0] in PARSERS and "--help" not in c], ids=" ".join
)
def test_every_command_parses(command: list[str]) -> None:
    PARSERS[command[0]].parse_args(command[1:])


def test_the_readme_has_the_commands_that_it_promises() -> None:
    found = [" ".join(command) for command in commands()]
    for command in ("supernet.py --exp_name spos_cifar", "random_search.py --ckpt"):
        assert command in found
    assert sum(command[0] in PARSERS for command in commands()) >= 9


def test_ci_runs_the_readmes_test_command() -> None:
    (command,) = re.findall(
        r"^python3 -m venv .*\n.*-m pytest -n 2 --dist loadfile$", BASH, re.MULTILINE
    )
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_every_link_leads_somewhere() -> None:
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            titles = (
                re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
                if anchor
                else []
            )
            assert not anchor or anchor in [
                re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles
            ]
            shown.add(target)
    assert set((ROOT / "img").glob("*.png")) <= shown


def test_the_results_are_those_of_the_table_behind_the_pictures() -> None:
    with open(ROOT / "img" / "paths.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = [row for row in rows if row["generation"] == "0"]
    children = [row for row in rows if int(row["generation"]) > 0]
    numbers = [f"{len(drawn):,} random", f"{median(float(row['accuracy']) for row in drawn):.2f}%"]
    for part in (drawn, children):
        best = max(part, key=lambda row: (float(row["accuracy"]), -float(row["loss"])))
        cost = f"{float(best['flops_m']):.1f}M, {float(best['params_m']):.2f}M"
        accuracy = float(best["accuracy"])
        numbers.append(
            f"{accuracy:.2f}% ±{(accuracy * (100 - accuracy) / 5000) ** 0.5:.2f} | {cost}"
        )
    table = README.split("## Quick start")[0]
    assert [number for number in numbers if number not in table] == []


def test_every_flag_has_a_help_text_with_its_default() -> None:
    for parser in PARSERS.values():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            shown = f" (default: {action.default})" if action.dest != "help" else ""
            assert action.help and action.help + shown in text


def test_the_quick_start_runs(tmp_path: Path) -> None:
    """Its two python commands as they stand, but with one epoch of 8-pixel images and 6 paths."""
    quick = BASH.split("-m pytest")[0].split("python3 -m venv")[1]
    train, search = (re.search(rf"{name} .*", quick)[0].removesuffix(" &&") for name in PARSERS)
    assert "--num_paths 100" in search and "--dataset digits" in train
    short = [f"{train} --epochs 1 --image_size 8", search.replace("100", "6")]
    for command in short:
        script, *flags = shlex.split(command)
        result = subprocess.run(
            [sys.executable, str(ROOT / script), *flags],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
    assert (tmp_path / "runs/digits/search/histogram.png").stat().st_size > 1000
    assert (
        len(
            json.loads((tmp_path / "runs/digits/search/search.json").read_text())["choice"].split(
                "-"
            )
        )
        == 20
    )


def imports(path: Path) -> set[str]:
    """The modules of this repository that a file imports."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    names += [
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import)
        for alias in node.names
    ]
    ours = {"blocks", "model", "utils", "supernet", "random_search", "data", "img", "matplotlib"}
    return {name.split(".")[0] for name in names} & ours


@pytest.mark.parametrize(
    ("file", "allowed"),
    [
        ("blocks.py", set()),
        ("utils.py", set()),
        ("model.py", {"blocks"}),
        ("supernet.py", {"blocks", "data", "img", "model", "utils"}),
        ("random_search.py", {"blocks", "data", "img", "model", "utils"}),
        ("data/datasets.py", {"data", "utils"}),
        ("data/augment.py", set()),
        ("data/images.py", {"utils"}),
        ("data/loaders.py", {"data", "utils"}),
        ("data/records.py", {"utils"}),
        ("img/plots.py", {"blocks", "data", "matplotlib", "model", "utils"}),
    ],
)
def test_data_flows_one_way(file: str, allowed: set[str]) -> None:
    assert imports(ROOT / file) <= allowed


def test_importing_the_scripts_does_nothing(tmp_path: Path) -> None:
    """pytorch/pytorch#5858: no parsing, printing or files, whatever the program's own arguments are."""
    code = "import sys; sys.argv = ['x', '--foreign']; import supernet, random_search"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    """The whole way to the shell, for both scripts."""
    for command in (
        ["supernet.py", "--choice", "1-2", "--dataset", "digits"],
        ["random_search.py", "--ckpt", "no/last.pth"],
    ):
        result = subprocess.run(
            [sys.executable, str(ROOT / command[0]), *command[1:]],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert result.returncode == 1 and result.stdout == ""
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
