"""Commands that pages, docstrings and recipes show: the scripts accept every one, and every flag explains itself."""

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import convert_keypoints
import measure_generated
import pytest

import make_dataset
import sample
import train
import video
from hoi.export import __main__ as export
from hoi.metrics import __main__ as metrics
from hoi.metrics import pose_network
from hoi.page import __main__ as page
from hoi.verify import __main__ as verify
from hoi.weights import __main__ as weights
from hoi.weights.load import BUILT_IN_MODEL

ROOT = Path(__file__).parent.parent
SCRIPTS = {"sample.py": sample, "make_dataset.py": make_dataset, "train.py": train, "video.py": video}
MODULES = SCRIPTS | {"hoi.verify": verify, "hoi.metrics": metrics, "hoi.export": export, "hoi.page": page}
MODULES |= {"tools/measure_generated.py": measure_generated, "hoi.metrics.pose_network": pose_network}
COMMAND_LINES = {script: module.parse_args for script, module in SCRIPTS.items()} | {
    "tools/convert_keypoints.py": convert_keypoints.parse_args,
    "tools/measure_generated.py": measure_generated.parse_args,
    "hoi/export/__main__.py": export.parse_args,
    "hoi/metrics/__main__.py": metrics.parse_args,
    "hoi/metrics/pose_network.py": pose_network.parse_args,
    "hoi/page/__main__.py": page.parse_args,
    "hoi/weights/__main__.py": weights.main,
    "hoi/verify/__main__.py": lambda: verify.parse_args([]),
}
COMMAND = re.compile(rf"\b(?:python|torchrun)\b.*?\b({'|'.join(map(re.escape, MODULES))})(?= |$)(.*)")


def commands_in(lines: list[str]) -> list[tuple[str, str]]:
    """(script, its flags) of every complete command; one with "..." in it is an outline."""
    found = [match.groups() for line in lines for part in line.split("&&") if (match := COMMAND.search(part))]
    return [(script, flags) for script, flags in found if "..." not in flags.partition("#")[0].split()]


def accepted(script: str, flags: str) -> None:
    """pytest shows the parser's message when the command is refused; --help ends with 0."""
    try:
        MODULES[script].parse_args(shlex.split(flags, comments=True))
    except SystemExit as end:
        assert end.code == 0, f"{script} refuses {flags}"


def page_commands() -> list[tuple[str, str]]:
    text = "\n\n".join(page.read_text() for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))))
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"```\w*\n.*?```", "", text, flags=re.DOTALL))
    mentioned = [command for command in commands_in(spans) if command[0] in SCRIPTS]  # of modules only the name
    return commands_in([line for block in blocks for line in block.splitlines()]) + mentioned


def docstring_commands() -> list[tuple[str, str]]:
    texts = [re.sub(r"\\\n\s*", "", module.__doc__) for module in SCRIPTS.values()]  # lines that end in \ go on
    return commands_in([line for text in texts for line in text.splitlines()])


def test_the_pages_show_commands_that_the_scripts_accept():
    commands = page_commands()
    assert len(commands) >= 25 and {script for script, _ in commands} == set(MODULES)
    for command in commands:
        accepted(*command)


def test_docstrings_show_commands_that_the_scripts_accept():
    commands = docstring_commands()
    assert len(commands) >= 20 and set(SCRIPTS) <= {script for script, _ in commands}
    for command in commands:
        accepted(*command)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ("train_tiny.sh full", 8),
        ("train_tiny.sh hour", 8),
        ("evaluate_tiny.sh", 13),
        ("evaluate_tiny.sh {0} guidance", 7),
    ],
)
def test_recipes_run_commands_that_the_scripts_accept(tmp_path, recipe, expected):
    """python stands for a note of its arguments here, and what earlier runs left behind is not there."""
    shutil.copytree(ROOT / "tools", tmp_path / "tools")
    (tmp_path / "hoi").symlink_to(ROOT / "hoi")
    (tmp_path / "python").write_text(f'#!/bin/bash\nprintf " %q" "$@" >> {tmp_path}/log; echo >> {tmp_path}/log\n')
    (tmp_path / "python").chmod(0o755)
    script, *words = recipe.format(BUILT_IN_MODEL).split()
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    subprocess.run(["bash", tmp_path / "tools" / script, *words], env=environment, check=True, capture_output=True)
    noted = [f"python{line}" for line in (tmp_path / "log").read_text().splitlines()]
    commands = commands_in(noted)
    assert len(commands) == expected, "\n".join(noted)
    for command in commands:
        accepted(*command)


def all_actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """Flags and positional arguments, those of subcommands too, and the subcommands."""
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            found += [*action._choices_actions, *(a for sub in action.choices.values() for a in all_actions(sub))]
        else:
            found.append(action)
    return found


@pytest.mark.parametrize("command", COMMAND_LINES)
def test_every_flag_has_a_help_text(command, monkeypatch):
    parsers = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, *_: parsers.append(self) or sys.exit())
    with pytest.raises(SystemExit):
        COMMAND_LINES[command]()
    actions = all_actions(parsers[0])
    assert len(actions) > (15 if command in SCRIPTS else 1)
    assert [action.option_strings or action.dest for action in actions if not action.help] == []


def test_every_command_line_is_looked_at():
    paths = [
        *ROOT.glob("*.py"),
        *(ROOT / "hoi").rglob("*.py"),
        *(ROOT / "tools" / name for name in ("convert_keypoints.py", "measure_generated.py")),
    ]
    with_parser = {str(path.relative_to(ROOT)) for path in paths if "ArgumentParser(" in path.read_text()}
    assert with_parser == set(COMMAND_LINES)


@pytest.mark.parametrize("module", ["sample", "video", "train", "make_dataset", "hoi.verify.__main__"])
def test_threads_are_told_to_sleep_before_torch_is_imported(module):
    code = (
        "import importlib.abc, os, sys\n"
        "class Stop(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'torch': sys.exit(os.environ.get('OMP_WAIT_POLICY'))\n"
        f"sys.meta_path.insert(0, Stop())\nimport {module}"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stderr.strip() == "passive"


def test_a_log_file_gets_a_progress_line_now_and_then_not_one_a_step():
    code = (
        "import hoi\nfrom tqdm import tqdm\n"
        "with tqdm(total=3) as bar:\n"
        "    for step in range(3000):\n"
        "        bar.set_postfix_str(f'step {step}', refresh=False); bar.update(step % 1000 == 999)\n"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TQDM_")}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.stderr.count("it/s") == 2 and "3/3" in ended.stderr  # the first and the last
