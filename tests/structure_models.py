"""Models whose channels depend on each other in the ways that matter."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunekit import Scores
from prunekit.criteria import model_digest
from prunekit.errors import StructureError
from prunekit.structure import GROUPED, find_groups
from prunekit.trajectory import Layout

IMAGES = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def random_scores(model: nn.Module, seed: int = 0, levels: int | None = None) -> Scores:
    """Scores as a file would hold them; with ``levels``, full of ties."""
    generator = torch.Generator().manual_seed(seed)
    names = [e.name for e in Layout.of(model).parameters if len(e.shape) >= 2]
    shapes = {e.name: e.shape for e in Layout.of(model)}
    importance = {n: torch.rand(shapes[n], generator=generator) for n in names}
    if levels is not None:
        importance = {n: (v * levels).floor() for n, v in importance.items()}
    facts = {
        "criterion": "magnitude", "group": "l2", "aggregation": None, "trajectory": "t", "model": model_digest(model),
        "prunable": names,
    }  # fmt: skip
    return Scores(importance, {}, facts)


class Flattened(nn.Module):
    """A convolution whose channels become blocks of a linear layer's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.hidden = nn.Linear(6 * 16, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(F.relu(self.conv(x)).flatten(1))))


class Residual(nn.Module):
    """Two convolutions whose outputs are added: their channels go together."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.inner = nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.out((x + F.relu(self.inner(x))).mean((2, 3)))


class Joined(nn.Module):
    """Two branches side by side: each keeps its own range of the next layer's inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(1, 4, 3, padding=1)
        self.right = nn.Conv2d(1, 6, 1)
        self.mix = nn.Conv2d(10, 5, 3)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([F.relu(self.left(x)), torch.tanh(self.right(x))], 1)
        return self.out(F.relu(self.mix(x)).mean((2, 3)))


class Multilayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 9), nn.Linear(9, 7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


HANDLED: dict[str, Callable[[], nn.Module]] = {
    "flattened": Flattened,
    "residual": Residual,
    "joined": Joined,
    "multilayer": Multilayer,
}


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm, self.out = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.norm(self.one(x.flatten(1)))))


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3, groups=2), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.two(torch.relu(self.one(x.flatten(1))))))


class Counting(nn.Module):
    """A mean over channels: removing some changes what the mean divides by."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.one(x.flatten(1)))
        return self.out(hidden - hidden.mean(1, keepdim=True))


class Squashed(nn.Module):
    """A removed channel would send 0.5, but what receives it leaves with it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.one(x.flatten(1))))


class Depthwise(nn.Module):
    """A depthwise convolution leaves with its producer; batch norm between."""

    def __init__(self) -> None:
        super().__init__()
        self.point, self.norm = nn.Conv2d(1, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depth, self.mix = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 5, 1)
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.depth(F.relu(self.norm(self.point(x)))))
        return self.out(F.relu(self.mix(x)).mean((2, 3)))


class GroupNormed(nn.Module):
    """Three groups of two channels: only whole ones keep the others' statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.mix = nn.Conv2d(1, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.Conv2d(6, 5, 3, padding=1)
        self.bare, self.out = nn.GroupNorm(5, 5, affine=False), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        return self.out(F.relu(self.bare(self.mix(x))).flatten(2).amax(2))


class InstanceNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.InstanceNorm2d(6, affine=True)
        self.two, self.bare = nn.Conv2d(6, 5, 3, padding=1), nn.InstanceNorm2d(5)
        self.slope, self.out = nn.PReLU(5), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.one(x)))
        return self.out(self.slope(self.bare(self.two(x))).flatten(2).amax(2))


class GroupedThenNormed(nn.Module):
    """A grouped convolution asks for the same place in each group, a norm for whole groups: together for all of both."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 8, 1)
        self.two, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.GroupNorm(4, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.two(F.relu(self.one(x))))
        return self.out(F.relu(self.norm(x)).flatten(2).amax(2))


class PartlyJoined(nn.Module):
    """Two branches side by side, added to one wide one: its channels leave with the left or with the right."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.left, self.right = nn.Conv2d(1, 7, 3, padding=1), nn.Conv2d(1, 4, 1), nn.Conv2d(1, 3, 1)
        self.norm, self.out = nn.BatchNorm2d(7), nn.Linear(7, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wide(x) + torch.cat([self.left(x), self.right(x)], 1)
        return self.out(F.relu(self.norm(x)).mean((2, 3)))


class PartlyNormed(nn.Module):
    """The width behind a LayerNorm stays, hidden neurons can go."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.up, self.down = nn.Linear(16, 8), nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1))
        return self.out(x + self.down(F.gelu(self.up(self.norm(x)))))


