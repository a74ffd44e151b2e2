"""Measure what the papers claim: what the networks cost, and what makes a network fast.

    python tools/papers.py complexity            every variant, counted, beside published figures
    python tools/papers.py guidelines [--quick]  the four experiments behind v2, on this machine

Prints Markdown tables; docs/papers.md discusses them. "v1" and "v2" are the papers of model.py.
"""

import itertools
import sys
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import get_model_weights, list_models

from model import VARIANTS, InvertedResidual
from shufflenet.common.messages import progress, say
from shufflenet.common.options import DEVICE, PLOTS, Parser, Words, check_file, run_script
from shufflenet.inference.plots import BLUE, ORANGE, save_figure
from shufflenet.inference.pytorch import choose_device

conv = partial(nn.Conv2d, kernel_size=1)  # with a bias, as if batch norm were folded into it


def build_parser() -> Parser:
    parser = Parser(description="Measure what the papers claim.")
    kinds = parser.add_subparsers(dest="what", required=True)
    kinds.add_parser("complexity", description="Count every variant.")
    add = kinds.add_parser("guidelines", description="Time the experiments behind v2.").add_argument
    add("--quick", action="store_true", help="3 rounds instead of 15")
    add("--plot", metavar="FILE", help="draw the relative speeds as bars")
    add("--device", **DEVICE)
    return parser


def main(args: Words = None) -> dict:
    """Print tables; returns what `complexity` or `compare` does."""
    args = build_parser().parse_args(args)
    if args.what == "complexity":
        return complexity()
    if args.plot:
        check_file("--plot", args.plot, PLOTS)
    device = choose_device(args.device)
    from benchmark import describe_machine  # imports all of requirements-deploy.txt

    machine = torch.cuda.get_device_name(device) + ", " if device.type == "cuda" else ""
    machine += describe_machine()
    say(machine)
    results = compare(measure(device, 3 if args.quick else 15), device.type != "cpu")
    if args.plot:
        save_figure(draw(results, machine.partition(",")[0]), args.plot)
    return results


