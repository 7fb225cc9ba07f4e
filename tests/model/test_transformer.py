"""The torch decoder against transformers on tiny random models, read from safetensors directories."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megalith.model.checkpoint import open_checkpoint
from megalith.model.source import resolve
from megalith.model.transformer import Attend, Transformer, causal_attention, plain_linear
from tests.model import tiny

_IDS = random.Random(3).choices(range(320), k=40)


def _ours(model: Transformer, ids: list[int]) -> Tensor:
    with torch.inference_mode():
        attend = causal_attention(model.spec, [0, len(ids)])
        return model.head(model(torch.tensor(ids), torch.arange(len(ids)), attend))


@pytest.mark.parametrize("case", tiny.CASES)
def test_logits_equal_transformers(case: str, tmp_path: Path) -> None:
    reference = tiny.make(case)
    folder = tiny.save(reference, tmp_path / case)
    model = Transformer(open_checkpoint(resolve(str(folder))))
    expected, found = tiny.logits(reference, _IDS), _ours(model, _IDS)
    # A random model tells its tokens apart; a model that ignored its input would pass a test of near-zeros.
    assert expected.std() > 0.5
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama3-rope", "gemma3", "mistral-window"])
def test_what_makes_a_family_special_matters(case: str, tmp_path: Path) -> None:
    """The control: the same weights described without the rotary scaling or the window give other logits."""
    reference = tiny.make(case)
    folder = tiny.save(reference, tmp_path / case)
    config = folder / "config.json"
    text = config.read_text()
    changed = text.replace('"factor": 8.0', '"factor": 1.0').replace('"sliding_window": 7', '"sliding_window": 70')
    assert changed != text
    config.write_text(changed)
    model = Transformer(open_checkpoint(resolve(str(folder))))
    assert (_ours(model, _IDS) - tiny.logits(reference, _IDS)).abs().max() > 0.01


@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_shards_read_like_one_file(case: str, tmp_path: Path) -> None:
    reference = tiny.make(case)
    folder = tiny.save(reference, tmp_path / case, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    model = Transformer(open_checkpoint(resolve(str(folder))))
    torch.testing.assert_close(_ours(model, _IDS), tiny.logits(reference, _IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["llama", "qwen2", "gemma3"])
def test_half_precision_files_are_read_exactly(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.save(tiny.make(case).to(dtype), tmp_path / case)
    reference = tiny.make(case)
    with torch.no_grad():
        # Only the weights: a whole model that went through half precision has rounded rotary frequencies too.
        for weight in reference.parameters():
            weight.copy_(weight.to(dtype))
    checkpoint = open_checkpoint(resolve(str(folder)))
    assert set(checkpoint.formats()) <= {"F32", "BF16" if dtype == torch.bfloat16 else "F16"}
    torch.testing.assert_close(_ours(Transformer(checkpoint), _IDS), tiny.logits(reference, _IDS), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3"])
def test_bfloat16_stays_near_float32(case: str, tmp_path: Path) -> None:
    folder = tiny.save(tiny.make(case), tmp_path / case)
    checkpoint = open_checkpoint(resolve(str(folder)))
    exact, rounded = _ours(Transformer(checkpoint), _IDS), _ours(Transformer(checkpoint, dtype=torch.bfloat16), _IDS)
    distance = (rounded - exact).norm() / exact.norm()
    assert 0 < distance < 0.06


def test_ragged_rows_in_any_company_give_the_same_hidden_states(tmp_path: Path) -> None:
    folder = tiny.save(tiny.make("gemma3"), tmp_path / "m")
    model = Transformer(open_checkpoint(resolve(str(folder))))
    sequences = [_IDS[:3], _IDS[5:25], _IDS[7:8], _IDS[10:40]]
    starts = [0]
    for ids in sequences:
        starts.append(starts[-1] + len(ids))
    tokens = torch.tensor([i for ids in sequences for i in ids])
    positions = torch.cat([torch.arange(len(ids)) for ids in sequences])
    with torch.inference_mode():
        together = model(tokens, positions, causal_attention(model.spec, starts))
        for ids, (start, end) in zip(sequences, itertools.pairwise(starts), strict=True):
            alone = model(torch.tensor(ids), torch.arange(len(ids)), causal_attention(model.spec, [0, len(ids)]))
            torch.testing.assert_close(together[start:end], alone, rtol=1e-5, atol=1e-5)


def test_the_linear_factory_makes_every_matrix_and_only_those(tmp_path: Path) -> None:
    reference = tiny.make("qwen2")
    checkpoint = open_checkpoint(resolve(str(tiny.save(reference, tmp_path / "m"))))
    seen: dict[str, bool] = {}

    class Doubled(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.inner(2 * x) / 2 if not seen[self.name] else self.inner(x)
            return result

        name = ""

    def factory(name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        seen[name] = bias is not None
        made = Doubled(plain_linear(name, weight, bias))
        made.name = name
        return made

    model = Transformer(checkpoint, make_linear=factory)
    expected = {n for n in checkpoint.names() if n.endswith(".weight") and "norm" not in n and n != "embed.weight"}
    assert set(seen) == expected | {"head.weight"}
    assert {n.split(".")[-2] for n, has in seen.items() if has} == {"q", "k", "v"}
    torch.testing.assert_close(_ours(model, _IDS), tiny.logits(reference, _IDS), rtol=1e-4, atol=1e-4)


def test_a_tied_head_costs_no_second_copy(tmp_path: Path) -> None:
    tied = tiny.save(tiny.make("llama-tied"), tmp_path / "tied")
    checkpoint = open_checkpoint(resolve(str(tied)))
    assert "head.weight" not in checkpoint
    model = Transformer(checkpoint)
    assert model.output.weight.data_ptr() == model.embedding.data_ptr()
    assert model.weight_bytes() == checkpoint.weight_bytes()
    assert Transformer(checkpoint, dtype=torch.bfloat16).weight_bytes() < 0.6 * checkpoint.weight_bytes()


def test_attend_sees_rotated_queries_of_the_right_shape(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(resolve(str(tiny.save(tiny.make("qwen3"), tmp_path / "m"))))
    model, calls = Transformer(checkpoint), []
    inner = causal_attention(model.spec, [0, 4])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        calls.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return inner(layer, q, k, v)

    watched: Attend = attend
    with torch.inference_mode():
        model(torch.tensor(_IDS[:4]), torch.arange(4), watched)
    assert calls == [(i, (4, 4, 32), (4, 2, 32), (4, 2, 32)) for i in range(3)]
