"""tools/evaluation_folders.py: conditions of one record under the words, or the text, of another."""

import evaluation_folders
from verifier_world import make_folder

from hoi.data.folder import load_label_map, read_records


def test_each_text_is_shown_the_conditions_of_the_next_record(tmp_path):
    shaded, out = make_folder(tmp_path / "shaded", 3), tmp_path / "skeletons"
    evaluation_folders.make_folder("skeletons", shaded, out)
    evaluation_folders.make_folder("skeletons", shaded, out)  # again: nothing is left to do
    records, shown = read_records(shaded), read_records(out)
    assert [record["text"] for record in shown] == [record["text"] for record in records]
    for k, record in enumerate(shown):
        assert (load_label_map(out, record) == load_label_map(shaded, records[(k + 1) % 3])).all()


def test_every_colour_meets_every_material():
    words = [evaluation_folders.words_of("materials", k, "A mug on the beach")[0] for k in range(208)]
    pairs = {(each["color"], each["material"]) for each in words}
    colors, materials = ({pair[k] for pair in pairs} for k in (0, 1))
    assert len(pairs) == len(colors) * len(materials) and materials == {"metallic", "striped", "marble"}
