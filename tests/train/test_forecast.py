"""The forecaster: a flow that changes variables, exact and resumable training, whole files, true scores."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalith.base.errors import ConfigError, ModelFormatError, ModelNotFound
from megalith.specs.load_series import LoadSeries
from megalith.specs.load_synthetic import LEVELS, SyntheticLoad, synthesize
from megalith.train.forecast import ForecastOptions, fit, load_forecaster
from megalith.train.forecast_net import CALENDAR, Coupling, ForecastNet, LevelAttention, NetOptions
from megalith.train.forecast_score import crps, naive, naive_spread, score
from megalith.train.forecast_windows import SplitOptions, parts

NET = NetOptions(width=8, layers=1, heads=2, inner=8, flow_width=8)
SMALL = ForecastOptions(split=SplitOptions(window=8, horizon=2), net=NET, levels=LEVELS, most_epochs=3, rate=3e-3)


@pytest.fixture(scope="module")
def series() -> LoadSeries:
    return synthesize(SyntheticLoad(steps=220), 1)


def shaken(net: ForecastNet) -> ForecastNet:
    """A flow that is not the identity any more."""
    torch.manual_seed(3)
    with torch.no_grad():
        for layer in net.flow:
            assert isinstance(layer, Coupling)
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    return net.double().eval()


def test_a_coupling_layer_is_undone_by_its_inverse_and_says_how_it_stretches() -> None:
    torch.manual_seed(0)
    layer = Coupling(4, 3, 8, odd=True).double()
    torch.nn.init.normal_(layer.net[2].weight, std=0.5)
    base, context = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    back, stretch = layer.inverse(layer(base, context), context)
    assert torch.allclose(back, base)
    for row in range(5):
        value = layer(base, context)[row]
        jacobian = torch.autograd.functional.jacobian(lambda x, r=row: layer.inverse(x, context[r])[0], value)
        assert float(torch.linalg.slogdet(jacobian)[1]) == pytest.approx(float(stretch[row].detach()), abs=1e-9)


def test_the_likelihood_is_that_of_a_change_of_variables() -> None:
    """Against the Jacobian of the whole way from base to load, by automatic differentiation."""
    net = shaken(ForecastNet(NET, 6, [1, 2], 1, 3))
    windows = torch.randn(1, 6, 2 + CALENDAR, dtype=torch.float64)
    encoding, mean, std = net.encode(windows)

    def load(noise: torch.Tensor) -> torch.Tensor:
        value = mean + std * noise
        for layer in net.flow:
            value = layer(value, encoding)
        return value

    noise = torch.randn(1, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: load(x[None])[0], noise[0])
    wanted = 0.5 * float(noise.square().sum()) + 1.5 * math.log(2 * math.pi) + float(torch.linalg.slogdet(jacobian)[1])
    assert float(net.negative_log_likelihood(windows, load(noise))[0].detach()) == pytest.approx(wanted, rel=1e-9)


def test_samples_follow_the_density() -> None:
    """Mean NLL of its own samples is the entropy; that of another model's samples is larger (Gibbs)."""
    net = shaken(ForecastNet(NET, 6, [1, 2], 1, 2))
    windows = torch.randn(1, 6, 2 + CALENDAR, dtype=torch.float64)
    drawn = net.sample(windows, 1000, torch.Generator().manual_seed(1))[0]
    with torch.no_grad():
        own = net.negative_log_likelihood(windows.expand(1000, -1, -1), drawn).mean()
        moved = net.negative_log_likelihood(windows.expand(1000, -1, -1), drawn * 1.3 + 0.2).mean()
        density = torch.exp(-net.negative_log_likelihood(*grid(windows)))
    assert float(density.sum()) * 0.2 * 0.2 == pytest.approx(1.0, abs=0.02)  # it integrates to one
    assert own < moved


