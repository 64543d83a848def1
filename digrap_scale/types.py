"""What the rooms hand to each other. Shapes: N local elements, B samples in a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch

# (name, start, stop) → elements [start, stop) of the flattened tensor of that name: [stop − start].
Slices = Callable[[str, int, int], torch.Tensor]
WEIGHTS = "model."  # what the key of a weight begins with in a checkpoint
IGNORED = -100  # torch's and transformers' label of a token that carries no loss
# PEFT's `init_lora_weights` that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ …) move a part of it.
PLAIN_LORA_STARTS = (True, False, "gaussian", "eva", "orthogonal")
SHARED_ELEMENTS = 1 << 16  # a replicated tensor below is one rank's alone to write


@dataclass(frozen=True)
class ShardSpec:
    """Which part of one parameter (= one layer) this rank holds.

    Attributes:
        name: the parameter's name in the unwrapped model.
        shape: its full, unsharded shape.
        start: first element that this rank holds, in the flattened (C order) tensor.
        stop: one past the last; ``start == stop`` is an empty shard.
        replicated: every rank of the reduction group holds the same elements, so that only one of them may count.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    replicated: bool = False

    @property
    def numel(self) -> int:
        """Elements that this rank holds (padding excluded)."""
        return self.stop - self.start


@dataclass(frozen=True)
class TensorPart:
    """This rank's part of a named tensor, as checkpoints take it.

    Attributes:
        key: the tensor's name in the checkpoint.
        shape: its full shape.
        start: first element that this rank holds, in the flattened (C order) tensor.
        stop: one past the last.
        tensor: [stop − start] its values; reading a checkpoint writes into it.
        replica: which of the ranks that hold the same part this is.
        replicas: how many hold it.
    """

    key: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: torch.Tensor
    replica: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        assert self.tensor.ndim == 1 and self.tensor.numel() == self.stop - self.start, f"{self.key}: not a flat part"

    def own(self) -> TensorPart:
        """What this rank writes of it: see ``own_interval``."""
        start, stop = own_interval(self.start, self.stop, self.replica, self.replicas)
        tensor = self.tensor[start - self.start : stop - self.start]
        return replace(self, start=start, stop=stop, tensor=tensor, replica=0, replicas=1)


def own_interval(start: int, stop: int, replica: int, replicas: int) -> tuple[int, int]:
    """Which elements of [start, stop), held by ``replicas`` ranks, the one of number ``replica`` answers for: an equal share
    of many, all or nothing of a few."""
    numel = stop - start
    if numel < SHARED_ELEMENTS:
        return (start, stop) if replica == 0 else (start, start)
    return start + numel * replica // replicas, start + numel * (replica + 1) // replicas


@dataclass(slots=True)
class AdamMoments:
    """What Adam's or AdamW's last step on a layer can be computed again from, instead of keeping the weights before it.

    θ_{t-2} = (θ_{t-1} + step_size · m / (√v · second_scale + eps)) / shrink, from torch's own update rule.

    Attributes:
        first, second: [N] the optimizer's moments m and v.
        factors: shrink (1 − lr · weight decay; 1 for Adam), step_size (lr / (1 − β₁^k)), second_scale
            (1 / √(1 − β₂^k)) and eps, of that step.
    """

    first: torch.Tensor
    second: torch.Tensor
    factors: tuple[float, float, float, float]

    def part(self, part: slice) -> AdamMoments:
        """The same of some of the elements."""
        return AdamMoments(self.first[part], self.second[part], self.factors)


@dataclass(frozen=True)
class AdamSettings:
    """The settings of one parameter group; equal ones are stepped together.

    Attributes:
        lr, beta1, beta2, eps, weight_decay: as in torch.
        decoupled: AdamW's decay, θ ← θ − lr·λ·θ; otherwise Adam's, g ← g + λ·θ.
        fused: take torch's fused kernel for small layers (the optimizer's own choice), otherwise foreach.
    """

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    fused: bool


