"""Multiply-accumulates against closed formulas, and models left as they were."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from prunekit import UsageError
from prunekit.measure import latencies, sizes

N, L, M, D, H, W = 3, 5, 7, 8, 2, 4  # samples, queries, keys, width, heads, hidden units
BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


class Calling(nn.Module):
    """A function of its inputs, with the modules that it uses."""

    def __init__(self, function: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.function, self.inner = function, nn.ModuleList(modules)

    def forward(self, *inputs: Any) -> Any:
        return self.function(*self.inner, *inputs)


def attention(queries: int, keys: int, width: int, value: int | None = None, samples: int = 1) -> int:
    return samples * queries * keys * (width + (width if value is None else value))


def encoder_layer(length: int, width: int, wide: int, samples: int = 1) -> int:
    return samples * length * (4 * width * width + 2 * width * wide) + attention(length, length, width, samples=samples)


T = torch.randn
LAYERS: dict[str, tuple[nn.Module, Any, int]] = {
    "linear": (nn.Linear(6, 4), T(N, L, 6), N * L * 24),
    "linear of a vector": (nn.Linear(6, 4), T(6), 24),
    "conv1d": (nn.Conv1d(6, 4, 3, stride=2), T(N, 6, 9), N * 4 * 6 * 3 * 4),
    "conv2d grouped": (nn.Conv2d(6, 4, (3, 2), groups=2, padding=1), T(N, 6, 5, 5), N * 5 * 6 * 4 * 3 * 6),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), T(N, 6, 5, 5), N * 9 * 6 * 9),
    "conv3d": (nn.Conv3d(2, 4, 3), T(1, 2, 5, 5, 5), 27 * 4 * 2 * 27),
    "dilated": (nn.Conv1d(2, 3, 3, dilation=2), T(N, 2, 9), N * 5 * 3 * 2 * 3),
    "transposed 1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, groups=2), T(N, 6, 5), N * 5 * 6 * 2 * 3),
    "transposed 2d": (nn.ConvTranspose2d(6, 4, 2, stride=2), T(N, 6, 3, 3), N * 9 * 6 * 4 * 4),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2), T(1, 2, 3, 3, 3), 27 * 2 * 3 * 8),
    "without a batch axis": (nn.Conv2d(2, 3, 3), T(2, 5, 5), 9 * 3 * 2 * 9),
    "bilinear": (nn.Bilinear(3, 4, 5), (T(N, L, 3), T(N, L, 4)), N * L * 60),
    "embedding": (nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 2)), torch.zeros(N, L, dtype=torch.long), N * L * 12),
    "embedding bag": (nn.EmbeddingBag(9, 6), torch.zeros(N, L, dtype=torch.long), 0),
    "norms": (nn.Sequential(nn.LayerNorm(6), nn.ReLU(), nn.Dropout(0.5)), T(N, 6), 0),
    "matrix by vector": (Calling(lambda a, v: a @ v), (T(L, 6), T(6)), L * 6),
    "dot": (Calling(lambda v: v @ v), (T(6),), 6),
    "batched": (Calling(torch.bmm), (T(N, L, 6), T(N, 6, 4)), N * L * 24),
    "baddbmm": (Calling(torch.baddbmm), (T(N, L, 4), T(N, L, 6), T(N, 6, 4)), N * L * 24),
    "addbmm": (Calling(torch.addbmm), (T(L, 4), T(N, L, 6), T(N, 6, 4)), N * L * 24),
    "addmv": (Calling(torch.addmv), (T(L), T(L, 6), T(6)), L * 6),
    "einsum": (Calling(lambda a, b: torch.einsum("nld,nmd->nlm", a, b)), (T(N, L, 6), T(N, M, 6)), N * L * M * 6),
    "conv_tbc": (Calling(torch.conv_tbc), (T(L, N, 6), T(3, 6, 4), T(4)), 3 * N * 3 * 24),
}  # fmt: skip


@BOTH
@pytest.mark.parametrize("name", LAYERS)
def test_layers(name: str, dtype: torch.dtype) -> None:
    layer, inputs, right = LAYERS[name]
    assert sizes(copy.deepcopy(layer).to(dtype), inputs)["macs"] == right


def recurrent(gates: int, inputs: int, hidden: int, layers: int = 1, ways: int = 1, proj: int = 0) -> int:
    """Of one time step of one sample."""
    out, total = proj or hidden, 0
    for layer in range(layers):
        into = inputs if layer == 0 else ways * out
        total += ways * (gates * hidden * (into + out) + hidden * proj)
    return total


@BOTH
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"num_layers": 2, "bidirectional": True}, {"batch_first": True}, {"bias": False}, {"proj_size": 2}]
)
def test_recurrent_layers(kind: Any, gates: int, options: dict[str, Any], packed: bool, dtype: torch.dtype) -> None:
    if "proj_size" in options and kind is not nn.LSTM:
        return
    layer = kind(6, W, **options)
    each = recurrent(
        gates, 6, W, options.get("num_layers", 1), 1 + options.get("bidirectional", False), options.get("proj_size", 0)
    )
    x, lengths = T(N, L, 6) if options.get("batch_first") else T(L, N, 6), [5, 3, 2]
    model: nn.Module = layer
    if packed:
        pack = nn.utils.rnn.pack_padded_sequence
        model = Calling(lambda layer, x: layer(pack(x, lengths, batch_first=options.get("batch_first", False))), layer)
    assert sizes(model.to(dtype), x)["macs"] == (sum(lengths) if packed else N * L) * each


@BOTH
@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTMCell, 4), (nn.GRUCell, 3), (nn.RNNCell, 1)])
def test_recurrent_cells(kind: Any, gates: int, dtype: torch.dtype) -> None:
    assert sizes(kind(6, W).to(dtype), T(N, 6))["macs"] == N * recurrent(gates, 6, W)


@BOTH
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(weights: bool, masked: bool, dtype: torch.dtype) -> None:
    layer = nn.MultiheadAttention(D, H, batch_first=True)
    mask = torch.zeros(N, L, dtype=torch.bool) if masked else None
    model = Calling(lambda layer, x: layer(x, x, x, key_padding_mask=mask, need_weights=weights), layer).to(dtype)
    assert sizes(model, T(N, L, D))["macs"] == N * L * 4 * D * D + attention(L, L, D, samples=N)


def test_attention_across() -> None:
    layer = nn.MultiheadAttention(D, H, kdim=6, vdim=3, batch_first=True)
    right = N * (2 * L * D * D + M * 6 * D + M * 3 * D) + attention(L, M, D, samples=N)
    assert sizes(layer, (T(N, L, D), T(N, M, 6), T(N, M, 3)))["macs"] == right


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, None])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"attn_mask": torch.zeros(L, M)}, {"scale": 0.1}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_attention_products(backend: SDPBackend | None, options: dict[str, Any], dtype: torch.dtype) -> None:
    options = {key: v.to(dtype) if isinstance(v, Tensor) else v for key, v in options.items()}

    def attend(query: Tensor, key: Tensor) -> Tensor:
        if backend is None:
            return F.scaled_dot_product_attention(query, key, key, **options)
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, key, **options)

    found = sizes(Calling(attend), (T(N, H, L, D).to(dtype), T(N, H, M, D).to(dtype)))["macs"]
    assert found == attention(L, M, D, samples=N * H)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_attention_whose_heads_share_keys(backend: SDPBackend) -> None:
    def attend(query: Tensor, key: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(query, key, key, enable_gqa=True)

    assert sizes(Calling(attend), (T(N, 4, L, D), T(N, 2, M, D)))["macs"] == attention(L, M, D, samples=N * 4)


@BOTH
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_encoder_of_torch(first: bool, masked: bool, dtype: torch.dtype) -> None:
    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True, norm_first=first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not first).to(dtype)
    inputs: Any = T(N, L, D)
    if masked:
        padding = torch.zeros(N, L, dtype=torch.bool)
        padding[0, 3:] = True
        inputs = {"src": inputs, "src_key_padding_mask": padding}
    before = torch.backends.mha.get_fastpath_enabled()
    assert sizes(model, inputs)["macs"] == 2 * encoder_layer(L, D, 16, N)
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_the_decoder_and_the_whole_transformer() -> None:
    model = nn.Transformer(D, H, 1, 1, 16, batch_first=True)
    cross = N * (2 * L * D * D + 2 * M * D * D) + attention(L, M, D, samples=N)
    right = encoder_layer(M, D, 16, N) + encoder_layer(L, D, 16, N) + cross
    assert sizes(model, (T(N, M, D), T(N, L, D)))["macs"] == right


@pytest.mark.parametrize("enabled", [True, False])
def test_the_fast_path_is_as_it_was_even_after_an_error(enabled: bool) -> None:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        model = nn.TransformerEncoderLayer(D, H, 16, batch_first=True).train()
        with pytest.raises(AssertionError):
            sizes(model, T(N, L, D + 1))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
        assert all(module.training for module in model.modules())
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class Counting(nn.Module):
    """Notes every pass in a buffer, in one that it replaces, and in random numbers."""

    total: Tensor
    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.frozen = nn.Linear(3, 2), nn.BatchNorm1d(3)
        self.register_buffer("total", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Any]:
        self.total += 1
        self.last = torch.rand(())
        return {"out": self.inner(self.frozen(x)), "kept": [x]}


@pytest.mark.parametrize("measured", [lambda m, x: sizes(m, x), lambda m, x: latencies({"m": m}, x, runs=1)])
def test_a_model_is_left_as_it_was(measured: Callable[[nn.Module, Any], Any]) -> None:
    model, x = Counting().train(), T(4, 3)
    model.frozen.eval()  # a part of it is frozen
    before, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    objects, seed = [id(b) for b in model.buffers()], torch.get_rng_state()
    measured(model, {"x": x})
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [id(b) for b in model.buffers()] == objects
    assert torch.equal(torch.get_rng_state(), seed)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


class Cached(nn.Module):
    """Attends to what it has seen so far, which is with the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(D, D)

    def forward(self, x: Tensor, past: Any) -> Tensor:
        past.seen.append(self.project(x))
        return F.scaled_dot_product_attention(x, torch.cat(past.seen, 1), torch.cat(past.seen, 1))


