"""Slices of a checkpoint for another number of ranks, and what of it can be wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from zero_files import Model, State, part_of, sub_groups, write_checkpoint

from nmar_ds.errors import CheckpointError
from nmar_ds.training import partitions
from nmar_ds.training.checkpoints import Found
from nmar_ds.training.elastic import Share, SubGroup, frozen_fragments, reslice, seed_of
from nmar_ds.training.partitions import SavedPartitions

ADAMW = ("exp_avg", "exp_avg_sq")
SHAPES = [
    {"embed": (13, 4), "up": (5, 7), "down": (7, 5), "head": (13, 4)},
    {"norm": (5,), "bias": (1,), "last": (3,)},
]
MANY = [1, 2, 3, 4, 7]


def model(*, kinds: tuple[str, ...] = ADAMW, tied: bool = False, **more: Any) -> Model:
    """Every element of every tensor is another number."""
    torch.manual_seed(0)
    groups: list[dict[str, State]] = [
        {name: {kind: torch.randn(shape) for kind in ("weight", *kinds)}
         for name, shape in group.items() if not (tied and name == "head")}
        for group in SHAPES
    ]  # fmt: skip
    shared = {"head": "embed"} if tied else {}
    scalars = {"step": torch.tensor(41.0)} if kinds else {}
    return Model(groups, shared=shared, scalars=scalars, **more)


def groups_of(saved: Model, world_size: int, most: int) -> list[SubGroup]:
    """What DeepSpeed has laid out on a rank of the new run: sub-groups full of rubbish."""
    found = []
    for number, group in enumerate(saved.groups):
        for sub in sub_groups(group, world_size, most):
            sizes = [(name, state["weight"].numel()) for name, state in sub.items()]
            length = sum(-(-numel // world_size) for _, numel in sizes)
            found.append(SubGroup(sizes, torch.full((length,), 55.0, requires_grad=True), number))
    return found


def without_padding(flat: torch.Tensor, sub: SubGroup, share: Share) -> dict[str, torch.Tensor]:
    """This rank's elements by parameter; what pads them must be zero."""
    found, at = {}, 0
    for name, numel in sub.parameters:
        part = -(-numel // share.world_size)
        own = max(0, min(part, numel - share.rank * part))
        found[name] = flat[at : at + own].detach()
        assert not flat[at + own : at + part].any(), "padding that is not zero"
        at += part
    assert at == len(flat)
    return found


@pytest.mark.parametrize("before", MANY)
@pytest.mark.parametrize("most", [10, 10**9], ids=["sub-groups", "one-group"])
def test_every_element_is_where_it_belongs(
    before: int, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partitions, "PIECE_BYTES", 12)  # pieces end inside parts
    whole = model()
    found = write_checkpoint(tmp_path, whole, before, most=most)
    with SavedPartitions(found.folder, found.manifest) as saved:
        for after in MANY:
            parts: dict[tuple[str, str], list[torch.Tensor]] = {}
            for rank in range(after):
                groups = groups_of(whole, after, most)
                share = Share(rank, after)
                state = reslice(saved, groups, share)
                inner = state["optimizer_state_dict"]
                assert state["partition_count"] == after and state["loss_scaler"].cur_scale == 1.0
                for index, sub in enumerate(groups):
                    flats = {"weight": state["fp32_flat_groups"][index], **inner["state"][index]}
                    assert flats["weight"] is sub.weights, "in place"
                    assert flats.pop("step") == 41.0
                    for kind, flat in flats.items():
                        for name, own in without_padding(flat, sub, share).items():
                            parts.setdefault((name, kind), []).append(own)
                indices = [group["params"] for group in inner["param_groups"]]
                assert [i for each in indices for i in each] == list(range(len(groups)))
                assert [i for i, g in enumerate(groups) if g.param_group == 1] == indices[1]
            expected = {
                (name, kind): tensor.flatten()
                for group in whole.groups for name, kept in group.items()
                for kind, tensor in kept.items()
            }  # fmt: skip
            assert parts.keys() == expected.keys()
            for key, tensor in expected.items():
                assert torch.equal(torch.cat(parts[key]), tensor), (after, key)


def resliced(found: Found, whole: Model, share: Share) -> tuple[list[SubGroup], dict[str, Any]]:
    groups = groups_of(whole, share.world_size, 10**9)
    with SavedPartitions(found.folder, found.manifest) as saved:
        return groups, reslice(saved, groups, share)


def test_tied_weights_bf16_and_an_optimizer_without_moments(tmp_path: Path) -> None:
    whole = model(kinds=(), tied=True, dtype=torch.bfloat16)
    found = write_checkpoint(tmp_path, whole, 2)
    groups, state = resliced(found, whole, Share(1, 3))
    assert state["optimizer_state_dict"]["state"] == {}
    assert "head" not in dict(groups[0].parameters), "stored once"
    own = without_padding(groups[0].weights, groups[0], Share(1, 3))
    full = whole.groups[0]["embed"]["weight"].flatten()
    assert torch.equal(own["embed"], full[18:36]) and own["embed"].dtype == torch.float32
    with SavedPartitions(found.folder, found.manifest) as saved:
        assert saved.shared == {"head": "embed"}


def test_frozen_parameters_are_resliced_in_their_own_dtype(tmp_path: Path) -> None:
    frozen = {"fixed": torch.randn(11).bfloat16(), "none": torch.empty(0)}
    whole = model(frozen=frozen)
    found = write_checkpoint(tmp_path, whole, 3)
    with SavedPartitions(found.folder, found.manifest) as saved:
        parts = [frozen_fragments(saved, Share(rank, 2)) for rank in range(2)]
        for name, value in frozen.items():
            got = torch.cat([part[name] for part in parts])
            assert torch.equal(got[: value.numel()], value) and got.dtype == value.dtype
            assert not got[value.numel() :].any()
        assert saved.model_state()["global_steps"] == 3


def test_a_moment_that_one_rank_lacks_and_other_parameters_are_refused(tmp_path: Path) -> None:
    whole = model()
    found = write_checkpoint(tmp_path, whole, 2)
    other = model()
    other.groups[0]["more"] = other.groups[0].pop("up")
    with pytest.raises(CheckpointError, match=r"more: has no elements, expected 35 \(2 such"):
        resliced(found, other, Share(0, 1))
    longer = model()
    longer.groups[1]["norm"] = {kind: torch.randn(6) for kind in ("weight", *ADAMW)}
    with pytest.raises(CheckpointError, match="norm: has 5 elements, expected 6"):
        resliced(found, longer, Share(0, 1))


def change(found: Found, rank: int, edit: Any) -> None:
    """Alter one rank's optimizer file: hostile, for its checksum is right again."""
    name = f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    content = torch.load(found.folder / name, weights_only=True)
    edit(content["optimizer_state_dict"])
    torch.save(content, found.folder / name)


def test_files_that_do_not_fit_each_other_are_one_line(tmp_path: Path) -> None:
    def shorten(state: dict[str, Any]) -> None:
        state["fp32_flat_groups"][0] = state["fp32_flat_groups"][0][:-1].clone()

    def forget(state: dict[str, Any]) -> None:
        del state["optimizer_state_dict"]["state"][0]["exp_avg"]

    def fewer(state: dict[str, Any]) -> None:
        state["fp32_flat_groups"].pop()

    def repeat(state: dict[str, Any]) -> None:
        state["fp32_flat_groups"][0] = torch.ones(1).expand(len(state["fp32_flat_groups"][0]))

    def strip(state: dict[str, Any]) -> None:
        del state["fp32_flat_groups"]

    whole = model()
    for number, edit in enumerate((shorten, forget, fewer, repeat, strip)):
        found = write_checkpoint(tmp_path / str(number), whole, 2)
        change(found, 1, edit)
        with pytest.raises(CheckpointError, match=r"rank_1_mp|rank 1 has no exp_avg of embed"):
            resliced(found, whole, Share(0, 1))


def test_steps_that_differ_within_a_new_sub_group_are_refused(tmp_path: Path) -> None:
    whole = model()
    found = write_checkpoint(tmp_path, whole, 2, most=10)

    def later(state: dict[str, Any]) -> None:
        state["optimizer_state_dict"]["state"][1]["step"] = torch.tensor(42.0)

    change(found, 0, later)
    with pytest.raises(CheckpointError, match="at different steps"):
        resliced(found, whole, Share(0, 1))


def test_pickled_code_and_torn_files_are_refused(tmp_path: Path) -> None:
    whole = model()
    found = write_checkpoint(tmp_path, whole, 2)
    canary = tmp_path / "canary"

    class Payload:
        def __reduce__(self) -> Any:
            return (Path.touch, (canary,))

    for kind in ("optim", "model"):
        path = found.folder / f"zero_pp_rank_0_mp_rank_00_{kind}_states.pt"
        good = path.read_bytes()
        torch.save({"optimizer_state_dict": Payload(), "param_shapes": Payload()}, path)
        with pytest.raises(CheckpointError, match="holds pickled code"):
            resliced(found, whole, Share(0, 1))
        assert not canary.exists()
        path.write_bytes(good[: len(good) // 2])
        with pytest.raises(CheckpointError, match="cannot be read"):
            resliced(found, whole, Share(0, 1))
        path.write_bytes(good)


def test_files_of_other_ranks_than_the_manifest_says(tmp_path: Path) -> None:
    found = write_checkpoint(tmp_path, model(), 2)
    with pytest.raises(CheckpointError, match=r"its files are of 2 ranks, expected 1"):
        SavedPartitions(found.folder, {**found.manifest, "world_size": 1})
    files = {n: e for n, e in found.manifest["files"].items() if "rank_1" not in n}
    with pytest.raises(CheckpointError, match=r"0 files .*zero_pp_rank_1"):
        resliced(Found(folder=found.folder, manifest={**found.manifest, "files": files}),
                 model(), Share(0, 1))  # fmt: skip


def test_new_generators_are_one_per_rank_and_the_same_each_time() -> None:
    seeds = {seed_of(s, step, r, w) for s in (0, 1) for step in (3, 4)
             for w in (1, 2, 3) for r in range(w)}  # fmt: skip
    assert len(seeds) == 24 and all(0 <= seed < 2**63 for seed in seeds)
    assert seed_of(1, 2, 0, 3) == seed_of(1, 2, 0, 3)


def test_the_writer_cuts_as_deepspeed_does() -> None:
    """The last part of ten elements on four ranks: 3, 3, 3, and one with two of padding."""
    parts = [part_of(torch.arange(10.0), rank, 4).tolist() for rank in range(4)]
    assert parts == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 77, 77]]
