"""The law of the house, read off the imports, and what a user's own files beside it do."""

import ast
import os
import subprocess
import sys

import pytest
from conftest import ROOT

SCRIPTS = {"train", "eval", "predict", "export"}
FRONT = {
    "model": set(),
    "my_dataset": {"model", "utils"},
    "utils": {"model"},
}  # what each may import in front
FRONT |= {script: {"model", "my_dataset", "utils"} for script in SCRIPTS}
ROOMS = ["common", "reading", "inference", "training"]  # each may import those before it
FILES = {path.stem: path for path in ROOT.glob("*.py")}
FILES |= {
    f"shufflenet.{room}.{path.stem}": path
    for room in ROOMS
    for path in (ROOT / "shufflenet" / room).glob("[!_]*.py")
}
LAZY = {  # what may be imported inside a function: packages that are optional, torch beside .onnx
    "shufflenet.inference.runtimes": {"onnxruntime", "openvino"},
    "shufflenet.inference.onnx_file": {"onnx", "onnxruntime", "onnxscript"},
    "shufflenet.inference.quantize": {"onnx", "onnxruntime"},
    "shufflenet.inference.classifier": {"shufflenet"},
    "shufflenet.inference.plots": {"matplotlib"},
    "predict": {"shufflenet"},
    "shufflenet.reading.download": {"torch", "torchvision"},
    "shufflenet.inference.checkpoint": {"torchvision"},
    "shufflenet.common.files": {"fcntl", "msvcrt"},  # of one system each
}


def imports(path):
    """(file of the house or package, whether inside a function) for every import."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef)
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            deeper = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else node.module for name in deeper]
        yield from ((name, node in inside) for name in names)


@pytest.mark.parametrize("name", FILES)
def test_every_import_keeps_the_law(name):
    for imported, inside in imports(FILES[name]):
        package = imported.partition(".")[0]
        if inside:
            assert package in LAZY.get(name, ()), f"{name} imports {imported} in a function"
        if imported in FILES and "." not in imported:  # in front
            assert imported in FRONT.get(name, {"model"}), f"{name} imports {imported}"
        elif imported in FILES and name not in FRONT:
            room, other = (ROOMS.index(each.split(".")[1]) for each in (name, imported))
            assert other <= room, f"{name} imports {imported}"
        if name.startswith(("shufflenet.common", "shufflenet.reading")):
            assert inside or package not in ("torch", "torchvision"), f"{name} imports {imported}"


def test_no_file_imports_itself_in_a_circle():
    needs = {
        name: {each for each, _ in imports(path)} & FILES.keys() for name, path in FILES.items()
    }
    while ready := [name for name, others in needs.items() if not others & needs.keys()]:
        for name in ready:
            del needs[name]
    assert not needs, f"a circle: {needs}"


def test_the_users_own_model_is_named_where_it_hides_ours(run_dir, onnx_file, flowers, tmp_path):
    (tmp_path / "model.py").write_text("raise SystemExit('never imported')")
    (tmp_path / "utils.py").touch()
    image = flowers / "roses" / "roses_000.jpg"
    code = "import sys; from shufflenet import Classifier; Classifier(sys.argv[1])(sys.argv[2])"

    def classify(weights):
        words = [sys.executable, "-c", code, weights, image]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        return subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert classify(onnx_file).returncode == 0  # which needs no model.py
    result = classify(run_dir / "best.pth")
    said = f"`import model` finds {tmp_path}/model.py, not {ROOT}/model.py: rename yours, or "
    assert said in result.stderr.splitlines()[-1]
    (tmp_path / "model.py").unlink()
    assert classify(run_dir / "best.pth").returncode == 0
