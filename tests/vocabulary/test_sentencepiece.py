"""`tokenizer.model` after growth, read by the official format's own classes and cut by SentencePiece's own rule."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.utils import sentencepiece_model_pb2_new as protobuf

from builders import pico, upcycle
from greek import ENGLISH, GREEK
from peft_moe_delta import extend_vocabulary, propose_tokens
from peft_moe_delta.graft.side_files import write_side_files
from peft_moe_delta.vocabulary import TokenizerGrowth, save_tokenizer
from peft_moe_delta.vocabulary.sentencepiece import CONTROL, NORMAL, USER_DEFINED

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@pytest.fixture
def folder(tmp_path):
    """A tokenizer after Llama 2's with the file that it was converted from."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁")
    trained.train_from_iterator(ENGLISH, trainers.BpeTrainer(vocab_size=60, show_progress=False))
    spec = json.loads(trained.to_str())["model"]
    merges = [tuple(merge) for merge in spec["merges"]]
    joined = ["".join(merge) for merge in merges]
    letters = [token for token in spec["vocab"] if token not in joined]
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *joined, *letters]
    backend = Tokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<chat>"]})
    tokenizer.save_pretrained(tmp_path / "source")
    proto = protobuf.ModelProto()
    proto.trainer_spec.model_type, proto.trainer_spec.vocab_size = proto.trainer_spec.BPE, len(tokens)
    kinds = {"<unk>": 2, "<s>": 3, "</s>": 3, **dict.fromkeys(BYTES, 6)}
    for rank, token in enumerate(tokens):
        proto.pieces.add(piece=token, score=0.0 if token in kinds else -rank, type=kinds.get(token, NORMAL))
    (tmp_path / "source" / "tokenizer.model").write_bytes(proto.SerializeToString())
    return tmp_path


def read(file):
    proto = protobuf.ModelProto()
    proto.ParseFromString(file.read_bytes())
    return proto


def cut(proto, text):
    """SentencePiece's merging: of neighbours whose join is a piece, the one of highest score, from the left."""
    ids = {piece.piece: index for index, piece in enumerate(proto.pieces) if piece.type == NORMAL}
    parts = list("▁" + text.replace(" ", "▁"))
    while joins := [(-proto.pieces[ids[a + b]].score, i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ids]:
        at = min(joins)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelt = [[ids[p]] if p in ids else [3 + byte for byte in p.encode()] for p in parts]
    return [index for part in spelt for index in part]


def test_the_file_has_a_piece_for_every_token_and_cuts_text_as_the_tokenizer_does(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    before = read(folder / "source" / "tokenizer.model")
    TokenizerGrowth.plan(tokenizer, tokens := propose_tokens(GREEK, tokenizer, 30)).apply(tokenizer)
    tokenizer.add_tokens([AddedToken("szia világ", normalized=False)])
    save_tokenizer(tokenizer, folder / "grown", folder / "source")
    after, again = read(folder / "grown" / "tokenizer.model"), AutoTokenizer.from_pretrained(folder / "grown")
    assert list(after.pieces[: len(before.pieces)]) == list(before.pieces)
    assert after.trainer_spec.vocab_size == len(after.pieces) == len(again)
    assert after.trainer_spec.model_type == after.trainer_spec.BPE
    new = after.pieces[len(before.pieces) :]
    assert [(piece.piece, piece.type) for piece in new] == [
        ("<chat>", CONTROL), *((token, NORMAL) for token in tokens), ("szia▁világ", USER_DEFINED)
    ]  # fmt: skip
    scores = [piece.score for piece in [*before.pieces, *new[1:-1]] if piece.type == NORMAL]
    assert scores == sorted(scores, reverse=True)
    for text in (*GREEK, *ENGLISH, "mixed και ű 漢字 cat"):
        assert cut(after, text) == again(text, add_special_tokens=False)["input_ids"]
    assert cut(before, GREEK[0]) != cut(after, GREEK[0])


def test_a_graft_from_files_writes_it_and_saving_again_keeps_it(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    model = upcycle(pico(vocab_size=len(tokenizer)))
    extend_vocabulary(model, tokenizer, propose_tokens(GREEK, tokenizer, 5))
    (folder / "graft").mkdir()
    write_side_files(folder / "graft", folder / "source", tokenizer)
    save_tokenizer(AutoTokenizer.from_pretrained(folder / "graft"), folder / "again", folder / "graft")
    graft, again = (read(folder / name / "tokenizer.model") for name in ("graft", "again"))
    assert len(graft.pieces) == len(tokenizer) and graft == again
    assert [piece.piece for piece in graft.pieces[-5:]] == list(model.active_peft_config.record.new_tokens)


@pytest.mark.parametrize(
    ("content", "reason"), [(b"IQ== 0\nIg== 1\n", "no SentencePiece model"), (b"", "no Sente"), (None, "piece 3 is")]
)
def test_a_file_that_is_not_the_tokenizers_is_left_out_with_a_warning(folder, content, reason):
    file = folder / "source" / "tokenizer.model"
    tokenizer = AutoTokenizer.from_pretrained(folder / "source")
    if content is None:
        proto = read(file)
        proto.pieces[3].piece = "other"
        content = proto.SerializeToString()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match=f"tokenizer.model was left out: .*{reason}"):
        save_tokenizer(tokenizer, folder / "grown", folder / "source")
    assert not (folder / "grown" / "tokenizer.model").exists()