class Past:
    def __init__(self) -> None:
        self.seen: list[Tensor] = []


def test_a_cache_among_the_inputs_does_not_grow() -> None:
    inputs = {"x": T(N, L, D), "past": Past()}
    model = Cached()
    right = N * L * D * D + attention(L, L, D, samples=N)
    assert sizes(model, inputs)["macs"] == right
    latencies({"m": model}, inputs, runs=1)
    assert sizes(model, inputs)["macs"] == right
    assert inputs["past"].seen == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_inputs_take_the_type_of_the_model(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)).to(dtype)
    assert sizes(model, T(1, 6)) == {"parameters": 38, "nonzero": 38, "macs": 32}
    assert latencies({"m": model, "float": nn.Linear(6, 2)}, T(1, 6), runs=1).keys() == {"m", "float"}


def test_tied_weights_count_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        model[0].weight[0] = 0
    model[1].weight = model[0].weight
    assert sizes(model, T(1, 4)) == {"parameters": 32, "nonzero": 28, "macs": 48}
    model[1].weight = nn.Parameter(model[0].weight.detach().t())
    assert sizes(model, T(1, 4)) == {"parameters": 32, "nonzero": 28, "macs": 48}
    whole = torch.ones(6, 4)
    model[0].weight, model[1].weight = nn.Parameter(whole[:4]), nn.Parameter(whole[2:])
    assert sizes(model, T(1, 4)) == {"parameters": 24 + 16, "nonzero": 24 + 16, "macs": 48}
    model[0].weight, model[1].weight = (nn.Parameter(part) for part in torch.ones(8, 4).split(4))
    assert sizes(model, T(1, 4)) == {"parameters": 48, "nonzero": 48, "macs": 48}


def test_a_model_without_weights_is_refused() -> None:
    with pytest.raises(UsageError, match="meta device has no weights to count"):
        sizes(nn.Linear(2, 2, device="meta"), T(1, 2))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_models_on_a_gpu_take_inputs_from_the_cpu() -> None:
    layer = nn.TransformerEncoderLayer(D, H, 16, batch_first=True)
    models = nn.ModuleDict({"encoder": layer, "lstm": nn.LSTM(D, W), "gru": nn.GRU(D, W, 2, bidirectional=True)}).cuda()
    each = {"encoder": encoder_layer(L, D, 16, N), "lstm": N * L * recurrent(4, D, W), "gru": N * L * recurrent(3, D, W, 2, 2)}
    assert {name: sizes(model, T(N, L, D))["macs"] for name, model in models.items()} == each
    assert latencies({"one": layer, "cpu": nn.Linear(D, 2)}, T(N, L, D), runs=1).keys() == {"one", "cpu"}
