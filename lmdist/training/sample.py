"""Text from the model while it is in training: a look at what it has learnt.

Plain sampling by torch, one word at a time, with the state carried on. The fast sampler is lmdist_export's; this one only
has to be there without an export. It knows nothing of files.
"""

from __future__ import annotations

import torch

from lmdist.model.language_model import LanguageModel
from lmdist.text.vocabulary import END_ID, UNKNOWN_ID


@torch.no_grad()
def sample(model: LanguageModel, words: int, temperature: float, seed: int) -> list[int]:
    """The ids of `words` words drawn one after the other, starting after an end mark; `<unk>` is never drawn."""
    was_training = model.training
    model.eval()
    device = model.embedding.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    state = model.initial_state(1)
    token = torch.tensor([[END_ID]], device=device)
    drawn = []
    for _ in range(words):
        hidden, state = model(token, state)
        logits = model.logits(hidden[:, -1]).float() / temperature  # (1, V)
        logits[:, UNKNOWN_ID] = -torch.inf
        token = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)  # (1, 1)
        drawn.append(token)
    model.train(was_training)
    return torch.cat(drawn, dim=1)[0].tolist()