def say_table(rows: list[dict]) -> None:
    """Print rows, whose keys are the head, as a Markdown table."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
    shown = [[f"{x:.2f}" if isinstance(x, float) else str(x) for x in line] for line in lines]
    say("\n".join(["", *(f"| {' | '.join(line)} |" for line in shown)]))


# -- What the networks cost ------------------------------------------------------------------------

# Millions of multiply-adds. v2: table 5. v1: table 1 for x1.0, table 2 for the narrower ones (one
# figure for all groups), table 5 for the wider ones.
PAPER = {"v2_x0_5": 41, "v2_x1_0": 146, "v2_x1_5": 299, "v2_x2_0": 591}
PAPER |= {"v1_x1_5_g3": 292, "v1_x2_0_g3": 524}
for number, figure in {1: 143, 2: 140, 3: 137, 4: 133, 8: 137}.items():
    PAPER |= {f"v1_x1_0_g{number}": figure, f"v1_x0_5_g{number}": 38, f"v1_x0_25_g{number}": 13}

NOTES = """
Stages: multiply-adds, M; memory access, M; output.
v1 x1.0: the paper leaves fc out; it includes it for x1.5 and x2.0.
v1 x0.25, x0.5: the paper has one figure for all groups, but channels have to divide by them.
v2: the paper's figures belong to its authors' split of the first unit of stage 2. In x0.5 both
splits are the same and come to 40.5; why the paper says 41 is unknown."""


def count(network: nn.Module, *shape: int) -> dict[str, tuple[float, float, str]]:
    """Millions of multiply-adds and of memory accesses, and the output's shape: of every stage (a
    child that has convolutions, or `fc`), and under "" of the network, which is on the meta device:
    that computes shapes only. `shape` is that of the input without the batch.

    v2 defines memory access (section 2, G1 and G2) as the elements that a convolution or `fc` reads
    and writes, and its weights; of a 1x1 convolution these are hw(c1 + c2) + c1 c2 / g.
    """
    accesses, outputs = Counter(), {}

    def record(name: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        for stage in (name.partition(".")[0], ""):
            outputs[stage] = "x".join(map(str, output.shape[1:]))
            if isinstance(module, nn.Conv2d | nn.Linear):
                accesses[stage] += inputs[0].numel() + output.numel() + module.weight.numel()

    for name, module in network.named_modules():
        module.register_forward_hook(partial(record, name))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.empty(1, *shape, device="meta"))
    flops, costs = counter.get_flop_counts(), {}
    for stage, accessed in accesses.items():
        # Torch counts a multiply-add, which the papers call a FLOP, as two.
        total = sum(flops[f"{type(network).__name__}.{stage}".rstrip(".")].values())
        costs[stage] = total / 2e6, accessed / 1e6, outputs[stage]
    return costs


def authors_unit(input_c: int, output_c: int, stride: int) -> InvertedResidual:
    """The unit of v2 in its authors' code: at stride 2 the first branch keeps its channels."""
    unit = InvertedResidual(input_c, output_c, stride)
    if stride == 2:
        unit.branch1 = InvertedResidual(input_c, 2 * input_c, 2).branch1
        unit.branch2[5] = conv(output_c // 2, output_c - input_c, bias=False)
        unit.branch2[6] = nn.BatchNorm2d(output_c - input_c)
    return unit


def complexity() -> dict[str, dict]:
    """Count every variant at 224 pixels; prints and returns {network: {column: figure}}."""
    networks, rows, theirs = dict(VARIANTS), {}, list_models(include="shufflenet_v2*")
    for name in theirs:
        authors = partial(VARIANTS[name], inverted_residual=authors_unit)
        networks[f"{name}, authors' split"] = authors
    for name, variant in networks.items():
        with torch.device("meta"):
            network = variant()
        costs = count(network, 3, 224, 224)
        published = get_model_weights(name).IMAGENET1K_V1.meta if name in theirs else {}
        rows[name] = {
            "": name,
            "multiply-adds, M": costs[""][0],
            "without fc": costs[""][0] - costs["fc"][0],
            "paper, M": PAPER.get(name.removeprefix("shufflenet_"), ""),
            "torchvision, G": str(published.get("_ops", "")),
            "parameters": sum(p.numel() for p in network.parameters()),
            "torchvision": published.get("num_params", ""),
            "memory access, M": costs[""][1],
        }
        for stage in ("conv1", "stage2", "stage3", "stage4", "conv5", "fc"):
            cost = costs.get(stage)  # v1 has no conv5
            rows[name][stage] = "{:.2f}; {:.2f}; {}".format(*cost) if cost else ""
    say_table(list(rows.values()))
    say(NOTES)
    say(f"1x1 convolutions in a ResNeXt unit: {resnext_share():.2%} (v1, section 3.1: 93.4 %)")
    return rows


def resnext_share() -> float:
    """The share of the 1x1 convolutions in the multiply-adds of a ResNeXt unit of 32 groups (v1,
    section 3.1); any with a bottleneck of half the channels gives the same."""
    with torch.device("meta"):
        middle = nn.Conv2d(128, 128, 3, padding=1, groups=32)
        costs = count(nn.Sequential(conv(256, 128), middle, conv(128, 256)), 256, 56, 56)
    return 1 - costs["1"][0] / costs[""][0]


# -- What makes a network fast ---------------------------------------------------------------------


class Parallel(nn.Sequential):
    """Layers side by side, their outputs added."""

    def forward(self, x: Tensor) -> Tensor:
        first, *others = (layer(x) for layer in self)
        return sum(others, first)


class Residual(nn.Sequential):
    """Layers one after the other, and the input added."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def fragments(number: int, join: type[nn.Sequential], c: int) -> nn.Module:
    """Convolutions that together cost as much as one of c channels."""
    c = round(c / number**0.5)
    return join(*(conv(c, c) for _ in range(number)))


def bottleneck(relu: bool, join: type[nn.Sequential], c: int) -> nn.Module:
    """ResNet's unit, a quarter as wide inside, with or without its element-wise operations."""
    relus = [nn.ReLU(inplace=True)] if relu else []
    convs = conv(c, c // 4), nn.Conv2d(c // 4, c // 4, 3, padding=1), conv(c // 4, c)
    return nn.Sequential(join(convs[0], *relus, convs[1], *relus, convs[2]), *relus)


# v2, tables 1 to 4: the block, then per row its options, its channels at x1 on GPU and on ARM, the
# batches per second of the GPU at x1, x2 and x4, the images per second of ARM. The first row obeys
# the guideline. Our choices, which the text leaves open: parallel fragments are added, a bottleneck
# is a quarter, no batch norm. ARM's 184 is printed as 180, which does not divide by 8 groups: the
# authors say 184 (megvii-model/ShuffleNet-Series#35).
SERIES = nn.Sequential
# fmt: off
TABLES = {
    "G1: equal widths (in:out)": (lambda c1, c2: SERIES(conv(c1, c2), conv(c2, c1)), {
        "1:1": ((), (128, 128), (32, 32), (1480, 723, 232), (76.2, 21.7, 5.3)),
        "1:2": ((), (90, 180), (22, 44), (1296, 586, 206), (72.9, 20.5, 5.1)),
        "1:6": ((), (52, 312), (13, 78), (876, 489, 189), (69.1, 17.9, 4.6)),
        "1:12": ((), (36, 432), (9, 108), (748, 392, 163), (57.6, 15.1, 4.4)),
    }),
    "G2: few groups": (lambda groups, c: conv(c, c, groups=groups), {
        "1": ((1,), (128,), (64,), (2451, 1289, 437), (40.0, 10.2, 2.3)),
        "2": ((2,), (180,), (90,), (1725, 873, 341), (35.0, 9.5, 2.2)),
        "4": ((4,), (256,), (128,), (1026, 644, 338), (32.9, 8.7, 2.1)),
        "8": ((8,), (360,), (184,), (634, 445, 230), (27.8, 7.5, 1.8)),
    }),
    "G3: few fragments": (fragments, {
        "1": ((1, SERIES), (128,), (64,), (2446, 1274, 434), (40.2, 10.1, 2.3)),
        "2 in series": ((2, SERIES), (128,), (64,), (1790, 909, 336), (38.6, 10.1, 2.2)),
        "4 in series": ((4, SERIES), (128,), (64,), (752, 745, 349), (38.4, 10.1, 2.3)),
        "2 parallel": ((2, Parallel), (128,), (64,), (1537, 803, 320), (33.4, 9.1, 2.2)),
        "4 parallel": ((4, Parallel), (128,), (64,), (691, 572, 292), (35.0, 8.4, 2.1)),
    }),
    "G4: few element-wise operations": (bottleneck, {
        "none": ((False, SERIES), (32,), (32,), (2842, 2376, 1782), (66.3, 20.2, 5.4)),
        "ReLU": ((True, SERIES), (32,), (32,), (2647, 2256, 1735), (61.9, 18.8, 5.2)),
        "shortcut": ((False, Residual), (32,), (32,), (2672, 2121, 1458), (57.3, 18.2, 5.1)),
        "both": ((True, Residual), (32,), (32,), (2427, 2066, 1436), (56.7, 16.9, 5.0)),
    }),
}
# fmt: on


def build(table: str, row: str, gpu: bool, scale: int = 1) -> tuple[nn.Module, list[int]]:
    """A network of ten blocks, and the channels in it, those of the input first."""
    block, rows = TABLES[table]
    options, gpu_channels, arm_channels, *_ = rows[row]
    channels = [scale * c for c in (gpu_channels if gpu else arm_channels)]
    network = nn.Sequential(*(block(*options, *channels) for _ in range(10)))
    convs = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d)]
    return network, list(dict.fromkeys(layer.in_channels for layer in convs))


