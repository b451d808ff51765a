"""Prompts as token ids, in the formats that checkpoints were trained with."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file

from pi0_ros.policy.prompt import PromptEncoder, clean, state_bins
from pi0_ros.policy.tokenizer import ByteTokenizer, TokenizerError, load_tokenizer

DATA = Path(__file__).parent / "data"
CASES = json.loads((DATA / "prompts.json").read_text())["cases"]


def text(ids):
    return bytes(i - 3 for i in ids if i > 2).decode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['kind']}-{case['max_len']}-{case['prompt'][:8]!r}")
def test_tokens_equal_openpi(case):
    kind = "pi0" if case["kind"] == "pi05_no_state" else case["kind"]
    encoder = PromptEncoder(ByteTokenizer(), kind, case["max_len"])
    tokens, mask = encoder.encode_padded(case["prompt"], np.array(case["state"], np.float32))
    assert tokens.tolist() == case["tokens"]
    assert mask.astype(int).tolist() == case["mask"]


def test_state_bins_equal_openpi():
    fixture = load_file(DATA / "transforms.safetensors")
    for kind in ("f32", "f64"):
        np.testing.assert_array_equal(state_bins(fixture[f"discretize.in.{kind}"]), fixture[f"discretize.out.{kind}"])


def test_state_bins_reach_from_minus_one_to_255():
    assert state_bins(np.array([-2.0, -1.0, -1 / 128, 0.0, 0.999, 1.0, 5.0])).tolist() == [
        -1,
        0,
        127,
        128,
        255,
        255,
        255,
    ]


def test_cleaning():
    assert clean("  pick_up\nthe cube \n") == "pick up the cube"


def test_the_pi0_newline_is_a_token_of_its_own():
    class Merging(ByteTokenizer):
        def encode(self, text, bos=False):
            return [7] if text.endswith("e\n") else super().encode(text, bos)

    assert PromptEncoder(Merging(), "pi0", 48).encode("cube")[-1] == ord("\n") + 3


def test_the_pi05_state_is_that_of_the_joints_alone_and_lerobot_pads_it_first():
    state = np.array([0.0, -1.0, 1.0])
    ours = PromptEncoder(ByteTokenizer(), "pi05", 200).encode("lift it", state)
    assert text(ours) == "Task: lift it, State: 128 0 255;\nAction: "
    for dims, padding in ((5, " 128 128"), (3, "")):
        theirs = PromptEncoder(ByteTokenizer(), "lerobot_pi05", 200, action_dim=dims).encode("lift it", state)
        assert text(theirs) == f"Task: lift it, State: 128 0 255{padding};\nAction: "


def test_a_format_with_state_needs_one():
    with pytest.raises(ValueError, match="prompt format 'pi05' holds the state, none was given"):
        PromptEncoder(ByteTokenizer(), "pi05", 200).encode("lift")
    with pytest.raises(ValueError, match="prompt format must be one of pi0, pi05, lerobot_pi05, found 'pi1'"):
        PromptEncoder(ByteTokenizer(), "pi1", 200)


def test_truncation_warns_once_for_a_prompt(caplog):
    encoder = PromptEncoder(ByteTokenizer(), "pi05", 40)
    with caplog.at_level(logging.WARNING):
        for value in (0.0, 0.1, 0.2):
            assert len(encoder.encode("sort the screws", np.full(6, value))) == 40
        encoder.encode("stack the boxes", np.zeros(6))
    assert [record.getMessage() for record in caplog.records] == [
        "prompt 'sort the screws' has 64 tokens, only the first 40 count: some of the state is cut",
        "prompt 'stack the boxes' has 64 tokens, only the first 40 count: some of the state is cut",
    ]


def test_a_prompt_that_just_fits_is_no_news(caplog):
    with caplog.at_level(logging.WARNING):
        assert len(PromptEncoder(ByteTokenizer(), "pi0", 9).encode("lift it")) == 9  # bos, 7 letters, newline
    assert not caplog.records


@pytest.mark.parametrize(("kind", "max_len"), [("pi0", 10), ("pi05", 54)])
def test_truncation_that_leaves_the_state_whole_says_nothing_of_it(caplog, kind, max_len):
    with caplog.at_level(logging.WARNING):
        ids = PromptEncoder(ByteTokenizer(), kind, max_len).encode("sort the screws", np.zeros(6))
    assert kind == "pi0" or text(ids).endswith(" 128")
    assert caplog.records[0].getMessage().endswith(f"tokens, only the first {max_len} count")


def test_a_prompt_is_tokenised_once():
    class Counting(ByteTokenizer):
        calls = 0

        def encode(self, text, bos=False):
            Counting.calls += 1
            return super().encode(text, bos)

    encoder = PromptEncoder(Counting(), "pi0", 48)
    first = encoder.encode("lift it")
    assert encoder.encode("lift it") is first
    assert Counting.calls == 2  # the prompt and its newline
    for number in range(64):  # those that were not asked for lately are forgotten: prompts come from outside
        encoder.encode(f"lift {number}")
    kept = Counting.calls
    encoder.encode("lift 0")
    assert Counting.calls == kept
    encoder.encode("lift it")
    assert Counting.calls == kept + 2


@given(st.text())
def test_bytes_are_always_within_the_vocabulary(prompt):
    ids = PromptEncoder(ByteTokenizer(), "pi0", 4000).encode(prompt)
    assert ids[0] == 2
    assert ids.min() >= 2
    assert ids.max() < 260


def test_the_byte_level_tokenizer_serves_only_its_own_vocabulary():
    assert load_tokenizer(None, 260).vocab_size == 260
    with pytest.raises(TokenizerError, match="no tokenizer given for a model of 257152 tokens; give --tokenizer"):
        load_tokenizer(None, 257152)


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "corpus.txt").write_text("pick up the red cube\nput the blue cube in the box\nopen the drawer\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "tiny"),
        vocab_size=280,
        byte_fallback=True,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return folder / "tiny.model"


def test_a_sentencepiece_file_and_a_folder_with_one(sentencepiece_model, tmp_path):
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    (tmp_path / "paligemma_tokenizer.model").write_bytes(sentencepiece_model.read_bytes())
    for path in (sentencepiece_model, tmp_path):
        encoder = PromptEncoder(load_tokenizer(path, 1000), "pi0", 48)
        ids = encoder.encode("pick up the cube").tolist()
        assert ids[0] == 2 and ids.count(2) == 1
        assert processor.decode(ids) == "pick up the cube\n"


def test_a_hugging_face_folder(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\n": 4, " ": 5, "lift": 6, "it": 7}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(" ", "isolated")
    tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])  # as PaliGemma's
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    ).save_pretrained(tmp_path)
    assert PromptEncoder(load_tokenizer(tmp_path, 8), "pi0", 48).encode("lift it").tolist() == [2, 6, 5, 7, 4]
    with pytest.raises(TokenizerError, match="8 tokens, but the model embeds only 7"):
        load_tokenizer(tmp_path, 7)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(tmp_path)
    with pytest.raises(TokenizerError, match="has no bos token, and pi prompts begin with one"):
        load_tokenizer(tmp_path, 8)


def test_a_hugging_face_folder_is_neither_completed_from_the_net_nor_run(tmp_path, monkeypatch):
    from transformers import AutoTokenizer

    def read(folder, **options):
        raise OSError(f"{options}")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", read)
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(TokenizerError, match="'local_files_only': True, 'trust_remote_code': False"):
        load_tokenizer(tmp_path, 8)


def test_paligemmas_image_token_stands_behind_what_the_model_embeds_and_no_prompt_becomes_it(tmp_path):
    """google/paligemma-3b-pt-224 has 257152 tokens and <image> as number 257152; the model embeds 257152."""
    from tokenizers import AddedToken, Regex, Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Split
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "\n": 4, "lift": 5, "it": 6, "<loc0000>": 7}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(" "), "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    fast.add_tokens([AddedToken("<image>", special=True)], special_tokens=True)
    fast.save_pretrained(tmp_path)
    assert len(fast) == 9
    encoder = PromptEncoder(load_tokenizer(tmp_path, 8), "pi0", 48)
    assert encoder.encode("lift it").tolist() == [2, 5, 6, 4]
    assert encoder.encode("lift <image>").tolist() == [2, 5, 3, 4]
    with pytest.raises(TokenizerError, match="8 tokens, but the model embeds only 7"):
        load_tokenizer(tmp_path, 7)


def test_a_broken_tokenizer_is_one_clear_error(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.json").write_text("{")
    (tmp_path / "broken.model").write_bytes(b"nothing")
    for name, error in [
        ("missing", "no such tokenizer file or folder"),
        ("empty", "needs tokenizer.json or one .model file, found []"),
        ("broken", "not a Hugging Face tokenizer folder: "),
        ("broken.model", "not a SentencePiece model: "),
    ]:
        with pytest.raises(TokenizerError) as caught:
            load_tokenizer(tmp_path / name, 260)
        assert error in str(caught.value)
        assert "\n" not in str(caught.value)
