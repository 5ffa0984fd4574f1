"""The examples of the documentation and of the README are executed, page by page, on a small trained network."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import networks
from calque import recipe
from recipes import shortened
from slow import slow

ROOT = Path(__file__).resolve().parents[1]
# workers.md starts processes and a cluster: tests/fitting/test_parallel.py and tests/fitting/test_ray.py run what it shows.
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.name != "workers.md")]
FIRST = ("README", "first-model")  # what people meet first is run after each change
STEPS = 20  # of the shipped recipes at most: the pages say what is called, not how well it is fitted
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Example(nn.Module):
    """The network that the pages call `model`: a gate beside a shortcut and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.block = nn.ModuleDict({
            "conv": nn.Conv2d(16, 16, 3, padding=1, bias=False),
            "norm": nn.BatchNorm2d(16),
            "gate": nn.Conv2d(16, 16, 1),
        })  # fmt: skip
        self.head = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, networks.CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.block["norm"](self.block["conv"](x))
        gate = torch.sigmoid(self.block["gate"](F.adaptive_avg_pool2d(y, 1)))
        x = F.relu(x + y * gate)
        logits: Tensor = self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return logits


@pytest.fixture(scope="module")
def model() -> nn.Module:
    network = networks.seeded(Example()).train()
    inputs, kinds = networks.stripes(768, seed=1)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(2)
    for _ in range(80):
        picked = torch.randint(len(inputs), (64,), generator=generator)
        loss = F.cross_entropy(network(inputs[picked]), kinds[picked])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network.eval()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SEQUENTIAL", "ADVANCED"):
        full: recipe.Recipe = getattr(recipe, name)
        short = shortened(full, STEPS)
        monkeypatch.setattr(recipe, name, short)
        monkeypatch.setitem(recipe.RECIPES, full.name, short)


def blocks(page: Path) -> list[str]:
    """The page's Python examples, each behind so many empty lines that a traceback names the page's line."""
    text = page.read_text(encoding="utf-8")
    return ["\n" * (text.count("\n", 0, found.start()) + 1) + found[1] for found in BLOCK.finditer(text)]


def test_every_page_that_should_have_examples_has_some() -> None:
    found = {page.name for page in PAGES if blocks(page)}

    assert {"README.md", "index.md", *(page.name for page in PAGES if page.parent.name == "howto")} <= found


@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize(
    "page", [page if page.stem in FIRST else slow(page) for page in PAGES if blocks(page)], ids=lambda page: page.stem
)
def test_the_examples_of_a_page_run(
    page: Path, model: nn.Module, test_inputs: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    namespace = {"model": model, "calibration": networks.stripes(128, seed=3)[0], "test_inputs": test_inputs}

    for block in blocks(page):
        exec(compile(block, str(page), "exec"), namespace)

    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
