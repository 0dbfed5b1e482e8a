"""The README's commands, links and results, the imports, and the scripts as users start them."""

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
from data.records import read_rows

PAGES = [ROOT / "README.md", ROOT / "img" / "README.md"]
README, DETAILS = (page.read_text(encoding="utf-8") for page in PAGES)
PARSERS = {"supernet.py": supernet.build_parser(), "random_search.py": random_search.build_parser()}


def python(folder, *command, **options):
    """Runs Python in a folder."""
    options |= {"cwd": folder, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run([sys.executable, *command], **options)


def test_every_command_parses():
    """In both pages; torchrun's without its own flags."""
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README + DETAILS, re.DOTALL))
    lines = re.split(r"\n|&&", blocks.replace("\\\n", " "))
    lines += re.findall(r"`(python [^`]*)`", README + DETAILS)
    words = [shlex.split(re.sub(r"^torchrun --\S+", "python", s), comments=True) for s in lines]
    commands = [w[1:] for w in words if w and Path(w[0]).name == "python" and w[1] in PARSERS]
    assert ["random_search.py", "--ckpt"] in commands and len(commands) >= 9
    for script, *flags in commands:
        if "--help" not in flags:
            PARSERS[script].parse_args(flags)


def test_every_link_leads_somewhere():
    shown = set()
    for page, text in zip(PAGES, (README, DETAILS), strict=True):
        links = re.findall(r"\]\((?!http)([^)]+)\)", text) + re.findall(r'src="([^"]+)"', text)
        for link in links:
            file, _, anchor = link.partition("#")
            target = (page.parent / file).resolve() if file else page
            assert target.exists(), link
            shown.add(target)
            if anchor:
                titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = [re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in titles]
                assert anchor in anchors, link
    assert set((ROOT / "img").glob("*.png")) <= shown


def test_the_results_agree_with_the_table_behind_the_pictures():
    rows = read_rows(ROOT / "img" / "paths.csv")
    drawn = [row for row in rows if row.generation == 0]
    children = [row for row in rows if row.generation > 0]
    results = []
    for part in (drawn, children):
        best = max(part, key=lambda row: (row.accuracy, -row.loss))
        error = (best.accuracy * (100 - best.accuracy) / 5000) ** 0.5
        results.append(f"{best.accuracy:.2f}% ±{error:.2f}")
        assert f"{results[-1]} | {best.flops_m:.1f}M, {best.params_m:.2f}M" in DETAILS
    middle = f"median {median(row.accuracy for row in drawn):.2f}%"
    assert f": {len(drawn):,} random" in README and f"{middle}, best {results[0]}" in README


def test_ci_runs_the_readmes_test_command():
    command = re.search(r"^.*-m pytest -n .*$", README, re.MULTILINE)[0]
    assert f"\n{command}\n" in (ROOT / ".ci" / "run").read_text()


def test_every_flag_has_a_help_text_with_its_default():
    for parser in PARSERS.values():
        text = " ".join(parser.format_help().split())
        flags = [action for action in parser._actions if action.dest != "help"]
        assert all(f"{flag.help} (default: {flag.default})" in text for flag in flags)


def test_the_quick_start_runs(tmp_path):
    """With one epoch of 8-pixel images and 6 paths."""
    quick = README.split("## Quick start")[1]
    train, search = (re.search(rf"{name} .*", quick)[0].removesuffix(" &&") for name in PARSERS)
    assert "--num_paths 100" in search and "--dataset digits" in train
    for command in (f"{train} --epochs 1 --image_size 8", search.replace("100", "6")):
        script, *flags = shlex.split(command)
        result = python(tmp_path, ROOT / script, *flags)
        assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "runs/digits/search/histogram.png").stat().st_size > 1000


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
    """The modules of this repository, and matplotlib, that a file imports."""
    limited = {"blocks", "data", "img", "matplotlib", "model", "random_search", "supernet", "utils"}
    for file in files.split():
        text = (ROOT / file).read_text(encoding="utf-8")
        imported = set(re.findall(r"^ *(?:from|import) (\w+)", text, re.MULTILINE))
        assert imported & limited <= set(allowed.split()), file


def test_importing_the_scripts_does_nothing(tmp_path):
    """Whatever the program's own arguments are (pytorch/pytorch#5858)."""
    code = "import sys; sys.argv = ['x', '--foreign']; import supernet, random_search"
    result = python(tmp_path, "-c", code, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_users_mistake_is_one_line_and_exit_code_1(tmp_path):
    result = python(tmp_path, ROOT / "supernet.py", "--choice", "1-2", "--dataset", "digits")
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch("error: .*\n", result.stderr)
    assert not list(tmp_path.iterdir())
