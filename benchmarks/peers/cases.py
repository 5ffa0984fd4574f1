"""What is measured: the tools with their packages, and the rows in the order of worth."""

from dataclasses import dataclass

FIELDS = ("network", "bits", "tool", "method", "seed")
Key = tuple[str, str, str, str, int]  # network, bits, tool, method, seed

RESNET, MOBILENET, LITE = "resnet20_cifar10", "mobilenet_v1_0.25_224_imagenet", "efficientnet_lite0_imagenet"


@dataclass(frozen=True)
class Setting:
    """Images of one network: so many to calibrate with, so many to test on."""

    calibration: int
    test: int


SETTINGS = {RESNET: Setting(1024, 1000), MOBILENET: Setting(256, 1300), LITE: Setting(256, 300)}

# What pip installs for each tool. torchvision that works beside a CPU build of torch is not at hand everywhere, so the tools
# that import it get the build that pairs with it; both run on the CPU here.
_COMMON = ("numpy", "pillow", "safetensors")
_TORCH, _TORCHVISION = ("torch==2.13.0",), ("torch==2.14.1", "torchvision==0.29.1")
PACKAGES = {
    "brevitas": (*_TORCH, "brevitas==0.13.4", "accelerate", "tqdm", *_COMMON),
    "aimet": (*_TORCHVISION, "aimet-torch==2.42.0", *_COMMON),
    "mct": (*_TORCHVISION, "model-compression-toolkit==2.6.1", *_COMMON),
    "nncf": (*_TORCH, "nncf==3.4.0", "torchao==0.18.0", *_COMMON),
    "torchao": (*_TORCH, "torchao==0.18.0", *_COMMON),
}
TOOLS = ("calque", *PACKAGES)

# One method of each tool that takes a minute or two, then what is quicker or slower.
MAIN = (
    ("calque", "fast"), ("brevitas", "gptq"), ("aimet", "seqmse"), ("mct", "ptq"), ("torchao", "histogram"),
)  # fmt: skip
EFFORTS = (
    ("calque", "nearest"), ("calque", "sequential"), ("calque", "accurate"), ("aimet", "nearest"),
    ("mct", "gptq-5-mse"), ("brevitas", "learned-round-1000"), ("brevitas", "qronos"), ("aimet", "adaround-1000"),
    ("brevitas", "nearest"),
)  # fmt: skip
LONG = (("aimet", "adaround-10000"), ("mct", "gptq-5"))  # the first at its published number of iterations
ROUNDING = ("brevitas", "learned-round-1000")  # the best of the peers on resnet20
QUICK = tuple(method for method in EFFORTS if method[1] in ("nearest", "accurate"))
EIGHT_BITS = (
    ("calque", "nearest"), ("calque", "fast"), ("nncf", "ptq"), ("brevitas", "nearest"), ("aimet", "nearest"),
    ("mct", "ptq"), ("torchao", "histogram"),
)  # fmt: skip
# mixed: bits of each layer's weights chosen, in no more bytes than the bits named take everywhere.
MIXED = (
    ("mct", "mixed"), ("calque", "mixed-fast"), ("calque", "mixed-light"), ("mct", "ptq"), ("calque", "fast"),
    ("brevitas", "gptq"),
)  # fmt: skip


def cases() -> list[Key]:
    """Every row, the most telling first."""
    found: list[Key] = [(network, "w4a4", *method, 0) for network in (RESNET, MOBILENET) for method in MAIN]
    found += [(RESNET, "w4a4", *method, 0) for method in EFFORTS]
    found += [
        (RESNET, bits, *method, 0) for bits, methods in (("w8a8", EIGHT_BITS), ("w2a4", MAIN)) for method in methods
    ]
    found += [(RESNET, "w3a4", *method, 0) for method in MIXED]
    found += [(MOBILENET, "w4a4", *method, 0) for method in EFFORTS]
    found += [(LITE, "w4a4", *method, 0) for method in MAIN]
    found += [(MOBILENET, "w4a8", *method, 0) for method in (*MAIN, *QUICK, ROUNDING)]
    found += [(RESNET, "w2a4", *method, 0) for method in EFFORTS]
    for seed in (1, 2):
        found += [(RESNET, bits, *method, seed) for bits in ("w4a4", "w2a4") for method in (*MAIN, ROUNDING)]
        found += [(MOBILENET, bits, *method, seed) for bits in ("w4a4", "w4a8") for method in MAIN]
    found += [(LITE, "w4a8", *method, 0) for method in MAIN] + [(LITE, "w4a4", *method, 0) for method in QUICK]
    return found + [(RESNET, "w4a4", *method, 0) for method in LONG]
