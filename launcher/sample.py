"""Draw a model's own responses to records, for traces with the errors it really makes.

    python launcher/sample.py --config configs/quickstart.yaml --model exported/ \
        --records data/train.jsonl --output data/train.sampled.jsonl

Writes the same records with `samples`, ids that `data.traces.builder: on_policy` aligns to the
reference. `<UNDO>` and all other special tokens are banned. A call that was cut off goes on where
it stopped. Exit codes: 0 done, 2 bad input.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nmar_ds.errors import NmarError


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, metavar="FILE",
                        help="run configuration: tokenizer, undo token, chat template")  # fmt: skip
    parser.add_argument("--model", required=True, type=Path, metavar="DIR",
                        help="Hugging Face folder with the configuration's tokenizer")  # fmt: skip
    parser.add_argument("--records", required=True, type=Path, metavar="FILE",
                        help="JSON lines with prompt and reference")  # fmt: skip
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a new file")
    parser.add_argument("--num-samples", type=int, default=1, metavar="N", help="per record (1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="(256)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T",
                        help="0 is greedy (1)")  # fmt: skip
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus mass (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (0)")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N",
                        help="sequences side by side; changes no sample (64)")  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="a.b=c",
                        help="values that replace the configuration's")  # fmt: skip
    options = parser.parse_intermixed_args(argv)
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if options.seed >= 2**63:
        parser.error("--seed must be below 2^63")
    return options


def run(options: argparse.Namespace) -> None:
    """Settle everything that can be wrong, then load the model and draw."""
    from nmar_ds.config import load_config

    config = load_config(options.config, options.overrides)
    from nmar_ds.data.prepare import chat_template, ready_tokenizer

    tokenizer, _ = ready_tokenizer(config)
    chat = chat_template(config, tokenizer)
    from tqdm import tqdm

    from nmar_ds.inference.exported import load_model
    from nmar_ds.inference.own_samples import (
        SamplingSettings,
        model_facts,
        positions_of,
        sample_file,
    )

    settings = SamplingSettings(
        num_samples=options.num_samples, max_new_tokens=options.max_new_tokens,
        temperature=options.temperature, top_p=options.top_p, seed=options.seed,
        batch_size=options.batch_size,
    )  # fmt: skip
    name = model_facts(options.model, tokenizer)
    with tqdm(unit=" records", disable=None) as bar:
        for num_done in sample_file(
            options.records, options.output, lambda: load_model(options.model), tokenizer,
            settings=settings, chat=chat, model=name, num_positions=positions_of(options.model),
        ):  # fmt: skip
            bar.update(num_done - bar.n)
    print(f"{options.output}: {num_done:,} records, {options.num_samples} samples each")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(argv)
    try:
        run(options)
        return 0
    except (NmarError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