class PartlyTied(nn.Module):
    """Two layers share a weight and stay as they are; a third can be cut."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.out = (nn.Linear(*s) for s in ((16, 16), (16, 16), (16, 9), (9, 4)))
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x.flatten(1)))))
        return self.out(torch.relu(self.three(x)))


HANDLED |= {
    "squashed": Squashed,
    "grouped": Grouped,
    "depthwise": Depthwise,
    "group norm": GroupNormed,
    "instance norm": InstanceNormed,
    "grouped, normed": GroupedThenNormed,
    "partly joined": PartlyJoined,
    "partly normed": PartlyNormed,
    "partly tied": PartlyTied,
}


class OddNormed(nn.Module):
    """A GroupNorm over two branches, whose middle group holds channels of both: no whole group comes from one branch."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.norm = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 1, 1), nn.GroupNorm(2, 4)
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.left(x), self.right(x)], 1)
        return self.out(F.relu(self.norm(x)).flatten(2).amax(2))


class Transposed(nn.Module):
    def __init__(self, groups: int = 1) -> None:
        super().__init__()
        self.one, self.up, self.out = nn.Conv2d(1, 4, 1), nn.ConvTranspose2d(4, 6, 2, groups=groups), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.up(torch.relu(self.one(x)))).mean((2, 3)))


HANDLED["transposed"] = Transposed


class Scaled(nn.Module):
    """A parameter of no known layer spans the channels: it leaves with them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.out, self.scale = nn.Linear(16, 8), nn.Linear(8, 4), nn.Parameter(torch.randn(8))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(self.one(x.flatten(1))) * self.scale)


HANDLED |= {"parameter": Scaled, "grouped and transposed": lambda: Transposed(2)}


class Attending(nn.Module):
    """Attention over the image's four rows, with separate projections; ``kv_heads`` below ``heads`` shares them."""

    def __init__(self, heads: int = 4, kv_heads: int = 4, size: int = 3) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = heads, kv_heads
        self.query, self.key = nn.Linear(4, heads * size), nn.Linear(4, kv_heads * size)
        self.value, self.out = nn.Linear(4, kv_heads * size, bias=False), nn.Linear(heads * size, 4)

    def forward(self, x: Tensor) -> Tensor:
        q = self.query(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k, v = (p(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2) for p in (self.key, self.value))
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Attentive(nn.Module):
    def __init__(self, kv_heads: int = 4) -> None:
        super().__init__()
        self.attention, self.norm, self.head = Attending(4, kv_heads), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        return self.head(self.norm(x + self.attention(x)).mean(1))


class Fused(nn.Module):
    """One layer for queries, keys and values, and an inner width beside the number of heads."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        self.num_heads, self.inner_dim = 4, 8
        self.embed, self.qkv = nn.Linear(4, 6), nn.Linear(6, 24, bias=bias)
        self.proj, self.head = nn.Linear(8, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.squeeze(1))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.inner_dim)
        return self.head((x + self.proj(mixed)).mean(1))


class Packed(nn.Module):
    """torch's own attention, batch last or first, with other sizes of keys and values if asked for."""

    def __init__(self, batch_first: bool = True, other: bool = False, bias: bool = True) -> None:
        super().__init__()
        sizes = {"kdim": 4, "vdim": 4} if other else {}
        self.embed = nn.Linear(4, 12)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=batch_first, bias=bias, **sizes)
        self.head, self.other = nn.Linear(12, 4), other

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        q = self.embed(x)
        k = x if self.other else q
        if not self.attention.batch_first:
            q, k = q.transpose(0, 1), k.transpose(0, 1)
        y, weights = self.attention(q, k, k)
        y = y if self.attention.batch_first else y.transpose(0, 1)
        return self.head(y.mean(1)) + weights.mean((1, 2), keepdim=True)[:, 0]


class Encoder(nn.Module):
    """torch's own encoder, which has a fused path for evaluation."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 4, 10, batch_first=True, norm_first=norm_first)
        self.embed = nn.Linear(4, 8)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.squeeze(1))).mean(1))


class Bert(nn.Module):
    """Projections of which no one module says what they are together."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d, self.head = (nn.Linear(*s) for s in ((4, 6), (4, 6), (4, 6), (6, 4), (4, 4)))

    def forward(self, x: Tensor) -> Tensor:
        x = x.squeeze(1)
        q, k, v = (p(x).unflatten(-1, (-1, 2)).transpose(1, 2) for p in (self.a, self.b, self.c))
        return self.head((x + self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))).mean(1))


