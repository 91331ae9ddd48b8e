"""Captions of photographs.  Dataset folder + caption file, or a vision-language model -> texts.  Paper: Sec. 4 (LLaVA).

What is captioned are the crops in images/, never whole frames: a caption should name what the network will see.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from hoi.common.files import JsonLines, parse_json, read_csv, read_text
from hoi.data.folder import load_image, read_records
from hoi.data.writer import write_records

# The paper asks its model in seven ways, three to fill in and four to describe, so that captions differ in form; these
# are the same questions in our words.  {object} is the noun.
CAPTION_FORMS = (
    'Fill in the brackets to suit the picture and answer with the finished sentence only: "A hand is grasping a '
    '[color] {object} [background]."',
    'Fill in the brackets to suit the picture and answer with the finished sentence only: "A hand grasps a [texture] '
    '{object} [background]."',
    'Fill in the brackets to suit the picture and answer with the finished sentence only: "This picture shows a hand '
    'that holds a [color] {object} [background]."',
    "In one short sentence, say what kind of {object} the hand is grasping and what surrounds it.",
    "In one short sentence, say which {object} the hand is holding and where this takes place.",
    "In one short sentence, say what the {object} in the hand is made of and what the surroundings are.",
    "In one short sentence, say the color and the texture of the {object} in the hand and what is behind it.",
)
# What programs that caption pictures call the two, ours and the authors' CSV among them.
CAPTION_COLUMNS = ("text", "caption", "sentence")
KEY_COLUMNS = ("image", "file_name", "picture", "path")
CAPTION_FILE = "captions.jsonl"


def read_captions(path: str | Path) -> dict[str, str]:
    """Captions by picture from a .csv or .jsonl file, as vision-language models write them.

    A CSV has a header with one of KEY_COLUMNS and one of CAPTION_COLUMNS, or no header and two columns; a JSONL file
    has objects with such keys.  A later caption of a picture replaces an earlier one.
    Raises FileNotFoundError, or ValueError naming the line that does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no caption file at {path}")
    captions = {}
    for number, row in _jsonl_rows(path) if path.suffix == ".jsonl" else _csv_rows(path):
        key, text = (next((row[name] for name in names if row.get(name) is not None), None)
                     for names in (KEY_COLUMNS, CAPTION_COLUMNS))  # fmt: skip
        if not (isinstance(key, str) and isinstance(text, str) and key and text.strip()):
            raise ValueError(f"{path} line {number}: expected a picture ({', '.join(KEY_COLUMNS)}) and a caption "
                             f"({', '.join(CAPTION_COLUMNS)}), got {key!r:.80} and {text!r:.80}")  # fmt: skip
        captions[key] = " ".join(text.split())
    if not captions:
        raise ValueError(f"{path} holds no caption")
    return captions


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and objects; anything else counts as an empty one."""
    # Not read_json_lines: a file of other origin may end without a line break, and its last line counts.
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path} line {number} is not JSON ({error})") from error
            yield number, row if isinstance(row, dict) else {}


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line numbers and columns."""
    header: list[str] | None = None
    for number, row in read_csv(path):
        if header is None:
            named = set(row) & set(KEY_COLUMNS) and set(row) & set(CAPTION_COLUMNS)
            header = row if named else [KEY_COLUMNS[0], CAPTION_COLUMNS[0]]
            if named:
                continue
        if row and row != header:  # a header that repeats is a second run's
            yield number, dict(zip(header, row, strict=False))


