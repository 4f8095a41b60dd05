"""Generate from an exported model, and show what it took back.

python launcher/generate.py --model exported/ --prompt "2 + 2 ="
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path

from nmar_ds.errors import ConfigError, NmarError


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Generate from an exported model; undone tokens are shown struck through on a "
        "terminal and as [-text-] elsewhere.",
    )
    parser.add_argument(
        "--model", type=Path, required=True, help="folder made by launcher/export.py"
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="taken to the letter; <UNDO> in it is ordinary text")
    prompt.add_argument(
        "--prompt-file", type=Path, help="UTF-8 file, taken whole, its last newline included"
    )
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N")
    parser.add_argument("--undo", choices=["allow", "ban"], default="allow")
    parser.add_argument(
        "--undo-bias", type=float, default=0.0, metavar="X", help="added to the undo's logit"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="nucleus mass")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--begun", default="", metavar="TEXT", help="beginning of the response; it may be undone"
    )
    parser.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="ends the response; repeatable"
    )
    parser.add_argument("--max-undos", type=int, default=256, metavar="N", help="in all")
    parser.add_argument(
        "--max-consecutive-undos", type=int, default=64, metavar="N", help="in a row"
    )
    parser.add_argument(
        "--max-revisits", type=int, metavar="N",
        help="ban the undo once the response came back to what it had undone more often",
    )  # fmt: skip
    parser.add_argument(
        "--tabu", action="store_true",
        help="never repeat what was taken back: not the token right after which an undo came",
    )  # fmt: skip
    parser.add_argument(
        "--stream", action="store_true",
        help="show the response as it comes: on a terminal in place, elsewhere as JSON lines",
    )  # fmt: skip
    parser.add_argument(
        "--delay", type=float, default=0.0, metavar="S", help="seconds a token stays, with --stream"
    )
    parser.add_argument("--show", choices=["raw", "reduced", "both"], default="both")
    options = parser.parse_args(argv)
    if options.seed < 0:
        parser.error("--seed must not be negative")
    if options.seed >= 2**63:
        parser.error("--seed must be below 2^63")
    if options.delay and not (options.stream and 0 < options.delay < 60):
        parser.error("--delay: expected seconds up to 60, with --stream")
    if "" in options.stop:
        parser.error("--stop must not be empty")
    return options


def run(options: argparse.Namespace) -> None:
    """Check the folder and the prompt, then load the model, decode and print."""
    from nmar_ds.inference.exported import (
        chat_of,
        load_exported_tokenizer,
        load_model,
        read_settings,
    )

    settings = read_settings(options.model)
    tokenizer = load_exported_tokenizer(options.model, settings)
    text, chat = read_prompt(options), chat_of(settings, tokenizer)

    from nmar_ds.inference.generation import generate, show
    from nmar_ds.inference.streaming import shown

    generated = generate(
        load_model(options.model),
        tokenizer,
        settings,
        text,
        chat=chat,
        begun=options.begun,
        stop_texts=options.stop,
        stream=functools.partial(shown, delay=options.delay) if options.stream else None,
        max_new_tokens=options.max_new_tokens,
        max_undos=options.max_undos,
        max_consecutive_undos=options.max_consecutive_undos,
        max_revisits=options.max_revisits,
        tabu=options.tabu,
        undo_mode=options.undo,
        undo_bias=options.undo_bias,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
    )
    if not options.stream:
        show(generated, options.show)


def read_prompt(options: argparse.Namespace) -> str:
    """The prompt, from the command line or from a file."""
    if options.prompt is not None:
        return str(options.prompt)
    try:
        # newline="": universal newlines would change the text.
        with options.prompt_file.open(encoding="utf-8", newline="") as file:
            return str(file.read())
    except OSError as error:
        raise ConfigError(f"{options.prompt_file}: {error.strerror}, expected a file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{options.prompt_file}: {error}, expected UTF-8 text") from None


def main(argv: list[str] | None = None) -> int:
    """Run; bad input is one line on stderr."""
    options = parse(argv)
    try:
        run(options)
    except NmarError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
