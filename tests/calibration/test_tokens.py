"""Made-up token ids: text by the tokenizer beside the model, or ids by Zipf's law; masks and segments agree with them."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from typer.testing import CliRunner

import spa
from spa.calibration import tokens
from spa.calibration.passages import Passage, passages, passages_of
from spa.calibration.synthetic import Synthesiser, synthesise
from spa.calibration.tokenisers import Corpus, find_tokenizer, tokenise
from spa.calibration.tokens import Text, zipf
from spa.cli import app
from spa.errors import PlanError, UnsupportedError

I64, F = TensorProto.INT64, TensorProto.FLOAT
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "ferry", "left", "harbour", "bread", "."]
ROWS = 1500


def language_model(mask: str = "attention_mask", segments: str = "token_type_ids", rows: int = ROWS) -> onnx.ModelProto:
    """A table of tokens, one of segments, a layer and a mean over the tokens that a mask leaves."""
    rng = np.random.default_rng(0)
    arrays = {
        "table": rng.standard_normal((rows, 16)),
        "kinds": rng.standard_normal((2, 16)),
        "w": rng.standard_normal((16, 32)) / 4,
        "v": rng.standard_normal((32, 8)) / 4,
    }
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["a"]),
        helper.make_node("Gather", ["kinds", segments], ["b"]),
        helper.make_node("Add", ["a", "b"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["h"]),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("MatMul", ["r", "v"], ["o"]),
        helper.make_node("Cast", [mask], ["m"], to=F),
        helper.make_node("Unsqueeze", ["m", "last"], ["u"]),
        helper.make_node("Mul", ["o", "u"], ["y"]),
    ]
    constants = [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
    constants.append(onnx.numpy_helper.from_array(np.array([2]), "last"))
    inputs = [helper.make_tensor_value_info(n, I64, ["batch", "seq"]) for n in ("input_ids", mask, segments)]
    outputs = [helper.make_tensor_value_info("y", F, ["batch", "seq", 8])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)


class Encoding:
    def __init__(self, ids, offsets):
        self.ids, self.offsets = ids, offsets


class Words:
    """A tokenizer as the package has it, of words between spaces."""

    def encode(self, text, add_special_tokens=True):
        offsets, end = [], 0
        for word in text.split():
            begin = text.index(word, end)
            end = begin + len(word)
            offsets.append((begin, end))
        ids = [WORDS.index(text[b:e]) if text[b:e] in WORDS else 1 for b, e in offsets]
        return Encoding([2, *ids, 3], [(0, 0), *offsets, (0, 0)]) if add_special_tokens else Encoding(ids, offsets)

    def token_to_id(self, token):
        return WORDS.index(token) if token in WORDS else None

    def get_vocab_size(self):
        return ROWS

    def no_padding(self):
        pass

    no_truncation = no_padding


@pytest.fixture
def words(monkeypatch):
    """Stands for the reader of tokenizers, which needs a package."""
    monkeypatch.setattr(tokens, "read_tokenizer", lambda path: Words())


def saved(folder: Path, model: onnx.ModelProto, tokenizer: Path | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    onnx.save(model, folder / "model.onnx")
    if tokenizer is not None:
        tokenizer.write_text("{}")
    return folder / "model.onnx"


# -- text ----------------------------------------------------------------------------------------------------------


def test_the_pages_that_come_with_the_package_are_of_many_languages_and_forms():
    found = passages()
    assert {"en", "de", "fr", "es", "zh", "ja", "ar", "hi"} <= {p.language for p in found if p.kind == "prose"}
    assert {"py", "html", "json", "csv"} <= {p.language for p in found if p.kind == "code"}
    assert 15_000 < sum(len(p.text.encode()) for p in found) < 32_000
    assert all(p.text and not p.text.startswith("%%") for p in found)


def test_sentences_begin_behind_marks_also_where_languages_have_no_spaces():
    english = Passage("prose", "en", "One day. Two! Three")
    assert [english.text[s:][:3] for s in english.starts] == ["One", "Two", "Thr"]
    chinese = Passage("prose", "zh", "今天下雨。我们走。")
    assert [chinese.text[s] for s in chinese.starts] == ["今", "我"]


def test_a_users_text_is_cut_at_empty_lines_or_else_at_lines():
    assert [p.text for p in passages_of("a\nb\n\n\nc\n")] == ["a\nb", "c"]
    assert [p.text for p in passages_of("a\r\nb\r\n")] == ["a", "b"]


def test_tokenised_passages_know_their_sentences_and_the_special_tokens():
    corpus = tokenise(Words(), [Passage("prose", "en", "ferry left . harbour bread"), Passage("prose", "en", "")])
    assert [list(ids) for ids in corpus.passages] == [[4, 5, 8, 6, 7]]
    assert [list(starts) for starts in corpus.starts] == [[0, 3]]
    assert (corpus.before, corpus.after, corpus.padding) == ((2,), (3,), 0)


class Letters(Words):
    """A tokenizer that cuts words that it does not know into letters."""

    def encode(self, text, add_special_tokens=True):
        offsets = []
        for begin, end in super().encode(text, add_special_tokens=False).offsets:
            known = text[begin:end] in WORDS
            offsets += [(begin, end)] if known else [(at, at + 1) for at in range(begin, end)]
        return Encoding([4] * len(offsets), offsets)


@pytest.mark.parametrize("tokenizer", [Words(), Letters()], ids=["unknown words", "words in pieces"])
def test_languages_that_the_tokenizer_does_not_know_are_left_out(tokenizer):
    english, french = Passage("prose", "en", "ferry left harbour ."), Passage("prose", "fr", "bateau parti port .")
    corpus = tokenise(tokenizer, [french, english, english])
    assert (corpus.languages, len(corpus.passages)) == (("en",), 2)
    assert len(tokenise(tokenizer, [french]).passages) == 1, "a user's text is kept"


def test_code_has_its_share_however_many_pieces_there_are():
    prose, code = Passage("prose", "en", "ferry left"), Passage("code", "py", "bread bread")
    corpus = tokenise(Words(), [prose, code, code, code])
    assert corpus.weights is not None and np.allclose(corpus.weights, [0.75, *[0.25 / 3] * 3])
    for alone in (prose, code):
        assert np.allclose(tokenise(Words(), [alone, alone]).weights, 0.5)


# -- ids, masks, segments ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["attention_mask", "input.4"], ids=["by name", "as what indexes nothing"])
@pytest.mark.parametrize("segments", ["token_type_ids", "input.7"], ids=["by name", "by its table"])
def test_masks_are_ones_up_to_the_end_of_the_text_and_segments_are_zero(mask, segments):
    corpus = Corpus((np.arange(4, 9),), (np.array([0, 3]),), (2,), (3,), padding=1)
    feeds = synthesise(language_model(mask, segments), 64, text=Text(corpus))[0]
    ids, ones = feeds["input_ids"], feeds[mask]
    assert ids.shape == (64, 128)
    lengths = ones.sum(axis=1)
    assert (ones == (np.arange(128) < lengths[:, None])).all()
    assert lengths.min() >= 64 and 0.5 < (lengths == 128).mean() < 1
    assert not feeds[segments].any()
    assert (ids[:, 0] == 2).all() and (ids[np.arange(64), lengths - 1] == 3).all()
    assert (ids[ones == 0] == 1).all() and not (ids[ones == 1] == 1).any()


def test_text_follows_itself_sentence_by_sentence():
    corpus = Corpus((np.arange(100, 200), np.arange(200, 300)), (np.array([0, 50]), np.array([0])))
    row = synthesise(language_model(), 1, text=Text(corpus))[0]["input_ids"][0]
    assert (np.diff(row) == 1).mean() > 0.9
    assert {int(row[0])} | {int(b) for a, b in pairwise(row) if b and b != a + 1} <= {100, 150, 200}


def test_without_a_tokenizer_ids_are_as_frequent_as_words_and_texts_repeat_their_own():
    ids = zipf(30_000, (200, 128), np.random.default_rng(0))
    counts = np.bincount(ids.ravel(), minlength=30_000)
    assert 0.02 < counts[0] / ids.size < 0.06  # 'the' is a twentieth of English
    assert ids.max() > 20_000
    rare = ids[:, 64:] > 1000
    repeated = (ids[:, 64:, None] == ids[:, None, :64]).any(axis=2)
    assert repeated[rare].mean() > 0.1  # by chance a twentieth of that
    feeds = synthesise(language_model(), 32)[0]
    assert np.median(feeds["input_ids"][feeds["attention_mask"] == 1]) < 300


@pytest.mark.parametrize("rows", [999, 512])
def test_small_tables_are_no_vocabularies(rows):
    ids = synthesise(language_model(rows=rows), 16)[0]["input_ids"]
    assert abs(float(ids.mean()) / rows - 0.5) < 0.1


def test_the_same_seed_gives_the_same_text_and_another_one_another():
    first, again, other = (synthesise(language_model(), 4, seed=s)[0]["input_ids"] for s in (0, 0, 1))
    assert (first == again).all() and (first != other).any()


# -- the tokenizer -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [".", ".."], ids=["beside the model", "in the folder above"])
def test_the_tokenizer_is_found(tmp_path, place, words):
    folder = tmp_path / "onnx"
    path = saved(folder, language_model())
    assert find_tokenizer(folder) is None
    (folder / place / "tokenizer.json").write_text("{}")
    found = find_tokenizer(folder)
    assert found is not None and found.name == "tokenizer.json"
    result = spa.prune(path, ratio=0.3, samples=8)
    assert any("tokenised with" in note and "input_ids" in note for note in result.report.notes)


def test_without_a_tokenizer_the_report_says_what_ids_are(tmp_path):
    result = spa.prune(saved(tmp_path, language_model()), ratio=0.3, samples=8)
    assert any("Zipf" in note and "no tokenizer" in note for note in result.report.notes)


def test_a_tokenizer_that_cannot_be_read_without_its_package_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    path = saved(tmp_path, language_model(), tmp_path / "tokenizer.json")
    result = spa.prune(path, ratio=0.3, samples=8)
    assert any("Zipf" in note and "pip install 'spa-onnx[text]'" in note for note in result.report.notes)
    with pytest.raises(UnsupportedError, match=r"spa-onnx\[text\]"):
        spa.prune(path, ratio=0.3, samples=8, tokenizer=tmp_path)


def test_a_tokenizer_of_another_vocabulary_is_refused_where_it_is_given_and_left_where_it_lies(tmp_path, words):
    path = saved(tmp_path, language_model(rows=4 * ROWS), tmp_path / "tokenizer.json")
    with pytest.raises(PlanError, match="knows 1500 tokens, input 'input_ids' of the model 6000"):
        spa.prune(path, ratio=0.3, samples=8, tokenizer=tmp_path / "tokenizer.json")
    assert any("Zipf" in note for note in spa.prune(path, ratio=0.3, samples=8).report.notes)


def test_ids_beyond_the_table_are_refused(monkeypatch):
    monkeypatch.setattr(tokens, "read_tokenizer", lambda path: Words())
    monkeypatch.setattr(Words, "encode", lambda self, text, add_special_tokens=True: Encoding([ROWS], [(0, 1)]))
    with pytest.raises(PlanError, match="makes id 1500, input 'input_ids' of the model has ids below 1500"):
        Synthesiser(language_model()).text(tokenizer="tokenizer.json")


def test_text_and_tokenizer_are_taken_from_the_command_line(tmp_path, words):
    path = saved(tmp_path, language_model())
    text = tmp_path / "mine.txt"
    text.write_text("bread bread bread")
    args = ["prune", str(path), "-o", str(tmp_path / "o.onnx"), "--ratio", "0.3", "--samples", "8", "--text", str(text)]
    shown = CliRunner().invoke(app, [*args, "--tokenizer", str(path)])
    assert shown.exit_code == 0, shown.output
    assert "mine.txt" in "".join(shown.output.split())
    refused = CliRunner().invoke(app, args)
    assert isinstance(refused.exception, PlanError) and "Give --tokenizer" in str(refused.exception)


@pytest.mark.parametrize("option", ["text", "tokenizer", "domain"])
def test_options_of_made_up_inputs_are_refused_beside_data(option, tmp_path):
    data = {n: np.ones((4, 128), np.int64) for n in ("input_ids", "attention_mask", "token_type_ids")}
    with pytest.raises(PlanError, match=f"data and {option} are given together"):
        spa.prune(language_model(), ratio=0.3, data=data, **{option: "photo" if option == "domain" else tmp_path / "a"})


@pytest.mark.parametrize("option", ["text", "tokenizer"])
def test_options_of_text_are_refused_where_no_input_holds_ids(option, tmp_path):
    with pytest.raises(PlanError, match=f"{option}: no input of the model holds token ids"):
        spa.prune("models/digits_resnet.onnx", ratio=0.3, samples=8, **{option: tmp_path / "a"})


def test_real_tokenizers_are_read(tmp_path):
    package = pytest.importorskip("tokenizers")
    tokenizer = package.Tokenizer(package.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = package.pre_tokenizers.Whitespace()
    tokenizer.post_processor = package.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.enable_padding(length=50)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    for name in ("tokenizer.json", "vocab.txt"):
        corpus = tokenise(tokens.read_tokenizer(tmp_path / name), [Passage("prose", "en", "ferry left. harbour bread")])
        assert list(corpus.passages[0]) == [4, 5, 8, 6, 7]
        assert list(corpus.starts[0]) == [0, 3]
        assert (corpus.before, corpus.after, corpus.padding) == ((2,), (3,), 0)


# -- lengths ----------------------------------------------------------------------------------------------


def reader(length: int | str) -> onnx.ModelProto:
    """Ids and a mask of one length, which the model adds up."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["a"]),
        helper.make_node("Unsqueeze", ["mask", "last"], ["b"]),
        helper.make_node("Mul", ["a", "b"], ["y"]),
    ]
    tensors = {"table": np.ones((2000, 3), np.float32), "last": np.array([2])}
    inputs = [helper.make_tensor_value_info("ids", TensorProto.INT64, ["batch", length])]
    inputs += [helper.make_tensor_value_info("mask", TensorProto.FLOAT, ["batch", length])]
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weights = [onnx.numpy_helper.from_array(a, n) for n, a in tensors.items()]
    graph = helper.make_graph(nodes, "g", inputs, [output], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.mark.parametrize("sizes", [None, {"ids[1]": 128, "mask[1]": 128}])
def test_mixed_lengths_differ_from_batch_to_batch(sizes: dict[str, int] | None) -> None:
    maker = Synthesiser(reader("sequence"), sizes=sizes, mixed=True)
    batches = maker.batches(26, batch=5)
    assert [b["ids"].shape for b in batches] == [(5, 128), (5, 96), (5, 64), (5, 112), (5, 80), (1, 128)]
    assert all(b["ids"].shape == b["mask"].shape for b in batches)
    assert any("differ in length" in note for note in maker.notes)
    assert len({b["ids"].shape[1] for b in maker.batches(10)}) == 5
    assert {b["ids"].shape[1] for b in Synthesiser(reader("sequence")).batches(26, batch=5)} == {128}


@pytest.mark.parametrize("sizes", [None, {"ids[1]": 40, "mask[1]": 40}])
def test_lengths_that_are_fixed_or_short_are_not_mixed(sizes: dict[str, int] | None) -> None:
    maker = Synthesiser(reader("sequence" if sizes else 100), sizes=sizes, mixed=True)
    assert {b["ids"].shape[1] for b in maker.batches(10, batch=5)} == {40 if sizes else 100}
    assert not any("differ in length" in note for note in maker.notes)


def test_lengths_that_the_model_refuses_are_not_mixed() -> None:
    model = reader("sequence")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1, 128, 3]), "shape"))
    model.graph.node.append(helper.make_node("Reshape", ["y", "shape"], ["z"]))
    model.graph.output[0].name = "z"
    maker = Synthesiser(model, mixed=True)
    assert {b["ids"].shape[1] for b in maker.batches(15, batch=5)} == {128}
