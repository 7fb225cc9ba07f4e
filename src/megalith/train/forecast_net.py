"""The network of the load forecaster: inverted embedding, attention by levels, a Gaussian head, a Real-NVP flow.

After HARMONY's forecasting stage (its released model, and Real-NVP: Dinh, Sohl-Dickstein and Bengio, ICLR 2017). Three
things differ, because the released code does not train a distribution: it minimises the squared error of a transformed
mean. Here the likelihood of what came is computed through the inverse of the flow; the flow is conditioned on the
encoding, so that its shape may change with the state; and every token has a learned identity beside its window. Knows
tensors; must not know files, scaling or training.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from megalith.base.config import Config
from megalith.base.errors import ConfigError

CALENDAR = 4
"""Tokens of the calendar: sine and cosine of the day and of the week."""
_LEAST_STD = 1e-3
"""Of the Gaussian, in standard deviations of the window: a load that stands still has no infinite density."""
_LARGEST_LOG_SCALE = 2.0
"""A coupling layer stretches by at most e**2; Real-NVP bounds the scale by a tanh too."""
_LOG_ROOT_2PI = 0.5 * math.log(2 * math.pi)


class NetOptions(Config):
    """Sizes. The published ones are d 512, 8 heads, inner 2,048; these train in minutes on a processor."""

    width: int = 128
    layers: int = 2
    heads: int = 4
    inner: int = 256
    dropout: float = 0.1
    flows: int = 2
    """Pairs of coupling layers; 0 is the Gaussian head alone."""
    flow_width: int = 64

    def __post_init__(self) -> None:
        sizes = {"width": self.width, "layers": self.layers, "heads": self.heads, "inner": self.inner,
                 "flow_width": self.flow_width}  # fmt: skip
        for name, size in sizes.items():
            if not 1 <= size <= 4096:
                raise ConfigError(f"A forecaster with {name} {size} cannot be.", "Give 1 to 4096.")
        if self.width % self.heads:
            raise ConfigError(f"{self.heads} heads do not divide a width of {self.width}.", "Give 4 and 128.")
        if not 0 <= self.flows <= 16 or not 0 <= self.dropout < 1:
            raise ConfigError(f"{self.flows} flows or a dropout of {self.dropout:g} cannot be.", "Give 2 and 0.1.")


class LevelAttention(nn.Module):
    """Attention from the top down: at each level the tokens of that level attend to each other and to what the level
    above gave out. Level 1 is the top (calendar, traffic), then services, then resources and the load."""

    def __init__(self, width: int, heads: int, levels: list[int], dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.drop = nn.Dropout(dropout)
        order = sorted(set(levels))
        self._places = [[place for place, level in enumerate(levels) if level == wanted] for wanted in order]
        self._back = torch.tensor([place for places in self._places for place in places]).argsort()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (batch, tokens, width) -> the same shape."""
        query, key, value = self.project(tokens).chunk(3, dim=-1)
        above: Tensor | None = None
        found = []
        for places in self._places:
            mine = [part[:, places] for part in (query, key, value)]
            if above is not None:  # the level above is looked at as it came out, in every role it can have here
                mine[1], mine[2] = torch.cat([mine[1], above], 1), torch.cat([mine[2], above], 1)
            above = self._attend(*mine)
            found.append(above)
        mixed: Tensor = self.out(torch.cat(found, 1)[:, self._back])
        return mixed

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        split = [part.view(*part.shape[:2], self.heads, -1).transpose(1, 2) for part in (query, key, value)]
        scores = self.drop(torch.softmax(split[0] @ split[1].transpose(-1, -2) / math.sqrt(split[0].shape[-1]), -1))
        mixed: Tensor = (scores @ split[2]).transpose(1, 2).flatten(-2)
        return mixed


