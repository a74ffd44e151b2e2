"""The page of export.py --web, in a real browser: it answers as predict.py does."""

import json
import shutil
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import onnx
import pytest
from conftest import ROOT, noise
from PIL import ExifTags, Image, ImageCms
from playwright.sync_api import sync_playwright

import export
import predict
from shufflenet.inference import web

PACKAGE = ROOT / ".cache" / "node" / "node_modules" / "onnxruntime-web"
PHOTOS = ROOT.parent / "shared" / "data" / "flower_photos"
CHROMIUM = shutil.which("chromium")
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"]

NO_IMAGE = "no image that this browser reads, or too large; use JPEG or PNG"
HARDWARE = "Object.defineProperty(GPUAdapterInfo.prototype, 'isFallbackAdapter', { value: false })"


@pytest.fixture(scope="module")
def launch():
    """Start Chromium of the system, with a camera that films a test picture."""
    if not CHROMIUM:
        pytest.skip("needs chromium: apt-get install chromium")
    with sync_playwright() as playwright:

        def start(*more):
            words = ["--no-sandbox", "--disable-background-networking", *CAMERA, *more]
            return playwright.chromium.launch(executable_path=CHROMIUM, args=words)

        yield start


@pytest.fixture(scope="module")
def browser(launch):
    with launch() as browser:
        yield browser


@pytest.fixture(scope="module")
def folder(run_dir, tmp_path_factory):
    """What export.py --web writes, with the runtime's files, among a file that is not its own."""
    about = PACKAGE / "package.json"
    if not about.exists() or json.loads(about.read_text())["version"] != web.VERSION:
        pytest.skip(f"needs npm install --prefix .cache/node onnxruntime-web@{web.VERSION}")
    path = tmp_path_factory.mktemp("web")
    (path / "CNAME").write_text("example.org")
    words = ["--weights", run_dir / "best.pth", "--web", path, "--runtime-dir", PACKAGE]
    assert export.main(words)["output"] == str(path / "model.onnx")
    ours = {"index.html", "preprocess.mjs", "model.onnx", "model.json", *web.RUNTIME}
    assert {each.name for each in path.iterdir()} == {"CNAME", *ours}
    return path


@pytest.fixture
def serve():
    """Start a server of a folder, as python -m http.server does: its address."""
    servers = []

    def start(folder):
        handler = partial(SimpleHTTPRequestHandler, directory=folder)
        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), handler))
        threading.Thread(target=servers[-1].serve_forever).start()
        return f"http://localhost:{servers[-1].server_address[1]}/"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def open_page(browser, address, **options):
    page = browser.new_page(**options)
    page.goto(address)
    page.locator("#where", has_text="Web").wait_for()
    return page


def drop(page, paths):
    """Drop files on the page, as a hand does; returns name, text and classes of the cards."""
    session, count = page.context.new_cdp_session(page), page.locator(".card").count()
    files = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for kind in ("dragEnter", "dragOver", "drop"):
        event = {"type": kind, "x": 100, "y": 100, "data": files}
        session.send("Input.dispatchDragEvent", event)
    cards = page.locator(".card")
    for number in range(count, count + len(paths)):
        cards.nth(number).locator("p:not(:empty)").wait_for()
    read = """cards => cards.slice(0, %d).map(card => [
        card.querySelector("h2").textContent, card.querySelector("p").textContent,
        Object.fromEntries([...card.querySelectorAll("ol li")].map(row => [
            row.querySelector("span").textContent, Number(row.querySelector("data").value)]))])"""
    return cards.evaluate_all(read % len(paths))


def compare(page, paths, weights):
    expected = predict.main([*map(str, paths), "--weights", weights, "--topk", 5])
    for path, (name, text, classes), theirs in zip(paths, drop(page, paths), expected, strict=True):
        probs = {guess["class"]: guess["prob"] for guess in theirs["predictions"]}
        assert (name, text.split()[1]) == (path.name, "ms,")
        assert classes == pytest.approx(probs, abs=1e-4), path


