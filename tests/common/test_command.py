"""hoi/common/command.py: what users cause is told in one line, bugs are not hidden."""

import argparse
import os
import shlex
import signal
import sys
import time
from importlib.metadata import version

import pytest
import torch

import hoi.metrics.__main__ as metrics
import hoi.verify.__main__ as verify
from hoi.common.command import first_few, how_made, positive, problems_as_messages
from hoi.metrics import pose_network


@pytest.mark.parametrize(
    ("problem", "message"),
    [
        (ValueError("mug.stl has no faces"), "make.py: mug.stl has no faces"),
        (FileNotFoundError("mug.stl is missing"), "make.py: mug.stl is missing"),
        (MemoryError(), "make.py: out of memory; smaller batches or fewer --workers need less"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to\nallocate"),
         "make.py: out of memory (CUDA out of memory. Tried to); smaller batches or fewer --workers need less"),
        (KeyboardInterrupt(), "the same command continues"),
        (SystemExit("told already"), "told already"),
    ],
)
def test_problems_of_users_become_the_exit_message(problem, message):
    with pytest.raises(SystemExit) as stopped, problems_as_messages("make.py", "the same command continues"):
        raise problem
    assert stopped.value.code == message  # a text as code: Python prints it and exits with 1


def test_bugs_keep_their_traceback():
    with pytest.raises(KeyError, match="a bug"), problems_as_messages("make.py", ""):
        raise KeyError("a bug")


def test_kill_stops_as_orderly_as_ctrl_c_and_only_within_the_block():
    before = signal.getsignal(signal.SIGTERM)
    words = "the same command continues"
    with pytest.raises(SystemExit, match=words), problems_as_messages("", words):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)  # the handler may run a little later
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_command_that_a_folder_names_can_be_pasted_into_a_shell(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--prompt", "a mug; rm -r $HOME"])
    made = how_made("sample.py")
    assert shlex.split(made["command"]) == ["python", "sample.py", "--prompt", "a mug; rm -r $HOME"]
    assert made["made_by"] == "sample.py" and made["versions"]["numpy"] == version("numpy")


def test_only_whole_numbers_from_1_on_are_positive():
    assert positive("12") == 12
    for word in ("0", "-1", "1.5", "two", ""):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a positive whole number"):
            positive(word)


def test_of_many_the_first_few_are_named_and_the_others_counted():
    assert first_few("abc") == "a, b, c" and first_few("abcdefg") == "a, b, c, d, e and 2 more"
    assert first_few(["x", "y", "z"], most=2, joint="; ") == "x; y; and 1 more" and first_few([]) == ""


@pytest.mark.parametrize(
    ("parse_args", "words"),
    [
        (pose_network.parse_args, "train --data DIR --out"), (pose_network.parse_args, "predict --data DIR --out"),
        (verify.parse_args, "train --data DIR --out"), (verify.parse_args, "DIR --keep pck>60% --list"),
        (metrics.parse_args, "--real DIR --inception FILE --save-statistics"),
    ],
)  # fmt: skip
def test_a_folder_in_the_place_of_a_file_to_write_is_refused_before_the_work(parse_args, words, tmp_path, capsys):
    with pytest.raises(SystemExit):
        parse_args([*words.split(), str(tmp_path)])
    assert f"argument {words.split()[-1]}: {tmp_path} is a folder, expected a file to write" in capsys.readouterr().err
