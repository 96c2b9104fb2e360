"""Make a Qwen2 checkpoint of a given shape, with random or trained weights.

The shapes of Qwen2.5 serve as stand-ins where the real weights are out of reach: bytes
and speed depend on the shape alone, quality figures need training. `tiny` is the model
of `python quant_lab.py --demo`; this made it, in two and a half minutes on an H100, from
the text that `python_documents` gives under Python 3.11.7:

    python tests/make_checkpoint.py --shape tiny --steps 3000 --batch 64 --rate 5e-3 \\
        --out tests/tiny-qwen2

and these make benchmarks of the real shapes:

    python tests/make_checkpoint.py --shape 0.5b --tokenizer FOLDER --out FOLDER
    python tests/make_checkpoint.py --shape 7b --tokenizer FOLDER --out FOLDER

The demo's texts, too, were made here, of the help of Python 3.11.7 (another has another):

    python tests/make_checkpoint.py --demo-texts tests/demo
"""

import argparse
import ast
import importlib.util
import json
import math
import re
import sys
import sysconfig
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

DEMO = Path(__file__).resolve().parent / "demo"
SHAPES = {
    "tiny": dict(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        rope_theta=10_000.0, tie_word_embeddings=True,
    ),
    "0.5b": dict(
        vocab_size=151_936, hidden_size=896, intermediate_size=4864,
        num_hidden_layers=24, num_attention_heads=14, num_key_value_heads=2,
        max_position_embeddings=32_768, rope_theta=1e6, tie_word_embeddings=True,
    ),
    "7b": dict(
        vocab_size=152_064, hidden_size=3584, intermediate_size=18_944,
        num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
        max_position_embeddings=32_768, rope_theta=1e6, tie_word_embeddings=False,
    ),
}
PACKAGES = ("torch", "transformers", "numpy", "pandas", "matplotlib", "networkx", "sympy")
SEPARATOR = "<|endoftext|>"
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read_help() -> tuple[list[list[dict]], str]:
    """Return chats and a held-out text of the topics of this Python's help.

    An eighth of the topics is held out: the demo scores a model on them, the chats
    train it and calibrate.
    """
    from pydoc_data.topics import topics
    texts = {name: re.sub(r"\n[^\w\s]{4,}\n", "\n", topics[name].strip())
             for name in sorted(topics)}
    held_out = [name for name in texts if zlib.crc32(name.encode()) % 8 == 6]
    text = "\n\n".join(map(texts.pop, held_out))
    # Topics quote each other: no chat may share a long line with the held-out text.
    lines = {s for line in text.split("\n") if len(s := line.strip()) >= 40}
    chats = []
    for name, topic in texts.items():
        kept = [paragraph for paragraph in topic.split("\n\n")
                if lines.isdisjoint(line.strip() for line in paragraph.split("\n"))]
        for part, begin in enumerate(range(0, len(kept), 4), 1):
            chats.append([
                dict(role="user", content=f"Explain {name} in Python, part {part}."),
                dict(role="assistant", content="\n\n".join(kept[begin : begin + 4]))])
    return chats, text


def write_demo_texts(folder: Path) -> None:
    """Write chats.jsonl and eval.txt of `read_help`."""
    chats, text = read_help()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(dict(messages=chat), ensure_ascii=False) + "\n" for chat in chats]
    for name, content in (("chats.jsonl", "".join(lines)), ("eval.txt", text)):
        (folder / name).write_text(content, encoding="utf-8", newline="\n")


def docstrings(folder: Path) -> list[str]:
    """Return docstrings of 80 characters or more of the Python files below a folder."""
    found = []
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for file in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib", "lib2to3"} & set(
            file.relative_to(folder).parts
        ):
            continue
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            text = isinstance(node, kinds) and ast.get_docstring(node)
            if text and len(text) >= 80:
                found.append(text)
    return found


def python_documents() -> list[str]:
    """Return English about Python: the demo's chats, docstrings of what is installed.

    The demo scores a model on topics of Python's help that it holds out; a document
    that shares a line of 40 characters or more with them is left out. The standard
    library counts three times, being closest to what is scored.
    """
    held_out = (DEMO / "eval.txt").read_text(encoding="utf-8")
    with (DEMO / "chats.jsonl").open(encoding="utf-8") as stream:
        chats = [json.loads(line)["messages"] for line in stream]
    near = ["".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
                    for turn in chat) for chat in chats]
    near += docstrings(Path(sysconfig.get_paths()["stdlib"]))
    far = []
    for package in PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec:
            far += docstrings(Path(spec.origin).parent)
    lines = {line.strip() for line in held_out.split("\n") if len(line.strip()) >= 40}
    return [
        document for document in 3 * list(dict.fromkeys(near)) + list(dict.fromkeys(far))
        if lines.isdisjoint(line.strip() for line in document.split("\n"))
    ]