def measure(device: torch.device, rounds: int, scales=(1, 2, 4), seconds=0.1) -> dict:
    """Images of 56x56 pixels per second, {(table, row): (rounds, scales)}.

    Channels, batch and threads are the paper's: 8 images on a GPU, else one image on one thread.
    The rows of a table take turns, so that a busy machine slows them alike. All networks are there
    from the start, since building one between turns moves what is allocated, and speeds jump.
    """
    from torch.utils.benchmark import Timer  # its import says so if there is no GPU

    torch.backends.cudnn.benchmark = True  # as in the paper
    gpu, batch = device.type != "cpu", 1 if device.type == "cpu" else 8
    timers, speeds = {}, defaultdict(list)
    with torch.inference_mode(), device:
        for table, (_, rows) in TABLES.items():
            for scale, row in itertools.product(scales, rows):
                network, channels = build(table, row, gpu, scale)
                names = {"network": network, "x": torch.randn(batch, channels[0], 56, 56)}
                network(names["x"])  # lets cuDNN choose
                timers[table, scale, row] = Timer("network(x)", globals=names, num_threads=1)
        for table, scale, row in progress([*timers] * rounds, "guidelines"):
            # Warms up, and waits for the GPU.
            run = timers[table, scale, row].blocked_autorange(min_run_time=seconds)
            speeds[table, row].append(batch / run.median)
    return {key: np.reshape(values, (rounds, -1)) for key, values in speeds.items()}


