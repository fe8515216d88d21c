"""The language model: embedding, a stack of single-layer LSTMs, and the weights of the projection to the vocabulary.

One forward serves training, evaluation and verification: `(tokens, state) -> (hidden, state)`. In training the logits are
made in loss.py, some at a time, and in production by the exported graph. The model knows nothing of losses, optimizers, ranks
or files.

Shapes: B rows, T words, V vocabulary, E embedding, H hidden, S the sum of the layers' sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmdist.model.lstm import Layer
from lmdist.settings import ModelSettings

State = tuple[Tensor, Tensor]
"""(h, c), each (B, S): the layers' states side by side, so that row b is everything the model knows about stream b."""


class LanguageModel(nn.Module):
    """Embedding, LSTM layers with dropout between them, and the projection's parameters."""

    def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocabulary_size = vocabulary_size
        self.layer_sizes = settings.layer_sizes
        self.embedding = nn.Embedding(vocabulary_size, settings.embedding_size)
        input_sizes = [settings.embedding_size, *self.layer_sizes[:-1]]
        # Single layers, not nn.LSTM(num_layers=N): only those can take cuDNN's persistent kernels.
        self.layers = nn.ModuleList(
            Layer(size_in, size, settings.weight_dropout) for size_in, size in zip(input_sizes, self.layer_sizes, strict=True)
        )
        self.dropout = nn.Dropout(settings.dropout)
        # An embedding of the usual 0.1 gives the LSTM inputs so small that it stays at the unigram model for hundreds of
        # steps; the projection is small, so that the first loss is close to log V.
        nn.init.uniform_(self.embedding.weight, -0.5, 0.5)
        self.projection: nn.Linear | nn.AdaptiveLogSoftmaxWithLoss
        if settings.head == "adaptive":
            self.projection = nn.AdaptiveLogSoftmaxWithLoss(
                self.layer_sizes[-1], vocabulary_size, cutoffs(vocabulary_size), head_bias=True
            )
        else:
            self.projection = nn.Linear(self.layer_sizes[-1], vocabulary_size)
            nn.init.uniform_(self.projection.weight, -0.1, 0.1)
            nn.init.zeros_(self.projection.bias)
            if settings.tied:
                self.projection.weight = self.embedding.weight

    def initial_state(self, rows: int) -> State:
        """The state before the first word: zeros (rows, S), on the model's device."""
        zeros = torch.zeros(rows, sum(self.layer_sizes), device=self.embedding.weight.device)
        return zeros, zeros.clone()

    def forward(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """Read `tokens` (B, T) from `state` on; give the last layer's output (B, T, H), not dropped out yet, and the state.

        The state is fp32 in any precision: a cell that is rounded at every batch forgets.
        """
        assert tokens.ndim == 2, tokens.shape
        assert state[0].shape == state[1].shape == (len(tokens), sum(self.layer_sizes)), (tokens.shape, state[0].shape)
        hidden = self.dropout(self.embedding(tokens))  # (B, T, E)
        last_h, last_c = [], []
        states = zip(state[0].split(self.layer_sizes, dim=1), state[1].split(self.layer_sizes, dim=1), strict=True)
        for number, (layer, (h, c)) in enumerate(zip(self.layers, states, strict=True)):
            if number:
                hidden = self.dropout(hidden)
            hidden, (h, c) = layer(hidden, (h.contiguous(), c.contiguous()))  # (B, T, H)
            last_h.append(h.float())
            last_c.append(c.float())
        return hidden, (torch.cat(last_h, dim=1), torch.cat(last_c, dim=1))

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all words whose softmax is their probability: (..., H) -> (..., V); for few words at a time."""
        if isinstance(self.projection, nn.Linear):
            return self.projection(hidden)
        return self.projection.log_prob(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)


def cutoffs(vocabulary_size: int) -> list[int]:
    """Where the words of the adaptive softmax become rare, and where very rare.

    The frequent words are ten times the vocabulary's square root: of WikiText-2's 33,278 the first 1,820, which are 76 % of
    its text. The second cut divides the rest evenly on a logarithmic scale.
    """
    first = min(10 * math.isqrt(vocabulary_size), vocabulary_size // 2)
    return sorted({first, math.isqrt(first * vocabulary_size)})