@pytest.fixture
def odd(tmp_path):
    """A phone's photograph, which lies on its side; transparency; a portrait; colours by a profile
    (red and green swapped)."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    noise(400, 300).save(tmp_path / "phone.jpg", exif=exif)
    clear = noise(300, 260).convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    clear.save(tmp_path / "clear.png")
    noise(301, 511).save(tmp_path / "portrait.png")
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for tag, other in [(b"rXYZ", b"    "), (b"gXYZ", b"rXYZ"), (b"    ", b"gXYZ")]:
        profile = profile.replace(tag, other, 1)
    noise(400, 300).save(tmp_path / "profile.png", icc_profile=profile)
    return sorted(tmp_path.glob("*.*g"))


def test_it_answers_as_predict_does_and_asks_nobody_else(browser, serve, folder, flowers):
    address, asked = serve(folder), set()
    page = open_page(browser, address)
    page.on("request", lambda request: asked.add(urlsplit(request.url).scheme))
    photos = sorted((PHOTOS if PHOTOS.exists() else flowers).rglob("*.jpg"))
    compare(page, photos[:: len(photos) // 10][:10], folder / "model.onnx")
    assert page.inner_text("#status") == "10 of 10 images classified."
    assert page.inner_text("#where") == "Computed by WebAssembly"
    assert not asked
    elsewhere = address.replace("localhost", "127.0.0.1") + "model.json"
    refused = page.evaluate("url => fetch(url, {mode: 'no-cors'}).catch(String)", elsewhere)
    assert refused == "TypeError: Failed to fetch"


def test_not_a_pixel_differs(browser, serve, folder, odd, tmp_path):
    """By a network in which each counts: a trained one forgives a lot."""
    path = tmp_path / "web" / "model.onnx"
    shutil.copytree(folder, path.parent)
    model = onnx.load(path)
    weights = np.random.default_rng(0).normal(0, 0.01, (3 * 224 * 224, 5)).astype(np.float32)
    flatten = onnx.helper.make_node("Flatten", ["input"], ["pixels"])
    multiply = onnx.helper.make_node("MatMul", ["pixels", "weights"], ["logits"])
    weights = onnx.numpy_helper.from_array(weights, "weights")
    ends = model.graph.input, model.graph.output
    model.graph.CopyFrom(onnx.helper.make_graph([flatten, multiply], "one", *ends, [weights]))
    onnx.save(model, path)
    compare(open_page(browser, serve(path.parent)), odd, path)


@pytest.mark.gpu
def test_on_webgpu_too(request, launch, serve, folder, odd, tmp_path):
    """By an adapter in software, which the page would leave alone; and what happens if it fails."""
    if request.config.getoption("markexpr") != "gpu":
        pytest.skip("takes long: make gpu")
    shutil.copytree(folder, tmp_path / "web")
    (tmp_path / "web" / web.RUNTIME[-1]).unlink()
    with launch(*WEBGPU) as browser:
        context = browser.new_context()
        context.add_init_script(HARDWARE)
        page = context.new_page()
        page.goto(serve(folder))
        if not page.evaluate("async () => !!await navigator.gpu?.requestAdapter()"):
            pytest.skip("this Chromium has no adapter for WebGPU")
        page.locator("#where", has_text="Computed by WebGPU").wait_for()
        compare(page, odd[:1], folder / "model.onnx")
        page.goto(serve(tmp_path / "web"))
        page.locator("#where", has_text="Computed by WebAssembly").wait_for()


def test_what_is_no_image_and_names_that_look_like_html(browser, serve, folder, flowers, tmp_path):
    shutil.copytree(folder, tmp_path / "web")
    about = json.loads((folder / "model.json").read_text())
    about["classes"][:2] = ["<b>bold</b>", "<img src=x>"]
    (tmp_path / "web" / "model.json").write_text(json.dumps(about))
    (tmp_path / "<i>.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    page = open_page(browser, serve(tmp_path / "web"))
    paths = [tmp_path / "<i>.jpg", tmp_path / "empty.png", flowers / "roses" / "roses_000.jpg"]
    *wrong, (_, _, classes) = drop(page, paths)
    for path, card in zip(paths, wrong, strict=False):
        assert card == [path.name, NO_IMAGE, {}]
    assert page.inner_text("#status") == "1 of 3 images classified."
    assert set(classes) == set(about["classes"])
    assert page.locator("main b, main i, main img").count() == 0


def test_by_keyboard_in_chinese_on_a_phone_with_its_camera(browser, serve, folder):
    size = {"width": 320, "height": 640}
    page = open_page(browser, serve(folder), viewport=size, locale="zh-CN", color_scheme="dark")
    assert page.get_attribute("html", "lang") == "zh-Hans"
    page.keyboard.press("Tab")
    page.locator("#files:focus-visible").wait_for()
    page.keyboard.press("Tab")
    page.locator("button:focus-visible", has_text="拍照").wait_for()
    page.keyboard.press("Enter")
    page.locator("dialog[open]").wait_for()
    while not page.evaluate("document.getElementById('video').videoWidth"):
        page.wait_for_timeout(50)
    page.keyboard.press("Enter")  # on the first button
    page.locator(".card p", has_text="毫秒").wait_for()
    page.locator("#camera:focus").wait_for()  # where it was before
    states = "document.getElementById('video').srcObject.getTracks().map(each => each.readyState)"
    assert page.evaluate(states) == ["ended"]
    assert page.evaluate("document.documentElement.scrollWidth") == size["width"]


def test_without_files_of_the_runtime_it_names_where_they_come_from(
    browser, serve, folder, tmp_path
):
    for name in ("model.json", "model.onnx"):
        shutil.copy(folder / name, tmp_path)
    web.write_page(tmp_path, [])
    assert web.make_folder(tmp_path) == tmp_path  # takes it for its own
    page = browser.new_page()
    headers = {"access-control-allow-origin": "*"}  # as that address sends

    def answer(route):
        name = Path(urlsplit(route.request.url).path).name
        route.fulfill(path=PACKAGE / "dist" / name, headers=headers)

    page.route(f"{web.ADDRESS}*", answer)  # tests ask no one outside
    page.goto(serve(tmp_path))
    where = page.locator("#where", has_text="Computed by WebAssembly")
    assert where.inner_text().endswith(f", loaded from {web.ADDRESS}")
    assert f"onnxruntime-web@{web.VERSION}" in (ROOT / "docs" / "deploy.md").read_text()


def test_what_cannot_be_loaded_is_said(browser, serve, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "web")
    (tmp_path / "web" / "model.onnx").unlink()
    for address, said in [
        (serve(tmp_path / "web"), "The model cannot be loaded (model.onnx: 404): reload the page."),
        ((folder / "index.html").as_uri(), "run python -m http.server here"),
    ]:
        page = browser.new_page()
        page.goto(address)
        page.locator("#status.wrong", has_text=said).wait_for()