def relative(speeds: np.ndarray, first: np.ndarray) -> np.ndarray:
    """How many times as fast: the geometric mean over the scales."""
    return np.exp(np.log(np.divide(speeds, first)).mean(-1))


def compare(speeds: dict, gpu: bool) -> dict[str, dict[str, dict]]:
    """Put what `measure` found beside the paper's speeds, all relative to the first row; prints and
    returns {table: {row: {column: figure}}}, and says which guidelines hold."""
    results = {}
    for table, (_, rows) in TABLES.items():
        lines, first = results.setdefault(table, {}), next(iter(rows))
        for row, (*_, gpu_speeds, arm_speeds) in rows.items():
            with torch.device("meta"):
                network, channels = build(table, row, gpu)
            multiply_adds, memory, _ = count(network, channels[0], 56, 56)[""]
            medians = np.median(speeds[table, row], axis=0)
            turns = relative(speeds[table, row], speeds[table, first])
            lines[row] = {
                table: row,
                "channels, x1": "-".join(map(str, channels)),
                "multiply-adds, M": multiply_adds,
                "memory access, M": memory,
                "images/s, x1, x2, x4": ", ".join(f"{speed:.4g}" for speed in medians),
                "here": np.median(turns),
                "range": f"{min(turns):.2f} to {max(turns):.2f}",
                "paper, GPU": relative(gpu_speeds, rows[first][3]),
                "paper, ARM": relative(arm_speeds, rows[first][4]),
            }
        say_table(list(lines.values()))
        # A few per cent are no answer: multiply-adds differ by as much, since channels are whole.
        slower = [row for row, line in lines.items() if line["here"] < 0.95]
        holds = "holds" if len(slower) == len(rows) - 1 else "holds in part" if slower else "fails"
        say(f"\n{table}: {holds} here; slower than the first: {', '.join(slower) or 'none'}.")
    return results


def draw(results: dict[str, dict[str, dict]], machine: str) -> Figure:
    """A panel per guideline, of what `compare` returns."""
    figure = Figure(figsize=(10, 6.5), dpi=90, layout="constrained")
    panels = figure.subplots(2, 2, sharey=True)
    for axes, (table, lines) in zip(panels.flat, results.items(), strict=True):
        colours = {"here": BLUE, "paper, GPU": ORANGE, "paper, ARM": "0.7"}
        for i, (label, colour) in enumerate(colours.items()):
            places = np.arange(len(lines)) + 0.28 * (i - 1)
            heights = [line[label] for line in lines.values()]
            bars = axes.bar(places, heights, 0.26, label=label, color=colour)
            axes.bar_label(bars, fmt="%.2f", fontsize=7 if len(lines) < 5 else 6)
        axes.set_xticks(range(len(lines)), lines)
        axes.set(title=table, ylabel="relative speed")
        axes.margins(y=0.1)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.suptitle(f"Speed at equal multiply-adds, relative to the first; here: {machine}")
    return figure


if __name__ == "__main__":
    run_script(main)
