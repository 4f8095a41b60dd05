"""Peak memory of an export against its largest shard.

    python benchmarks/export_memory.py [--megabytes 512] [--shard 64MB] [--ranks 3] [--no-result]

Writes a checkpoint of that size (fp32 Llama, so 12 bytes of state per weight), and exports its
weights in a fresh process that has exported a tiny one before: imports, caches and allocators are
warm, and what grows after that is the model's. The figure is the growth of VmHWM, the highest
resident size that Linux has seen of the process, mapped files included; the export maps none, so
nothing has to be deducted. The goal: at most 1.5 times the largest shard. The same is measured for
transformers' own path, which holds the model, so that the measure is seen to measure.

Exit code 0 when the goal is met and the other path fails it. The result goes to
benchmarks/results/export_memory.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "export_memory.json"
GOAL = 1.5
HIDDEN = 256


def config_of(megabytes: float) -> dict[str, Any]:
    """A Llama whose fp32 weights take about that much, in many tensors of at most 4 MB."""
    per_layer = 4 * HIDDEN * HIDDEN + 3 * HIDDEN * 4 * HIDDEN + 2 * HIDDEN
    layers = max(1, round(megabytes * 2**20 / 4 / per_layer))
    return {
        "model_type": "llama", "vocab_size": 1000, "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN, "num_hidden_layers": layers, "num_attention_heads": 4,
        "num_key_value_heads": 4, "eos_token_id": 1, "bos_token_id": 2,
    }  # fmt: skip


def write(folder: Path, megabytes: float, ranks: int) -> None:
    """A checkpoint of random weights."""
    import torch
    import transformers
    from zero_files import Model, write_checkpoint

    keys = config_of(megabytes)
    config = transformers.LlamaConfig(**{k: v for k, v in keys.items() if k != "model_type"})
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    groups = [
        {f"lm.{n}": {k: torch.randn(v.shape) for k in ("weight", "exp_avg", "exp_avg_sq")}
         for n, v in model.named_parameters() if (v.dim() > 1) == decayed}
        for decayed in (True, False)
    ]  # fmt: skip
    saved = Model(groups, scalars={"step": torch.tensor(3.0)})
    write_checkpoint(folder, saved, ranks, dtype="float32", model_config=keys)


def status(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    text = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure(folder: Path, tiny: Path, shard: str, path: str) -> dict[str, int]:
    """Export both in this process; bytes of growth while the second was exported."""
    from nmar_ds.training import export
    from nmar_ds.training.checkpoints import find_newest

    def run(run_folder: Path) -> Path:
        found = find_newest(run_folder, report=print)
        assert found is not None
        output = run_folder / f"out-{path}"
        output.mkdir()
        write_model = export._write_model if path == "streamed" else export.write_in_memory
        write_model(found, output, shard)
        return output

    run(tiny)
    before = status("VmRSS")
    output = run(folder)
    shards = [file.stat().st_size for file in output.glob("*.safetensors")]
    return {
        "growth": status("VmHWM") - before, "largest_shard": max(shards), "shards": len(shards),
        "model": sum(shards), "mapped_files": status("RssFile"),
    }  # fmt: skip


def in_fresh_process(*arguments: str) -> str:
    """This script again; its stdout."""
    places = [str(ROOT), str(ROOT / "tests" / "unit")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places), "DS_ACCELERATOR": "cpu",
                   "OMP_NUM_THREADS": "1"}  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode != 0:
        raise SystemExit(done.stdout + done.stderr)
    return done.stdout


def compare(options: argparse.Namespace) -> dict[str, Any]:
    """Both paths over one checkpoint."""
    with tempfile.TemporaryDirectory(prefix="export-memory-") as name:
        folder = Path(name)
        for part, size in (("big", options.megabytes), ("tiny", 1)):
            in_fresh_process("--write", str(folder / part), "--megabytes", str(size),
                             "--ranks", str(options.ranks))  # fmt: skip
        found = {}
        for path in ("streamed", "in_memory"):
            said = in_fresh_process("--measure", path, "--folder", name, "--shard", options.shard)
            entry = json.loads(said.strip().splitlines()[-1])
            found[path] = entry | {"ratio": round(entry["growth"] / entry["largest_shard"], 3)}
    return {
        "what": "growth of VmHWM during the export of a checkpoint, over its largest shard",
        "goal": GOAL, "ranks": options.ranks, **found, "python": platform.python_version(),
        "command": f"python benchmarks/export_memory.py --megabytes {options.megabytes:g} "
        f"--shard {options.shard} --ranks {options.ranks}",
    }  # fmt: skip


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=float, default=512, help="of fp32 weights")
    parser.add_argument("--shard", default="64MB", help="largest weight file")
    parser.add_argument("--ranks", type=int, default=3, help="that saved the checkpoint")
    parser.add_argument("--no-result", action="store_true", help="keep the former result")
    for hidden in ("--write", "--measure", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write(Path(options.write), options.megabytes, options.ranks)
        return 0
    if options.measure:
        folder = Path(options.folder)
        print(json.dumps(measure(folder / "big", folder / "tiny", options.shard, options.measure)))
        return 0
    result = compare(options)
    for path in ("streamed", "in_memory"):
        entry = result[path]
        print(f"{path:10} grew by {entry['growth'] / 2**20:.1f} MiB, {entry['ratio']} times its "
              f"largest shard of {entry['largest_shard'] / 2**20:.1f} MiB; model "
              f"{entry['model'] / 2**20:.0f} MiB in {entry['shards']} files")  # fmt: skip
    if not options.no_result:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0 if result["streamed"]["ratio"] <= GOAL < result["in_memory"]["ratio"] else 1


if __name__ == "__main__":
    sys.exit(main())
