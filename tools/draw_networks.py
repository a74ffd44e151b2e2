"""Draw the pictures of docs/networks.md from the modules of model.py.

    python tools/draw_networks.py    writes channel_shuffle.png, units.png and networks.png in docs/

Names, kernels, strides, groups and shapes come from a trace of a forward pass, multiply-adds from
the counter of tools/papers.py: a picture cannot say what the network does not do. The words are
those that Chinese texts use, too.
"""

import operator
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from papers import count  # first: it makes the repository importable
from torch import Tensor, nn
from torch.fx import Node, symbolic_trace
from torch.fx.passes.shape_prop import ShapeProp

from model import build_model, channel_shuffle
from shufflenet.inference.plots import BLUE, save_figure

ROOT = Path(__file__).resolve().parents[1]
GROUPS, CARDS = 3, 12
LEFT, MIDDLE, RIGHT = -1, 0, 1
WIDE, HIGH, STEP = 14.2, 6.2, 8.5  # of a box, and from its top to that of the next
OUTLINE = {"fill": False, "edgecolor": "0.25"}
# By what a box computes; they differ in lightness, too.
FILL = {"1x1": "#BBD9EC", "depthwise": "#E9A66B", "shuffle": "#777777"}
GROUP_FILL = [(BLUE, "white"), ("#F0B27A", "black"), ("#F4F4F4", "black")]  # (cell, its number)


# -- What the network does -------------------------------------------------------------------------


class Box(NamedTuple):
    """An operation of a unit, with the batch norm and the ReLU after it."""

    lines: list[str]
    shape: str  # of its output
    sources: list[int]  # the boxes that it reads


class Stage(NamedTuple):
    units: int
    shape: list[int]  # of its output, without the batch
    cost: float  # millions of multiply-adds


def trace_unit(unit: nn.Module, *shape: int) -> list[Box]:
    """The boxes of a unit in the order in which they run; `shape` is its input's, without the
    batch. The first box is the input."""
    graph = symbolic_trace(unit)
    ShapeProp(graph).propagate(torch.empty(1, *shape, device="meta"))
    modules, boxes, place = dict(graph.named_modules()), [], {}  # place: the box of a node
    for node in graph.graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        sources = [place[each] for each in node.all_input_nodes]
        if isinstance(module, nn.BatchNorm2d | nn.ReLU):
            boxes[sources[0]].lines.append("BN" if isinstance(module, nn.BatchNorm2d) else "ReLU")
        elif not (
            node.op == "output" or node.target is operator.getitem or type(module) is nn.Identity
        ):
            boxes.append(Box([describe(node, module)], shape_of(node), sources))
            sources = [len(boxes) - 1]
        place[node] = sources[0]
    return boxes


def describe(node: Node, module: nn.Module | None) -> str:
    if isinstance(module, nn.Conv2d):
        kernel, groups = module.kernel_size[0], module.groups
        depthwise = groups == module.in_channels
        text = f"{kernel}x{kernel} {'depthwise' if depthwise else 'conv'}"
        text += f", g={groups}" if groups > 1 and not depthwise else ""
        return text + (f", /{module.stride[0]}" if module.stride[0] > 1 else "")
    if isinstance(module, nn.AvgPool2d):
        return f"{module.kernel_size}x{module.kernel_size} avg pool, /{module.stride}"
    if node.target is channel_shuffle:
        return f"shuffle, g={node.args[1]}"
    names = {"chunk": "split", operator.add: "add", torch.cat: "concat"}
    return "input" if node.op == "placeholder" else names[node.target]


def shape_of(node: Node) -> str:
    """CxHxW of what a node returns; a split returns several."""
    outputs = node.meta["tensor_meta"]
    outputs = [outputs] if hasattr(outputs, "shape") else outputs
    channels = " | ".join(str(output.shape[1]) for output in outputs)
    return "x".join([channels, *map(str, outputs[0].shape[2:])])


