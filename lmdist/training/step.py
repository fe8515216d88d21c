"""One training step: forward, backward, clip, update.

The loss of a step is the sum of nats over the tokens of the global batch, divided by their number, on any number of ranks. A
rank computes its part of the batch in one go, or in `training.accumulation` parts one after another to save memory. This
module does not know where batches come from, what is logged, or when to save.

Shapes: G global batch size, B batch size of this rank, P sequences of a part of it, T tokens, H hidden size, S state size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor, nn

from lmdist.errors import UsageError
from lmdist.model.cuda_graph import Function, Graphed
from lmdist.model.dropout import Masks
from lmdist.model.language_model import LanguageModel
from lmdist.model.loss import IGNORED, activation_penalty, summed_nats
from lmdist.model.lstm import State
from lmdist.model.precision import Precision
from lmdist.settings import Recipe
from lmdist.training.data import Batch
from lmdist.training.distributed import RowAverage, World
from lmdist.training.metrics import NatsTotal
from lmdist.training.optimizer import build_optimizer, fill_momentum, set_learning_rate


class TrainingStep:
    """The model in training: its optimizer, its loss scaler, and the LSTM state of this rank's streams."""

    def __init__(self, recipe: Recipe, model: LanguageModel, precision: Precision, world: World) -> None:
        self.model = model
        self.precision = precision
        self.world = world
        self.seed = recipe.seed
        self.global_batch = recipe.data.global_batch
        self.batch_size = recipe.data.global_batch // world.size
        self.accumulation = recipe.training.accumulation
        self.window = recipe.data.sequence_length
        self.penalties = (recipe.optimizer.activation_penalty, recipe.optimizer.temporal_penalty)
        self.clip = recipe.optimizer.clip or math.inf
        self.frozen = frozen_parameters(model, recipe.init.freeze)
        self.freeze_steps = recipe.init.freeze_steps or math.inf
        # The gradient of a tied embedding is the projection's as well, and has all rows.
        embedding = None if recipe.model.tied else model.embedding.get_parameter("weight")
        self.network = world.wrap(model, recipe.training.gradient_compression, embedding)
        self.embedding_rows = RowAverage(world, embedding, recipe.training.gradient_compression)
        self.optimizer = build_optimizer(recipe.optimizer, model)
        self.scaler = torch.GradScaler(world.device.type, enabled=precision.name == "fp16")
        self.state: State = model.initial_state(self.batch_size)  # parts (B, S)
        # DDP, sums over parts, and the adaptive head, whose shapes depend on the batch, do not fit into a CUDA graph.
        is_plain = world.size == self.accumulation == 1 and recipe.model.head == "full"
        self.compute_part: Function = self.forward_backward_part
        self.draw_masks: Callable[[int], Masks] = self.draw
        if world.device.type == "cuda":
            self.draw_masks = DrawnAhead(self.draw)
            self.compute_part = Graphed(self.forward_backward_part, model) if is_plain else self.forward_backward_part

    def warm_up_ddp(self) -> None:
        """Go once through DDP before the first step, and discard the gradients.

        After its first backward pass DDP rebuilds its buckets, and on more than two ranks sums over other buckets are rounded
        differently. With this warm-up a resumed run computes what a run without a stop does, bit for bit.
        """
        if self.world.size == 1:
            return
        part_size = self.batch_size // self.accumulation
        tokens = torch.zeros(part_size, self.window, dtype=torch.long, device=self.world.device)  # (P, T)
        weight = torch.ones((), device=self.world.device)
        masks, state = self.masks(0), self.model.initial_state(part_size)
        self.forward_backward_part(tokens, tokens, weight, masks.rows[:part_size], *masks[1:], *state)
        self.model.zero_grad(set_to_none=True)

    def masks(self, step: int) -> Masks:
        """Return the dropout masks of step number `step` for this rank's part of the global batch, on its device."""
        return self.draw_masks(step).to(self.world.device)

    def draw(self, step: int) -> Masks:
        """Return the same masks on the CPU, where they are drawn."""
        return self.model.dropout.draw(self.seed, step, self.global_batch, self.world.part_of(self.global_batch))

    def forward_backward(self, batch: Batch, step: int, nats: NatsTotal) -> None:
        """Compute the gradients of `batch`, this rank's part of global batch number `step`.

        Add its loss to `nats`; carry the state on.
        """
        if batch.state_reset:
            self.state = self.model.initial_state(self.batch_size)
        self.embedding_rows.start(batch.inputs)
        device = self.world.device
        weight = torch.full((), 1 / batch.num_tokens, device=device)  # torch.tensor would wait for the GPU
        masks = self.masks(step)
        tensors = (*batch.tensors_on(device), batch.targets != IGNORED, masks.rows, *self.state)  # each (B, ...)
        parts = zip(*(tensor.chunk(self.accumulation) for tensor in tensors), strict=True)  # each (P, ...)
        states: list[State] = []
        for number, (inputs, targets, mask, rows, *state) in enumerate(parts, start=1):
            with self.world.gradient_sync(self.network, enabled=number == self.accumulation):
                part_nats, *new_state = self.compute_part(inputs, targets, weight, rows, *masks[1:], *state)
            nats.add(part_nats, int(mask.sum()))
            states.append(tuple(new_state))
        self.embedding_rows.finish()
        if step < self.freeze_steps:
            for parameter in self.frozen:
                parameter.grad = None  # neither clipped nor updated nor decayed; for DDP it is a parameter like all others
        self.state = tuple(torch.cat(parts) for parts in zip(*states, strict=True))  # parts (B, S)

    def forward_backward_part(
        self, inputs: Tensor, targets: Tensor, weight: Tensor, rows: Tensor, words: Tensor, weights: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Add the gradients of a part of the batch; return its summed nats and the state after it.

        `inputs` and `targets` are (P, T); `weight` is one token's weight in the loss, 1 / tokens of the global batch; `rows`,
        `words` and `weights` are dropout's Masks. DDP averages gradients over the W ranks, hence the factor W.
        """
        masks = Masks(rows, words, weights)
        with self.precision.autocast(self.world.device):
            raw, new_state = self.network(inputs, state, masks)  # (P, T, H)
            hidden = self.model.dropout.drop_vectors(raw, -1, masks)
            part_nats = summed_nats(hidden, self.model.projection, targets, weight * self.world.size)
            loss = part_nats * weight
            if self.penalties != (0, 0):
                loss = loss + activation_penalty(raw, hidden, targets != IGNORED, *self.penalties) * weight
        self.scaler.scale(loss * self.world.size).backward()
        return part_nats.detach(), *(part.detach() for part in new_state)

    def clip_and_update(self, learning_rate: float) -> Tensor:
        """Clip the gradients, update the parameters, clear the gradients; return the norm of the gradient before clipping."""
        set_learning_rate(self.optimizer, learning_rate)
        self.scaler.unscale_(self.optimizer)
        parameters = list(self.model.parameters())
        norm = nn.utils.get_total_norm(parameter.grad for parameter in parameters if parameter.grad is not None)
        # A GPU would have to be waited for, and a CPU takes longer to multiply by 1.
        if norm.device.type == "cuda" or norm > self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        if self.scaler.is_enabled():
            fill_momentum(self.optimizer)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm


class DrawnAhead:
    """The masks of each step, drawn in a thread while the step before is computed.

    Those of the recurrent weights are millions of numbers, for which a GPU would wait.
    """

    def __init__(self, draw: Callable[[int], Masks]) -> None:
        self.draw = draw
        self.thread = ThreadPoolExecutor(1, "masks")
        self.ready: tuple[int, Future[Masks]] | None = None

    def __call__(self, step: int) -> Masks:
        """Return the masks of step number `step`, and begin with those of the next one."""
        masks = self.ready[1].result() if self.ready and self.ready[0] == step else self.draw(step)
        self.ready = step + 1, self.thread.submit(self.draw, step + 1)
        return masks


def frozen_parameters(model: LanguageModel, names: Sequence[str]) -> list[nn.Parameter]:
    """Return the parameters of the parts of a model that init.freeze names.

    Raise UsageError for other names, and where nothing is left to train.
    """
    parts = model.parts
    for name in names:
        if name not in parts:
            raise UsageError(f"init.freeze has {name}; the parts of this model are {', '.join(parts)}")
    frozen = {parameter: None for name in names for parameter in parts[name].parameters()}
    if len(frozen) == len(list(model.parameters())):
        raise UsageError(f"init.freeze {', '.join(names)} is all of the model: nothing is left to train")
    return list(frozen)
