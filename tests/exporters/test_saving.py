"""A pruned class is written to a file, and made again from a fresh module, without tracing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spa
from spa.errors import ModelError, OptionError, UnreadableError, UnsupportedError
from spa.exporters.pytorch import write_back
from spa.exporters.pytorch.saving import ATTRIBUTE, Narrowing, narrow
from spa.exporters.pytorch.sizes import tensors
from tests.exporters.test_write_back import IMAGE, Block, Residual, pruned, size
from tests.exporters.test_write_back_wide import Windowed


class Biasless(nn.Module):
    """Gets a bias by reconstruction, ties a matrix, and keeps a buffer that no state_dict has."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.first = nn.Linear(9, width)
        self.second = nn.Linear(width, 24, bias=False)
        self.third = nn.Linear(24, 24)
        self.fourth = nn.Linear(24, 5)
        self.register_buffer("gain", torch.linspace(1, 2, width), persistent=False)
        self.sizes = (width, 24)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.second(F.relu(self.first(x)) * self.gain))
        return self.fourth(F.relu(self.third(x)))


def same(a: nn.Module, b: nn.Module, example: Tensor) -> bool:
    with torch.no_grad():
        return torch.equal(a.eval()(example), b.eval()(example))


def of(module: nn.Module, example: Tensor, **options: object) -> nn.Module:
    quick = {"exporter": "torchscript"}
    options = {"ratio": 0.5, "criterion": "l2", "round_to": 1, "convert_options": quick, **options}
    options["example_inputs"] = example
    return spa.prune(module, **options).pruned


@pytest.mark.parametrize("name", ["depthwise", "lstm"])
def test_a_fresh_module_becomes_the_pruned_one(tmp_path: Path, name: str) -> None:
    module, result, names, example = pruned(name)
    small = write_back(module, result, names, example)
    spa.save(small, tmp_path / "small.pt")
    fresh = type(module)()
    again = spa.load(tmp_path / "small.pt", fresh)
    assert same(again, small, example)
    assert size(again) == size(small) < size(fresh)
    assert [str(m) for m in again.children()] == [str(m) for m in small.children()]
    assert [f.name for f in tmp_path.iterdir()] == ["small.pt"]


def test_a_fresh_module_gets_the_widths_and_keeps_its_own_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    example = torch.randn(3, 9)
    kept, shapes = {"first.weight": {0: [1, 4, 30]}, "first.bias": {0: [1, 4, 30]}}, {"first.weight": [40, 9]}
    kept |= {"second.weight": {0: range(24), 1: [1, 4, 30]}, "gain": {0: [1, 4, 30]}}
    shapes |= {"first.bias": [40], "second.weight": [24, 40], "gain": [40]}
    small = narrow(Biasless(), Narrowing(kept=kept, shapes=shapes, added={"second.bias": [24]}))
    spa.save(small, tmp_path / "small.pt")
    fresh = Biasless()
    with monkeypatch.context() as patch:
        patch.setattr(Biasless, "forward", None)  # nothing runs it
        made = [spa.narrow(fresh, small), spa.narrow(fresh, tmp_path / "small.pt")]
    for again in made:
        assert torch.equal(again.second.weight, fresh.second.weight[:, [1, 4, 30]])
        assert not again.second.bias.any()  # the constructor makes none
        again.load_state_dict(small.state_dict())
        again.gain.copy_(small.gain)  # in no state_dict
        assert same(again, small, example)
    assert len(fresh.gain) == 40


def test_what_is_no_record_of_the_same_class_narrows_nothing(tmp_path: Path) -> None:
    small = narrow(Biasless(), Narrowing(kept={"first.weight": {0: [1, 4]}}, shapes={"first.weight": [40, 9]}))
    with pytest.raises(ModelError, match="the pruned module is a Biasless, and a Block is given"):
        spa.narrow(Block(), small)
    with pytest.raises(UnsupportedError, match="carries no record of a pruning"):
        spa.narrow(Biasless(), Biasless())
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is no file of spa\.save"):
        spa.narrow(Biasless(), tmp_path / "plan.json")
    with pytest.raises(UnsupportedError, match="Give a flax nnx or equinox module"):
        spa.narrow(lambda x: x, small)
    with pytest.raises(OptionError, match="cannot narrow a str"):
        spa.narrow("net.pt", small)


def test_a_module_trained_further_comes_back_as_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = of(Residual(), IMAGE)
    with torch.no_grad():
        for value in small.parameters():
            value.add_(torch.rand_like(value))
        small(IMAGE)  # statistics
    spa.save(small, tmp_path / "small.pt")
    assert same(spa.load(tmp_path / "small.pt", Residual()), small, IMAGE)
    small.double()  # types are those of the file
    spa.save(small, tmp_path / "small.pt")
    assert same(spa.load(tmp_path / "small.pt", Residual()), small, IMAGE.double())


