"""The README's commands, links and results, the imports, and the scripts as users start them."""

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


def commands():
    """Every python command of both pages, split as a shell would; torchrun's without its flags."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README + DETAILS, re.DOTALL))
    lines = re.split(r"\n|&&", blocks.replace("\\\n", " "))
    lines += re.findall(r"`(python [^`]*)`", README + DETAILS)
    words = [shlex.split(re.sub(r"^torchrun --\S+", "python", s), comments=True) for s in lines]
    return [w[1:] for w in words if w and Path(w[0]).name == "python"]


def python(folder, *command, **options):
    """Runs Python in a folder."""
    options |= {"cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *command], **options)


COMMANDS = [c for c in commands() if c[0] in PARSERS and "--help" not in c]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_parses(command):
    PARSERS[command[0]].parse_args(command[1:])


def test_the_commands_are_found():
    found = [" ".join(command) for command in commands()]
    assert {"supernet.py --exp_name spos_cifar", "random_search.py --ckpt"} <= set(found)
    assert sum(command[0] in PARSERS for command in commands()) >= 9


def test_ci_runs_the_readmes_test_command():
    pattern = r"^python3 -m venv .*\n.*-m pytest -n 2 --dist loadfile$"
    (command,) = re.findall(pattern, BASH, re.MULTILINE)
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_every_link_leads_somewhere():
    shown = set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        links = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            shown.add(target)
            if anchor:
                titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
                words = [re.sub(r"[^\w -]", "", title.lower()) for title in titles]
                assert anchor in [title.replace(" ", "-") for title in words]
    assert set((ROOT / "img").glob("*.png")) <= shown


def test_the_results_agree_with_the_table_behind_the_pictures():
    with open(ROOT / "img" / "paths.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    drawn = [row for row in rows if row["generation"] == "0"]
    children = [row for row in rows if int(row["generation"]) > 0]
    numbers = [f"{len(drawn):,} random", f"{median(float(row['accuracy']) for row in drawn):.2f}%"]
    for part in (drawn, children):
        best = max(part, key=lambda row: (float(row["accuracy"]), -float(row["loss"])))
        accuracy, flops, params = (float(best[k]) for k in ("accuracy", "flops_m", "params_m"))
        error = (accuracy * (100 - accuracy) / 5000) ** 0.5
        numbers.append(f"{accuracy:.2f}% ±{error:.2f} | {flops:.1f}M, {params:.2f}M")
    table = README.split("## Quick start")[0]
    assert [number for number in numbers if number not in table] == []


def test_every_flag_has_a_help_text_with_its_default():
    for parser in PARSERS.values():
        text = " ".join(parser.format_help().split())
        for action in parser._actions:
            shown = f" (default: {action.default})" if action.dest != "help" else ""
            assert action.help and action.help + shown in text


def test_the_quick_start_runs(tmp_path):
    """With one epoch of 8-pixel images and 6 paths."""
    quick = BASH.split("-m pytest")[0].split("python3 -m venv")[1]
    train, search = (re.search(rf"{name} .*", quick)[0].removesuffix(" &&") for name in PARSERS)
    assert "--num_paths 100" in search and "--dataset digits" in train
    for command in (f"{train} --epochs 1 --image_size 8", search.replace("100", "6")):
        script, *flags = shlex.split(command)
        result = python(tmp_path, ROOT / script, *flags)
        assert (result.returncode, result.stderr) == (0, "")
    folder = tmp_path / "runs/digits/search"
    assert (folder / "histogram.png").stat().st_size > 1000
    assert len(json.loads((folder / "search.json").read_text())["choice"].split("-")) == 20


def imports(path):
    """The modules of this repository, and matplotlib, that a file imports."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            names.append(node.module)
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    ours = {"blocks", "model", "utils", "supernet", "random_search", "data", "img", "matplotlib"}
    return {name.split(".")[0] for name in names} & ours


LAYERS = {
    "blocks.py utils.py data/augment.py": "",
    "model.py": "blocks",
    "data/images.py data/records.py": "utils",
    "data/datasets.py data/loaders.py": "data utils",
    "supernet.py random_search.py": "blocks data img model utils",
    "img/plots.py": "blocks data matplotlib model utils",
}


@pytest.mark.parametrize(("files", "allowed"), LAYERS.items(), ids=LAYERS)
def test_imports_go_one_way(files, allowed):
    for file in files.split():
        assert imports(ROOT / file) <= set(allowed.split()), file


def test_importing_the_scripts_does_nothing(tmp_path):
    """Whatever the program's own arguments are (pytorch/pytorch#5858)."""
    code = "import sys; sys.argv = ['x', '--foreign']; import supernet, random_search"
    result = python(tmp_path, "-c", code, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


WRONG = ["supernet.py --choice 1-2 --dataset digits", "random_search.py --ckpt no/last.pth"]


@pytest.mark.parametrize("command", WRONG)
def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path, command):
    script, *flags = command.split()
    result = python(tmp_path, ROOT / script, *flags)
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