class Layer(nn.Module):
    """Attention by levels and a feed-forward part, each with a residual and a norm after it."""

    def __init__(self, options: NetOptions, levels: list[int]) -> None:
        super().__init__()
        self.attention = LevelAttention(options.width, options.heads, levels, options.dropout)
        self.first, self.second = nn.LayerNorm(options.width), nn.LayerNorm(options.width)
        self.feed = nn.Sequential(
            nn.Linear(options.width, options.inner), nn.GELU(), nn.Dropout(options.dropout),
            nn.Linear(options.inner, options.width),
        )  # fmt: skip
        self.drop = nn.Dropout(options.dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, width) -> the same shape."""
        tokens = self.first(tokens + self.drop(self.attention(tokens)))
        out: Tensor = self.second(tokens + self.drop(self.feed(tokens)))
        return out


class Coupling(nn.Module):
    """One affine coupling layer. What the mask keeps stays as it is and says, with the encoding, how the rest is
    stretched and moved. It begins as the identity."""

    def __init__(self, size: int, context: int, hidden: int, odd: bool) -> None:
        super().__init__()
        mask = (torch.arange(size) % 2 == int(odd)).float()
        self.register_buffer("mask", mask)
        self.mask: Tensor
        self.net = nn.Sequential(nn.Linear(size + context, hidden), nn.ReLU(), nn.Linear(hidden, 2 * size))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def _how(self, kept: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        scale, shift = self.net(torch.cat([kept, context], -1)).chunk(2, -1)
        free = 1 - self.mask
        return _LARGEST_LOG_SCALE * torch.tanh(scale) * free, shift * free

    def forward(self, base: Tensor, context: Tensor) -> Tensor:
        """From the base to the load: (..., size) and (..., context) -> (..., size)."""
        scale, shift = self._how(base * self.mask, context)
        return base * torch.exp(scale) + shift

    def inverse(self, value: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """From the load to the base, and the log of how much the way back stretches, (...)."""
        scale, shift = self._how(value * self.mask, context)
        return (value - shift) * torch.exp(-scale), -scale.sum(-1)


class ForecastNet(nn.Module):
    """A window of indicators -> the joint distribution of the load in the next `horizon` steps.

    Everything is in units of the window: less its mean, over its standard deviation. Coupling layers need two
    dimensions, so at least two steps are forecast together; they are the dimensions of the flow.
    """

    def __init__(self, options: NetOptions, window: int, levels: list[int], target: int, horizon: int) -> None:
        """`levels` of the indicators, from 1; the calendar's tokens are added at level 1."""
        super().__init__()
        if horizon < 2:
            raise ConfigError(f"A horizon of {horizon} has no two steps to couple.", "Forecast at least 2 steps.")
        self.target, self.horizon = target, horizon
        levels = [*levels, *[1] * CALENDAR]
        self.embed = nn.Linear(window, options.width)
        self.identity = nn.Parameter(0.02 * torch.randn(len(levels), options.width))
        self.drop = nn.Dropout(options.dropout)
        self.layers = nn.ModuleList(Layer(options, levels) for _ in range(options.layers))
        self.head = nn.Linear(options.width, 2 * horizon)
        self.flow = nn.ModuleList(
            Coupling(horizon, options.width, options.flow_width, odd)
            for _ in range(options.flows)
            for odd in (False, True)
        )

    def encode(self, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """windows (batch, window, indicators + calendar) -> encoding (batch, width), mean and standard deviation of
        the base (batch, horizon). The mean counts from the last value: knowing nothing it says that all stays."""
        tokens = self.drop(self.embed(windows.transpose(1, 2)) + self.identity)
        for layer in self.layers:
            tokens = layer(tokens)
        encoding = tokens[:, self.target]
        mean, spread = self.head(encoding).chunk(2, -1)
        return encoding, mean + windows[:, -1:, self.target], nn.functional.softplus(spread) + _LEAST_STD

    def negative_log_likelihood(self, windows: Tensor, loads: Tensor) -> Tensor:
        """loads (batch, horizon) in units of the window -> nats for each of the batch."""
        encoding, mean, std = self.encode(windows)
        value, log_stretch = loads, torch.zeros(len(loads), dtype=loads.dtype)
        for layer in reversed(self.flow):
            assert isinstance(layer, Coupling)
            value, more = layer.inverse(value, encoding)
            log_stretch = log_stretch + more
        normal = 0.5 * ((value - mean) / std).square() + torch.log(std) + _LOG_ROOT_2PI
        return normal.sum(-1) - log_stretch

    def sample(self, windows: Tensor, count: int, dice: torch.Generator) -> Tensor:
        """(batch, count, horizon) in units of the window: every sample goes through the flow by itself."""
        encoding, mean, std = self.encode(windows)
        drawn = torch.randn(len(windows), count, self.horizon, generator=dice, dtype=mean.dtype)
        value = mean[:, None] + std[:, None] * drawn
        context = encoding[:, None].expand(-1, count, -1)
        for layer in self.flow:
            value = layer(value, context)
        return value
