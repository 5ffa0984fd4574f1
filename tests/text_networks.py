"""A small encoder, trained in seconds, with the outlier channels that trained encoders have."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, LENGTH, WIDTH, HEADS = 40, 12, 32, 4
FREE = {name: {1: torch.export.Dim.AUTO} for name in ("input_ids", "attention_mask")}


class Block(nn.Module):
    """A post-norm transformer layer, as BERT's."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.fused = fused

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        kept = mask[:, None, None, :].bool()
        if self.fused:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=kept)
        else:
            scores = (q @ k.transpose(-1, -2)) / (WIDTH / HEADS) ** 0.5
            context = scores.masked_fill(~kept, -1e9).softmax(-1) @ v
        x = self.norm1(x + self.output(context.transpose(1, 2).flatten(2)))
        return self.norm2(x + self.down(F.gelu(self.up(x))))  # type: ignore[no-any-return]


class Encoder(nn.Module):
    """Classifies sentences by their most frequent third of the vocabulary; an outlier channel, as trained encoders have."""

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        self.blocks = nn.ModuleList(Block(fused) for _ in range(2))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.norm(self.words(input_ids) + self.positions(places))
        for block in self.blocks:
            x = block(x, attention_mask)
        mask = attention_mask[..., None].float()
        return self.head((x * mask).sum(1) / mask.sum(1))  # type: ignore[no-any-return]


def sentences(count: int, seed: int, length: int = LENGTH) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCABULARY, (count, length), generator=generator)
    lengths = torch.randint(3, length + 1, (count, 1), generator=generator)
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def labels(inputs: dict[str, Any]) -> Tensor:
    thirds = inputs["input_ids"] * 3 // VOCABULARY
    counts = [((thirds == third) * inputs["attention_mask"]).sum(1) for third in range(3)]
    return torch.stack(counts, 1).argmax(1)


def trained_encoder(steps: int = 250) -> Encoder:
    """The encoder trained on `labels`, the same on every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Encoder()
        with torch.no_grad():
            model.norm.weight[3] = 12.0
            block = model.blocks[0]
            assert isinstance(block, Block)
            block.norm1.weight[7] = 15.0
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for step in range(steps):
            batch = sentences(64, seed=step)
            optimizer.zero_grad()
            F.cross_entropy(model(**batch), labels(batch)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return model.eval()
