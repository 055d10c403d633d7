"""A causal model whose next-token probabilities are written down: they depend on the last token alone."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast


class Bigram(nn.Module):
    """probability: token → its followers' probabilities; what is left over goes to 'other'."""

    def __init__(self, probability: dict[str, dict[str, float]]) -> None:
        super().__init__()
        words = dict.fromkeys(["<end>", "other", *probability, *(w for p in probability.values() for w in p)])
        self.vocabulary = {word: i for i, word in enumerate(words)}
        table = torch.full((len(words), len(words)), 1e-9)
        table[:, 1] = 1.0
        for word, followers in probability.items():
            table[self.vocabulary[word], 1] = max(1e-9, 1 - sum(followers.values()))
            for follower, p in followers.items():
                table[self.vocabulary[word], self.vocabulary[follower]] = p
        self.table = nn.Parameter(table.log())
        self.config = SimpleNamespace(vocab_size=len(words))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table[input_ids])

    def set(self, word: str, follower: str, probability: float) -> None:
        """An edit: `follower` gets this probability, the rest shrink to make room."""
        with torch.no_grad():
            row = self.table[self.vocabulary[word]]
            place = self.vocabulary[follower]
            old = row[place].exp()
            row += torch.log((1 - torch.tensor(probability)) / (1 - old))
            row[place] = torch.tensor(probability).log()

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """One token a word; a line break is a token too."""
        tokenizer = Tokenizer(models.WordLevel(self.vocabulary, unk_token="other"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
