"""The only room that knows DeepSpeed and torch.distributed.

Everything a rank shares with its peers goes through here: the start of the process group, the
ZeRO-3 engine, reductions, and the agreement of all ranks on one answer.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# DeepSpeed guesses the accelerator at its first import; without a GPU it must not guess.
import torch

from nmar_ds.config import OptimizerSection
from nmar_ds.errors import (
    CheckpointError,
    FolderError,
    LaunchError,
    NmarError,
    PeerLostError,
    SaveError,
)
from nmar_ds.files import about
from nmar_ds.training.cpu_step import (
    flatten_in_place,
    gather_weights_by_exchange,
    keep_freed_memory,
    sum_gradients_by_exchange,
    take_norms_in_blocks,
)
from nmar_ds.training.nodes import choose_interface, meet
from nmar_ds.training.plain_data import not_plain_data
from nmar_ds.training.ranks import Ranks, own_cpus, threads_per_rank
from nmar_ds.training.snapshot import HostMemory, Snapshot, write_file

if TYPE_CHECKING:
    from nmar_ds.training.partitions import SavedPartitions

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# Every torch.load of this process, DeepSpeed's own among them, refuses to run pickled code.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning, module=r"(torch|deepspeed)\b.*")

import deepspeed  # noqa: E402
import deepspeed.ops  # noqa: E402
from deepspeed.runtime.comm import coalesced_collectives  # noqa: E402
from deepspeed.runtime.fp16.loss_scaler import LossScaler  # noqa: E402
from deepspeed.runtime.zero import partition_parameters  # noqa: E402
from deepspeed.runtime.zero.config import ZeroStageEnum  # noqa: E402
from deepspeed.utils import logger as deepspeed_logger  # noqa: E402
from deepspeed.utils import set_z3_leaf_modules  # noqa: E402

# What gloo says when a peer is gone or silent.
LOST_PEER_SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe",
                   "Timed out waiting", "Connection refused", "Application timeout")  # fmt: skip

# The two globals a genuine ZeRO-3 checkpoint names besides tensors.
torch.serialization.add_safe_globals([LossScaler, ZeroStageEnum])


def start_process_group(
    ranks: Ranks, *, timeout_seconds: int, collective_seconds: int | None = None
) -> torch.device:
    """Join the other ranks.

    Args:
        ranks: from `discover_ranks`; the environment must be complete.
        timeout_seconds: longest wait for the others to come.
        collective_seconds: a collective that waits longer fails (the library default is 30
            minutes); as long as the others may take to come, unless it is given.

    Returns:
        This rank's device.

    Raises:
        LaunchError: the ranks do not find each other, or not as the launcher announced them.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    if torch.cuda.is_available():
        if ranks.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"environment: LOCAL_RANK: is {ranks.local_rank}, expected less than the "
                f"{torch.cuda.device_count()} visible GPUs"
            )
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
        backend = "nccl"
    else:
        device = torch.device("cpu")
        backend = "gloo"
        keep_freed_memory()
        sum_gradients_by_exchange(coalesced_collectives, deepspeed.comm)
        gather_weights_by_exchange(partition_parameters, torch.distributed)
        choose_interface(os.environ, ranks)
        # Compiled with g++ at every first start, and serves inference only. The whole table is put
        # in its place: reading it makes DeepSpeed probe every extension, with compilers.
        vars(deepspeed.ops)["__compatible_ops__"] = {"deepspeed_shm_comm": False}
    meeting = meet(ranks, os.environ, timeout_seconds=timeout_seconds)
    torch.set_num_threads(threads_per_rank(own_cpus(), meeting.cpus_of_others))
    try:
        deepspeed.init_distributed(
            dist_backend=backend,
            auto_mpi_discovery=False,
            timeout=datetime.timedelta(seconds=collective_seconds or timeout_seconds),
            verbose=False,
        )
    except RuntimeError as error:
        raise LaunchError(
            f"the ranks met, but {backend} could not connect them: {str(error).splitlines()[0]}; "
            "set GLOO_SOCKET_IFNAME (CPU) or NCCL_SOCKET_IFNAME (GPU) to the network interface "
            "that joins the nodes"
        ) from None
    del meeting  # the process group holds its own
    formed = torch.distributed.get_world_size()
    if formed != ranks.world_size or torch.distributed.get_rank() != ranks.rank:
        raise LaunchError(f"{formed} ranks met, expected {ranks.world_size}")
    return device


