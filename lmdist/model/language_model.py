"""The language model: embedding, a stack of single-layer LSTMs, and the weights of the projection to the vocabulary.

One forward serves training, evaluation and verification: `(tokens, state) -> (hidden, state)`. In training loss.py computes
the logits, chunk by chunk; in production the exported graph does. The model knows neither losses, optimizers, ranks nor files.

Shapes: B batch size, T tokens, V vocabulary, E embedding, H hidden, S the sum of the layers' hidden sizes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lmdist.model.dropout import Dropout, Masks
from lmdist.model.lstm import RECURRENT, STATE_PARTS, Layer, State
from lmdist.settings import InitSettings, ModelSettings


class LanguageModel(nn.Module):
    """Embedding, LSTM layers with dropout between them, and the projection's parameters.

    The model's state has the parts of a layer's, each (B, S): the layers' states side by side.
    """

    def __init__(self, settings: ModelSettings, vocabulary_size: int) -> None:
        super().__init__()
        self.settings = settings
        self.vocabulary_size = vocabulary_size
        self.layer_sizes = settings.layer_sizes
        self.embedding = nn.Embedding(vocabulary_size, settings.embedding_size)
        input_sizes = [settings.embedding_size, *self.layer_sizes[:-1]]
        # Single layers, not nn.LSTM(num_layers=N): only those can take cuDNN's persistent kernels.
        self.layers = nn.ModuleList(Layer(*sizes) for sizes in zip(input_sizes, self.layer_sizes, strict=True))
        self.dropout = Dropout(settings, vocabulary_size, [layer.get_parameter(RECURRENT).shape for layer in self.layers])
        # An embedding of the usual 0.1 makes the LSTM's inputs so small that training stays at the unigram loss for hundreds
        # of steps; the projection is small, so that the first loss is close to log V.
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

    def initialize_layers(self, settings: InitSettings) -> None:
        """Replace some of the random parameters of the layers."""
        for layer in self.layers:
            assert isinstance(layer, Layer), type(layer)
            layer.initialize(settings)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Return the parts by name, from the input to the output; a tied matrix is in the first and in the last one."""
        layers = {f"layers.{number}": layer for number, layer in enumerate(self.layers)}
        return {"embedding": self.embedding, **layers, "projection": self.projection}

    def initial_state(self, batch_size: int) -> State:
        """Return the state before the first token: zeros, each part (B, S), on the model's device."""
        shape, device = (batch_size, sum(self.layer_sizes)), self.embedding.weight.device
        return tuple(torch.zeros(shape, device=device) for _ in STATE_PARTS)

    def forward(self, tokens: Tensor, state: State, masks: Masks | None = None) -> tuple[Tensor, State]:
        """Return the last layer's outputs (B, T, H) for `tokens` (B, T), before dropout, and the state after them.

        `masks` are dropout's in a training step; without them nothing is dropped. The state is fp32 in any precision: a cell
        that is rounded at every batch forgets.
        """
        assert tokens.ndim == 2, tokens.shape
        expected = (len(tokens), sum(self.layer_sizes))  # (B, S)
        assert all(part.shape == expected for part in state), (tokens.shape, [part.shape for part in state])
        hidden = self.dropout.drop_words(self.embedding(tokens), tokens, masks)  # (B, T, E)
        layer_states = zip(*(part.split(self.layer_sizes, dim=1) for part in state), strict=True)
        new_states: list[State] = []
        for number, (layer, layer_state) in enumerate(zip(self.layers, layer_states, strict=True)):
            hidden = self.dropout.drop_vectors(hidden, number, masks)
            recurrent = self.dropout.drop_weights(layer.get_parameter(RECURRENT), number, masks)  # (4H, H)
            hidden, new_state = layer(hidden, tuple(part.contiguous() for part in layer_state), recurrent)  # (B, T, H)
            new_states.append(tuple(part.float() for part in new_state))
        return hidden, tuple(torch.cat(parts, dim=1) for parts in zip(*new_states, strict=True))  # parts (B, S)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of all tokens of the vocabulary, (..., H) -> (..., V), for a few positions at a time."""
        if isinstance(self.projection, nn.Linear):
            return self.projection(hidden)
        return self.projection.log_prob(hidden.flatten(0, -2)).view(*hidden.shape[:-1], -1)


def cutoffs(vocabulary_size: int) -> list[int]:
    """Return the token ids at which the clusters of rare and of very rare tokens of the adaptive softmax begin.

    The frequent tokens are ten times the vocabulary's square root: of WikiText-2's 33,278 the first 1,820, which are 76 % of
    its text. The second cutoff divides the rest evenly on a logarithmic scale.
    """
    first = min(10 * math.isqrt(vocabulary_size), vocabulary_size // 2)
    return sorted({first, math.isqrt(first * vocabulary_size)})
