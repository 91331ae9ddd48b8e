"""Captions of photographs: files by picture, the seven questions, and a tiny network that answers them."""

import json

import numpy as np
import pytest
import torch._dynamo  # noqa: F401 - transformers loads it; it must come before GL's driver, see FrameConverter
from PIL import Image

from hoi.conditions import Conditions
from hoi.data.folder import read_records
from hoi.data.writer import DatasetWriter, write_pictures
from hoi.sources.captions import (
    CAPTION_FORMS,
    Captioner,
    apply_captions,
    caption_folder,
    instruction_for,
    read_captions,
)


@pytest.fixture
def folder(tmp_path):
    """Three crops with template texts and one scenery."""
    writer = DatasetWriter(tmp_path / "data", {})
    for k in range(4):
        record = {"text": "A hand is grasping a mug", "category": "mug", "source_frame": f"S/{k:04d}"}
        image = np.full((28, 28, 3), 60 * k, dtype=np.uint8)
        conditions = Conditions(*np.zeros((3, 28, 28, 3), dtype=np.uint8)) if k < 3 else None
        writer.append(write_pictures(tmp_path / "data", k, record, image, conditions))
    writer.finish(grid=False)
    return tmp_path / "data"


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", 'images/000000.png,"A pink mug, by a wall"\n/far/away/data/images/000001.png,A tin mug\n'),
    ("b.csv", "image,caption\n000000.png,\"A pink mug,\n by a wall\"\nimage,caption\nS/0001,A tin mug\n"),
    ("c.jsonl", '{"file_name": "images/000000.png", "text": "A pink mug, by a wall"}\n\n'
                '{"image": "S/0001", "caption": "old"}\n{"image": "S/0001", "caption": "A tin mug"}\n'),
])  # fmt: skip
def test_caption_files_of_every_kind_replace_the_template(name, text, folder, tmp_path):
    (tmp_path / name).write_text(text)
    assert apply_captions(folder, read_captions(tmp_path / name)) == (2, 2)
    texts = [record["text"] for record in read_records(folder)]
    assert texts == ["A pink mug, by a wall", "A tin mug", *["A hand is grasping a mug"] * 2]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("a.jsonl", '{"image": "x.png"}\n', "line 1: expected a picture .* and a caption .*, got 'x.png' and None"),
    ("a.jsonl", "{\n", "line 1 is not JSON"),
    ("a.csv", "x.png\n", "line 1: expected a picture"),
    ("a.csv", "", "holds no caption"),
])  # fmt: skip
def test_a_caption_file_that_does_not_fit_is_refused_with_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_captions(tmp_path / name)


def test_there_are_three_forms_to_fill_in_and_four_to_describe_and_each_is_used():
    assert len(set(CAPTION_FORMS)) == 7 and all("{object}" in form for form in CAPTION_FORMS)
    assert sum("[" in form for form in CAPTION_FORMS) == 3
    asked = {instruction_for({"index": k, "category": "tuna can"}, 0) for k in range(60)}
    assert len(asked) == 7 and all("tuna can" in question for question in asked)


class Interrupted(Exception):
    pass


def test_an_interrupted_captioner_continues_and_names_what_it_asked(folder):
    calls = []

    def describe(images, instructions):
        if len(calls) == 1:
            calls.append(None)
            raise Interrupted
        assert len(images) == len(instructions)
        calls.append([int(image[0, 0, 0]) for image in images])
        return [f"A mug of grey {image[0, 0, 0]}" for image in images]

    with pytest.raises(Interrupted):
        caption_folder(folder, describe, seed=0, batch_size=2)
    with open(folder / "captions.jsonl", "a") as stream:
        stream.write('{"file_name": "images/0000')  # a line cut short
    caption_folder(folder, describe, seed=0, batch_size=2)
    assert calls == [[0, 60], None, [120]]  # each crop once, never the scenery
    lines = [json.loads(line) for line in (folder / "captions.jsonl").read_text().splitlines()]
    assert [line["instruction"] for line in lines] == [instruction_for(r, 0) for r in read_records(folder)[:3]]
    assert apply_captions(folder, read_captions(folder / "captions.jsonl")) == (3, 1)
    assert read_records(folder)[2]["text"] == "A mug of grey 120"


def tiny_llava(folder):
    """A randomly initialised LLaVA with a processor of a few words, saved as transformers saves them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    words = ["<unk>", "<s>", "</s>", "<image>", "USER", ":", "ASSISTANT", "a", "hand", "mug", "red", "on", "table"]
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<unk>", additional_special_tokens=["<image>"])  # fmt: skip
    pictures = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor = LlavaProcessor(pictures, fast, patch_size=14, vision_feature_select_strategy="default",
                               image_token="<image>", num_additional_image_tokens=1)  # fmt: skip
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlavaConfig(vision_config=CLIPVisionConfig(image_size=28, patch_size=14, **small),
                         text_config=LlamaConfig(vocab_size=len(words), **small), image_token_id=3)  # fmt: skip
    torch.manual_seed(0)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return set(words)


def test_a_saved_llava_describes_a_picture_alike_alone_and_beside_others(tmp_path):
    pytest.importorskip("transformers")
    words = tiny_llava(tmp_path)
    captioner = Captioner(str(tmp_path), max_new_tokens=6)
    pictures = [np.asarray(Image.effect_noise((60, 40), 90).convert("RGB")), np.zeros((40, 60, 3), dtype=np.uint8)]
    asked = ["a red mug on a table", "a hand"]  # questions of two lengths
    answers, alone = captioner(pictures, asked), [captioner(pictures[k : k + 1], asked[k : k + 1])[0] for k in (0, 1)]
    assert answers == alone and set(answers[0].split()) <= words
    assert "USER" not in answers[0] or "ASSISTANT" not in answers[0]  # the question is not part of the answer
    with pytest.raises(ValueError, match="no LLaVA model could be loaded from '.*nowhere'"):
        Captioner(str(tmp_path / "nowhere"))