def device_kind() -> str:
    """`cuda` where a GPU is at hand, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def close_process_group() -> None:
    """Leave the group; a process that skips this may keep its peers waiting at exit."""
    if torch.distributed.is_initialized():
        gc.collect()  # engines first: their groups and pending work go with them
        torch.distributed.destroy_process_group()


@contextlib.contextmanager
def naming_lost_peers() -> Iterator[None]:
    """Turn the torn connection of a peer that died into one line.

    Raises:
        PeerLostError: the block failed because another rank ended or did not answer.
    """
    try:
        yield
    except RuntimeError as error:  # gloo has no type of its own; torch's DistError is a subclass
        sign = next((sign for sign in LOST_PEER_SIGNS if sign in str(error)), None)
        if sign is None and not isinstance(error, torch.distributed.DistError):
            raise
        raise PeerLostError(
            f"another rank ended or did not answer ({sign or str(error).splitlines()[0]}); its own "
            "message, if it could leave one, says why"
        ) from error


def all_reduce(tensor: torch.Tensor, op: str = "sum") -> torch.Tensor:
    """Reduce in place over all ranks (`sum` or `max`) and return the tensor."""
    kind = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}[op]
    torch.distributed.all_reduce(tensor, op=kind)
    return tensor


class ProcessPeers:
    """The ranks of the running process group, as `checkpoints.Peers` wants them."""

    def __init__(self) -> None:
        self.rank = torch.distributed.get_rank()
        self.world_size = torch.distributed.get_world_size()

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank, in order of rank."""
        box: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(box, value)
        return box

    @contextlib.contextmanager
    def share_errors(self) -> Iterator[None]:
        """Run a block whose `NmarError` or `OSError` on one rank ends it on all, with its message.

        Without it the healthy ranks would wait in their next collective until the timeout. The
        block itself must not be collective where it can fail on one rank alone.
        """
        problem: NmarError | None = None
        try:
            yield
        except NmarError as error:
            problem = error
        except OSError as error:
            problem = FolderError(about(error, Path()))
        problems = [p for p in self.gather(problem) if p is not None]
        if problems:
            problems[0].shared = True
            raise problems[0]


