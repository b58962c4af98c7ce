"""Models of the shapes that people bring, written out: small, random, and done on a CPU in milliseconds.

Each has the layers, skips, masks, states and outputs of its kind; ``build`` and ``make_inputs`` know all by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

WORDS = 23


class Block(nn.Module):
    """Two convolutions with BatchNorm around a skip, which a convolution carries where the size changes."""

    def __init__(self, fan_in: int, fan_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(fan_in, fan_out, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(fan_out)
        self.conv2 = nn.Conv2d(fan_out, fan_out, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(fan_out)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or fan_in != fan_out:
            self.skip = nn.Sequential(nn.Conv2d(fan_in, fan_out, 1, stride, bias=False), nn.BatchNorm2d(fan_out))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.skip(x)
        return y.relu()


class ResNet(nn.Module):
    """A residual network for images ``(batch, 3, 8, 8)``: one score per class."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.maxpool = nn.MaxPool2d(2)
        self.layer1 = nn.Sequential(Block(8, 8, 1))
        self.layer2 = nn.Sequential(Block(8, 12, 2))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer2(self.layer1(self.maxpool(self.bn1(self.conv1(x)).relu())))
        scores: Tensor = self.fc(self.avgpool(y).flatten(1))
        return scores


class UNet(nn.Module):
    """A segmentation network: down twice, up by transposed convolutions, skips joined by their channels."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = self._double(1, 4)
        self.down2 = self._double(4, 8)
        self.middle = self._double(8, 8)
        self.up2 = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.join2 = self._double(16, 4)
        self.up1 = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.join1 = self._double(8, 4)
        self.head = nn.Conv2d(4, 2, 1)

    @staticmethod
    def _double(fan_in: int, fan_out: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(fan_in, fan_out, 3, padding=1), nn.GroupNorm(2, fan_out), nn.ReLU(),
            nn.Conv2d(fan_out, fan_out, 3, padding=1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        one = self.down1(x)
        two = self.down2(F.max_pool2d(one, 2))
        y = self.up2(self.middle(F.max_pool2d(two, 2)))
        y = self.up1(self.join2(torch.cat([y, two], 1)))
        maps: Tensor = self.head(self.join1(torch.cat([y, one], 1)))
        return maps


class Recurrent(nn.Module):
    """A tagger of words: embedding, a recurrent layer, one score per word; the state comes back too."""

    def __init__(self, cell: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 6)
        self.rnn = cell(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.dropout = nn.Dropout(0.2)
        self.fc = nn.Linear(10, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embed(ids))
        scores: Tensor = self.fc(self.dropout(hidden))
        return scores


class Series(nn.Module):
    """A forecaster of series: an LSTM from a given state, whose last hidden state is read."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 6, batch_first=True)
        self.fc = nn.Linear(6, 1)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Tensor:
        # A state has its batch in dimension 1; it comes batch first, as all inputs do.
        _, (last, _) = self.lstm(x, (h.transpose(0, 1).contiguous(), c.transpose(0, 1).contiguous()))
        y: Tensor = self.fc(last[-1])
        return y


class Encoder(nn.Module):
    """``nn.TransformerEncoder`` with a padding mask, on sequences of vectors."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        hidden = self.encoder(x, src_key_padding_mask=padding)
        scores: Tensor = self.fc(hidden.masked_fill(padding[..., None], 0).mean(1))
        return scores


class Attention(nn.Module):
    """Self-attention with projections of its own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        mixed: Tensor = self.out(y.transpose(1, 2).flatten(-2))
        return mixed