def test_added_biases_unsaved_buffers_and_a_second_pruning_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example, options = torch.randn(3, 9), {"convert_options": {"exporter": "dynamo"}}  # which names such buffers
    once = of(Biasless(), example, criterion="obspa", samples=64, ratio=0.3, **options)
    assert once.second.bias is not None and len(once.gain) < 40
    once.gain *= 2
    twice = of(once, example, ratio=0.4, **options)
    assert size(twice) < size(once)
    for small in (once, twice):
        spa.save(small, tmp_path / "small.pt")
        again = spa.load(tmp_path / "small.pt", Biasless())
        assert same(again, small, example)
        assert torch.equal(again.gain, small.gain)


def test_parts_that_stay_wide_and_heads_come_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = torch.randn(3, 5, 32)
    with pytest.warns(UserWarning, match="wider than pruning left it"):
        small = of(Windowed(), example)
    spa.save(small, tmp_path / "small.pt")
    assert same(spa.load(tmp_path / "small.pt", Windowed()), small, example)


def test_tied_parameters_stay_one(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(67, 16)
            self.wide, self.narrow = nn.Linear(16, 24), nn.Linear(24, 16)
            self.head = nn.Linear(16, 67, bias=False)
            self.head.weight = self.table.weight

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.table(tokens)
            return self.head(x + self.narrow(F.relu(self.wide(x))))

    torch.manual_seed(0)
    example = torch.randint(67, (3, 6))
    small = of(Tied(), example)
    assert small.table.embedding_dim < 16
    spa.save(small, tmp_path / "small.pt")
    again = spa.load(tmp_path / "small.pt", Tied())
    assert again.head.weight is again.table.weight
    assert same(again, small, example)


def test_another_process_needs_the_class_and_the_file_alone(tmp_path: Path) -> None:
    fresh, example = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.ones(1, 3)
    kept, shapes = {"0.weight": {0: [1, 4]}, "0.bias": {0: [1, 4]}, "2.weight": {1: [1, 4]}}, {}
    shapes = {key: fresh.state_dict()[key].shape for key in kept}
    small = narrow(fresh, Narrowing(kept=kept, shapes=shapes, sizes={"0": {"out_features": 2}}))
    spa.save(small, tmp_path / "small.pt")
    code = (
        "import sys, torch\n"
        "import spa\n"
        "from torch import nn\n"
        "fresh = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))\n"
        "net = spa.load(sys.argv[1], fresh)\n"
        "print(net(torch.ones(1, 3)).tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "small.pt")], capture_output=True, text=True)
    assert done.stdout.strip() == f"{small(example).tolist()}", done.stderr


def test_narrowing_takes_the_kept_indices() -> None:
    fresh = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2))
    narrowing = Narrowing(
        kept={"0.weight": {0: [1, 4]}, "1.weight": {1: [1, 4]}},
        shapes={"0.weight": (5, 3), "1.weight": (2, 5)},
        sizes={"0": {"out_features": 2}, "1": {"in_features": 2}},
        added={"0.bias": [2]},
    )
    small = narrow(fresh, narrowing)
    assert torch.equal(small[0].weight, fresh[0].weight[[1, 4]]) and small[0].weight.requires_grad
    assert torch.equal(small[1].weight, fresh[1].weight[:, [1, 4]])
    assert small[0].bias.tolist() == [0, 0] and small[0].out_features == 2
    assert fresh[0].weight.shape == (5, 3) and not hasattr(fresh, ATTRIBUTE)
    assert set(tensors(small)) == {"0.weight", "0.bias", "1.weight", "1.bias"}


def test_what_does_not_fit_is_refused_with_a_reason(tmp_path: Path) -> None:
    kept, shapes = {"first.weight": {0: [1, 4]}}, {"first.weight": [40, 9]}
    small = narrow(Biasless(), Narrowing(kept=kept, shapes=shapes, added={"second.bias": [24]}))
    file = tmp_path / "small.pt"
    spa.save(small, file)
    with pytest.raises(ModelError, match=r"holds a Biasless, and a Block is given\. .* made with the same arguments"):
        spa.load(file, Block())
    for width in (20, 80):
        with pytest.raises(ModelError, match=r"the module has no 'first\.weight' of the shape \[40, 9\]"):
            spa.load(file, Biasless(width))
    with pytest.raises(ModelError, match=r"has no place for 'third\.bias'"):
        narrow(Biasless(), Narrowing(added={"third.bias": [24]}))
    with pytest.raises(UnsupportedError, match="carries no record of a pruning"):
        spa.save(Biasless(), tmp_path / "other.pt")
    with pytest.raises(UnreadableError):
        spa.load(tmp_path / "none.pt", Biasless())
    torch.save(Biasless().state_dict(), tmp_path / "state.pt")
    (tmp_path / "text.pt").write_text("hello")
    for name in ("state.pt", "text.pt"):
        with pytest.raises(ModelError, match=r"is no file of spa\.save"):
            spa.load(tmp_path / name, Biasless())
    with pytest.raises(OptionError, match="Give a PyTorch, flax or equinox module"):
        spa.save("net", tmp_path / "other.pt")
