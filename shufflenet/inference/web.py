"""A page that classifies images in the browser, beside an exported network: export.py --web."""

from pathlib import Path

from shufflenet.common import options
from shufflenet.common.files import replacing
from shufflenet.common.messages import UsageError

HERE = Path(__file__).parent
MARK = b'<meta name="generator" content="export.py --web">'  # of page.html
VERSION = "1.30.0"
ADDRESS = f"https://cdn.jsdelivr.net/npm/onnxruntime-web@{VERSION}/dist/"
# Of npm's onnxruntime-web: what the page imports, for the CPU and for WebGPU, and what that loads.
RUNTIME = (
    "ort.wasm.bundle.min.mjs",
    "ort-wasm-simd-threaded.wasm",
    "ort.webgpu.bundle.min.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
)


def find_runtime(folder: str) -> list[Path]:
    """The runtime's files in npm's package onnxruntime-web, or in its dist; UsageError unless all
    are there."""
    places = [Path(folder, "dist", name) for name in RUNTIME]
    if not places[0].is_file():
        places = [Path(folder, name) for name in RUNTIME]
    missing = [place.name for place in places if not place.is_file()]
    if missing:
        todo = f"run npm install onnxruntime-web@{VERSION} and name node_modules/onnxruntime-web"
        raise UsageError(f"--runtime-dir {folder}: no {missing[0]} in it: {todo}")
    return places


def make_folder(path: str) -> Path:
    """Make the folder for the page, before any work; UsageError if another page is in it."""
    index = Path(path, "index.html")
    if index.is_file() and MARK not in index.read_bytes():
        raise UsageError(f"--web {path}: its index.html is of another page; name another folder")
    return options.make_folder(path, "", "--web")


def write_page(folder: Path, runtime: list[Path]) -> None:
    """Write the page, what prepares images, and the `runtime` (if empty: the page loads it from its
    public address) to the folder of model.onnx and model.json."""
    copies = [HERE / "preprocess.mjs", *runtime]
    contents = {place.name: place.read_bytes() for place in copies}
    page = (HERE / "page.html").read_text(encoding="utf-8")
    page = page.replace("RUNTIME_ADDRESS", "./" if runtime else ADDRESS)
    page = page.replace("RUNTIME_SOURCE", "" if runtime else ADDRESS)
    for name, content in (contents | {"index.html": page.encode()}).items():
        with replacing(folder / name) as file:
            file.write(content)
