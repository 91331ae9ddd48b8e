"""docs/lesson.md: its code is the code that runs, and its pictures are made."""

import re
import sys
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "lesson.md").read_text()


def test_each_quoted_piece_of_code_stands_in_the_file_that_is_named():
    pieces = re.findall(r"`([\w/]+\.py)`[^`]*\n```python\n(.*?)```", TEXT, re.DOTALL)
    assert len(pieces) == TEXT.count("```python") == 8
    for name, code in pieces:
        assert code in (ROOT / name).read_text(), f"{name} has no longer:\n{code}"


def test_every_picture_of_the_lesson_is_there_and_small():
    names = re.findall(r"\]\((lesson/\S+\.png)\)", TEXT)
    assert len(names) == 8
    for name in names:
        path = ROOT / "docs" / name
        assert path.stat().st_size < 600_000
        with Image.open(path) as picture:
            assert picture.height > 190


@pytest.mark.slow
def test_the_command_makes_the_eight_pictures(tmp_path):
    sys.path.insert(0, str(ROOT / "tools"))
    import lesson

    lesson.main(["--out", str(tmp_path)])
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(p.name for p in (ROOT / "docs/lesson").iterdir())