def apply_captions(folder: str | Path, captions: dict[str, str]) -> tuple[int, int]:
    """Put captions in place of the texts of a folder's records; how many got one, how many did not.

    Pictures may be named by any path that ends in images/000000.png, as a model run over the folder names them, by the
    picture's name with or without .png, or by the frame of the source.
    """
    records = read_records(folder)
    wanted = {record["file_name"] for record in records}
    short = {}
    for key, text in captions.items():  # of a long path its end, where that names a picture of the folder
        ending = "/".join(Path(key).parts[-2:])
        short[ending if ending in wanted else key] = text
    found = 0  # records without a caption keep their text: a model may have seen a part of the folder
    for record in records:
        path = record["file_name"] or ""
        names = (path, Path(path).name, Path(path).stem, record.get("source_frame") or "")
        if name := next((name for name in names if name in short), None):
            record["text"], found = short[name], found + 1
    write_records(folder, records)
    return found, len(records) - found


class Captioner:
    """A LLaVA network of the optional package transformers that describes a crop.

    model           folder of a saved LlavaForConditionalGeneration with its processor, or a name at the hub such as
                    "llava-hf/llava-1.5-7b-hf" (14 GB)
    device, dtype   see choose_device and fast_dtype; a name of torch's, such as "float16"
    max_new_tokens  words stop after so many; the paper allows 512, one sentence needs few
    The answer is the likeliest one.  The paper draws it at temperature 0.2, which is close and not repeatable.
    Raises ValueError when the package is missing or the model cannot be loaded.
    """

    def __init__(self, model: str, device: str = "cpu", dtype: str = "float32", max_new_tokens: int = 64) -> None:
        try:
            from transformers import AutoProcessor, LlavaForConditionalGeneration
        except ImportError as error:
            raise ValueError("the captioner needs the package transformers: pip install transformers") from error
        try:
            self.processor = AutoProcessor.from_pretrained(model)
            self.network = LlavaForConditionalGeneration.from_pretrained(model, dtype=dtype).to(device).eval()
        except (OSError, ValueError) as error:
            raise ValueError(f"no LLaVA model could be loaded from {model!r} ({error})") from error
        self.max_new_tokens = max_new_tokens
        self.processor.tokenizer.padding_side = "left"  # so that every answer begins where its question ends

    def __call__(self, images: Sequence[np.ndarray], instructions: Sequence[str]) -> list[str]:
        """Pictures (H, W, 3) uint8 with a question each -> the answers, one line each."""
        import torch

        # The conversation that LLaVA 1.5 was trained on.
        prompts = [f"USER: <image>\n{instruction} ASSISTANT:" for instruction in instructions]
        pictures = [Image.fromarray(image) for image in images]
        inputs = self.processor(images=pictures, text=prompts, padding=True, return_tensors="pt")
        inputs = inputs.to(self.network.device, self.network.dtype)
        with torch.inference_mode():
            output = self.network.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answers = self.processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return [" ".join(answer.split()) for answer in answers]


def caption_folder(folder: str | Path, captioner: Captioner, seed: int, batch_size: int = 1) -> None:
    """Describe every picture of a folder that shows an object, some at once, into its captions.jsonl, a line each; a
    run that was interrupted continues.
    """
    path = Path(folder) / CAPTION_FILE
    lines = JsonLines(path)
    known = read_captions(path) if path.exists() and path.stat().st_size else {}
    todo = [record for record in read_records(folder)
            if record["segmentation_file_name"] is not None and record["file_name"] not in known]  # fmt: skip
    for start in tqdm(range(0, len(todo), batch_size), "captions", unit="batch"):
        few = todo[start : start + batch_size]
        asked = [instruction_for(record, seed) for record in few]
        texts = captioner([load_image(folder, record) for record in few], asked)
        for record, text, instruction in zip(few, texts, asked, strict=True):
            # An empty answer would be no caption: the record's own text stays.
            lines.append({"file_name": record["file_name"], "text": text or record["text"], "instruction": instruction})


def instruction_for(record: dict[str, Any], seed: int) -> str:
    """One of CAPTION_FORMS for a record; the choice depends on (seed, index) alone."""
    # By index and not by a generator that runs along, so that a continued run asks the same.
    form = np.random.default_rng([seed, record["index"]]).integers(len(CAPTION_FORMS))
    return CAPTION_FORMS[form].replace("{object}", record.get("category") or "object")