@dataclass(slots=True)
class AdamState:
    """One layer's state: the moments m and v ([N], changed in place), and which step this is (1 = the first)."""

    first: torch.Tensor
    second: torch.Tensor
    count: int
    settings: AdamSettings

    def part(self, part: slice) -> AdamState:
        """The same of some of the elements."""
        return AdamState(self.first[part], self.second[part], self.count, self.settings)


@dataclass(slots=True)
class ShardView:
    """One layer's shard, as flat tensors that alias the optimizer's own memory where the backend allows it.

    Attributes:
        spec: what it is a shard of.
        weight: [N] the weights that the optimizer steps (the fp32 master under mixed precision).
        grad: [N] the gradient that the optimizer reads, or None where the layer had none (it counts as zeros).
        grad_scale: factor that brings ``grad`` to the gradient that the optimizer will see (1 unless a loss
            scale or clipping is still to be undone).
        reference: [N] pre-trained weights in their stored dtype, or None: zero if ``projected``, absent otherwise.
        projected: whether the layer has a reference at all.
        previous: [N] the weights before the optimizer's last step, or None where nothing keeps them.
        moments: what ``previous`` can be computed from where it is not kept, or None.
        lr: learning rate of the layer's parameter group in this step.
        offset: which of this rank's elements of the layer is the first here.
    """

    spec: ShardSpec
    weight: torch.Tensor
    grad: torch.Tensor | None
    grad_scale: float = 1.0
    reference: torch.Tensor | None = None
    projected: bool = False
    previous: torch.Tensor | None = None
    moments: AdamMoments | None = None
    lr: float = 0.0
    offset: int = 0

    def part(self, part: slice, reference: bool = False) -> ShardView:
        """The same of some of this rank's elements; ``reference`` is left as it is (it may be the part's already), or cut
        too."""
        return replace(
            self,
            reference=self.reference[part] if reference and self.reference is not None else self.reference,
            weight=self.weight[part],
            grad=None if self.grad is None else self.grad[part],
            previous=None if self.previous is None else self.previous[part],
            moments=None if self.moments is None else self.moments.part(part),
            offset=self.offset + (part.start or 0),
        )


@dataclass
class Batch:
    """A collated batch: model inputs, and what the task compares with.

    Attributes:
        inputs: the model's keyword arguments (``pixel_values`` [B, 3, H, W] float32, ``input_ids`` …).
        labels: [B] int64 class indices (classification, contrastive over classes), or None. −1: a sample that does not count.
        keys: the samples' keys in their shards, in order.
        answers: the texts that count as right, a list a sample (tasks that generate text).
        groups: by what each sample's score is told apart: its type of question, or empty for all in one.
        rest: the micro-batch's other samples, where one forward would be too large for all: each a forward of its own.
    """

    inputs: dict[str, torch.Tensor]
    labels: torch.Tensor | None = None
    keys: list[str] = field(default_factory=list)
    answers: list[list[str]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    rest: list[Batch] = field(default_factory=list)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on ``device``; ``rest`` stays where it is until its turn."""
        return replace(
            self,
            inputs={name: tensor.to(device, non_blocking=True) for name, tensor in self.inputs.items()},
            labels=None if self.labels is None else self.labels.to(device, non_blocking=True),
        )

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from which copies to an accelerator do not wait."""
        return replace(
            self,
            inputs={name: tensor.pin_memory() for name, tensor in self.inputs.items()},
            labels=None if self.labels is None else self.labels.pin_memory(),
            rest=[part.pin_memory() for part in self.rest],
        )


@dataclass(frozen=True)
class StoredWeights:
    """An open checkpoint as one model sees it; nothing of it is in memory before ``read``.

    Attributes:
        shapes: the file's names → shapes.
        file_names: names in the model → the file's name for the same tensor, unchanged but for its dtype.
        converted: the file's names of tensors that are merged, split or reshaped on their way into the model.
        read: (file's name, start, stop) → elements [start, stop) of the flattened tensor, in the file's dtype.
    """

    shapes: Mapping[str, tuple[int, ...]]
    file_names: Mapping[str, str]
    converted: Sequence[str]
    read: Slices