class Bert(nn.Module):
    """A text classifier in the manner of BERT, called by keywords: ids, a mask, and one line of positions for all."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.positions = nn.Embedding(WORDS, 8), nn.Embedding(16, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(8) for _ in range(5))
        self.attentions = nn.ModuleList(Attention(8, 2) for _ in range(2))
        self.up = nn.ModuleList(nn.Linear(8, 16) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(16, 8) for _ in range(2))
        self.dropout = nn.Dropout(0.1)
        self.classifier = nn.Linear(8, 3)

    def forward(self, *, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        places = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        x = self.norms[0](self.words(input_ids) + self.positions(places))
        mask = attention_mask.bool()
        for i, attention in enumerate(self.attentions):
            x = self.norms[2 * i + 1](x + self.dropout(attention(x, mask)))
            x = self.norms[2 * i + 2](x + self.dropout(self.down[i](F.gelu(self.up[i](x)))))
        return {"logits": self.classifier(x[:, 0]), "pooled": x[:, 0]}


class Messages(nn.Module):
    """Message passing over one list of edges ``(2, edges)`` that all graphs of a batch share.

    Nodes are in dimension 1, ``(batch, nodes, features)``, so that the batch stays in dimension 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.message1, self.update1 = nn.Linear(6, 5), nn.Linear(8, 5)
        self.message2, self.update2 = nn.Linear(10, 5), nn.Linear(10, 5)
        self.readout = nn.Linear(5, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        for message, update in ((self.message1, self.update1), (self.message2, self.update2)):
            sent = message(torch.cat([x[:, source], x[:, target]], -1)).relu()
            received = torch.zeros(len(x), x.shape[1], sent.shape[-1], dtype=sent.dtype, device=x.device)
            x = update(torch.cat([x, received.index_add(1, target, sent)], -1)).relu()
        y: Tensor = self.readout(x.sum(1))
        return y


class Concatenated(nn.Module):
    """The same on nodes of all graphs in one line, ``(nodes, features)``, as graph libraries have them: no batch."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.update = nn.Linear(6, 5), nn.Linear(8, 2)

    def forward(self, x: Tensor, edge_index: Tensor) -> Tensor:
        source, target = edge_index
        sent = self.message(torch.cat([x[source], x[target]], -1)).relu()
        received = torch.zeros(len(x), sent.shape[-1], dtype=sent.dtype, device=x.device).index_add(0, target, sent)
        y: Tensor = self.update(torch.cat([x, received], -1))
        return y


class Graphs(nn.Module):
    """A network over concatenated nodes, called with graphs in a batch: each row has nodes and edges of its own."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        first = torch.arange(len(x), device=x.device)[:, None, None] * x.shape[1]
        y: Tensor = self.network(x.flatten(0, 1), (edges + first).transpose(0, 1).flatten(1))
        return y.unflatten(0, x.shape[:2])


class Detector(nn.Module):
    """Several outputs of different kinds: a tuple of boxes and a dict of scores, classes and a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv1d(2, 6, 3, padding=1), nn.GELU(), nn.Conv1d(6, 6, 3, padding=1))
        self.boxes = nn.Linear(6, 4)
        self.scores = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        hidden = self.backbone(x).mean(-1).tanh()
        scores = self.scores(hidden)
        return self.boxes(hidden), {"scores": scores, "classes": scores.argmax(-1), "stride": 8}


Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def _ids(batch: int) -> Tensor:
    return torch.randint(WORDS, (batch, 5), generator=torch.Generator().manual_seed(batch))


def _mask(batch: int) -> Tensor:
    return (torch.arange(5) < 3 + torch.arange(batch)[:, None] % 3).long()


EDGES = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])


@dataclass(frozen=True)
class Shape:
    """A kind of model: its class, its inputs for a batch, the inputs that have no batch, and its output layer."""

    build: Callable[[], nn.Module]
    make: Callable[[int], Inputs]
    head: str
    shared: tuple[str, ...] = ()
    has_norms_of_batches: bool = False


SHAPES = {
    "resnet": Shape(ResNet, lambda n: ((_draw(n, 3, 8, 8),), {}), "fc", has_norms_of_batches=True),
    "unet": Shape(UNet, lambda n: ((_draw(n, 1, 8, 8),), {}), "head"),
    "gru": Shape(lambda: Recurrent(nn.GRU), lambda n: ((_ids(n),), {}), "fc"),
    "lstm": Shape(lambda: Recurrent(nn.LSTM), lambda n: ((_ids(n),), {}), "fc"),
    "series": Shape(Series, lambda n: ((_draw(n, 4, 2), _draw(n, 1, 6), _draw(n, 1, 6)), {}), "fc"),
    "encoder": Shape(Encoder, lambda n: ((_draw(n, 5, 8), _mask(n) == 0), {}), "fc"),
    "bert": Shape(Bert, lambda n: ((), {"input_ids": _ids(n), "attention_mask": _mask(n)}), "classifier"),
    "graph": Shape(Messages, lambda n: ((_draw(n, 4, 3), EDGES), {}), "readout", ("edge_index",)),
    "graphs": Shape(
        lambda: Graphs(Concatenated()), lambda n: ((_draw(n, 4, 3), EDGES.repeat(n, 1, 1)), {}), "network.update"
    ),
    "detector": Shape(Detector, lambda n: ((_draw(n, 2, 6),), {}), "boxes"),
}


def build(name: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A model of this shape, in evaluation mode, whose norms and biases are not at their start values."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = SHAPES[name].build()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        for buffer in model.buffers():
            if buffer.is_floating_point():
                buffer += torch.rand_like(buffer)
    return model.to(dtype).eval()


def make_inputs(name: str, batch: int = 6, dtype: torch.dtype = torch.float64) -> Inputs:
    """Positional and keyword inputs of a batch for this shape."""
    args, kwargs = SHAPES[name].make(batch)
    return tuple(a.to(dtype) if a.is_floating_point() else a for a in args), kwargs