def list_stages(name: str) -> dict[str, Stage]:
    """The input and the children of a network, by name, in the order in which they run."""
    with torch.device("meta"):
        network = build_model(name)
    shapes = {"input": [3, 224, 224]}

    def record(stage: str, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        shapes[stage] = list(output.shape[1:])

    for stage, child in network.named_children():
        child.register_forward_hook(partial(record, stage))
    costs, stages = count(network, *shapes["input"]), {}
    for stage, shape in shapes.items():
        units = len(getattr(network, stage)) if stage.startswith("stage") else 1
        stages[stage] = Stage(units, shape, costs[stage][0] if stage in costs else 0)
    return stages


def reached(shuffled: bool) -> Tensor:
    """(outputs, inputs): whether an output of two grouped 1x1 convolutions depends on an input,
    with or without a shuffle between them."""
    x = torch.eye(CARDS).reshape(CARDS, CARDS, 1, 1)  # in image i only channel i is not 0
    weight = torch.ones(CARDS, CARDS // GROUPS, 1, 1)  # so that nothing cancels
    x = nn.functional.conv2d(x, weight, groups=GROUPS)
    x = channel_shuffle(x, GROUPS) if shuffled else x
    return nn.functional.conv2d(x, weight, groups=GROUPS).flatten(1).T > 0


# -- How it is drawn -------------------------------------------------------------------------------


def draw_shuffle() -> Figure:
    """Where the channels go, and which outputs depend on which inputs."""
    figure = Figure(figsize=(10, 3.6), dpi=140)
    axes = blank(figure, (0.01, 0.02, 0.56, 0.96), 13, 6)
    order = channel_shuffle(torch.arange(CARDS).reshape(1, CARDS, 1, 1), GROUPS).flatten().tolist()
    size = CARDS // GROUPS
    xs = [place + 0.6 + 0.4 * (place // size) for place in range(CARDS)]  # a gap between groups
    for y, row in ((4.2, range(CARDS)), (0.8, order)):
        for x, card in zip(xs, row, strict=True):
            fill, ink = GROUP_FILL[card // size]
            axes.add_patch(Rectangle((x - 0.42, y), 0.84, 0.9, facecolor=fill, edgecolor="black"))
            axes.text(x, y + 0.42, card, ha="center", va="center", color=ink, fontsize=12)
        for group in range(GROUPS):
            corner, label = (xs[group * size] - 0.52, y - 0.1), f"group {group + 1}"
            axes.add_patch(Rectangle(corner, size + 0.04, 1.1, fill=False, linestyle="--"))
            above = 5.45 if y > 2 else 0.2
            axes.text(corner[0] + size / 2, above, label, ha="center", fontsize=11)
    for x, card in zip(xs, order, strict=True):
        colour = (BLUE, "#C87830", "0.6")[card // size]
        arrow = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.5}
        axes.annotate("", (x, 1.85), (xs[card], 4.15), arrowprops=arrow)
    for i, shuffled in enumerate((False, True)):
        axes = figure.add_axes((0.635 + 0.19 * i, 0.2, 0.17, 0.48))
        shades = {"cmap": "Greys", "vmin": 0, "vmax": 1.25, "edgecolors": "0.8", "linewidth": 0.5}
        axes.pcolormesh(reached(shuffled), **shades)
        axes.invert_yaxis()
        axes.set(xticks=[], yticks=[])
        axes.set_xlabel("input channel", fontsize=11)
        axes.set_ylabel("output channel" if i == 0 else "", fontsize=11)
        conv = f"1x1 conv, g={GROUPS}"
        axes.set_title("\n".join([conv, *["shuffle"] * shuffled, conv]), fontsize=11)
    return figure


def draw_units(units: dict[str, tuple[list[Box], float]]) -> Figure:
    """Units side by side: by title, the boxes and the millions of multiply-adds."""
    axes = blank(figure := Figure(figsize=(10, 6.3), dpi=140), (0, 0, 1, 1), 100, 65)
    left = 0.5
    for title, (boxes, cost) in units.items():
        lanes = lay_out(boxes)
        # Where nothing is computed on the left a line suffices.
        first = WIDE if LEFT in lanes else 2
        xs = {LEFT: left + first / 2, RIGHT: left + first + 1 + WIDE / 2}
        xs[MIDDLE] = (xs[LEFT] + xs[RIGHT]) / 2 if LEFT in lanes else xs[RIGHT]
        draw_boxes(axes, boxes, lanes, xs)
        axes.text(xs[MIDDLE], 62.5, title, ha="center", fontsize=13, weight="bold")
        axes.text(xs[MIDDLE], 1, f"{cost:.2f} M multiply-adds", ha="center", fontsize=11)
        left += first + WIDE + 2.2
    return figure


def blank(figure: Figure, place: tuple[float, ...], width: float, height: float) -> Axes:
    axes = figure.add_axes(place, xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return axes


def lay_out(boxes: list[Box]) -> list[int]:
    """The lane of each box: LEFT and RIGHT for what leads to the first and to the second input of
    an operation that has two, MIDDLE for what all paths share."""
    users = Counter(source for box in boxes for source in box.sources)
    lanes = [MIDDLE] * len(boxes)
    for box in boxes:
        if len(box.sources) == 2:
            for lane, source in zip((LEFT, RIGHT), box.sources, strict=True):
                while users[source] == 1:
                    lanes[source] = lane
                    (source,) = boxes[source].sources
    return lanes


def draw_boxes(axes: Axes, boxes: list[Box], lanes: list[int], xs: dict[int, float]) -> None:
    users = Counter(source for box in boxes for source in box.sources)
    tops = []
    for box, lane in zip(boxes, lanes, strict=True):
        x, top = xs[lane], min((tops[source] - STEP for source in box.sources), default=61)
        for side, source in zip((LEFT, RIGHT), box.sources, strict=False):
            # From a box with two readers to one with two sources a line takes the free lane.
            passes = len(box.sources) == users[source] == 2
            via = xs[side if passes else lanes[source]] if len(box.sources) == 2 else x
            start, bend = tops[source] - HIGH, (STEP - HIGH) / 2
            across = [xs[lanes[source]]] * 2 + [via] * 2 + [x] * 2
            down = [start, start - bend, start - bend, top + bend, top + bend, top]
            axes.plot(across, down, color="0.25", linewidth=1.2, zorder=1)
            axes.plot(x, top + 0.35, "v", color="0.25", markersize=5)
        tops.append(top)
        kind = next((kind for kind in FILL if kind in box.lines[0]), "")
        corner, fill = (x - WIDE / 2, top - HIGH), FILL.get(kind, "white")
        hatch = "//" if "conv, g=" in box.lines[0] else None
        for style in ({"facecolor": fill, "hatch": hatch, "edgecolor": "white"}, OUTLINE):
            axes.add_patch(Rectangle(corner, WIDE, HIGH, zorder=2, **style))
        lines = [box.lines[0], ", ".join(box.lines[1:]), box.shape]
        text, ink = "\n".join(filter(None, lines)), "white" if kind == "shuffle" else "black"
        axes.text(x, top - HIGH / 2, text, ha="center", va="center", fontsize=10, color=ink)


def draw_networks(networks: dict[str, dict[str, Stage]]) -> Figure:
    """A strip per network. A block is as high as the output's side and as wide as its channels, to
    the root; under it stand the multiply-adds."""
    figure = Figure(figsize=(10, 5.8), dpi=140)
    for row, (title, stages) in enumerate(networks.items()):
        axes = blank(figure, (0, 0.5 - 0.5 * row, 1, 0.5), 100, 32)
        total = sum(stage.cost for stage in stages.values())
        title = f"{title}: {total:.1f} M multiply-adds"
        axes.text(1, 29.5, title, fontsize=13, weight="bold")
        for i, (name, (units, shape, cost)) in enumerate(stages.items()):
            x, (channels, *sides) = 6.25 + 12.5 * i, shape
            wide, high = 0.33 * channels**0.5, 0.8 * sides[0] ** 0.5 if sides else 0.8
            colours = {"facecolor": FILL["1x1"], "edgecolor": "0.25"}
            axes.add_patch(Rectangle((x - wide / 2, 16), wide, high, **colours))
            lines = f"{name}, {units} units" if units > 1 else name, "x".join(map(str, shape))
            axes.text(x, 15, "\n".join(lines), ha="center", va="top", fontsize=10)
            if cost:
                colours["facecolor"] = FILL["depthwise"]
                axes.add_patch(Rectangle((x - 3, 2), 6, cost / 10, **colours))
                axes.text(x, 2.4 + cost / 10, f"{cost:.1f} M", ha="center", fontsize=10)
    return figure


def main(folder: Path = ROOT / "docs") -> None:
    """Write the pictures."""
    units, networks = {}, {}
    for name in ("shufflenet_v1_x1_0_g3", "shufflenet_v2_x1_0"):
        networks[name] = stages = list_stages(name)
        with torch.device("meta"):
            first, second, *_ = build_model(name).stage3
        for stride, unit, before in ((1, second, "stage3"), (2, first, "stage2")):
            shape = stages[before].shape
            boxes = trace_unit(unit, *shape)
            units[f"{name[11:13]}, stride {stride}"] = boxes, count(unit, *shape)[""][0]
    save_figure(draw_shuffle(), folder / "channel_shuffle.png")
    save_figure(draw_units(units), folder / "units.png")
    save_figure(draw_networks(networks), folder / "networks.png")


if __name__ == "__main__":
    main()
