"""tools/blind_sheets.py: every listed picture once, unnamed and shuffled; counts come back to their folders."""

import csv

import blind_sheets
import numpy as np
import pytest
from verifier_world import make_folder

from hoi.common.files import read_json


def test_counts_by_number_come_back_to_their_folders(tmp_path, capsys):
    folders = {name: make_folder(tmp_path / name, 6, seed=k) for k, name in enumerate(("truth", "old"))}
    out = tmp_path / "sheets"
    blind_sheets.make_sheets([0, 2, 5], folders, out, seed=0)
    key = read_json(out / "key.json", "key", kind=list)
    assert sorted(map(tuple, key)) == sorted((name, index) for name in folders for index in (0, 2, 5))
    assert [name for name, _ in key] != sorted(name for name, _ in key) and (out / "sheet_00.png").is_file()
    with open(out / "counts.csv", newline="") as stream:
        rows = list(csv.DictReader(stream))
    for path, right in ((tmp_path / "a.csv", "truth"), (tmp_path / "b.csv", "")):
        with open(path, "w", newline="") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(
                {**row, "part": int(key[int(row["number"])][0] == right), "fingers": 1} for row in rows[::-1]
            )
    blind_sheets.tell(key, [tmp_path / "a.csv", tmp_path / "b.csv"])
    printed = capsys.readouterr().out
    assert "| a | truth | 3 | 3 | 3 |" in printed and "| a | old | 3 | 0 | 3 |" in printed
    assert "| b agrees with a | all | 6 | 0.500 | 1.000 |" in printed
    with pytest.raises(ValueError, match="counts.csv number 0: .* expected 0 or 1 in part, fingers"):
        blind_sheets.read_counts(out / "counts.csv", 6)
    with pytest.raises(ValueError, match="has 6 rows, expected the numbers 0 to 6"):
        blind_sheets.read_counts(tmp_path / "a.csv", 7)
    assert np.array_equal(blind_sheets.read_counts(tmp_path / "b.csv", 6), np.tile([0, 1], (6, 1)))