def make_optimizer(
    model: torch.nn.Module, section: OptimizerSection, *, offloaded: bool = False
) -> torch.optim.Optimizer:
    """AdamW or SGD over two groups: matrices decay, norms and biases do not.

    In host memory, on a CPU or offloaded to it, one pass over each state is what counts, so AdamW
    runs fused there: nine times as fast as torch's default for it.

    Under ZeRO-3 a parameter's own shape is empty, so its rank is read from `ds_shape`.
    """
    decayed: list[torch.nn.Parameter] = []
    exempt: list[torch.nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            shape = getattr(parameter, "ds_shape", parameter.shape)
            (decayed if len(shape) > 1 else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": section.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if section.name == "sgd":
        return torch.optim.SGD(groups, lr=section.learning_rate)
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=section.betas,
        eps=section.eps,
        fused=True if offloaded or device_kind() == "cpu" else None,
    )


@dataclass(frozen=True, slots=True)
class Resliced:
    """A rank's state out of a checkpoint of another number of ranks.

    Attributes:
        model: DeepSpeed's model file: buffers, counters, frozen parameters.
        optimizer: DeepSpeed's optimizer state of this rank.
    """

    model: dict[str, Any]
    optimizer: dict[str, Any]


class Engine:
    """A model under ZeRO-3.

    Args:
        model: built inside ZeRO-3 partitions; its forward computes the loss, because DeepSpeed
            gathers parameters only inside that call.
        settings: from `deepspeed_config`.
        optimizer: over the model's parameters.
        whole_modules: class names of modules whose parameters are gathered all at once, with one
            pair of hooks instead of one per submodule. For a decoder layer that saves a fifth of
            a small model's step on a CPU and costs one layer's parameters in memory.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        settings: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        *,
        whole_modules: Sequence[str] = (),
    ) -> None:
        if whole_modules:
            set_z3_leaf_modules(model, list(whole_modules))
        self._engine, *_ = deepspeed.initialize(model=model, config=settings, optimizer=optimizer)
        self.world_size = torch.distributed.get_world_size()
        self.rank = torch.distributed.get_rank()
        self.device = self._engine.device
        if self.device.type == "cpu":
            take_norms_in_blocks(self._engine.optimizer)
            flatten_in_place(self._engine.optimizer)
        self._problem: SaveError | None = None
        self._host_memory = HostMemory()  # empty until a save copies
        self._take: Callable[[dict[str, Any], Path], None] = write_file
        self._engine.checkpoint_engine.save = self._take_file
        # It would put executable scripts beside the data.
        self._engine._copy_recovery_script = lambda folder: None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's forward, with its parameters gathered."""
        return self._engine(*args, **kwargs)

    @property
    def module(self) -> torch.nn.Module:
        """The wrapped model; its parameters are partitioned."""
        module: torch.nn.Module = self._engine.module
        return module

    def train(self, mode: bool = True) -> None:
        """Training or evaluation mode."""
        self._engine.train(mode)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulate gradients of `loss` as it is: SPEC 3 has put every factor into it."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def set_learning_rate(self, value: float) -> None:
        """For the coming step. The schedule is a function of the step, so it needs no state."""
        for group in self._engine.optimizer.param_groups:
            group["lr"] = value

    def step(self) -> None:
        """Call after every micro-batch; the weights move after the last of a step."""
        self._engine.step()

    def step_was_applied(self) -> bool:
        """False after a step that DeepSpeed skipped because a gradient was not finite."""
        return bool(self._engine.was_step_applied())

    def gradient_norm(self) -> float:
        """2-norm of the whole gradient of the latest step, before clipping."""
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def save_into(self, folder: Path, tag: str, client_state: dict[str, Any]) -> None:
        """Write this rank's part of a checkpoint to `folder/tag`. Collective; no `latest` file.

        Raises:
            SaveError: on the rank that could not write, after all ranks have come through.
        """
        self._save(folder, tag, client_state, write_file)

    def copy_into(self, folder: Path, tag: str, client_state: dict[str, Any]) -> Callable[[], None]:
        """Copy this rank's part of a checkpoint to host memory. Collective.

        Returns:
            Writes the copy to `folder/tag` when called; by any thread, and not collective.

        Raises:
            SaveError: on the rank that has no memory for it, after all ranks have come through.
        """
        snapshot = Snapshot(self._host_memory)
        self._save(folder, tag, client_state, snapshot.add)
        return snapshot.write

    def _save(
        self, folder: Path, tag: str, client_state: dict[str, Any],
        take: Callable[[dict[str, Any], Path], None],
    ) -> None:  # fmt: skip
        """Let DeepSpeed put this rank's files together, and `take` each of them."""
        self._problem, self._take = None, take
        self._engine.save_checkpoint(
            str(folder), tag=tag, client_state={"nmar": client_state}, save_latest=False
        )
        if self._problem is not None:
            raise self._problem

    def _take_file(self, state_dict: dict[str, Any], path: str) -> None:
        """DeepSpeed's hook for one file.

        A rank that failed in here alone would leave the others waiting in DeepSpeed's barriers.
        """
        try:
            self._take(state_dict, Path(path))
        except SaveError as error:
            self._problem = self._problem or error

    def load_from(self, folder: Path, tag: str) -> dict[str, Any]:
        """Load `folder/tag` into a fresh engine and return this rank's client state.

        Raises:
            CheckpointError: a file of it is no plain data; nothing in it was run.
        """
        try:
            path, state = self._engine.load_checkpoint(str(folder), tag=tag)
        except pickle.UnpicklingError as error:
            raise CheckpointError(not_plain_data(folder / tag, error)) from None
        assert path is not None, "the checkpoint was verified before"
        client: dict[str, Any] = state["nmar"]
        return client

    def prepare_resliced(self, saved: SavedPartitions) -> Resliced:
        """Read this rank's slices of a checkpoint of another number of ranks. Not collective.

        The fp32 weights are overwritten at once; `take_resliced` makes the rest of them.

        Raises:
            CheckpointError: the checkpoint does not fit this model.
        """
        from nmar_ds.training import elastic

        zero = self._engine.optimizer
        zero.checkpoint_event_prologue()
        names = self._engine.param_names
        groups = [
            elastic.SubGroup(
                [(names[parameter], parameter.ds_numel) for parameter in parameters],
                zero.fp32_partitioned_groups_flat[index],
                zero.sub_group_to_group_id[index],
            )
            for index, parameters in enumerate(zero.fp16_groups)
        ]
        share = elastic.Share(self.rank, self.world_size)
        model = saved.model_state()
        if saved.frozen:
            model["frozen_param_fragments"] = elastic.frozen_fragments(saved, share)
        return Resliced(model, elastic.reslice(saved, groups, share))

    def take_resliced(self, slices: Resliced) -> None:
        """Go on from what `prepare_resliced` has read. Collective."""
        self._engine.load_module_state_dict(slices.model)
        # DeepSpeed asks a list of all ranks' states for this rank's alone.
        self._engine.optimizer.load_state_dict({self.rank: slices.optimizer})
        self._engine.optimizer.checkpoint_event_epilogue()
        for counter in ("global_steps", "global_samples", "skipped_steps"):
            setattr(self._engine, counter, slices.model[counter])

    def full_gradients(self) -> dict[str, torch.Tensor]:
        """Unclipped gradients by name, gathered; valid between the last backward and its step."""
        from deepspeed.utils import safe_get_full_grad

        return {
            name: safe_get_full_grad(parameter).detach().clone()
            for name, parameter in self.module.named_parameters()
        }

    def full_weights(self) -> dict[str, torch.Tensor]:
        """fp32 master weights by name, gathered on every rank. For tests and small models."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {
            name: safe_get_full_fp32_param(parameter).detach().clone()
            for name, parameter in self.module.named_parameters()
        }
