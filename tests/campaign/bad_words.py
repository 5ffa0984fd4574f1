"""What is typed where something else belongs: words for every option, references to functions, and the module with them."""

from .bad_files import DIGITS

MODULE = """
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))


def fails():
    raise ValueError("this one fails")


def nothing():
    return None


def needs(argument):
    return build()


def text(model):
    return "good"


def score(model):
    return 0.5


class Net(nn.Module):
    pass


def kind():
    return Net


def empty():
    return nn.Sequential()


def state():
    return build().state_dict()


def quantized():
    return torch.ao.nn.quantized.Linear(3, 4)


def scripted():
    return torch.jit.script(nn.Linear(3, 4))


def halves():
    return build().half()


def doubles():
    return build().double()


def on_meta():
    return build().to("meta")


def sparse():
    net = build()
    net[3].weight = nn.Parameter(net[3].weight.to_sparse())
    return net


def complexes():
    return build().to(torch.complex64)


def broken():
    net = build()
    with torch.no_grad():
        net[0].weight.fill_(torch.nan)
    return net


def endless():
    net = build()
    with torch.no_grad():
        net[3].weight.fill_(torch.inf)
    return net



instance = build()
number = 3
"""
# What is no part of a number, a name or a path, typed as any option.
WORDS = ("", " ", "nonsense", "-1", "1e999", "nan", "0x10", "9" * DIGITS, "½", "a\0b", "a\udc80b",
    "w8a8;w4a4", "../..", "[1]")  # fmt: skip
WRONG: dict[str, tuple[str, ...]] = {
    "--bits": (*WORDS, "w8a8,w4a4", "w9a8", "w1a8", "w8a9", "w8a1", "a8", "w", "w4g", "w4g0", "w4g-1", f"w4g{10**20}",
        "w8a8,", ",", "8", "w4.5a8"),
    "--size": (*WORDS, "0", "0.13,0.2", "1.5", "101%", "0%", "-5MB", "1XB", "1e400", "0.13 of it", "1MB2"),
    "--bops": (*WORDS, "0", "-3G", "3.5X", "1e400G", "101%", "3GB"),
    "--activation-memory": (*WORDS, "0", "300 k B", "1e400MB", "200%"),
    "--latency": (*WORDS, "table.csv", "=4", "table.csv=", "table.csv=x", "table.csv=-1", "table.csv=nan",
        "missing.csv=4", "inputs.npy=4", ".=4"),
    "--max-loss": ("", "nonsense", "nan", "inf", "-1", "9" * DIGITS, "1e999", "0.5"),
    "--minimize": ("", "nonsense", "size", "loss", "bops", "latency"),
    "--loss": ("", "nonsense", "KL", "mse,kl", "subject:missing", "nowhere:loss", "subject:", ":loss", "subject:number",
        "a\0b:c", "a\udc80b:c"),
    "--override": (*WORDS, "0=w9a8", "=w8a8", "0=", "nowhere=w8a8", "0", "[=w8a8", "0=None", "0=w8a8,w4a4", "*=nonsense"),
    "--recipe": (*WORDS, "quick", "Fast", "nearest.toml", "inputs.npy", "."),
    "--placement": ("", "nonsense", "Integer", "outputs", "integer,inputs"),
    "--first-last": ("", "nonsense", "w9a8", "Auto", "w8a8,w8a8", "null"),
    "--dynamic": ("", "nonsense", "input:", "input:x", "input:-1", "input:9", ":2", "nowhere:2", "input:2,",
        "input:" + "9" * DIGITS, "input:0x2", "input:2.0", "input:²"),
    "--seed": ("", "nonsense", "1.5", "1e3", "9" * 30, "9" * DIGITS, "0x10", "²"),
    "--memory": (*WORDS, "0", "-1GB", "2XB", "1e400GB", "0B", "2 G B"),
    "--workers": ("", "nonsense", "0", "-1", "1.5", "9" * 30, "9" * DIGITS, "5000", "many"),
    "--device": ("", "nonsense", "meta", "cuda:99", "CPU", "cuda:x", "mps", "xla", "a\0b", "a\udc80b", "privateuseone",
        "mkldnn", "fpga", "cpu,cuda"),
    "--evaluate": ("", "nonsense", "subject:missing", "nowhere:score", "subject:", ":score", "subject:fails",
        "subject:text", "subject:number", "subject:nothing", "a b:c", "a\0b:c"),
}  # fmt: skip
MODELS = (
    "", "subject", "subject:", ":build", "nowhere:build", "subject:missing", "subject:fails", "subject:nothing",
    "subject:needs", "subject:number",
    "subject:instance", "subject:Net", "subject:kind", "subject:empty", "subject:state", "subject:quantized",
    "subject:scripted", "subject:halves",
    "subject:doubles", "subject:on_meta", "subject:sparse", "subject:complexes", "subject:broken", "subject:endless",
    "a\0b:c", "a\udc80b:c", "a b:c",
    "subject:build:build", "sub.ject:build", ".:build", "..subject:build", "subject.build", "os:getcwd",
    "subject:build()", "broken_module:build",
)  # fmt: skip