def train_tokenizer(documents: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with the ChatML template and Qwen's specials."""
    specials = [SEPARATOR, "<|im_start|>", "<|im_end|>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(documents, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=specials, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    ))
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token=SEPARATOR,
        additional_special_tokens=["<|im_start|>"], chat_template=CHATML,
    )


def train(model, ids: torch.Tensor, steps: int, minutes: float, batch: int,
          length: int, rate: float) -> None:
    """Train on random crops of `ids` [n] until `steps` or `minutes` are spent.

    AdamW, cosine schedule with warm-up over whichever limit comes first; bfloat16
    autocast over float32 weights.
    """
    ids, reach = ids.to(model.device), torch.arange(length, device=model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1,
                                  betas=(0.9, 0.95))
    start = time.monotonic()
    for step in range(steps):
        spent = (time.monotonic() - start) / 60
        progress = max(step / steps, spent / minutes if minutes else 0)
        if progress >= 1:
            break
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * (0.02 + 0.98 * cosine)
        begin = torch.randint(len(ids) - length, (batch, 1), device=ids.device)
        crop = ids[begin + reach]
        with torch.autocast(model.device.type, dtype=torch.bfloat16):
            loss = model(crop, labels=crop).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 200 == 0:
            print(f"step {step:6,}  loss {loss.item():6.3f}  {spent:5.1f} min", flush=True)
    print(f"{step + 1:,} steps of {batch} x {length} tokens, last loss {loss.item():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--out", help="folder to write the checkpoint to")
    parser.add_argument("--demo-texts", metavar="FOLDER",
                        help="write the demo's texts there, of this Python's help")
    parser.add_argument("--tokenizer", help="folder of a tokenizer (default: train one)")
    parser.add_argument("--text", help="UTF-8 file to train on, documents apart by\n"
                        f"{SEPARATOR} (default: docstrings and Python's help)")
    parser.add_argument("--steps", type=int, default=0, help="0 leaves random weights")
    parser.add_argument("--minutes", type=float, default=0, help="0 sets no limit")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=512, help="tokens of a crop")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--dtype", default="float16", help="of the saved weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.demo_texts:
        return write_demo_texts(Path(args.demo_texts))
    if not args.out:
        parser.error("give --out or --demo-texts")
    torch.manual_seed(args.seed)

    text = Path(args.text).read_text(encoding="utf-8") if args.text else (
        SEPARATOR.join(python_documents()))
    documents = text.split(SEPARATOR)
    if args.tokenizer:
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    else:
        tokenizer = train_tokenizer(documents, SHAPES[args.shape]["vocab_size"])
    config = Qwen2Config(
        **SHAPES[args.shape], bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id, initializer_range=0.02,
    )
    if len(tokenizer) > config.vocab_size:
        sys.exit(f"the tokenizer has {len(tokenizer):,} tokens, the shape {args.shape} "
                 f"holds {config.vocab_size:,}")
    dtype = getattr(torch, args.dtype)
    torch.set_default_dtype(torch.float32 if args.steps else dtype)
    with torch.device(args.device):
        model = Qwen2ForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    print(f"{args.shape}: {model.num_parameters():,} parameters")
    if args.steps:
        separator = tokenizer.convert_tokens_to_ids(SEPARATOR)
        ids = [token for document in documents
               for token in [*tokenizer(document, verbose=False).input_ids, separator]]
        print(f"{len(documents):,} documents, {len(ids):,} tokens", flush=True)
        train(model.train(), torch.tensor(ids), args.steps, args.minutes, args.batch,
              args.length, args.rate)
    # The sampling defaults of Qwen2.5: a greedy benchmark has to override them.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.7, top_p=0.8, top_k=20, repetition_penalty=1.1,
        eos_token_id=[tokenizer.eos_token_id, tokenizer.pad_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    model.eval().to(dtype).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    size = sum(file.stat().st_size for file in Path(args.out).iterdir())
    print(f"wrote {args.out}, {size:,} bytes")


if __name__ == "__main__":
    main()