def grid(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    line = torch.arange(-20, 20, 0.2, dtype=torch.float64)
    points = torch.cartesian_prod(line, line)
    return windows.expand(len(points), -1, -1), points


def test_attention_goes_from_the_top_down_only() -> None:
    torch.manual_seed(0)
    attention = LevelAttention(8, 2, [3, 1, 2, 1], 0.0).eval()
    tokens = torch.randn(1, 4, 8)
    before = attention(tokens)
    for changed, reached in ((0, {0}), (2, {0, 2}), (1, {0, 1, 2, 3})):
        other = tokens.clone()
        other[0, changed] += 1.0
        moved = (attention(other) - before).abs().sum(-1)[0] > 1e-6
        assert {place for place in range(4) if moved[place]} == reached


def test_one_step_cannot_be_coupled() -> None:
    with pytest.raises(ConfigError, match="at least 2"):
        ForecastNet(NET, 6, [1], 0, 1)


def test_training_lowers_the_likelihoods_loss_and_is_the_same_again(series: LoadSeries) -> None:
    first, again = fit(series, SMALL), fit(series, SMALL)
    assert first.course.train_nats[-1] < first.course.train_nats[0]
    rows = range(190, 210)
    assert (first.samples(series, rows, 9) == again.samples(series, rows, 9)).all()
    assert first.samples(series, rows, 9).min() >= 0.0


class Stop(Exception):
    """In place of Ctrl-C."""


def test_an_interrupted_training_goes_on_to_the_same_bits(series: LoadSeries, tmp_path: Path) -> None:
    def stop(epoch: int, _nats: float) -> None:
        if epoch == 2:
            raise Stop

    kept = tmp_path / "training"
    with pytest.raises(Stop):
        fit(series, SMALL, kept, stop)
    epochs: list[int] = []
    resumed = fit(series, SMALL, kept, lambda epoch, _nats: epochs.append(epoch))
    assert epochs == [3]
    whole = fit(series, SMALL)
    assert resumed.course.valid_nats == whole.course.valid_nats
    assert (resumed.samples(series, range(200, 204), 5) == whole.samples(series, range(200, 204), 5)).all()
    with pytest.raises(ConfigError, match="other options"):
        fit(series, ForecastOptions(split=SMALL.split, net=NET, levels=LEVELS, most_epochs=5), kept)


def test_a_file_gives_the_same_samples_and_damage_is_seen(series: LoadSeries, tmp_path: Path) -> None:
    trained, path = fit(series, SMALL), tmp_path / "load.npz"
    trained.save(path)
    back = load_forecaster(path)
    assert back.options == trained.options
    assert (back.samples(series, range(200, 204), 5) == trained.samples(series, range(200, 204), 5)).all()
    with pytest.raises(ModelNotFound):
        load_forecaster(tmp_path / "none.npz")
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole.replace(b"head", b"haed")):
        path.write_bytes(damaged)
        with pytest.raises(ModelFormatError):
            load_forecaster(path)


def test_what_does_not_go_together_is_said(series: LoadSeries) -> None:
    trained = fit(series, ForecastOptions(split=SMALL.split, net=NET, most_epochs=1))
    other = LoadSeries(series.names, series.values, 0, series.start_s, series.step_s)
    with pytest.raises(ConfigError, match="trained on"):
        trained.samples(other, range(20, 22))
    slower = LoadSeries(series.names, series.values, series.target, series.start_s, 60.0)
    with pytest.raises(ConfigError, match="steps of 1800 s"):
        trained.samples(slower, range(20, 22))
    with pytest.raises(ConfigError, match="windows of 8"):
        trained.samples(series, range(7, 9))
    with pytest.raises(ConfigError, match="Levels name cpu"):
        fit(series, ForecastOptions(split=SMALL.split, net=NET, levels={"cpu": 1}))
    with pytest.raises(ConfigError, match="220 rows; a window of 200"):
        parts(len(series), SplitOptions(window=200))


def test_the_parts_do_not_overlap() -> None:
    split = parts(1000, SplitOptions(window=144, horizon=4))
    assert split.train.stop + 3 <= split.valid.start
    assert split.valid.stop + 3 <= split.test.start
    assert (split.train.start, split.test.stop + 3) == (144, 1000)


@settings(max_examples=30)
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=12), st.floats(-5, 5))
def test_crps_is_that_of_its_definition(samples: list[float], came: float) -> None:
    count = len(samples)
    near = sum(abs(x - came) for x in samples) / count
    spread = sum(abs(x - y) for x in samples for y in samples) / (count * (count - 1))
    assert crps(np.array([samples]), np.array([came]))[0] == pytest.approx(near - spread / 2, abs=1e-9)


def test_crps_of_a_normal_is_the_closed_form() -> None:
    """For N(0, 1) at y: y (2 Phi(y) - 1) + 2 phi(y) - 1 / sqrt(pi) (Gneiting and Raftery, 2007)."""
    drawn = np.random.Generator(np.random.PCG64(1)).normal(size=(1, 200_000))
    for came in (0.0, 1.5):
        phi = math.exp(-came * came / 2) / math.sqrt(2 * math.pi)
        wanted = came * math.erf(came / math.sqrt(2)) + 2 * phi - 1 / math.sqrt(math.pi)
        assert crps(drawn, np.array([came]))[0] == pytest.approx(wanted, abs=0.005)


def test_coverage_counts_what_lies_inside() -> None:
    samples = np.tile(np.linspace(0, 100, 101), (4, 1))
    found = score(samples, np.array([50.0, 4.0, 96.0, 95.0]))
    assert (found.coverage, found.late, found.width) == (0.5, 0.25, 90.0)


def test_naive_forecasts_know_only_what_is_before() -> None:
    load = np.arange(20.0)
    assert naive(load, range(10, 11), 1, 3)[0, 0].tolist() == [9.0, 9.0, 9.0]
    assert naive(load, range(10, 11), 2, 4)[0, 0].tolist() == [8.0, 9.0, 8.0, 9.0]
    spread = naive_spread(load, range(10, 11), range(3, 9), 1, 3, 50, 0)
    assert (spread[0] - np.array([9.0, 9.0, 9.0]) == np.array([1.0, 2.0, 3.0])).all()  # its errors on a straight line