ATTENTIVE: dict[str, Callable[[], nn.Module]] = {
    "separate": Attentive,
    "grouped queries": lambda: Attentive(2),
    "fused": Fused,
    "fused, no bias": lambda: Fused(bias=False),
    "packed": Packed,
    "packed, batch last": lambda: Packed(batch_first=False),
    "packed, other sizes": lambda: Packed(other=True),
    "packed, no bias": lambda: Packed(bias=False),
    "encoder": Encoder,
    "encoder, norm first": lambda: Encoder(norm_first=True),
}


class ResidualBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 5, 3, padding=1), nn.BatchNorm2d(5)
        self.conv2, self.norm2 = nn.Conv2d(5, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return F.relu(x + scale * self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x))))))


class Stack(nn.Module):
    """Residual blocks with a ReLU behind the sum, called with another argument; the last member is no such block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 3, 1)
        self.blocks = nn.ModuleList(ResidualBlock() for _ in range(3))
        self.tail = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        self.out = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x, scale=0.5)
        return self.out(self.tail(x).mean((2, 3)))


class PreNormStack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(self.Block() for _ in range(3)))
        self.out = nn.Linear(16, 4)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 8), nn.Linear(8, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.encoder(x.flatten(1)))


class TinyRouter(nn.Module):
    """Chooses two of the experts for every token, as transformers' routers answer."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.top_k, self.num_experts = 2, experts
        self.weight = nn.Parameter(torch.randn(experts, 8))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(x, self.weight)
        scores, chosen = logits.softmax(-1).topk(self.top_k)
        return logits, scores / scores.sum(-1, keepdim=True), chosen


class TinyExperts(nn.Module):
    """Gated experts in two tensors, ``(experts, outputs, inputs)``."""

    def __init__(self, experts: int, neurons: int = 16) -> None:
        super().__init__()
        self.num_experts, self.intermediate_dim = experts, neurons
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * neurons, 8) / 3)
        self.down_proj = nn.Parameter(torch.randn(experts, 8, neurons) / 3)

    def forward(self, x: Tensor, chosen: Tensor, scores: Tensor) -> Tensor:
        gate, up = torch.einsum("th,eoh->teo", x, self.gate_up_proj).chunk(2, -1)
        out = torch.einsum("teo,eho->teh", F.silu(gate) * up, self.down_proj)
        return (out.gather(1, chosen[..., None].expand(-1, -1, 8)) * scores[..., None]).sum(1)


class Mixture(nn.Module):
    """Experts behind a router of its own, or behind a linear layer."""

    def __init__(self, linear: bool = False) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(16, 8), nn.Linear(8, 3)
        self.top_k = 2
        self.gate = nn.Linear(8, 5) if linear else TinyRouter(5)
        self.experts = TinyExperts(5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x.flatten(1))
        if isinstance(self.gate, nn.Linear):
            scores, chosen = self.gate(x).softmax(-1).topk(self.top_k)
        else:
            _, scores, chosen = self.gate(x)
        return self.head(x + self.experts(x, chosen, scores))


class Feeding(nn.Module):
    """An MLP whose names are of no known family."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.narrow(F.gelu(self.wide(x.flatten(1))))


MIXED: dict[str, Callable[[], nn.Module]] = {"router": Mixture, "linear router": lambda: Mixture(linear=True)}

STACKED: dict[str, Callable[[], nn.Module]] = {
    "blocks": Stack,
    "pre-norm": PreNormStack,
    "torch's own": lambda: Encoder(norm_first=True),
}

ALL = {**HANDLED, **ATTENTIVE, **STACKED}
OF: dict[str, dict[str, Callable[[], nn.Module]]] = {
    "channels": ALL, "heads": ATTENTIVE, "layers": STACKED, "experts": MIXED, "neurons": {"mixed": Mixture, "unnamed": Feeding},
}  # fmt: skip


def has_units(structure: str, model: nn.Module) -> bool:
    try:
        return bool(find_groups(structure, model.eval(), IMAGES))
    except StructureError:
        return False


def models_of(structure: str) -> dict[str, Callable[[], nn.Module]]:
    """The models that units can be cut from: those in ``OF``, or for a structure that is not named there whichever has some."""
    return OF.get(structure) or {name: build for name, build in ALL.items() if has_units(structure, build())}


CASES = [(structure, name, build) for structure in GROUPED for name, build in models_of(structure).items()]
"""Structure, name, model: all that units can be cut from, for every structure in the table."""

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "layer norm": (Normed, r"one: norm is a LayerNorm"),
    "group norm": (OddNormed, r"left#1: all of its channels can only go together"),
    "counting": (Counting, r"one: .*counts its units"),
    "tied": (Tied, r"two\.weight is tied to one\.weight"),
    "output only": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 4)), "only its output layer"),
}
