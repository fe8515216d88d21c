"""Sample text from the model during training, to see what it has learned.

Plain sampling by torch, one token at a time, with the state carried on. The fast sampler is lmdist_export's; this one needs no
export. This module knows no files.
"""

from __future__ import annotations

import torch

from lmdist.model.language_model import LanguageModel
from lmdist.signals import StopRequest
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID


@torch.no_grad()
def sample(model: LanguageModel, num_tokens: int, temperature: float, seed: int, stop: StopRequest) -> list[int]:
    """Return `num_tokens` ids sampled one after another, after an end mark, fewer if a `stop` is requested meanwhile.

    `<unk>` is never sampled.
    """
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    state = model.initial_state(1)
    token = torch.tensor([[END_ID]], device=device)  # (1, 1)
    sampled = []
    for _ in range(num_tokens):
        if stop.requested:
            break
        hidden, state = model(token, state)  # (1, 1, H)
        logits = model.logits(hidden[:, -1]).float() / temperature  # (1, V)
        logits[:, UNKNOWN_ID] = -torch.inf
        token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (1, 1)
        sampled.append(token)
    model.train(was_training)
    return torch.cat(sampled, dim=1)[0].tolist() if sampled else []
